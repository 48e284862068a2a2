"""Files whose names are timm's or an older torchvision's: renamed where all of them fit, or not.

timm's names and shapes were taken from timm 1.0.31. Its logits, with random weights and statistics,
were compared with torchvision's after renaming, for one network a family: equal to the bit, or to
3e-7 where a convolution became a linear layer, once BatchNorm's epsilon was the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
torchvision = pytest.importorskip("torchvision")

import jinv  # noqa: E402
from test_weights_convert import template_of  # noqa: E402
from weights_convert import (  # noqa: E402
    WeightsError,
    from_flax,
    match,
    naming,
    read,
    renames,
    to_flax,
    write,
)

# torchvision's name of a network: timm's, and the start of the sha256 of its sorted lines
# f"{name} {list(shape)}".
TIMM = {
    "densenet121": ("densenet121", "d9126905"),
    "densenet201": ("densenet201", "b7acdeee"),
    "vgg11": ("vgg11", "9d2fe000"),
    "vgg19_bn": ("vgg19_bn", "f88dbe56"),
    "convnext_tiny": ("convnext_tiny", "6a2556c6"),
    "convnext_small": ("convnext_small", "e1f54aa6"),
    "convnext_large": ("convnext_large", "b82e92b7"),
    "efficientnet_b0": ("efficientnet_b0", "0fbc1673"),
    "efficientnet_b1": ("efficientnet_b1", "ccde4bc1"),
    "efficientnet_b7": ("efficientnet_b7", "e82f3d3e"),
    "efficientnet_v2_s": ("efficientnetv2_s", "94b49e52"),
    "efficientnet_v2_l": ("efficientnetv2_l", "4bf1e69e"),
    "mobilenet_v2": ("mobilenetv2_100", "5add8b2f"),
    "mobilenet_v3_large": ("mobilenetv3_large_100", "05df56b1"),
    "mobilenet_v3_small": ("mobilenetv3_small_100", "dad02d8b"),
    "mnasnet0_5": ("mnasnet_050", "c52a22e4"),
    "mnasnet0_75": ("mnasnet_075", "1cb93529"),
    "mnasnet1_0": ("mnasnet_100", "513cef61"),
    "regnet_x_400mf": ("regnetx_004_tv", "2247e3c3"),
    "regnet_y_800mf": ("regnety_008_tv", "259a212c"),
    "resnet18": ("resnet18", "867b8d8a"),
    "resnext50_32x4d": ("resnext50_32x4d", "d244da45"),
    "wide_resnet50_2": ("wide_resnet50_2", "4facef4f"),
}

# What is of the same shape as its neighbours, and thus not told by the digest alone.
EXAMPLES = {
    "densenet121": {
        "features.denseblock2.denselayer11.norm2.running_mean": (
            "features.denseblock2.denselayer11.norm.2.running_mean"
        ),
        "features.denseblock1.denselayer1.conv1.weight": (
            "features.denseblock1.denselayer1.conv.1.weight"
        ),
        "features.transition1.norm.weight": "features.transition1.norm.weight",
    },
    "convnext_tiny": {
        "features.0.1.bias": "stem.1.bias",
        "features.1.2.block.2.weight": "stages.0.blocks.2.norm.weight",
        "features.1.2.block.5.bias": "stages.0.blocks.2.mlp.fc2.bias",
        "features.1.2.layer_scale": "stages.0.blocks.2.gamma",
        "features.2.0.weight": "stages.1.downsample.0.weight",
        "classifier.0.bias": "head.norm.bias",
    },
    "efficientnet_b0": {
        "features.1.0.block.0.1.weight": "blocks.0.0.bn1.weight",
        "features.1.0.block.2.0.weight": "blocks.0.0.conv_pw.weight",
        "features.3.1.block.0.1.running_var": "blocks.2.1.bn1.running_var",
        "features.3.1.block.1.1.running_var": "blocks.2.1.bn2.running_var",
        "features.3.1.block.2.fc2.bias": "blocks.2.1.se.conv_expand.bias",
        "features.8.1.bias": "bn2.bias",
    },
    "efficientnet_v2_s": {
        "features.1.1.block.0.0.weight": "blocks.0.1.conv.weight",
        "features.2.1.block.1.0.weight": "blocks.1.1.conv_pwl.weight",
        "features.4.0.block.0.1.bias": "blocks.3.0.bn1.bias",
    },
    "mobilenet_v2": {
        "features.1.conv.2.bias": "blocks.0.0.bn2.bias",
        "features.6.conv.0.1.weight": "blocks.2.2.bn1.weight",
        "features.6.conv.1.1.weight": "blocks.2.2.bn2.weight",
        "features.17.conv.3.weight": "blocks.6.0.bn3.weight",
    },
    "mobilenet_v3_small": {
        "features.1.block.1.fc1.weight": "blocks.0.0.se.conv_reduce.weight",
        "features.11.block.1.1.bias": "blocks.4.2.bn2.bias",
        "features.12.1.bias": "blocks.5.0.bn1.bias",
        "classifier.0.bias": "conv_head.bias",
        "classifier.3.bias": "classifier.bias",
    },
    "mnasnet1_0": {
        "layers.4.weight": "blocks.0.0.bn1.weight",
        "layers.9.2.layers.1.bias": "blocks.2.2.bn1.bias",
        "layers.9.2.layers.4.bias": "blocks.2.2.bn2.bias",
        "layers.15.bias": "bn2.bias",
    },
    "regnet_y_400mf": {
        "stem.1.bias": "stem.bn.bias",
        "trunk_output.block3.block3-1.f.a.1.bias": "s3.b2.conv1.bn.bias",
        "trunk_output.block3.block3-1.f.b.1.bias": "s3.b2.conv2.bn.bias",
        "trunk_output.block3.block3-1.f.se.fc2.bias": "s3.b2.se.fc2.bias",
        "trunk_output.block3.block3-0.proj.1.bias": "s3.b1.downsample.bn.bias",
    },
}


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    """torchvision's, in the order of its state_dict."""
    # RegNet computes its widths with tensors.
    with contextlib.nullcontext() if "regnet" in name else torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None)
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def others(name: str) -> dict[str, str]:
    """The other names of a network, by its own; DataParallel gives them to many."""
    found = dict(renames.namings(shapes(name)))
    found.pop("DataParallel's", None)
    assert len(found) < 2
    return next(iter(found.values()), {})


def shape_at_timm(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if name == "pre_logits.fc1.weight":
        return (4096, 512, 7, 7)
    if name in ("pre_logits.fc2.weight", "conv_head.weight") and len(shape) == 2:
        return (*shape, 1, 1)
    return shape[:1] if name.endswith(".gamma") else shape


@pytest.mark.parametrize("name", TIMM)
def test_the_names_are_timms(name: str) -> None:
    # timm's DenseNets have today's names, as their published files have the old ones.
    names = {} if name.startswith("densenet") else others(name)
    told = {names.get(own, own): shape for own, shape in shapes(name).items()}
    lines = sorted(f"{n} {list(shape_at_timm(n, shape))}" for n, shape in told.items())
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:8] == TIMM[name][1]


@pytest.mark.parametrize("name", EXAMPLES)
def test_layers_of_one_shape_are_told_apart(name: str) -> None:
    names = others(name)
    assert {own: names[own] for own in EXAMPLES[name]} == EXAMPLES[name]


# --- files -------------------------------------------------------------------------------------


def small(name: str) -> tuple[dict[Any, Any], dict[str, np.ndarray]]:
    """A template with a network's names and dimensions of 2 at most, and its own state."""
    rng = np.random.default_rng(0)
    state: dict[str, np.ndarray] = {}
    for key, shape in shapes(name).items():
        state[key] = rng.uniform(1, 2, [min(n, 2) for n in shape]).astype(np.float32)
        if key.endswith("num_batches_tracked"):
            state[key] = np.array(7)
    return template_of(
        {key: types.SimpleNamespace(shape=v.shape) for key, v in state.items()}
    ), state


def foreign(state: dict[str, np.ndarray], names: dict[str, str]) -> dict[str, np.ndarray]:
    """The state under other names, where some layers have other axes."""
    return {
        names[key]: value.reshape(shape_at_timm(names[key], value.shape))
        for key, value in state.items()
    }


def assert_equal(tree: dict, state: dict[str, np.ndarray]) -> None:
    back = from_flax(tree)
    assert back.keys() == state.keys()
    for name, value in state.items():
        assert np.array_equal(back[name], value), name


NETWORKS = [
    "densenet121",
    "convnext_tiny",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "mnasnet0_5",
    "regnet_y_400mf",
]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("prefix", ["", "module.", "model."])
def test_a_file_with_other_names_is_read(name: str, prefix: str) -> None:
    template, state = small(name)
    names = others(name)
    given = {prefix + n: value for n, value in foreign(state, names).items()}
    given |= {"n_averaged": np.array(3)}
    assert_equal(to_flax(given, template), state)
    assert match(given, template).keys() == state.keys()
    whose = "an older torchvision's" if name == "densenet121" else "timm's"
    assert naming(given, template) == whose
    assert naming(state, template) is None
    without = {n: v for n, v in given.items() if not n.endswith("num_batches_tracked")}
    counted = {n: v * 0 if n.endswith("num_batches_tracked") else v for n, v in state.items()}
    assert_equal(to_flax(without, template), counted)


def test_a_convolution_over_the_whole_map_is_a_linear_layer() -> None:
    """As timm holds VGG's first two."""
    rng = np.random.default_rng(0)
    own = {
        "features.0.weight": rng.normal(size=(3, 3, 3, 3)),
        "classifier.0.weight": rng.normal(size=(5, 3 * 2 * 4)),
        "classifier.3.weight": rng.normal(size=(4, 5)),
        "classifier.6.weight": rng.normal(size=(2, 4)),
    }
    own = {name: value.astype(np.float32) for name, value in own.items()}
    given = {
        "features.0.weight": own["features.0.weight"],
        "pre_logits.fc1.weight": own["classifier.0.weight"].reshape(5, 3, 2, 4),
        "pre_logits.fc2.weight": own["classifier.3.weight"].reshape(4, 5, 1, 1),
        "head.fc.weight": own["classifier.6.weight"],
    }
    template = template_of(own)
    assert_equal(to_flax(given, template), own)
    # The layer is torch's own, on a map of channels, rows and columns.
    image = torch.randn(1, 3, 2, 4)
    wanted = torch.nn.functional.conv2d(image, torch.from_numpy(given["pre_logits.fc1.weight"]))
    got = image.flatten(1).numpy() @ to_flax(given, template)["classifier"][0]["weight"]
    np.testing.assert_allclose(got[0], wanted.numpy()[0, :, 0, 0], rtol=1e-5)
    given["pre_logits.fc1.weight"] = np.ones((3, 5, 2, 4), np.float32)  # of another order
    with pytest.raises(WeightsError, match=r"classifier\.0\.weight: file \(3, 5, 2, 4\), network"):
        to_flax(given, template)


def test_features_that_were_trained_in_data_parallel_are_read(tmp_path: Path) -> None:
    model = torch.nn.Module()
    model.features = torch.nn.DataParallel(torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3)))
    model.classifier = torch.nn.Sequential(torch.nn.Linear(2, 3))
    torch.save({"state_dict": model.state_dict(), "arch": "alexnet"}, tmp_path / "w.pth")
    state = {
        name.replace("features.module.", "features."): value
        for name, value in model.state_dict().items()
    }
    given, template = read(tmp_path / "w.pth"), template_of(state)
    assert naming(given, template) == "DataParallel's"
    assert_equal(to_flax(given, template), {name: v.numpy() for name, v in state.items()})


# --- what is refused ---------------------------------------------------------------------------


def _lose(state: dict[str, np.ndarray]) -> None:
    del state["blocks.2.1.bn2.weight"]


def _rename_one(state: dict[str, np.ndarray]) -> None:
    state["features.3.1.block.1.1.weight"] = state.pop("blocks.2.1.bn2.weight")


def _add(state: dict[str, np.ndarray]) -> None:
    state["blocks.9.0.conv_pw.weight"] = np.ones((2, 2, 1, 1), np.float32)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_lose, "not one name is the network's"),
        (_rename_one, "check that the file is of this network"),
        (_add, r"1 unexpected; .*\n1 unexpected.*\n  blocks\.9\.0\.conv_pw\.weight$"),
    ],
)
def test_a_file_with_some_of_the_names_is_not(
    spoil: Callable[[dict[str, np.ndarray]], None], words: str
) -> None:
    template, state = small("efficientnet_b0")
    given = foreign(state, others("efficientnet_b0"))
    spoil(given)
    with pytest.raises(WeightsError, match=words):
        to_flax(given, template)


def test_own_names_beside_other_ones_are_not_mixed() -> None:
    template, state = small("densenet121")
    old = foreign(state, others("densenet121"))
    with pytest.raises(WeightsError, match=r"unexpected(?s:.*)denselayer1\.conv\.1\.weight"):
        to_flax({**state, **old}, template)
    mixed = dict(old)
    first = "features.denseblock1.denselayer1.norm1.weight"
    mixed[first] = mixed.pop(others("densenet121")[first])
    with pytest.raises(WeightsError, match="missing"):
        to_flax(mixed, template)


def test_a_file_of_another_network_is_told_with_other_names_too(tmp_path: Path) -> None:
    """And a head of other classes."""
    state = from_flax(
        jax.tree.map(lambda v: np.ones(v.shape, v.dtype), jinv.models.template("mobilenet_v2", 7))
    )
    state["features.0.0.weight"][:] = np.arange(27).reshape(3, 3, 3)
    names = others("mobilenet_v2")
    path = tmp_path / "w.safetensors"
    write(path, {names[name]: value for name, value in state.items()})
    net = jinv.models.load("mobilenet_v2", path, classes=7)
    assert_equal(net.variables, state)
    with pytest.raises(WeightsError, match="classes: 7 fits") as caught:
        jinv.models.load("mobilenet_v2", path)
    assert caught.value.classes == 7
    with pytest.raises(WeightsError, match="it is of mobilenet_v2 with classes: 7"):
        jinv.models.load("resnet18", path)

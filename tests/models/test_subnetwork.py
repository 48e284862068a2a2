"""Subnetworks of random networks against an independent construction in torch, and their files."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import weights_convert
from jinv import models, training
from jinv.image import Preprocessing
from jinv.models import registry, resnet_cifar
from jinv.models.layers import Conv2d, LayerNorm, Linear
from jinv.models.network import Network
from jinv.models.subnetwork import (
    Subnetwork,
    check_kept,
    draw,
    effective,
    mask,
    trainable,
    with_scores,
)
from jinv.net import Net, parameters
from jinv.recipes import convert, invert, pretrain
from jinv.runs import command_line
from recipe_examples import arrays
from tiny import network
from weights_convert import WeightsError, subnetworks

torch = pytest.importorskip("torch")

from torch_subnetwork import Chosen, ResNet  # noqa: E402

KEPT = 0.3
SPACE = Preprocessing(size=8, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))


@pytest.fixture(scope="module", autouse=True)
def small() -> Any:
    """A network of the zoo that compiles in a second."""
    build = functools.partial(resnet_cifar.ResNet, (1, 1), widths=(16, 24))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry._REGISTRY, "small", registry.Entry(build, SPACE, 10))
        yield


@pytest.fixture(scope="module")
def peer() -> Any:
    """The network in torch, with statistics of a few batches."""
    torch.manual_seed(0)
    model = ResNet(KEPT)
    with torch.no_grad():
        for _ in range(30):
            model(torch.randn(16, 3, 8, 8) + torch.rand(16, 1, 1, 1))
    return model.eval()


def public(model: Any) -> dict[str, Any]:
    """A checkpoint as the public code writes it from DataParallel."""
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    optimizer = {"state": {}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    return {
        "epoch": 3,
        "arch": "ResNet",
        "state_dict": state,
        "best_acc1": torch.tensor(60.0),
        "optimizer": optimizer,
        "curr_acc1": "Not evaluated",
    }


def saved(path: Path, checkpoint: dict[str, Any]) -> Path:
    torch.save(checkpoint, path)
    return path


def converted(*arguments: Any) -> int:
    return convert.main([str(argument) for argument in arguments])


def read(model: Any) -> tuple[Net, dict[str, Any]]:
    """The architecture, and the variables of torch's network with scores."""
    net = models.load("small", None)
    tree = with_scores(net.variables)
    state = {name: value.numpy(force=True).copy() for name, value in model.state_dict().items()}
    variables = weights_convert.to_flax(subnetworks.completed(state, tree), tree)
    return net, jax.tree.map(jnp.asarray, variables)


# --- the mathematics ---------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0.3, 0.5, 0.7, 1.0, 1e-3])
@pytest.mark.parametrize("shape", [(8, 5, 3, 3), (7, 9), (1, 1, 1, 1)])
def test_the_mask_is_that_of_torchs_stable_sort(kept: float, shape: tuple[int, ...]) -> None:
    """Of coarse scores, many of which are equal."""
    scores = np.round(np.random.default_rng(0).normal(0, 2, shape)).astype(np.float32)
    wanted = Chosen.apply(torch.tensor(np.abs(scores)), kept).numpy()
    axes = (2, 3, 1, 0) if len(shape) == 4 else (1, 0)
    found = mask(jnp.asarray(scores.transpose(axes)), kept)
    np.testing.assert_array_equal(found, wanted.transpose(axes))
    assert wanted.sum() == scores.size - int((1 - kept) * scores.size)


def test_forward_in_both_modes_equals_torch(peer: Any) -> None:
    net, variables = read(peer)
    scored = trainable(net, variables, KEPT)
    images = np.random.default_rng(1).normal(size=(5, 8, 8, 3)).astype(np.float32)
    seen = torch.tensor(images.transpose(0, 3, 1, 2))
    with torch.no_grad():
        np.testing.assert_allclose(scored(images).logits, peer(seen), atol=1e-5)
        trains = ResNet(KEPT)
        trains.load_state_dict(peer.state_dict())
        wanted = trains.train()(seen)
    assert scored.train_apply is not None
    found = jax.jit(scored.train_apply)(scored.variables, images)
    np.testing.assert_allclose(found.logits, wanted, atol=1e-5)


def test_score_training_equals_torch(peer: Any) -> None:
    """Two steps of SGD with momentum, decay and label smoothing; the weights stay as they were."""
    net, variables = read(peer)
    scored = trainable(net, variables, KEPT)
    config = training.Config(
        batch=8, lr=0.5, lr_floor=1.0, warmup=0, nesterov=False, label_smoothing=0.1
    )
    rng = np.random.default_rng(2)
    batches = [
        (rng.integers(0, 256, (8, 8, 8, 3), np.uint8), np.arange(8) % 10),
        (rng.integers(0, 256, (8, 8, 8, 3), np.uint8), np.arange(8) // 2),
    ]
    optimizer = training.make_optimizer(config, 10)
    step = jax.jit(training.make_step(scored, config, optimizer))
    state = training.init(scored, optimizer)

    model = ResNet(KEPT)
    model.load_state_dict(peer.state_dict())
    model.train()
    scores = [p for p in model.parameters() if p.requires_grad]
    assert len(scores) == 7
    sgd = torch.optim.SGD(scores, lr=0.5, momentum=0.9, weight_decay=5e-4)
    criterion = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    for images, labels in batches:
        state, info = step(jax.random.key(0), state, (images, labels))
        pixels = (images / 255 - np.array(SPACE.mean)) / np.array(SPACE.std)
        loss = criterion(
            model(torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32)),
            torch.tensor(labels),
        )
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        np.testing.assert_allclose(info.loss, loss.item(), rtol=1e-5)
    found = weights_convert.from_flax(state.variables)
    wanted = {name: value.numpy(force=True) for name, value in model.state_dict().items()}
    before = peer.state_dict()
    for name, value in wanted.items():
        np.testing.assert_allclose(
            found[name].reshape(value.shape), value, rtol=1e-5, atol=1e-5, err_msg=name
        )
        if name.endswith("scores"):
            assert np.abs(value - before[name].numpy(force=True)).max() > 1e-3
        elif name.endswith("weight"):
            np.testing.assert_array_equal(found[name].reshape(value.shape), before[name])
    assert (found["bn1.weight"] == 1).all()
    assert (found["linear.bias"] == 0).all()


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("weights", ["signed_constant", "kaiming_normal"])
def test_what_is_drawn(weights: Any, scaled: bool) -> None:
    """Also of networks with biases, groups, or names of Flax."""
    config = Subnetwork(0.4, weights, scaled)
    for net in (models.load("small", None), models.load("lenet", None), network()):
        variables = draw(net, config, jax.random.key(0))
        assert parameters(trainable(net, variables, 0.4)).keys() <= variables.keys()
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
            name, values = path[-1].key, np.asarray(leaf)
            inputs = math.prod(values.shape[:-1])
            std = math.sqrt(2 / (inputs * (0.4 if scaled else 1)))
            if name == "bias":
                assert not values.any()
            elif name == "scores":
                assert 0.9 < np.abs(values).max() * math.sqrt(inputs) <= 1
                assert abs(values.mean()) * math.sqrt(inputs) < 0.15
            elif name in ("weight", "kernel") and values.ndim > 1:
                if weights == "signed_constant":
                    np.testing.assert_allclose(np.abs(values), std, rtol=1e-6)
                    assert abs(np.sign(values).mean()) < 0.25
                else:
                    assert abs(values.std() / std - 1) < 0.25
            elif name in ("running_mean", "mean"):
                assert not values.any()
            elif name in ("running_var", "var", "scale", "weight"):
                assert (values == 1).all()


class Grouped(nnx.Module):
    """A convolution in groups, with a bias and a norm that is no BatchNorm."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = Conv2d(4, 8, 3, groups=2, bias=True, rngs=rngs)
        self.norm = LayerNorm(8)
        self.head = Linear(8, 3, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.head(self.norm(self.conv(x)).mean((1, 2)))


def test_groups_and_layers_without_masks() -> None:
    """A unit's inputs are those of its group; only convolutions and linear layers have scores."""
    space = Preprocessing(size=8, mean=(0.5,) * 4, std=(0.2,) * 4)
    net = Net.from_nnx(Grouped(nnx.Rngs(0)), space)
    variables = draw(net, Subnetwork(0.5), jax.random.key(0))
    np.testing.assert_allclose(np.abs(variables["conv"]["weight"]), math.sqrt(2 / 18), rtol=1e-6)
    scored = trainable(net, variables, 0.5)
    learned = parameters(scored)
    assert {layer: list(inner) for layer, inner in learned.items()} == {
        "conv": ["scores"],
        "head": ["scores"],
    }
    found = effective(variables, 0.5)
    assert jax.tree.structure(found) == jax.tree.structure(net.variables)
    assert (found["conv"]["weight"] != 0).mean() == 0.5
    images = np.random.default_rng(0).normal(size=(2, 8, 8, 4)).astype(np.float32)
    inner = dataclasses.replace(net, variables=found)
    np.testing.assert_allclose(scored(images).logits, inner(images).logits, atol=1e-6)


# --- files -------------------------------------------------------------------------------------


def test_a_public_checkpoint_converts_exactly_and_back(
    peer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = saved(tmp_path / "popup.pth.tar", public(peer))
    images = np.random.default_rng(3).normal(size=(4, 8, 8, 3)).astype(np.float32)
    with torch.no_grad():
        wanted = peer(torch.tensor(images.transpose(0, 3, 1, 2)))
    net = models.load("small", source, subnetwork=Subnetwork(KEPT))
    np.testing.assert_allclose(net(images).logits, wanted, atol=1e-5)

    asked = ("--input", source, "--model", "small", "--kept", KEPT)
    plain, back = tmp_path / "plain.safetensors", tmp_path / "back.pth"
    assert converted(*asked, "--output", plain) == 0
    assert "running means correlate 0.9" in capsys.readouterr().out
    ordinary = models.load("small", plain)
    np.testing.assert_array_equal(ordinary(images).logits, net(images).logits)
    assert converted(*asked, "--output", back, "--format", "hidden-networks") == 0
    told = json.loads((tmp_path / "back.pth.summary.json").read_text())
    assert (told["kept"], told["format"]) == (KEPT, "hidden-networks")

    found = torch.load(back, weights_only=True)
    assert list(found) == ["state_dict"]
    before = public(peer)["state_dict"]
    assert found["state_dict"].keys() == before.keys()
    for name, value in before.items():
        assert found["state_dict"][name].dtype == value.dtype
        assert torch.equal(found["state_dict"][name], value), name
    assert converted(*asked, "--output", tmp_path / "out", "--format", "hidden-networks") == 0
    assert (tmp_path / "out" / "popup.pth").is_file()


def test_the_published_resnet50_has_267_entries() -> None:
    torchvision = pytest.importorskip("torchvision")
    template = with_scores(models.template("resnet50"))
    shapes = weights_convert.shapes(template)
    zeros = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    ones = {n: v + 1 for n, v in zeros.items() if v.ndim == 1 and n.endswith("weight")}
    found = {n: v.shape for n, v in subnetworks.to_public(zeros | ones).items()}
    wanted = {}
    for name, module in torchvision.models.resnet50().named_modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            shape = tuple(module.weight.shape)
            shape += (1, 1) if len(shape) == 2 else ()
            wanted |= {f"module.{name}.{last}": shape for last in ("weight", "scores")}
        elif isinstance(module, torch.nn.BatchNorm2d):
            wanted |= {f"module.{name}.{n}": tuple(b.shape) for n, b in module.named_buffers()}
    assert found == wanted
    assert len(found) == 267
    assert found["module.fc.scores"] == (1000, 2048, 1, 1)


def _renamed(state: dict[str, Any]) -> None:
    state["module.layer1.0.convolution1.weight"] = state.pop("module.layer1.0.conv1.weight")


def _without_scores(state: dict[str, Any]) -> None:
    del state["module.layer2.0.conv2.scores"]


def _more(state: dict[str, Any]) -> None:
    state["module.layer3.0.conv1.scores"] = torch.zeros(3, 3, 1, 1)


def _one_scale(state: dict[str, Any]) -> None:
    state["module.bn1.weight"] = torch.ones(16)


def _misshaped(state: dict[str, Any]) -> None:
    state["module.conv1.scores"] = torch.zeros(16, 3, 5, 5)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (_renamed, ["1 missing", "1 unexpected", "layer1.0.convolution1.weight"]),
        (_without_scores, ["1 missing", "layer2.0.conv2.scores"]),
        (_more, ["1 unexpected", "layer3.0.conv1.scores"]),
        (_one_scale, ["missing", "bn1.bias"]),
        (_misshaped, ["1 misshaped", "conv1.scores: file (16, 3, 5, 5), network (16, 3, 3, 3)"]),
    ],
)
def test_a_key_that_does_not_match_is_an_error(
    peer: Any, tmp_path: Path, change: Any, names: list[str]
) -> None:
    checkpoint = public(peer)
    change(checkpoint["state_dict"])
    source = saved(tmp_path / "popup.pth", checkpoint)
    with pytest.raises(WeightsError) as told:
        models.load("small", source, subnetwork=Subnetwork(KEPT))
    assert all(name in str(told.value) for name in names)


def test_the_share_is_asked_for(
    peer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = saved(tmp_path / "popup.pth", public(peer)), tmp_path / "out.pth"
    with pytest.raises(WeightsError, match=r"it is a subnetwork's: say which share .*kept: K"):
        models.load("small", source)
    asked = ("--input", source, "--output", output)
    assert converted(*asked) == 2
    assert "give its --model, too" in capsys.readouterr().err
    assert converted(*asked, "--model", "small") == 2
    told = capsys.readouterr().err
    assert "give --kept K, the share of the weights that stays" in told
    assert "the share that is removed in FixedSubnetConv" in told
    assert not output.exists()
    plain = tmp_path / "plain.pth"
    weights_convert.write(plain, weights_convert.from_flax(models.load("lenet", None).variables))
    for flags in (("--kept", 0.3), ("--format", "hidden-networks")):
        arguments = ("--input", plain, "--model", "lenet", "--output", output)
        assert converted(*arguments, *flags) == 2
        assert "has no scores" in capsys.readouterr().err


def test_the_share_given_the_wrong_way_round_is_noticed(peer: Any, tmp_path: Path) -> None:
    """By what the mask of this density leaves, and of a fixed mask by the density itself."""
    source = saved(tmp_path / "popup.pth", public(peer))
    with pytest.raises(WeightsError, match=r"0.7 is the share that it removes.*at kept 0.3"):
        models.load("small", source, subnetwork=Subnetwork(0.7))
    with pytest.raises(WeightsError, match=r"speak against kept 0.5: .*at kept 0.3"):
        models.load("small", source, subnetwork=Subnetwork(0.5))
    models.load("small", source, subnetwork=Subnetwork(0.7), compare_kept=False)

    net, variables = read(peer)
    assert check_kept(net, variables, 0.32).startswith("running means correlate 0.9")

    def binary(tree: Any) -> Any:
        return {
            key: binary(value)
            if isinstance(value, dict)
            else mask(value, KEPT)
            if key == "scores"
            else value
            for key, value in tree.items()
        }

    fixed = binary(variables)
    assert check_kept(net, fixed, 0.3) == "the fixed mask keeps 0.3 of the weights"
    with pytest.raises(WeightsError, match=r"keeps 0.3 of the weights, not 0.7 \(0.7 is the"):
        check_kept(net, fixed, 0.7)
    untrained = draw(net, Subnetwork(0.3), jax.random.key(0))
    assert "nothing tells whether 0.7" in check_kept(net, untrained, 0.7)


# --- as a network like any other ---------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    tree = {
        "model": "small",
        "data": arrays(folder, 80, 8),
        "subnetwork": {"kept": 0.4},
        "training": {"epochs": 3, "batch": 16, "warmup": 2, "lr": 0.1},
    }
    (folder / "c.yaml").write_text(json.dumps(tree))
    arguments = ["--config", str(folder / "c.yaml"), "--out", str(folder / "out")]
    assert command_line.main(pretrain.COMMAND, arguments) == 0
    return folder / "out"


def test_a_trained_subnetwork_comes_back(trained: Path, tmp_path: Path) -> None:
    """Its file holds the random weights and the scores; a folder needs no `subnetwork:`."""
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["subnetwork"]["kept"] == 0.4
    state = weights_convert.read(trained / "weights.safetensors")
    assert (np.abs(state["conv1.weight"]) == np.float32(math.sqrt(2 / 27))).all()
    assert state["bn1.num_batches_tracked"] == 15
    net = models.load_trained(trained)
    np.testing.assert_array_equal(
        weights_convert.from_flax(net.variables)["conv1.weight"] != 0,
        mask(jnp.asarray(state["conv1.scores"].transpose(2, 3, 1, 0)), 0.4).transpose(3, 2, 0, 1),
    )
    test = np.load(trained.parent / "test.npz")
    pixels = np.repeat(test["images"][..., None], 3, -1) / 255
    normal = (pixels - np.array(net.preprocessing.mean)) / np.array(net.preprocessing.std)
    right = np.asarray(net(normal.astype(np.float32)).logits).argmax(-1) == test["labels"]
    assert summary["test_accuracy"] == right.mean() > 0.9
    output = tmp_path / "popup.pth"
    arguments = ("--input", trained, "--output", output, "--format", "hidden-networks")
    assert converted(*arguments) == 0
    model = ResNet(0.4, classes=2).eval()
    found = torch.load(output, weights_only=True)["state_dict"]
    model.load_state_dict({name.removeprefix("module."): v for name, v in found.items()})
    images = torch.tensor(normal.transpose(0, 3, 1, 2), dtype=torch.float32)
    np.testing.assert_allclose(
        net(normal.astype(np.float32)).logits, model(images).detach(), atol=1e-5
    )


def test_another_share_than_the_folders_is_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Network("small", str(trained), subnetwork=Subnetwork(0.4)).load()
    with pytest.raises(ValueError, match=r"holds a subnetwork that keeps 0.4: leave `subnetwork`"):
        Network("small", str(trained), subnetwork=Subnetwork(0.6)).load()
    with pytest.raises(ValueError, match="scale_by_kept: true plays no part: the file holds"):
        Network("small", str(trained), subnetwork=Subnetwork(0.4, scale_by_kept=True))
    arguments = ("--input", trained, "--output", tmp_path / "x.pth", "--kept", 0.6)
    assert converted(*arguments) == 2
    assert "was trained to keep 0.4: leave --kept out" in capsys.readouterr().err
    with pytest.raises(ValueError, match="leave `weights` out"):
        pretrain.Config("small", weights=str(trained), subnetwork=Subnetwork(0.4))


def test_statistics_can_be_reset(trained: Path) -> None:
    own = Network("small", str(trained)).load()
    reset = Network("small", str(trained), statistics="reset").load()
    assert own is not reset
    for moments in reset.running_moments():
        assert not np.asarray(moments.mean).any()
        assert (np.asarray(moments.var) == 1).all()
    assert all(np.asarray(moments.mean).any() for moments in own.running_moments())
    np.testing.assert_array_equal(
        parameters(own)["conv1"]["weight"], parameters(reset)["conv1"]["weight"]
    )
    random = Network("small", "random", subnetwork=Subnetwork(0.2, "kaiming_normal")).load()
    kept = parameters(random)["linear"]["weight"] != 0
    assert kept.mean() == pytest.approx(0.2)


def inverted(model: str, source: Path, kept: float, labels: list[int]) -> dict[str, Any]:
    """Two steps of `jinv invert` beside the file: its summary."""
    tree = {
        "networks": [{"model": model, "weights": str(source), "subnetwork": {"kept": kept}}],
        "images": 2,
        "labels": labels,
        "attack": {"warmup": 1, "phases": [{"steps": 2, "jitter": 1}]},
    }
    config, out = source.with_name("c.yaml"), source.with_name("out")
    config.write_text(json.dumps(tree))
    assert command_line.main(invert.COMMAND, ["--config", str(config), "--out", str(out)]) == 0
    return json.loads((out / "summary.json").read_text())


def test_it_is_inverted_as_any_other(peer: Any, tmp_path: Path) -> None:
    source = saved(tmp_path / "popup.pth", public(peer))
    assert inverted("small", source, KEPT, [1, 4])["steps"] == 2


@pytest.mark.slow
def test_a_resnet50_of_full_size_is_inverted(tmp_path: Path) -> None:
    """Two steps at 224 px from a made checkpoint in the public format."""
    source = tmp_path / "resnet50.pth"
    rng = np.random.default_rng(0)
    shapes = weights_convert.shapes(with_scores(models.template("resnet50")))
    values = {
        "running_mean": lambda shape: np.zeros(shape, np.float32),
        "running_var": lambda shape: np.ones(shape, np.float32),
        "num_batches_tracked": lambda shape: np.zeros(shape, np.int64),
    }
    state = {}
    for name, shape in shapes.items():
        last = name.rpartition(".")[2]
        if last in values:
            state[f"module.{name}"] = torch.tensor(values[last](shape))
        elif len(shape) > 1:
            shape += (1, 1) if len(shape) == 2 else ()
            std = 1.0 if last == "scores" else math.sqrt(2 / math.prod(shape[1:]))
            state[f"module.{name}"] = torch.tensor(rng.normal(0, std, shape), dtype=torch.float32)
    assert len(state) == 267
    saved(source, {"state_dict": state, "arch": "ResNet50", "epoch": 100})
    told = inverted("resnet50", source, 0.3, [985, 417])
    assert told["steps"] == 2
    assert np.isfinite(told["loss"])

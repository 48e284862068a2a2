"""Gradients and updates as torch computes them; files; what is refused."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import tiny
import weights_convert
from jinv import models
from jinv.federated import evidence
from jinv.federated.evidence import Evidence, Local
from jinv.net import Moments, Net

LABELS = [3, 1, 3, 0]
NAMES = ("resnet18", "mobilenet_v2")


def torch_network(name: str, classes: int) -> Any:
    """torchvision's, with random running statistics, in double precision."""
    torch = pytest.importorskip("torch")
    torchvision = pytest.importorskip("torchvision")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = getattr(torchvision.models, name)(num_classes=classes)
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    return network.double()


def double(net: Net) -> Any:
    def widen(leaf: jax.Array) -> jax.Array:
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return jnp.asarray(np.asarray(leaf), jnp.float64 if floating else leaf.dtype)

    return jax.tree.map(widen, net.variables)


def ported(name: str, network: Any, classes: int) -> Net:
    state = {key: value.detach().numpy() for key, value in network.state_dict().items()}
    variables = weights_convert.to_flax(state, models.template(name, classes))
    net = models.load(name, None, classes=classes)
    return dataclasses.replace(net, variables=jax.tree.map(jnp.asarray, variables))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", NAMES)
def test_gradient_equals_torch(name: str, training: bool) -> None:
    """Of every parameter, in double precision."""
    torch = pytest.importorskip("torch")
    network = torch_network(name, 5).train(training)
    images = np.random.default_rng(0).normal(size=(4, 40, 48, 3))
    with jax.enable_x64(True):
        net = ported(name, network, 5)
        found = jax.jit(lambda v, x, y: evidence.observed(net, v, x, y, training=training))(
            double(net), jnp.asarray(images), jax.nn.one_hot(jnp.asarray(LABELS), 5)
        )
        ours = weights_convert.from_flax(jax.device_get(found))
    logits = network(torch.tensor(images.transpose(0, 3, 1, 2).copy()))
    torch.nn.functional.cross_entropy(logits, torch.tensor(LABELS)).backward()
    theirs = {key: value.grad.numpy() for key, value in network.named_parameters()}
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        scale = np.linalg.norm(value)
        assert np.linalg.norm(ours[key] - value) < 1e-6 * scale + 1e-12, key


def test_local_steps_equal_torch() -> None:
    """Three steps on batches of two, the last one in another order."""
    torch = pytest.importorskip("torch")
    network = torch_network("resnet18", 5).eval()
    images = np.random.default_rng(1).normal(size=(4, 32, 32, 3))
    local = Local(0.05, ((0, 1), (2, 3), (3, 0)))
    with jax.enable_x64(True):
        net = ported("resnet18", network, 5)
        found = jax.jit(lambda v, x, y: evidence.observed(net, v, x, y, local=local))(
            double(net), jnp.asarray(images), jax.nn.one_hot(jnp.asarray(LABELS), 5)
        )
        ours = weights_convert.from_flax(jax.device_get(found))
    before = {key: value.detach().clone() for key, value in network.named_parameters()}
    optimiser = torch.optim.SGD(network.parameters(), lr=0.05)
    for batch in local.batches:
        optimiser.zero_grad()
        chosen = torch.tensor(images.transpose(0, 3, 1, 2)[list(batch)].copy())
        targets = torch.tensor([LABELS[i] for i in batch])
        torch.nn.functional.cross_entropy(network(chosen), targets).backward()
        optimiser.step()
    for key, value in network.named_parameters():
        theirs = (value.detach() - before[key]).numpy()
        assert np.linalg.norm(ours[key] - theirs) < 1e-6 * np.linalg.norm(theirs) + 1e-12, key


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_exact_moments_are_those_the_victims_layers_saw(training: bool) -> None:
    net = tiny.network()
    images = tiny.noise((4, 16, 16, 3), seed=2)
    found, secret = evidence.simulate(net, images, LABELS, training=training, statistics="exact")
    assert found.moments is not None
    first = np.asarray(images, np.float64)
    conv = net.variables["convs"][0]
    seen = np.asarray(
        jax.lax.conv_general_dilated(
            images, conv["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        + conv["bias"]
    )
    np.testing.assert_allclose(found.moments[0].mean, seen.mean((0, 1, 2)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.moments[0].var, seen.var((0, 1, 2)), rtol=1e-4)
    np.testing.assert_array_equal(secret.images, first.astype(np.float32))
    np.testing.assert_array_equal(secret.labels, LABELS)
    apply: Any = net.train_apply if training else net.apply
    deeper = apply(net.variables, images).moments[1]
    np.testing.assert_allclose(found.moments[1].mean, deeper.mean, rtol=1e-4, atol=1e-5)
    other = (net.apply if training else net.train_apply)(net.variables, images)  # type: ignore[misc]
    assert np.abs(np.asarray(other.moments[1].mean) - found.moments[1].mean).max() > 1e-2


def test_moments_follow_from_torchs_running_statistics() -> None:
    torch = pytest.importorskip("torch")
    layer = torch.nn.BatchNorm2d(5).double().train()
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    batch = torch.randn(3, 5, 4, 4, dtype=torch.float64) * 2 + 1

    def running() -> Moments:
        return Moments(layer.running_mean.numpy().copy(), layer.running_var.numpy().copy())

    before = running()
    layer(batch)
    with jax.enable_x64(True):
        (found,) = evidence.moments_of_update([before], [running()], [3 * 4 * 4])
    np.testing.assert_allclose(found.mean, batch.mean((0, 2, 3)).numpy(), rtol=1e-10)
    expected = batch.var((0, 2, 3), correction=0).numpy()
    np.testing.assert_allclose(found.var, expected, rtol=1e-10)


# --- files ---------------------------------------------------------------------------------------


@functools.cache
def captured(**settings: Any) -> tuple[Net, Evidence]:
    net = models.load("resnet20_cifar", None)
    images = tiny.noise((4, 16, 16, 3))
    return net, evidence.simulate(net, images, LABELS, **settings)[0]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"training": True, "statistics": "exact"},
        {"local": Local(0.1, ((0, 1), (2, 3)))},
    ],
    ids=["gradient", "exact", "update"],
)
def test_evidence_survives_its_files(tmp_path: Path, settings: dict[str, Any]) -> None:
    net, saved = captured(**settings)
    evidence.save(tmp_path / "client", saved)
    found = evidence.load(tmp_path / "client", net)
    assert jax.tree.structure(found.values) == jax.tree.structure(saved.values)
    jax.tree.map(np.testing.assert_array_equal, found.values, saved.values)
    assert (found.images, found.training, found.statistics, found.local) == (
        saved.images,
        saved.training,
        saved.statistics,
        saved.local,
    )
    for ours, theirs in zip(found.moments or (), saved.moments or (), strict=True):
        np.testing.assert_array_equal(ours.mean, theirs.mean)
        np.testing.assert_array_equal(ours.var, theirs.var)


class WithoutBatchNorm(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.head = nnx.Linear(4, 7, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(jax.nn.relu(self.conv(x)).mean((1, 2)))


@pytest.mark.parametrize(
    ("statistics", "moments"), [("none", None), ("running", None), ("exact", ()), ("update", ())]
)
def test_evidence_of_a_network_without_batch_norm_survives_its_files(
    tmp_path: Path, statistics: Any, moments: tuple | None
) -> None:
    net = Net.from_nnx(WithoutBatchNorm(nnx.Rngs(0)), tiny.SPACE)
    saved, _ = evidence.simulate(net, tiny.noise((2, 8, 8, 3)), [0, 1], statistics=statistics)
    evidence.save(tmp_path / "client", saved)
    found = evidence.load(tmp_path / "client", net)
    assert (found.statistics, found.moments) == (statistics, moments)
    jax.tree.map(np.testing.assert_array_equal, found.values, saved.values)


def test_a_gradient_captured_in_torch_is_accepted(tmp_path: Path) -> None:
    """Under torch's names, in torch's layout."""
    torch = pytest.importorskip("torch")
    network = torch_network("resnet18", 5).float().eval()
    images = torch.randn(2, 3, 32, 32)
    torch.nn.functional.cross_entropy(network(images), torch.tensor([1, 4])).backward()
    state = {key: value.grad.numpy() for key, value in network.named_parameters()}
    weights_convert.write(tmp_path / "client.safetensors", state)
    (tmp_path / "client.json").write_text(json.dumps({"images": 2}))
    net = ported("resnet18", network, 5)
    found = evidence.load(tmp_path / "client", net)
    ours, _ = evidence.simulate(net, images.numpy().transpose(0, 2, 3, 1), [1, 4])
    for a, b in zip(jax.tree.leaves(found.values), jax.tree.leaves(ours.values), strict=True):
        assert np.linalg.norm(a - b) < 1e-3 * np.linalg.norm(b) + 1e-6


def change(tree: dict[str, Any], name: str, value: Callable[[Any], Any]) -> dict[str, Any]:
    state = weights_convert.from_flax(tree)
    if (new := value(state[name])) is None:
        del state[name]
    else:
        state[name] = new
    return state


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda old: None, "layer1.0.conv1.weight"),
        (lambda old: old[:-1], "layer1.0.conv1.weight"),
        (lambda old: old * np.nan, "not finite[^:]*:\n  layer1.0.conv1.weight"),
    ],
    ids=["missing", "misshaped", "nan"],
)
def test_wrong_evidence_names_the_layer(tmp_path: Path, value: Any, message: str) -> None:
    net, found = captured()
    state = change(found.values, "layer1.0.conv1.weight", value)  # type: ignore[arg-type]
    weights_convert.write(tmp_path / "client.safetensors", state)
    (tmp_path / "client.json").write_text(json.dumps({"images": 4}))
    with pytest.raises(ValueError, match=message):
        evidence.load(tmp_path / "client", net)


@pytest.mark.parametrize(
    ("circumstances", "message"),
    [
        ("{", "holds no evidence"),
        ("[]", "holds no evidence"),
        ('{"images": 0}', "at least one image"),
        ('{"images": 4, "colour": 1}', "colour"),
        ('{"images": 4, "statistics": "exact"}', "do not go together"),
        ('{"images": 4, "statistics": "all"}', "statistics must be one of none, running"),
        ('{"images": 4, "local": {"lr": 0.1, "batches": [[0, 1]]}}', "images 0 to 3, all"),
        ('{"images": 4, "local": {"lr": -1, "batches": [[0]]}}', "positive lr"),
        ("", "client.json is no JSON"),
        ("{}", "client.json lacks images"),
        ('"images"', "client.json holds no object"),
        ("[" * 100_000, "client.json is no JSON"),
        ('{"images": 4.0}', "images must be a whole number, not 4.0"),
        ('{"images": "4"}', "images must be a whole number, not '4'"),
        ('{"images": true}', "images must be a whole number, not True"),
        ('{"images": null}', "images must be a whole number, not None"),
        ('{"images": NaN}', "NaN is no number"),
        ('{"images": 4, "training": "false"}', "training is true or false, not 'false'"),
        ('{"images": 4, "training": 0}', "training is true or false, not 0"),
        ('{"images": 4, "statistics": "Exact"}', "statistics must be one of .*, not 'Exact'"),
        ('{"images": 4, "statistics": null}', "statistics must be one of .*, not nothing"),
        ('{"images": 4, "statistics": ["none"]}', "statistics must be one of"),
        ('{"images": 4, "images": 2}', "the key 'images' is there twice"),
        ('{"images": 4, "training": true, "training": true}', "key 'training' is there twice"),
        (
            '{"images": 1, "local": {"lr": 0.1, "batches": [[0]], "lr": 0.2}}',
            "the key 'lr' is there twice",
        ),
        ('{"image": 4}', "unknown key 'image'; did you mean images"),
        ('{"images": 4, "Training": true}', "unknown key 'Training'; did you mean training"),
        ('{"images": 4, "lr": 0.1}', "unknown key 'lr'; there are: "),
        ('{"images": 4, "local": 0.1}', "local holds lr and batches, it is not 0.1"),
        ('{"images": 4, "local": {"lr": 0.1}}', "local lacks batches"),
        ('{"images": 4, "local": {"lr": 0.1, "batch": [[0]]}}', "did you mean batches"),
        ('{"images": 4, "local": {"lr": 1e999, "batches": [[0]]}}', "positive lr, not inf"),
        ('{"images": 4, "local": {"lr": "0.1", "batches": [[0]]}}', "positive lr, not '0.1'"),
        ('{"images": 4, "local": {"lr": true, "batches": [[0]]}}', "positive lr, not True"),
        ('{"images": 4, "local": {"lr": 1, "batches": [[0.5]]}}', "whole number, not 0.5"),
        ('{"images": 4, "local": {"lr": 1, "batches": [0, 1]}}', "lists of image numbers"),
        ('{"images": 4, "local": {"lr": 1, "batches": "all"}}', "lists of image numbers"),
        ('{"images": 4, "local": {"lr": 1, "batches": [[]]}}', "at least one image"),
        ('{"images": 4, "local": {"lr": 1, "batches": [[0, 1, 2, 4]]}}', "images 0 to 3, all"),
        ('{"images": 1000000000000, "local": {"lr": 1, "batches": [[0]]}}', "all"),
        ('{"images": 4, "frozen": "linear"}', "frozen must be a list of texts"),
        ('{"images": 4, "frozen": ["liner"]}', "begins with 'liner'; near it: linear"),
        ('{"images": 4, "frozen": ["linear"]}', "frozen: linear, but linear.bias was sent"),
        ('{"images": 4, "weights": "yes"}', "weights is true or false"),
        ('{"images": 4, "weights": true}', "say which with `local`"),
        ('{"images": 4, "momentum": 0.2}', "momentum and size play no part"),
        ('{"images": 4, "statistics": "update"}', "training mode and its one step"),
    ],
)
def test_wrong_circumstances_are_refused(tmp_path: Path, circumstances: str, message: str) -> None:
    net, found = captured()
    evidence.save(tmp_path / "client", found)
    (tmp_path / "client.json").write_text(circumstances)
    with pytest.raises(ValueError, match=message):
        evidence.load(tmp_path / "client", net)


def test_circumstances_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    net, found = captured()
    evidence.save(tmp_path / "client", found)
    (tmp_path / "client.json").write_text('{"images": 4}', encoding="utf-8-sig")
    assert evidence.load(tmp_path / "client", net).images == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"images": 1.0}, "images must be a whole number, not 1.0"),
        ({"images": True}, "images must be a whole number, not True"),
        ({"images": np.float32(2)}, "images must be a whole number"),
        ({"training": "false"}, "training is true or false, not 'false'"),
        ({"training": 1}, "training is true or false, not 1"),
        ({"statistics": "Exact"}, "statistics must be one of"),
        ({"statistics": "exact"}, "do not go together"),
        ({"local": (0.1, ((0, 1),))}, "local must be a mapping with the keys lr, batches"),
        ({"frozen": "fc"}, "frozen must be a list of texts"),
    ],
    ids=str,
)
def test_evidence_is_checked_when_it_is_made(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Evidence(**({"values": {"a": np.ones(1)}, "images": 2} | settings))


def test_numbers_of_numpy_are_as_good() -> None:
    local = Local(np.float64(0.1), np.arange(4).reshape(2, 2))  # type: ignore[arg-type]
    assert local == Local(0.1, ((0, 1), (2, 3)))
    held = Evidence({"a": np.ones(1)}, np.int64(4), np.True_, local=local)  # type: ignore[arg-type]
    assert held.circumstances == Evidence({}, 4, True, local=local).circumstances
    assert json.dumps(dataclasses.asdict(held.circumstances))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m[:1], "moments of 1 BatchNorm layers for 2"),
        (lambda m: (Moments(m[0].mean[:-1], m[0].var), m[1]), r"mean at norms.0 is .* \(5,\)"),
        (lambda m: (m[1], m[0]), r"mean at norms.0 is of shape \(8,\), not \(6,\)"),
        (lambda m: (m[0], Moments(m[1].mean, -m[1].var)), "variance at norms.1 is below zero"),
        (lambda m: (m[0], Moments(m[1].mean * np.nan, m[1].var)), "mean at norms.1 is not finite"),
    ],
)
def test_moments_must_be_those_of_the_layers(change: Any, message: str) -> None:
    net = tiny.network()
    held, _ = evidence.simulate(net, tiny.noise((2, 16, 16, 3)), [0, 1], statistics="exact")
    held.check(net)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(held, moments=change(held.moments)).check(net)


def test_lost_moments_are_named(tmp_path: Path) -> None:
    net, found = captured(statistics="exact")
    evidence.save(tmp_path / "client", found)
    state = weights_convert.read(tmp_path / "client.safetensors")
    del state["moments.3.var"]
    weights_convert.write(tmp_path / "client.safetensors", state)
    with pytest.raises(ValueError, match=r"19 BatchNorm layers .* missing: moments\.3\.var"):
        evidence.load(tmp_path / "client", net)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda g, w: 0 * g, "every value is 0, .* before optimizer.zero_grad"),
        (lambda g, w: w + 0.01 * g, "the network's weights, .* `weights: true`"),
    ],
    ids=["zeros", "weights"],
)
def test_what_is_no_gradient_is_told(value: Any, message: str) -> None:
    net = tiny.network()
    held, _ = evidence.simulate(net, tiny.noise((2, 16, 16, 3)), [0, 1])
    wrong = jax.tree.map(value, held.values, evidence.parameters(net))
    with pytest.raises(ValueError, match=message):
        evidence.from_state(weights_convert.from_flax(wrong), net, images=2)


class Flax(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = linen.BatchNorm(use_running_average=True)(linen.Conv(4, (3, 3))(x))
        return linen.Dense(7)(jax.nn.relu(x).mean((1, 2)))


def test_linens_layers_need_not_name_their_collection() -> None:
    module = Flax()
    variables = module.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    net = Net.from_linen(module, variables, tiny.SPACE)
    held, _ = evidence.simulate(net, tiny.noise((2, 8, 8, 3)), [0, 1])
    state = weights_convert.from_flax(held.values["params"])
    for prefix in ("", "params."):
        named = {prefix + name: value for name, value in state.items()}
        found = evidence.from_state(named, net, images=2)
        jax.tree.map(np.testing.assert_array_equal, found.values, held.values)
        head = {name: value for name, value in named.items() if "Dense" in name}
        assert list(evidence.from_state(head, net, images=2).values["params"]) == ["Dense_0"]
        body = {name: value for name, value in named.items() if "BatchNorm" not in name}
        assert len(evidence.from_state(body, net, images=2).values["params"]) == 2


def test_the_pages_snippets_do_what_they_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of "Evidence of a real client", one after the other."""
    torch = pytest.importorskip("torch")
    page = (Path(__file__).parents[2] / "docs" / "gradients.md").read_text(encoding="utf-8")
    section = page.partition("## Evidence of a real client")[2].partition("\n## ")[0]
    gradient, weights, flower, direct = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    network, net = both("lenet")
    monkeypatch.chdir(tmp_path)
    images, chosen = torch.randn(4, 1, 28, 28), torch.tensor(LABELS)
    names = {"model": network.eval(), "images": images, "labels": chosen, "net": net}
    exec(gradient, names)
    held = evidence.load("client", net)
    expected, _ = evidence.simulate(net, images.numpy().transpose(0, 2, 3, 1), LABELS)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6),
        held.values,
        expected.values,
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter -= 0.01 * parameter.grad
    exec(weights, names)
    update = evidence.load("client", net)
    assert update.local == Local(0.01, ((0, 1), (2, 3)))
    Path("client.pth").unlink()
    exec(flower, names)
    listed = evidence.load("client", net)
    exec(direct, names)
    for found in (update, listed, names["held"]):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, -0.01 * b, rtol=1e-3, atol=1e-6),
            found.values,
            expected.values,
        )


# --- what frameworks carry -----------------------------------------------------------------------


def both(name: str) -> tuple[Any, Net]:
    """A network of ten classes in torch and here, with the same weights."""
    torch = pytest.importorskip("torch")
    import torch_peers

    net = models.load(name, None)
    state = weights_convert.from_flax(net.variables)
    network = torch_peers.build(name).to_empty(device="cpu")
    network.load_state_dict({key: torch.tensor(value) for key, value in state.items()})
    return network, net


def state_of(network: Any) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy().copy() for name, value in network.state_dict().items()}


def one_step(network: Any, lr: float = 0.1) -> Any:
    """One step of SGD on four images in training mode; what BatchNorm layers saw."""
    import torch

    torch.manual_seed(1)
    images, seen = torch.randn(4, 3, 32, 32), []
    layers = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    hooks = [m.register_forward_hook(lambda _, x, y: seen.append(x[0].detach())) for m in layers]
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=lr)
    torch.nn.functional.cross_entropy(network.train()(images), torch.tensor(LABELS)).backward()
    optimizer.step()
    for hook in hooks:
        hook.remove()
    return [(x.mean((0, 2, 3)).numpy(), x.var((0, 2, 3), correction=0).numpy()) for x in seen]


STEP = Local(0.1, ((0, 1, 2, 3),))


@pytest.mark.parametrize("form", ["changes", "weights", "arrays", "without counters", "npz"])
def test_a_whole_state_gives_the_update_and_the_batchs_moments(tmp_path: Path, form: str) -> None:
    """Flower's new weights, in torch's order, or their changes under torch's names."""
    network, net = both("resnet20_cifar")
    before, order = state_of(network), list(network.state_dict())
    seen = one_step(network)
    after = state_of(network)
    told: dict[str, Any] = {"images": 4, "training": True, "statistics": "update", "size": 32}
    if form == "changes":
        changes = {name: after[name] - before[name] for name in order}
        found = evidence.from_state(changes, net, local=STEP, **told)
    elif form == "weights":
        prefixed = {f"module.{name}": value for name, value in after.items()}
        found = evidence.from_state(prefixed, net, local=STEP, weights=True, **told)
    elif form == "npz":
        np.savez(tmp_path / "client.npz", *after.values())
        told |= {"weights": True, "local": dataclasses.asdict(STEP)}
        (tmp_path / "client.json").write_text(json.dumps(told))
        found = evidence.load(tmp_path / "client", net)
    else:
        arrays = [v for name, v in after.items() if form == "arrays" or "num_batch" not in name]
        found = evidence.from_arrays(arrays, net, local=STEP, weights=True, **told)
    ours = weights_convert.from_flax(found.values)
    assert ours.keys() == {name for name, _ in network.named_parameters()}
    for name, value in ours.items():
        np.testing.assert_allclose(value, after[name] - before[name], rtol=1e-5, atol=1e-7)
    assert found.circumstances == evidence.Circumstances(4, True, "update", STEP)
    assert found.moments is not None
    # The hooks tell in forward order, as we do.
    for ours_, (mean, var) in zip(found.moments, seen, strict=True):
        np.testing.assert_allclose(ours_.mean, mean, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(ours_.var, var, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({}, {"training": False}, "training mode and its one step"),
        ({}, {"local": Local(0.1, ((0, 1), (2, 3)))}, "its one step saw all images"),
        ({"norms.1.var": None}, {}, r"missing: norms\.1\.var"),
        ({"norms.1.var": np.zeros(3)}, {}, r"norms\.1\.var is of shape \(3,\), not \(8,\)"),
        ({"norms.1.var": np.full(8, -9.0)}, {}, r"norms\.1\.var gives a variance below zero"),
        ("zero", {}, "running statistics did not change"),
        ({}, {"momentum": 0.0}, "momentum is a share"),
        ({}, {"size": 16.0}, "size must be positive whole numbers"),
    ],
)
def test_running_statistics_that_cannot_be_solved_are_refused(
    changes: Any, settings: dict[str, Any], message: str
) -> None:
    net = tiny.network()
    held, _ = evidence.simulate(net, tiny.noise((4, 16, 16, 3)), LABELS, training=True)
    statistics = {
        ".".join(map(str, path)): np.full(width, 0.0 if changes == "zero" else 0.01)
        for paths, width in zip(net.statistics, (6, 8), strict=True)
        for path in paths
    }
    state = weights_convert.from_flax(held.values) | statistics
    state |= {} if changes == "zero" else changes
    state = {name: value for name, value in state.items() if value is not None}
    told = {"images": 4, "training": True, "statistics": "update", "momentum": 0.1}
    with pytest.raises(ValueError, match=message):
        evidence.from_state(state, net, **told | settings)
    if not changes and "training" not in settings:
        found = evidence.from_state(state, net, **told)
        assert found.moments is not None
        before = net.running_moments()[1]
        np.testing.assert_allclose(found.moments[1].mean, before.mean + 0.1, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("ending", [".pth", ".pt", ".npz"])
def test_a_gradient_of_another_type_and_file_is_read(
    tmp_path: Path, dtype: str, ending: str
) -> None:
    torch = pytest.importorskip("torch")
    net, saved = captured()
    state = weights_convert.from_flax(saved.values)
    if ending == ".npz":
        if dtype == "bfloat16":
            pytest.skip("NumPy has none")
        narrow: dict[str, Any] = {name: value.astype(dtype) for name, value in state.items()}
        np.savez_compressed(tmp_path / "client.npz", **narrow)
    else:
        kind = getattr(torch, dtype)
        narrow = {f"_module.{name}": torch.tensor(v).to(kind) for name, v in state.items()}
        torch.save(narrow, tmp_path / f"client{ending}")
    (tmp_path / "client.json").write_text('{"images": 4}')
    for name in ("client", f"client{ending}"):
        found = weights_convert.from_flax(evidence.load(tmp_path / name, net).values)
        for key, value in state.items():
            assert found[key].dtype == np.float32
            np.testing.assert_allclose(found[key], value, rtol=1e-2, atol=1e-6)


def test_which_file_is_meant_must_be_clear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, saved = captured()
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"there is no file .*client with one of the endings"):
        evidence.load("~/client", net)
    evidence.save("~/client", saved)
    np.savez(tmp_path / "client.npz", **weights_convert.from_flax(saved.values))
    with pytest.raises(ValueError, match=r"client\.safetensors and client\.npz: say which"):
        evidence.load("~/client", net)
    for ending in (".npz", ".safetensors"):
        assert evidence.load(f"~/client{ending}", net).images == 4
    (tmp_path / "client.json").unlink()
    with pytest.raises(ValueError, match=r"there is no client\.json"):
        evidence.load("~/client.npz", net)


@pytest.mark.parametrize(
    "chosen",
    [
        lambda name: "linear" in name,
        lambda name: "linear" in name or "layer3" in name,
        lambda name: "linear" in name or "layer3.1" in name or "layer3.2" in name,
        lambda name: "layer2" in name,
        lambda name: "linear" not in name,
        lambda name: "bn" not in name,
        lambda name: "bn" in name,
        lambda name: "bn" not in name and ("linear" in name or "layer3.2" in name),
    ],
    ids=["head", "stage", "blocks", "middle", "body", "no bn", "bn", "block, no bn"],
)
def test_a_part_of_the_network_may_be_trained_alone(tmp_path: Path, chosen: Any) -> None:
    net, saved = captured()
    state = {n: v for n, v in weights_convert.from_flax(saved.values).items() if chosen(n)}
    weights_convert.write(tmp_path / "client.safetensors", state)
    (tmp_path / "client.json").write_text('{"images": 4}')
    found = evidence.load(tmp_path / "client", net)
    assert weights_convert.from_flax(found.values).keys() == state.keys()
    evidence.save(tmp_path / "again", found)
    again = evidence.load(tmp_path / "again", net)
    jax.tree.map(np.testing.assert_array_equal, again.values, found.values)


@pytest.mark.parametrize(
    "lost", ["layer1.0.conv1", "layer1.1", "layer2.0.bn1", "linear.bias", "layer3.2.conv2.weight"]
)
def test_layers_that_got_lost_are_named_unless_they_were_frozen(lost: str) -> None:
    net, saved = captured()
    whole = weights_convert.from_flax(saved.values)
    gone = {name for name in whole if name.startswith(lost)}
    state = {name: value for name, value in whole.items() if name not in gone}
    with pytest.raises(ValueError, match=f"{len(gone)} of 59 arrays are missing.*{lost}"):
        evidence.from_state(state, net, images=4)
    for sent in (state, state | dict.fromkeys(gone), state | {n: 0 * whole[n] for n in gone}):
        found = evidence.from_state(sent, net, images=4, frozen=[lost])
        assert weights_convert.from_flax(found.values).keys() == state.keys()
        assert evidence.from_state(state | dict.fromkeys(gone), net, images=4).frozen
    with pytest.raises(ValueError, match=f"frozen: {lost}, but .* was sent"):
        evidence.from_state(whole, net, images=4, frozen=[lost])


def test_local_steps_change_the_trained_layers_alone() -> None:
    """As torch's do with `requires_grad` False."""
    torch = pytest.importorskip("torch")
    network, net = both("lenet")
    network.eval()
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name.startswith("fc"))
    images = np.random.default_rng(1).normal(size=(4, 28, 28, 1)).astype(np.float32)
    local = Local(0.5, ((0, 1), (2, 3), (3, 0)))
    before = state_of(network)
    optimizer = torch.optim.SGD(network.fc.parameters(), lr=0.5)
    for batch in local.batches:
        optimizer.zero_grad()
        chosen = torch.tensor(images.transpose(0, 3, 1, 2)[list(batch)].copy())
        targets = torch.tensor([LABELS[i] for i in batch])
        torch.nn.functional.cross_entropy(network(chosen), targets).backward()
        optimizer.step()
    after = state_of(network)
    sent = {name: after[name] - before[name] for name in ("fc.0.weight", "fc.0.bias")}
    held = evidence.from_state(sent, net, images=4, local=local)
    found = evidence.observed(
        net,
        net.variables,
        jnp.asarray(images),
        jax.nn.one_hot(jnp.asarray(LABELS), 10),
        local=local,
        trained=held.values,
    )
    ours = weights_convert.from_flax(jax.device_get(found))
    assert ours.keys() == sent.keys()
    for name, value in sent.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-3, atol=1e-5)


def test_arrays_that_do_not_fit_are_told_by_index_and_name() -> None:
    net, saved = captured()
    whole = weights_convert.from_flax(saved.values)
    order = [name for name in models.registry.state_dict_names(net) if name in whole]
    arrays: list[Any] = [whole[name] for name in order]
    found = evidence.from_arrays(arrays, net, images=4)
    jax.tree.map(np.testing.assert_array_equal, found.values, saved.values)
    with pytest.raises(ValueError, match=r"array 0 \(conv1.weight\) is of .* not \(16, 3"):
        evidence.from_arrays([arrays[1], arrays[0], *arrays[2:]], net, images=4)
    with pytest.raises(ValueError, match="58 arrays: resnet20_cifar has 116 in its state_dict"):
        evidence.from_arrays(arrays[:-1], net, images=4)
    with pytest.raises(ValueError, match="2 arrays need as many different names, not 1"):
        evidence.from_arrays(arrays[-2:], net, names=["linear.bias"], images=4)
    with pytest.raises(ValueError, match=r"4 arrays .* more than once there: fc.bias, fc.weight"):
        evidence.from_arrays(arrays[-4:], net, names=["fc.bias", "fc.weight"] * 2, images=4)
    names = [f"module.{name}" for name in order[-2:]]
    head = evidence.from_arrays(arrays[-2:], net, names=names, images=4)
    assert list(head.values) == ["linear"]
    with pytest.raises(ValueError, match=r"array 0 \(linear.weight\) is of shape \(10,\)"):
        evidence.from_arrays(arrays[-2:][::-1], net, names=names, images=4)
    frozen = evidence.from_arrays([None, *arrays[1:]], net, images=4)
    assert frozen.frozen == ("conv1.weight",)
    renamed = dataclasses.replace(net, name="client 3")
    assert evidence.from_arrays(arrays, renamed, images=4).images == 4
    with pytest.raises(ValueError, match=r"tiny is not known, .* give their names"):
        evidence.from_arrays(arrays, tiny.network(), images=4)


def npz(path: Path, header: str, data: bytes, compressed: bool = False) -> None:
    """A file of np.savez with one array, whose header says anything."""
    text = header.encode().ljust(118) + b"\n"
    how = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", how) as archive:
        archive.writestr("arr_0.npy", b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + data)


@pytest.mark.parametrize(
    ("descr", "shape", "message"),
    [
        ("<f4", (2**40,), "more than the network has"),
        ("<f4", (2**28,), "more than the network has"),
        ("<f4", (-1, 4), "more than the network has"),
        ("|O", (4,), "no numbers that can be read without running code"),
        ("|V2", (4,), "no numbers"),
        ("<U4", (4,), "no numbers"),
        ("<f4", (40,), "cut short"),
        ("<f4", "4", "no file of np.savez"),
    ],
)
@pytest.mark.parametrize("compressed", [False, True])
def test_hostile_arrays_are_refused_in_little_memory(
    tmp_path: Path, descr: str, shape: Any, message: str, compressed: bool
) -> None:
    net = tiny.network()
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape!r}}}"
    npz(tmp_path / "client.npz", header, bytes(16 if not compressed else 10_000_000), compressed)
    if message == "cut short":
        npz(tmp_path / "client.npz", header, bytes(16), compressed)
    (tmp_path / "client.json").write_text('{"images": 4}')
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message):
            evidence.load(tmp_path / "client", net)
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()


def test_arrays_are_read_as_numpy_reads_them(tmp_path: Path) -> None:
    arrays = [np.arange(6, dtype=">f4").reshape(2, 3), np.asfortranarray(np.ones((3, 2)) * [1, 2])]
    arrays += [np.array(5), np.zeros((0, 3), np.float16)]
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", *arrays)
        found = weights_convert.read_arrays(tmp_path / "a.npz", most=1000)
        assert list(found) == ["arr_0", "arr_1", "arr_2", "arr_3"]
        for ours, theirs in zip(found.values(), arrays, strict=True):
            np.testing.assert_array_equal(ours, theirs)
            assert ours.shape == theirs.shape
            assert ours.dtype == theirs.dtype.newbyteorder("=")
    content = (tmp_path / "a.npz").read_bytes()
    for wrong in (b"", b"text", content[:-40], content[:200]):
        (tmp_path / "a.npz").write_bytes(wrong)
        with pytest.raises(weights_convert.WeightsError, match=r"a\.npz: "):
            weights_convert.read_arrays(tmp_path / "a.npz", most=1000)


def test_a_network_without_training_mode_is_refused() -> None:
    net = dataclasses.replace(tiny.network(), train_apply=None)
    found, _ = evidence.simulate(tiny.network(), tiny.noise((2, 16, 16, 3)), [0, 1], training=True)
    with pytest.raises(ValueError, match="tiny has no training mode"):
        found.check(net)


def test_parameters_are_neither_statistics_nor_counters() -> None:
    net = models.load("resnet20_cifar", None)
    names = weights_convert.from_flax(evidence.parameters(net)).keys()
    assert "bn1.weight" in names
    assert not [n for n in names if "running" in n or "num_batches" in n]
    doubled = jax.tree.map(lambda leaf: 2 * leaf, evidence.parameters(net))
    changed = evidence.with_parameters(net.variables, doubled)
    np.testing.assert_array_equal(changed["linear"]["bias"], 2 * net.variables["linear"]["bias"])
    assert changed["bn1"]["running_var"] is net.variables["bn1"]["running_var"]
    assert jax.tree.structure(changed) == jax.tree.structure(dict(net.variables))


def test_a_client_is_compiled_once() -> None:
    """A batch after another through one simulator, each as `simulate` makes it."""
    net = tiny.network()
    traces = []

    def apply(variables: Any, images: Any) -> Any:
        traces.append(images.shape)
        return net.apply(variables, images)

    counted = dataclasses.replace(net, apply=apply)
    client = evidence.simulator(counted, statistics="exact")
    batches = [(tiny.noise((3, 16, 16, 3), seed), [seed, 2, 5]) for seed in (0, 1)]
    found = [client(images, classes) for images, classes in batches[:1]]
    first = len(traces)
    found += [client(images, classes) for images, classes in batches[1:]]
    assert len(traces) == first > 0
    for (held, secret), (images, classes) in zip(found, batches, strict=True):
        expected, truth = evidence.simulate(net, images, classes, statistics="exact")
        jax.tree.map(np.testing.assert_array_equal, held.values, expected.values)
        jax.tree.map(np.testing.assert_array_equal, held.moments, expected.moments)
        np.testing.assert_array_equal(secret.images, truth.images)
        assert held.circumstances == expected.circumstances
    with pytest.raises(ValueError, match="3 images need as many labels in 0 to 6"):
        client(batches[0][0], [1, 2])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([3.5, 6.2], r"whole numbers, not \[3.5, 6.2\]"),
        (["3", "1"], r"whole numbers, not \['3', '1'\]"),
        ([True, False], "whole numbers"),
        ([None, 1], "whole numbers"),
        ([[3], [1, 2]], "whole numbers"),
        ([], r"2 images need as many labels in 0 to 6, one class each, not labels of shape \(0,\)"),
        (3, r"not labels of shape \(\)"),
        (np.eye(7, dtype=int)[:2], r"not labels of shape \(2, 7\)"),
        ([3, 12], "label 1 is 12; tiny has classes 0 to 6"),
        (np.asarray([-1, 3]), "label 0 is -1; tiny has classes 0 to 6"),
        (jnp.asarray([7, 8]), "label 0 is 7; tiny has classes 0 to 6"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evidence.simulate(tiny.network(), tiny.noise((2, 16, 16, 3)), labels)


def test_a_simulator_of_unknown_statistics_is_refused() -> None:
    with pytest.raises(ValueError, match="statistics must be one of none, running, exact, update"):
        evidence.simulator(tiny.network(), statistics="all")  # type: ignore[arg-type]


def test_names_with_dots_are_names_of_their_own(tmp_path: Path) -> None:
    net = tiny.network()
    for i, name in enumerate(("client.1", "client.2", "lr0.1", "lr0.01")):
        held, _ = evidence.simulate(net, tiny.noise((i + 1, 16, 16, 3)), [0] * (i + 1))
        evidence.save(tmp_path / name, held)
    for i, name in enumerate(("client.1", "client.2", "lr0.1", "lr0.01")):
        for ending in ("", ".safetensors", ".json"):
            assert evidence.load(tmp_path / f"{name}{ending}", net).images == i + 1
    assert len(list(tmp_path.iterdir())) == 8

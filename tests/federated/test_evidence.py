"""Gradients and updates as torch computes them; files; what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

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
    ],
)
def test_wrong_circumstances_are_refused(tmp_path: Path, circumstances: str, message: str) -> None:
    net, found = captured()
    evidence.save(tmp_path / "client", found)
    (tmp_path / "client.json").write_text(circumstances)
    with pytest.raises(ValueError, match=message):
        evidence.load(tmp_path / "client", net)


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

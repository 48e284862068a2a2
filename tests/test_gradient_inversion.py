"""Gradient matching as torch's double backward computes it; groups, noise, what is found."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import tiny
from jinv import evidence, models, optimise
from jinv.attacks import gradient_inversion, labels
from jinv.attacks.gradient_inversion import Attack, Config
from jinv.evidence import Local
from jinv.image import Preprocessing, denormalise, normalise
from jinv.net import Net
from test_evidence import double, ported, torch_network

KEY = jax.random.key(3)
PLAIN: dict[str, Any] = {
    "steps": 1,
    "warmup": 1,
    "seeds": 1,
    "noise": 0.0,
    "clip": False,
    "gradient": 1.0,
}


def first_step(attack: Attack, images: Any) -> tuple[optimise.State, optimise.Info]:
    phase = attack.phases[0]
    return jax.jit(phase.step)(KEY, phase.enter(jnp.asarray(images), 0), attack.data)


def torch_distance(found: list[Any], wanted: list[Any], kind: str) -> Any:
    import torch

    pairs = list(zip(found, wanted, strict=True))
    if kind == "l2":
        return sum((a - b).norm() for a, b in pairs)
    if kind == "squared_l2":
        return sum((a - b).square().sum() for a, b in pairs)
    ours = torch.cat([a.flatten() for a, _ in pairs])
    theirs = torch.cat([b.flatten() for _, b in pairs])
    return 1 - ours @ theirs / (ours.norm() * theirs.norm())


@pytest.mark.parametrize(
    ("name", "training", "distance"),
    [
        ("resnet18", False, "l2"),
        pytest.param("resnet18", True, "cosine", marks=pytest.mark.slow),
        pytest.param("mobilenet_v2", False, "squared_l2", marks=pytest.mark.slow),
        ("mobilenet_v2", True, "l2"),
    ],
)
def test_loss_and_image_gradient_equal_torch(name: str, training: bool, distance: str) -> None:
    """In double precision: the gradient's distance, differentiated again with respect to images."""
    torch = pytest.importorskip("torch")
    network = torch_network(name, 5).train(training)
    if name == "mobilenet_v2":
        state = torch_weights_of_the_package(network)
        network.load_state_dict(state)
    rng = np.random.default_rng(0)
    secret, images = rng.normal(size=(2, 2, 32, 40, 3))
    classes = [3, 1]

    with jax.enable_x64(True):
        net = ported(name, network, 5)
        net = dataclasses.replace(net, variables=double(net))
        held, _ = evidence.simulate(net, jnp.asarray(secret), classes, training=training)
        config = Config(distance=distance, tv_l2=2e-3, l2=1e-2, **PLAIN)  # type: ignore[arg-type]
        attack = gradient_inversion.build(config, net, held, classes, size=(32, 40))
        state, info = first_step(attack, images[None])
        ours = np.asarray(optax.tree.get(state.optimiser, "mu"))[0] / 0.1

    def gradients(x: Any, graph: bool) -> list[Any]:
        loss = torch.nn.functional.cross_entropy(network(x), torch.tensor(classes))
        return list(torch.autograd.grad(loss, list(network.parameters()), create_graph=graph))

    wanted = [g.detach() for g in gradients(nchw(secret), False)]
    x = nchw(images).requires_grad_()
    matching = torch_distance(gradients(x, True), wanted, distance)
    variation = sum(
        d.norm()
        for d in (
            x[..., :-1] - x[..., 1:],
            x[:, :, :-1] - x[:, :, 1:],
            x[:, :, 1:, :-1] - x[:, :, :-1, 1:],
            x[:, :, :-1, :-1] - x[:, :, 1:, 1:],
        )
    )
    loss = matching + 2e-3 * variation + 1e-2 * x.flatten(1).norm(dim=1).mean()
    loss.backward()
    theirs = x.grad.numpy().transpose(0, 2, 3, 1)
    assert float(info.terms["gradient"]) == pytest.approx(matching.item(), rel=1e-6)
    assert float(info.loss) == pytest.approx(loss.item(), rel=1e-6)
    assert np.linalg.norm(ours - theirs) < 1e-5 * np.linalg.norm(theirs)


def nchw(images: np.ndarray) -> Any:
    import torch

    return torch.tensor(images.transpose(0, 3, 1, 2).copy())


def torch_weights_of_the_package(network: Any) -> dict[str, Any]:
    """Real weights but for the head, whose classes are fewer here."""
    import torch

    import weights_convert

    try:
        path = models.packaged_weights("mobilenet_v2")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    real = {key: torch.tensor(value) for key, value in weights_convert.read(path).items()}
    return network.state_dict() | {k: v for k, v in real.items() if not k.startswith("classifier")}


# --- what the settings do ------------------------------------------------------------------------


def small(**settings: Any) -> tuple[Any, Any, Any]:
    """A tiny network, evidence of two images, and the secret."""
    net = tiny.network(classes=7)
    images = 0.5 * tiny.noise((2, 16, 16, 3), seed=4)
    held, secret = evidence.simulate(net, images, [2, 5], **settings)
    return net, held, secret


def run(attack: Attack) -> tuple[optimise.State, dict[str, np.ndarray]]:
    return tiny.run(attack, noise=2)


def test_the_secret_itself_has_distance_zero() -> None:
    for settings in ({}, {"training": True}, {"local": Local(0.1, ((0, 1), (1, 0)))}):
        net, held, secret = small(**settings)
        config = Config(**PLAIN | {"tv_l2": 0.0, "l2": 0.0})
        attack = gradient_inversion.build(config, net, held, [2, 5])
        _, info = first_step(attack, secret.images[None])
        other = first_step(attack, tiny.noise((1, 2, 16, 16, 3)))[1]
        assert float(info.loss) < 1e-4 * float(other.loss)


@pytest.mark.parametrize(
    "settings",
    [{}, {"training": True}, {"local": Local(0.05, ((0,), (1,), (0, 1), (1,)))}],
    ids=["gradient", "training", "local steps"],
)
def test_matching_brings_the_distance_down(settings: dict[str, Any]) -> None:
    net, held, _ = small(**settings)
    config = Config(**PLAIN | {"steps": 150, "tv_l2": 0.0, "l2": 0.0, "lr": 0.05})
    _, metrics = run(gradient_inversion.build(config, net, held, [2, 5]))
    assert metrics["gradient"][-1] < 0.5 * metrics["gradient"][0]


def test_candidates_are_independent_without_a_group() -> None:
    """Three seeds at once are three runs, each with its own best images."""
    net, held, _ = small()
    config = Config(**PLAIN | {"steps": 12, "seeds": 3, "group": 0.0, "lr": 0.05})
    attack = gradient_inversion.build(config, net, held, [2, 5])
    together, _ = run(attack)
    assert together.best_loss.shape == (3,)
    initial = np.asarray(attack.initial(jax.random.key(2)))
    for i in range(3):
        alone = gradient_inversion.build(dataclasses.replace(config, seeds=1), net, held, [2, 5])
        state = optimise.run(
            alone.phases, jax.random.key(1), jnp.asarray(initial[i : i + 1]), alone.data
        )
        np.testing.assert_allclose(together.images[i], state.images[0], atol=1e-4)
        np.testing.assert_allclose(together.best_loss[i], state.best_loss[0], rtol=1e-4)


def test_a_group_draws_together_once_it_has_a_consensus() -> None:
    net, held, _ = small()
    base = PLAIN | {"steps": 60, "seeds": 4, "group_from": 20, "group_every": 10, "lr": 0.05}
    spread = {}
    for weight in (0.0, 1.0):
        config = Config(**base | {"group": weight, "gradient": 0.01})
        state, metrics = run(gradient_inversion.build(config, net, held, [2, 5], register=None))
        spread[weight] = float(np.std(np.asarray(state.images), axis=0).mean())
        if weight:
            assert metrics["group"][25] < metrics["group"][20]
    assert spread[1.0] < 0.5 * spread[0.0]


def test_a_users_own_registration_is_called() -> None:
    net, held, _ = small()
    config = Config(
        **PLAIN | {"steps": 3, "seeds": 2, "group_from": 1, "group_every": 1, "group": 1.0}
    )

    def nowhere(images: jax.Array, reference: jax.Array) -> jax.Array:
        return jnp.full_like(images, 7.0)

    state, _ = run(gradient_inversion.build(config, net, held, [2, 5], register=nowhere))
    np.testing.assert_allclose(state.memory, 7.0)


def test_noise_kicks_as_much_as_the_schedule_says() -> None:
    net, held, _ = small()
    quiet = Config(**PLAIN | {"lr": 0.1, "steps": 2, "warmup": 1})
    attacks = [
        gradient_inversion.build(dataclasses.replace(quiet, noise=a), net, held, [2, 5])
        for a in (0.0, 0.3)
    ]
    images = attacks[0].initial(KEY)
    still, moved = (np.asarray(first_step(attack, images)[0].images) for attack in attacks)
    assert np.std(moved - still) == pytest.approx(0.3 * 0.1, rel=0.05)


def test_bn_alone_needs_no_gradient() -> None:
    """The ablation: with exact statistics, and the gradient's weight 0."""
    net, held, _ = small(statistics="exact")
    config = Config(**PLAIN | {"gradient": 0.0, "steps": 100, "lr": 0.05, "batch_norm": 1.0})
    _, metrics = run(gradient_inversion.build(config, net, held, [2, 5]))
    assert "gradient" not in metrics
    assert metrics["batch_norm"][-1] < 0.2 * metrics["batch_norm"][0]


def test_layers_count_by_the_beginning_of_their_names() -> None:
    wanted = {"a": {"w": jnp.ones(4), "b": jnp.ones(1)}, "c": jnp.ones(9)}
    found = jax.tree.map(jnp.zeros_like, wanted)

    def distance(**layers: float) -> float:
        return float(gradient_inversion.gradient_distance(found, wanted, "l2", layers))

    assert distance() == pytest.approx(2 + 1 + 3)
    assert distance(a=0) == pytest.approx(3)
    assert distance(**{"a": 0, "a.b": 5}) == pytest.approx(5 + 3)


@pytest.mark.parametrize(
    ("chosen", "settings", "message"),
    [
        ([2], {}, "2 labels from 0 to 6 are needed"),
        ([2, 7], {}, "2 labels from 0 to 6 are needed"),
        ([2, 5], {"devices": 99}, "99 devices asked for"),
    ],
)
def test_what_does_not_fit_is_refused(chosen: Any, settings: Any, message: str) -> None:
    net, held, _ = small()
    with pytest.raises(ValueError, match=message):
        gradient_inversion.build(Config(), net, held, chosen, **settings)


@pytest.mark.parametrize("settings", [{"steps": 0}, {"seeds": 0}, {"distance": "taxi"}])
def test_config_refuses(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        Config(**settings)


# --- what comes back -----------------------------------------------------------------------------


class LeNet(nnx.Module):
    """Convolutions with smooth activations and no BatchNorm, as in DLG."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Conv(1, 12, (5, 5), strides=2, padding=2, rngs=rngs)
        self.second = nnx.Conv(12, 12, (5, 5), strides=2, padding=2, rngs=rngs)
        self.head = nnx.Linear(12 * 49, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in (self.first, self.second):
            x = nnx.sigmoid(layer(x))
        return self.head(x.reshape(len(x), -1))


def test_an_image_comes_back_from_its_gradient() -> None:
    """With its label, to 40 dB: a drawing of 28 px."""
    space = Preprocessing(size=28, mean=(0.3,), std=(0.35,))
    net = Net.from_nnx(LeNet(nnx.Rngs(0)), space)
    y, x = np.mgrid[:28, :28]
    pixels = np.where((abs(x - 14) < 6) & (abs(y - 12) < 9), 0.8, 0.0)
    pixels = (pixels + 0.2 * (np.hypot(x - 14, y - 20) < 5))[None, :, :, None]
    secret = normalise(jnp.asarray(pixels, jnp.float32), space)
    held, _ = evidence.simulate(net, secret, [4])

    kernel, bias = (np.asarray(net.variables["head"][name]) for name in ("kernel", "bias"))
    gradient = held.values["head"]
    head = labels.Head(kernel, gradient["kernel"], 1, bias, gradient["bias"])
    found = labels.as_list(labels.restore(head))
    assert found == [4]
    config = Config(**PLAIN | {"steps": 800, "warmup": 20, "tv_l2": 0.0, "l2": 0.0, "clip": True})
    state, _ = run(gradient_inversion.build(config, net, held, found))
    error = np.asarray(denormalise(state.best_images[0], space)) - pixels
    assert -10 * np.log10(np.mean(error**2)) > 40

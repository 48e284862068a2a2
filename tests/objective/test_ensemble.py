"""Where and in what order networks are computed changes no value."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from jinv import optimise, parallel
from jinv.attacks import deepinversion
from jinv.attacks.deepinversion import Attack, Config, Phase
from jinv.net import Net, Outputs, batch_moments
from jinv.objective import ensemble, microbatch, priors
from jinv.objective.ensemble import Execution
from jinv.objective.terms import Member, Weights, label_loss

TARGETS = (0, 3, 6, 1)
CONFIG = Config(phases=(Phase(3, jitter=2),), lr=0.05, warmup=1, tv_l1=0.01)


def members() -> list[Member]:
    """Three architectures, the first one twice with different weights."""
    nets = (
        tiny.network(0, name="a"),
        tiny.network(1, name="b", space=tiny.OTHER_SPACE, widths=(5,), classes=9),
        tiny.network(2, name="c"),
        tiny.network(3, name="d", widths=(4, 4, 4)),
    )
    weights = (Weights(0.8, 0.05), Weights(0.3, 0.2, 3), Weights(0.8, 0.05), Weights(1, 0.1))
    return [Member(net, w) for net, w in zip(nets, weights, strict=True)]


def attack_of(*chosen: Member, config: Config = CONFIG, **execution: Any) -> Attack:
    return deepinversion.build(config, chosen, TARGETS, execution=Execution(**execution))


def assert_same(ours: Attack, theirs: Attack, tolerance: float = 1e-4) -> None:
    (state, metrics), (expected, others) = tiny.run(ours), tiny.run(theirs)
    assert metrics.keys() == others.keys()
    for name, series in others.items():
        np.testing.assert_allclose(metrics[name], series, rtol=tolerance, err_msg=name)
    np.testing.assert_allclose(state.images, expected.images, atol=1e-3)


# --- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"networks_at_once": 3},
        {"images_at_once": 1},
        {"images_at_once": 2, "networks_at_once": 2},
    ],
    ids=str,
)
def test_every_execution_gives_the_same_images(settings: dict[str, Any]) -> None:
    assert_same(attack_of(*members(), **settings), attack_of(*members(), networks_at_once=None))


def test_one_network_gives_the_loss_of_its_formula() -> None:
    """Written out with the priors, on the very images that the step sees."""
    alone = members()[0]
    attack = attack_of(
        alone, config=dataclasses.replace(CONFIG, phases=(Phase(1, jitter=0),), flip=0)
    )
    images = attack.initial(jax.random.key(0))
    state = optimise.enter(attack.phases[0], images, 0)
    _, info = jax.jit(attack.phases[0].step)(jax.random.key(1), state, attack.data)
    outputs, running = alone.net(images), alone.net.running_moments()
    expected = (
        0.8 * label_loss(outputs.logits, jnp.asarray(TARGETS))
        + 0.05 * priors.batch_norm(outputs.moments, running, first_multiplier=10)
        + CONFIG.tv_l2 * priors.total_variation_l2(images)
        + CONFIG.tv_l1 * priors.total_variation_l1(images)
        + CONFIG.l2 * priors.l2(images)
    )
    np.testing.assert_allclose(info.loss, expected, rtol=1e-6)


def test_an_ensemble_of_one_is_deepinversion_to_the_bit() -> None:
    alone = members()[0]
    state, metrics = tiny.run(attack_of(alone))
    assert set(metrics) == {"loss", "label", "batch_norm", "tv_l2", "tv_l1", "l2"}
    for settings in ({"networks_at_once": None}, {"images_at_once": 4}):
        other, series = tiny.run(attack_of(alone, **settings))
        np.testing.assert_array_equal(state.images, other.images)
        np.testing.assert_array_equal(metrics["loss"], series["loss"])


def test_a_gradient_that_is_not_finite_spares_the_next_network() -> None:
    """Whose terms would otherwise be blamed."""

    @jax.custom_jvp
    def steep(x: jax.Array) -> jax.Array:
        return x

    steep.defjvp(lambda primals, tangents: (primals[0], tangents[0] * jnp.inf))
    first, second = members()[0], members()[2]

    def apply(variables: Any, images: jax.Array) -> Outputs:
        return first.net.apply(variables, steep(images))

    broken = dataclasses.replace(first, net=dataclasses.replace(first.net, apply=apply))
    attack = attack_of(broken, second, networks_at_once=1)
    state = optimise.enter(attack.phases[0], attack.initial(jax.random.key(0)), 0)
    _, info = jax.jit(attack.phases[0].step)(jax.random.key(0), state, attack.data)
    assert all(np.isfinite(value) for value in info.terms.values())


def test_one_network_at_a_time_needs_less_memory() -> None:
    """Compiled for CPU: the activations of one network instead of all four's."""
    nets = [tiny.network(i, name=f"n{i}", widths=(16, 16, 16)) for i in range(4)]
    config = Config(phases=(Phase(1, jitter=0),), flip=0.0)

    def temporary(**execution: Any) -> int:
        attack = deepinversion.build(
            config,
            [Member(net) for net in nets],
            [0] * 8,
            size=64,
            execution=Execution(**execution),
        )
        key, images = jax.random.key(0), attack.initial(jax.random.key(0))
        state = attack.phases[0].enter(images, 0)
        compiled = jax.jit(attack.phases[0].step).lower(key, state, attack.data).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    everything = temporary(networks_at_once=None)
    assert temporary() < 0.5 * everything
    assert temporary(networks_at_once=None, images_at_once=2) < 0.5 * everything


# --- a few images at a time ----------------------------------------------------------------------


def test_moments_of_parts_are_those_of_the_whole_batch() -> None:
    net = tiny.network()
    images = 3 + tiny.noise((6, 10, 14, 3))
    ours, whole = microbatch.in_turns(net.apply, 2)(net.variables, images), net(images)
    np.testing.assert_allclose(ours.logits, whole.logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours.features, whole.features, rtol=1e-5, atol=1e-5)
    for a, b in zip(ours.moments, whole.moments, strict=True):
        np.testing.assert_allclose(a.mean, b.mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(a.var, b.var, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_gradient_in_turns_is_that_of_the_whole_batch(at_once: int) -> None:
    """In double precision, through logits, features, means and variances."""
    with jax.enable_x64(True):
        double = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), tiny.network().variables)
        net = tiny.network()
        images = jnp.asarray(3 + tiny.noise((6, 10, 14, 3)), jnp.float64)

        def loss(apply: Callable) -> Callable:
            def value(x: jax.Array) -> jax.Array:
                found = apply(double, x)
                moments = sum(jnp.sin(m.mean).sum() + jnp.log(m.var).sum() for m in found.moments)
                return moments + jnp.square(found.logits).sum() + jnp.cos(found.features).sum()

            return jax.grad(value)

        ours = loss(microbatch.in_turns(net.apply, at_once))(images)
        np.testing.assert_allclose(ours, loss(net.apply)(images), rtol=1e-9, atol=1e-12)


def test_a_batch_that_cannot_be_taken_in_turns_is_an_error() -> None:
    uneven = r"\Aexecution.images_at_once: 4 images cannot be taken 3 .*: possible are 1, 2, 4"
    with pytest.raises(ValueError, match=uneven):
        attack_of(members()[0], images_at_once=3)


@pytest.mark.parametrize("name", ["networks_at_once", "images_at_once"])
def test_less_than_one_at_once_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1 .*, not 0"):
        Execution(**{name: 0})


def test_an_unknown_placement_is_an_error() -> None:
    with pytest.raises(
        ValueError, match="placement must be one of auto, data, networks, not 'nowhere'"
    ):
        Execution(placement="nowhere")  # type: ignore[arg-type]


# --- placement -----------------------------------------------------------------------------------


def parts(costs: list[float]) -> list[ensemble.Part]:
    @dataclasses.dataclass(frozen=True)
    class Priced(ensemble.Part):
        price: float = 1.0

        def cost(self) -> float:
            return self.price

    example: Any = (None, None)
    return [
        Priced(f"n{i}", lambda v, x, t: {}, {"label": 1.0}, {}, example, price)
        for i, price in enumerate(costs)
    ]


def place(costs: list[float], images: int, devices: int, **settings: Any) -> ensemble.Placement:
    return ensemble.place(parts(costs), images, Execution(**settings))


@pytest.fixture
def four_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "devices", lambda: [f"device {i}" for i in range(4)])
    monkeypatch.setattr(parallel, "check_all_take_part", lambda devices: None)
    monkeypatch.setattr(parallel, "mesh", lambda axis, devices: (axis, len(devices)))


@pytest.mark.usefixtures("four_devices")
@pytest.mark.parametrize(
    ("networks", "images", "settings", "kind", "used"),
    [
        (1, 8, {}, "data", 4),
        (3, 8, {}, "data", 4),
        (1, 6, {}, "data", 3),
        (4, 6, {}, "networks", 4),
        (2, 6, {}, "data", 3),
        (2, 5, {}, "networks", 2),
        (3, 8, {"placement": "networks"}, "networks", 3),
        (6, 8, {"placement": "networks", "devices": 2}, "networks", 2),
        (3, 8, {"devices": 1}, "data", 1),
        (1, 8, {"images_at_once": 2}, "data", 2),
        (1, 8, {"images_at_once": 10}, "data", 4),
    ],
)
def test_placement_keeps_most_devices_busy(
    networks: int, images: int, settings: dict[str, Any], kind: str, used: int
) -> None:
    placement = ensemble.place(parts([1.0] * networks), images, Execution(**settings))
    assert (placement.kind, placement.mesh[1]) == (kind, used)
    assert sorted(i for group in placement.groups for i in group) == list(range(networks))
    assert f"{used} of" in placement.reason


@pytest.mark.usefixtures("four_devices")
def test_dear_networks_are_spread() -> None:
    costs = [5, 1, 1, 4, 1]
    placement = ensemble.place(parts(costs), 8, Execution(placement="networks", devices=2))
    assert [sum(costs[i] for i in group) for group in placement.groups] == [6, 6]


@pytest.mark.usefixtures("four_devices")
@pytest.mark.parametrize(
    ("networks", "images", "settings", "message"),
    [
        (1, 6, {"devices": 4}, "4 devices cannot share 6 images evenly: .*devices 3$"),
        (1, 7, {"placement": "data"}, "devices 1$"),
        (3, 7, {"placement": "data"}, "7 images evenly, nor 3 networks: .*devices 1$"),
        (3, 8, {"placement": "networks", "devices": 4}, "nor 3 networks: .*devices 3$"),
        (1, 8, {"placement": "networks"}, "needs two networks and two devices"),
        (2, 8, {"placement": "networks", "devices": 1}, "there are 2 and 1"),
        (1, 8, {"images_at_once": 2, "devices": 4}, "8 images evenly, 2 at once: .*devices 2$"),
        (1, 10, {"devices": 5}, "5 devices asked for; there are 4 here"),
        (1, 10, {"devices": 0}, "devices must be a whole number of at least 1"),
    ],
)
def test_devices_that_do_not_fit_are_an_error(
    networks: int, images: int, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ensemble.place(parts([1.0] * networks), images, Execution(**settings))


def test_cost_counts_operations() -> None:
    small, large = tiny.network(widths=(4,)), tiny.network(widths=(64,), name="large")
    costs = [
        ensemble.Part(
            net.name,
            lambda v, x, t, net=net: {"label": net.apply(v, x).logits.sum()},
            {"label": 1.0},
            net.variables,
            (jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32), jax.ShapeDtypeStruct((2,), int)),
        ).cost()
        for net in (small, large)
    ]
    assert costs[1] > 8 * costs[0] > 0


# --- what does not fit ---------------------------------------------------------------------------


def test_a_network_that_cannot_take_the_images_is_named() -> None:
    def apply(variables: Any, images: jax.Array) -> Outputs:
        raise TypeError("17 is no channel")

    stubborn = dataclasses.replace(members()[1].net, name="stubborn", apply=apply)
    with pytest.raises(ValueError, match="stubborn cannot take 12 x 12 px images: 17 is no chan"):
        attack_of(members()[0], Member(stubborn))


def test_images_that_vanish_in_a_network_are_an_error() -> None:
    def apply(variables: Any, images: jax.Array) -> Outputs:
        return Outputs(jnp.zeros((len(images), 7)), None, (batch_moments(images[:, 20:]),))

    net = dataclasses.replace(tiny.network(), name="deep", apply=apply)
    with pytest.raises(ValueError, match=r"deep cannot take 16 x 16 px images: .* sees nothing"):
        attack_of(Member(net))


def test_a_network_without_a_term_is_named() -> None:
    with pytest.raises(ValueError, match="c adds nothing to the objective"):
        attack_of(members()[0], Member(members()[2].net, Weights(0, 0)))


def test_a_network_without_batch_norm_joins_with_its_label_loss() -> None:
    def apply(variables: dict, images: jax.Array) -> Outputs:
        return Outputs(images.mean((1, 2)) @ variables["w"], None, ())

    plain = Net("plain", apply, {"w": jnp.ones((3, 7))}, tiny.SPACE, 7, ())
    _, metrics = tiny.run(attack_of(members()[0], Member(plain)))
    assert "label[plain]" in metrics
    assert "batch_norm[plain]" not in metrics


def test_statistics_alone_need_no_labels() -> None:
    _, metrics = tiny.run(attack_of(Member(members()[0].net, Weights(label=0))))
    assert set(metrics) == {"loss", "batch_norm", "tv_l2", "tv_l1", "l2"}


# --- devices -------------------------------------------------------------------------------------

PLACED = """
import json, sys
sys.path[:0] = ["tests", "tests/objective"]
import jax, numpy as np
import tiny
from test_ensemble import CONFIG, members
from jinv.objective import ensemble
from jinv.attacks import deepinversion
from jinv.attacks.deepinversion import Phase
import dataclasses

config = dataclasses.replace(CONFIG, phases=(Phase(20, jitter=2),))
targets = [0, 1, 2, 3, 4, 5, 6, 0]

def run(**execution):
    attack = deepinversion.build(
        config, members(), targets, execution=ensemble.Execution(**execution)
    )
    state, metrics = tiny.run(attack)
    return attack, state, metrics

_, alone, expected = run(devices=1)
out = {}
for name, execution in {
    "data 4": dict(placement="data"),
    "data 4 in turns": dict(placement="data", images_at_once=4),
    "networks 2": dict(placement="networks", devices=2),
    "networks 4": dict(placement="networks"),
    "networks 2 at once": dict(placement="networks", devices=2, networks_at_once=None),
}.items():
    attack, state, metrics = run(**execution)
    used = len(state.images.sharding.device_set)
    leaves = jax.tree.leaves(attack.data.networks)
    out[name] = {
        "used": used,
        "groups": attack.placement.groups,
        "held": max(
            sum(leaf.addressable_shards[i].data.size for leaf in leaves) for i in range(used)
        ),
        "images": float(np.abs(np.asarray(state.images) - np.asarray(alone.images)).max()),
        "terms": max(float(np.abs(metrics[n] / expected[n] - 1).max()) for n in expected),
        "names": set(metrics) == set(expected),
        "moved": float(np.abs(np.asarray(state.images)).max()),
    }
print(json.dumps(out))
"""


def test_placements_find_the_images_of_one_device(run_python: Callable[..., Any]) -> None:
    """After 20 steps, and a device holds its own networks only."""
    found = run_python(textwrap.dedent(PLACED), devices=4)
    for name, part in found.items():
        assert part["used"] == int(name.split()[1]), name
        assert part["terms"] < 1e-3, (name, part)
        assert part["images"] < 5e-3, (name, part)
        assert part["moved"] > 0.5
        assert part["names"], name
    assert sorted(i for group in found["networks 2"]["groups"] for i in group) == [0, 1, 2, 3]
    assert found["networks 4"]["held"] < 0.6 * found["data 4"]["held"]


CONCURRENT = """
import dataclasses, json, sys, threading
sys.path[:0] = ["tests", "tests/objective"]
import jax
import tiny
from jinv import optimise
from jinv.objective import ensemble
from jinv.attacks import deepinversion
from jinv.attacks.deepinversion import Config, Phase
from jinv.objective.terms import Member

def waiting(name, meet):
    net = tiny.network(name=name)

    def apply(variables, images):
        seen = jax.lax.stop_gradient(images[:1, :1, :1])
        return net.apply(variables, images + 0 * jax.pure_callback(meet, seen, seen))

    return Member(dataclasses.replace(net, name=name, apply=apply))

out = {}
for placement, devices in (("data", 1), ("networks", 2)):
    barrier, met = threading.Barrier(2), []

    def meet(x):
        try:
            barrier.wait(60 if placement == "networks" else 0.2)
            met.append(True)
        except threading.BrokenBarrierError:
            met.append(False)
            barrier.reset()
        return x

    attack = deepinversion.build(
        Config(phases=(Phase(5, jitter=1),)), [waiting("a", meet), waiting("b", meet)], [0, 1, 2],
        execution=ensemble.Execution(devices, placement),
    )
    optimise.run(
        attack.phases, jax.random.key(0), attack.initial(jax.random.key(1)), attack.data
    )
    out[placement] = met
print(json.dumps(out))
"""


def test_networks_on_several_devices_are_computed_at_the_same_time(
    run_python: Callable[..., Any],
) -> None:
    """Of networks that wait in their forward pass until the other is there too."""
    found = run_python(textwrap.dedent(CONCURRENT), devices=2)
    assert len(found["data"]) >= 10
    assert not any(found["data"])
    assert len(found["networks"]) >= 10
    assert all(found["networks"])

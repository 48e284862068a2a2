"""Label losses and weighting against loops over Python floats; what a network adds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array
from jax.test_util import check_grads

import tiny
from jinv.attacks import deepinversion, gradient_inversion
from jinv.federated import evidence
from jinv.federated.evidence import Statistics
from jinv.image import Preprocessing
from jinv.net import Net, Outputs
from jinv.objective import priors
from jinv.objective.terms import Member, Weights, label_loss, network_terms, term_weights, weigh


@pytest.fixture
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def logits_and_targets(classes: int = 5, spread: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return spread * rng.standard_normal((4, classes)), np.asarray([0, 3, 3, classes - 1])


def cross_entropy_reference(logits: np.ndarray, targets: np.ndarray, temperature: float) -> float:
    total = 0.0
    for row, target in zip(logits, targets, strict=True):
        partition = sum(math.exp(v / temperature) for v in row)
        total -= math.log(math.exp(row[target] / temperature) / partition)
    return total / len(targets)


# --- label loss ----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 4.0, 0.5])
@pytest.mark.usefixtures("float64")
def test_cross_entropy_is_its_formula(temperature: float) -> None:
    logits, targets = logits_and_targets()

    def loss(logits: jax.Array) -> jax.Array:
        return label_loss(logits, jnp.asarray(targets), temperature=temperature)

    expected = cross_entropy_reference(logits, targets, temperature)
    np.testing.assert_allclose(loss(jnp.asarray(logits)), expected, rtol=1e-10)
    check_grads(jax.jit(loss), (jnp.asarray(logits),), 2, ["rev"], eps=1e-5, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("float64")
def test_target_logit_is_its_formula() -> None:
    """Minus the mean; the temperature does not matter."""
    logits, targets = logits_and_targets()

    def loss(logits: jax.Array) -> jax.Array:
        return label_loss(logits, jnp.asarray(targets), "target_logit", temperature=9.0)

    expected = -sum(row[t] for row, t in zip(logits, targets, strict=True)) / len(targets)
    np.testing.assert_allclose(loss(jnp.asarray(logits)), expected, rtol=1e-10)
    check_grads(jax.jit(loss), (jnp.asarray(logits),), 2, ["rev"], eps=1e-5, atol=1e-5, rtol=1e-5)


def test_cross_entropy_of_huge_logits_is_finite() -> None:
    logits = jnp.asarray([[1e4, 0.0], [0.0, 1e4]])
    value, gradient = jax.value_and_grad(label_loss)(logits, jnp.asarray([1, 1]))
    np.testing.assert_allclose(value, 5000)
    np.testing.assert_allclose(gradient, [[0.5, -0.5], [0, 0]])


def test_unknown_label_loss_is_an_error() -> None:
    with pytest.raises(ValueError, match="no label loss is called 'hinge'"):
        label_loss(jnp.ones((1, 2)), jnp.zeros(1, int), "hinge")  # type: ignore[arg-type]


# --- weigh ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("float64")
def test_weigh_is_the_weighted_sum() -> None:
    values = {"a": jnp.asarray(1.5), "b": jnp.asarray(-2.0), "c": jnp.asarray(0.25)}
    weights = {"c": 8.0, "a": 1e-4, "b": 3.0, "unused": 5.0}
    np.testing.assert_allclose(weigh(values, weights), 1.5e-4 - 6 + 2, rtol=1e-12)
    check_grads(lambda v: weigh(v, weights), (values,), 1)


def test_weigh_of_nothing_is_zero() -> None:
    assert float(weigh({}, {})) == 0


def test_value_without_weight_is_an_error() -> None:
    with pytest.raises(KeyError, match="b"):
        weigh({"a": jnp.ones(()), "b": jnp.ones(())}, {"a": 1.0})


# --- network terms -------------------------------------------------------------------------------


def terms_of(
    weights: Weights, net: Net | None = None, temperature: float = 1.0
) -> tuple[dict[str, jax.Array], Outputs, Net]:
    net = net or tiny.network()
    outputs = net(tiny.noise((4, 10, 14, 3), seed=5))
    targets = jnp.asarray([1, 0, 6, 6])
    member = Member(net, weights)
    terms = network_terms(member, outputs, net.variables, targets, "cross_entropy", temperature)
    return terms, outputs, net


def test_network_terms_are_the_label_loss_and_the_batch_norm_prior() -> None:
    weights = Weights(label=0.7, batch_norm=0.03, first_bn_multiplier=4, bn_weighting="relative")
    terms, outputs, net = terms_of(weights, temperature=2.0)
    assert list(terms) == ["label", "batch_norm"]
    assert term_weights(Member(net, weights)) == {"label": 0.7, "batch_norm": 0.03}
    expected = cross_entropy_reference(
        np.asarray(outputs.logits, np.float64), np.asarray([1, 0, 6, 6]), 2.0
    )
    np.testing.assert_allclose(terms["label"], expected, rtol=1e-5)
    expected = priors.batch_norm(
        outputs.moments, net.running_moments(), first_multiplier=4, weighting="relative"
    )
    np.testing.assert_allclose(terms["batch_norm"], expected, rtol=1e-6)
    other = terms_of(Weights(first_bn_multiplier=1, bn_weighting="relative"))[0]
    assert float(terms["batch_norm"]) > 1.5 * float(other["batch_norm"])


def test_running_statistics_come_from_the_variables_given() -> None:
    """Not from the net's own: they may have been trained on or put on devices."""
    net = tiny.network()
    outputs = net(tiny.noise((4, 10, 14, 3), seed=5))
    other = tiny.network(seed=1).variables
    args = (jnp.asarray([1, 0, 6, 6]), "cross_entropy", 1.0)
    terms = network_terms(Member(net), outputs, other, *args)
    expected = priors.batch_norm(outputs.moments, net.running_moments(other), first_multiplier=10)
    np.testing.assert_allclose(terms["batch_norm"], expected, rtol=1e-6)


def test_terms_of_weight_zero_are_left_out() -> None:
    assert list(terms_of(Weights(label=0))[0]) == ["batch_norm"]
    assert list(terms_of(Weights(batch_norm=0))[0]) == ["label"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bn_weighting": "foo"}, "bn_weighting must be one of published, relative, standardised"),
        ({"batch_norm": 0, "first_bn_multiplier": 1}, "first_bn_multiplier: 1 plays no part"),
        ({"batch_norm": 0, "bn_weighting": "relative"}, "bn_weighting: 'relative' plays no part"),
    ],
)
def test_weights_refuse(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Weights(**settings)


def test_network_without_batch_norm_adds_its_label_loss_only() -> None:
    def apply(variables: dict, images: jax.Array) -> Outputs:
        return Outputs(images.mean((1, 2)) @ variables["w"], None, ())

    net = Net("plain", apply, {"w": jnp.ones((3, 7))}, Preprocessing(size=8), 7, ())
    assert list(terms_of(Weights(batch_norm=1), net)[0]) == ["label"]


class Groups(nnx.Module):
    """GroupNorm keeps no running statistics."""

    def __init__(self) -> None:
        self.norm = nnx.GroupNorm(3, num_groups=1, rngs=nnx.Rngs(0))
        self.head = nnx.Linear(3, 4, rngs=nnx.Rngs(0))

    def __call__(self, x: Array) -> Array:
        return self.head(self.norm(x).mean((1, 2)))


def test_attacks_warn_once_that_there_are_no_statistics() -> None:
    net = Net.from_nnx(Groups(), Preprocessing(size=8))
    images = tiny.noise((2, 8, 8, 3))
    phases = (deepinversion.Phase(1),)
    client = gradient_inversion.Config(steps=1, seeds=1, group=0)
    message = r"Groups has no BatchNorm layers with running statistics: .*\(weight 0.\d+\) is left"
    with pytest.warns(UserWarning, match=message) as told:
        deepinversion.build(deepinversion.Config(phases=phases), [Member(net)], [0])
    assert [Path(warning.filename) for warning in told] == [Path(__file__)]
    knowledge: tuple[Statistics, ...] = ("none", "running", "exact")
    for statistics in knowledge:
        held, _ = evidence.simulate(net, images, [0, 1], statistics=statistics)
        with pytest.warns(UserWarning, match=message) as told:
            attack = gradient_inversion.build(client, net, held, [0, 1])
        assert len(told) == 1
        assert attack.data.moments == ()
        alone = dataclasses.replace(client, gradient=0.0, distance="l2")
        with pytest.raises(ValueError, match="nothing ties the images"):
            gradient_inversion.build(alone, net, held, [0, 1])
    nothing = Member(net, Weights(label=0.0))
    with pytest.raises(ValueError, match="Groups adds nothing to the objective"):
        deepinversion.build(deepinversion.Config(phases=phases), [nothing], [0])


def test_attacks_do_not_warn_where_the_term_is_not_asked_for(
    recwarn: pytest.WarningsRecorder,
) -> None:
    plain = Member(
        Net.from_nnx(Groups(), Preprocessing(size=8)),
        Weights(batch_norm=0.0, first_bn_multiplier=Weights().first_bn_multiplier),
    )
    for member in (plain, Member(tiny.network())):
        config = deepinversion.Config(phases=(deepinversion.Phase(1),))
        deepinversion.build(config, [member], [0])
    assert not recwarn.list

"""Label counts out of the last layer's gradient, exact where the theory says so."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax import Array

import tiny
from jinv import models
from jinv.federated import evidence, labels
from jinv.federated.evidence import Evidence, Local
from jinv.federated.labels import Head
from jinv.image import Preprocessing
from jinv.net import Net


def head_of(
    features: np.ndarray,
    chosen: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None,
    probabilities: np.ndarray | None = None,
) -> Head:
    """The head's gradient by its formula, in float64."""
    logits = features @ weight + (0 if bias is None else bias)
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    residual = (p - np.eye(weight.shape[1])[chosen]) / len(chosen)
    gradient = None if bias is None else residual.sum(0)
    return Head(weight, features.T @ residual, len(chosen), bias, gradient, probabilities)


def problem(
    seed: int, images: int = 12, classes: int = 20, scale: float = 0.01
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    features = np.abs(rng.normal(1, 0.3, (images, 30)))
    chosen = rng.integers(0, classes, images)
    return (
        features,
        chosen,
        scale * rng.normal(size=(30, classes)),
        scale * rng.normal(size=classes),
    )


@pytest.mark.parametrize("method", ["identity", "ilrg", "llg"])
def test_counts_with_repeats_are_exact_for_an_untrained_head(method: str) -> None:
    for seed in range(20):
        features, chosen, weight, bias = problem(seed)
        found = labels.restore(head_of(features, chosen, weight, bias), method)
        np.testing.assert_array_equal(found, np.bincount(chosen, minlength=20))


@pytest.mark.parametrize("method", ["identity", "llg"])
def test_counts_without_a_bias(method: str) -> None:
    hits = 0
    for seed in range(20):
        features, chosen, weight, _ = problem(seed)
        found = labels.restore(head_of(features, chosen, weight, None), method)
        assert found.sum() == 12
        hits += np.array_equal(found, np.bincount(chosen, minlength=20))
    assert hits >= 18


def test_the_identity_is_exact_whatever_the_head_says_if_its_predictions_are_known() -> None:
    """n_c = sum_k p_kc - K db_c: also for a head that is sure of itself."""
    for seed in range(20):
        features, chosen, weight, bias = problem(seed, scale=1.0)
        logits = features @ weight + bias
        p = np.exp(logits - logits.max(1, keepdims=True))
        mean = (p / p.sum(1, keepdims=True)).mean(0)
        found = labels.restore(head_of(features, chosen, weight, bias, mean), "identity")
        np.testing.assert_array_equal(found, np.bincount(chosen, minlength=20))


def test_the_minimum_finds_classes_that_occur_once() -> None:
    for seed in range(20):
        features, _, weight, bias = problem(seed)
        chosen = np.random.default_rng(seed).permutation(20)[:12]
        found = labels.restore(head_of(features, chosen, weight, bias), "minimum")
        np.testing.assert_array_equal(found, np.bincount(chosen, minlength=20))


@pytest.mark.parametrize("method", labels.METHODS)
def test_counts_are_whole_and_sum_to_the_batch(method: str) -> None:
    """Also where nothing fits: noise for a gradient, more images than classes."""
    rng = np.random.default_rng(0)
    for images, classes in ((1, 5), (7, 5), (64, 10)):
        head = Head(
            rng.normal(size=(8, classes)),
            rng.normal(size=(8, classes)),
            images,
            rng.normal(size=classes),
            rng.normal(size=classes),
        )
        found = labels.restore(head, method)
        assert found.dtype.kind == "i"
        assert found.sum() == images
        assert found.min() >= 0
        assert len(labels.as_list(found)) == images


def test_resnet18_untrained_gives_away_every_label_of_64() -> None:
    """1000 classes, repeats in every batch: 50 batches of 50."""
    net = models.load("resnet18", None)
    fc = jax.device_get(net.variables["fc"])

    @jax.jit
    def gradient(variables: dict, images: jax.Array, chosen: jax.Array) -> dict:
        features = net.apply(variables, images).features

        def loss(head: dict) -> jax.Array:
            log_p = jax.nn.log_softmax(features @ head["weight"] + head["bias"])
            return -jnp.take_along_axis(log_p, chosen[:, None], 1).mean()

        return jax.grad(loss)(variables["fc"])

    rng = np.random.default_rng(0)
    for _ in range(50):
        chosen = rng.integers(0, 1000, 64)
        chosen[:20] = rng.choice(chosen[40:], 20)
        images = rng.normal(size=(64, 32, 32, 3)).astype(np.float32)
        found = jax.device_get(gradient(net.variables, images, chosen))
        head = Head(fc["weight"], found["weight"], 64, fc["bias"], found["bias"])
        truth = np.bincount(chosen, minlength=1000)
        for method in ("identity", "ilrg", "llg"):
            np.testing.assert_array_equal(labels.restore(head, method), truth, err_msg=method)


@pytest.mark.parametrize("method", ["identity", "ilrg", "llg"])
def test_a_clipped_gradient_gives_the_same_counts(method: str) -> None:
    """Clipping scales by a factor that the attacker does not see."""
    for seed in range(20):
        features, chosen, weight, bias = problem(seed)
        head = head_of(features, chosen, weight, bias)
        assert head.bias_gradient is not None
        clipped = dataclasses.replace(
            head,
            weight_gradient=0.07 * head.weight_gradient,
            bias_gradient=0.07 * head.bias_gradient,
            scaled=True,
        )
        truth = np.bincount(chosen, minlength=20)
        np.testing.assert_array_equal(labels.restore(clipped, method), truth)


def test_an_update_is_read_halfway_through_its_steps() -> None:
    """A head that moves far while the client trains gives more away than its start alone."""
    net = models.load("lenet", None)
    local = Local(0.004, ((0, 1), (2, 3), (0, 1), (2, 3)))

    @jax.jit
    def sent(images: jax.Array, one_hot: jax.Array) -> dict:
        return evidence.observed(net, net.variables, images, one_hot, local=local)

    exact = {"start": 0, "halfway": 0}
    for seed in range(12):
        chosen = np.random.default_rng(seed).integers(0, 10, 4)
        values = sent(tiny.noise((4, 28, 28, 1), seed), jax.nn.one_hot(chosen, 10))
        halfway = labels.head_of(net, Evidence(jax.device_get(values), 4, local=local))
        start = labels.head_of(net, Evidence(jax.device_get(values), 4))
        start = dataclasses.replace(halfway, weight=start.weight, bias=start.bias)
        for name, head in (("start", start), ("halfway", halfway)):
            counts = labels.restore(head, "ilrg")
            exact[name] += np.array_equal(counts, np.bincount(chosen, minlength=10))
    assert exact["halfway"] >= exact["start"] + 3


@pytest.mark.parametrize("method", labels.METHODS)
def test_one_local_step_says_what_its_gradient_says(method: str) -> None:
    """It was taken at the weights before; also where the step is so long that they jump."""
    net = models.load("lenet", None)
    local = Local(64.0, ((0, 1, 2, 3, 4, 5, 6, 7),))
    for seed in range(3):
        chosen = np.random.default_rng(seed).integers(0, 10, 8).tolist()
        images = tiny.noise((8, 28, 28, 1), seed)
        gradient, _ = evidence.simulate(net, images, chosen)
        update = jax.tree.map(lambda g: -local.lr * g, gradient.values)
        one = labels.head_of(net, gradient)
        other = labels.head_of(net, Evidence(update, 8, local=local))
        np.testing.assert_array_equal(one.weight, other.weight)
        np.testing.assert_array_equal(one.bias, other.bias)
        np.testing.assert_array_equal(one.weight_gradient, other.weight_gradient)
        np.testing.assert_array_equal(labels.restore(one, method), labels.restore(other, method))


def test_orders_are_all_the_ways_to_share_classes_among_batches() -> None:
    batches = ((0, 1), (2, 3), (0, 1))
    found = labels.orders([1, 2, 3, 4], batches, most=50)
    assert found[0] == [1, 2, 3, 4]
    shared = {(frozenset(way[:2]), frozenset(way[2:])) for way in found}
    assert len(found) == len(shared) == 6
    assert len(labels.orders([1, 1, 2, 2], batches, most=50)) == 3
    assert len(labels.orders([1, 2, 3, 4], ((0, 1, 2, 3),), most=50)) == 1
    assert len(labels.orders(list(range(8)), batches=tuple((i,) for i in range(8)), most=5)) == 5


def test_scores_by_hand() -> None:
    found, truth = np.asarray([2, 1, 0, 1]), np.asarray([1, 0, 1, 2])
    assert labels.scores(found, truth) == {
        "accuracy": 2 / 4,
        "precision": 2 / 3,
        "recall": 2 / 3,
        "exact": 0.0,
    }
    assert set(labels.scores(truth, truth).values()) == {1.0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_gradient": np.zeros((3, 5))}, r"gradient is \(3, 5\), its weight \(3, 4\)"),
        ({"bias_gradient": None}, "a bias and its gradient, or neither"),
        ({"bias": np.zeros(5)}, r"bias is \(5,\), not \(4,\)"),
        ({"images": 0}, "at least one image"),
        ({"images": 2.5}, "a whole number of them, not 2.5"),
        ({"images": "2"}, "not '2'"),
        ({"images": True}, "not True"),
        ({"weight": np.zeros(4)}, r"weight is \(D, C\), one column a class, not \(4,\)"),
        ({"weight_gradient": np.full((3, 4), np.nan)}, "weight_gradient has values .* not finite"),
        ({"bias_gradient": [0, 0, 0, -np.inf]}, "bias_gradient has values that are not finite"),
        ({"weight": np.full((3, 4), np.inf)}, "head's weight has values that are not finite"),
        ({"bias": ["a"] * 4}, "bias holds .* no numbers"),
        ({"probabilities": [3, 0, 0, 1]}, "no distribution: they run from 0 to 3 and sum to 4"),
        ({"probabilities": [-1, 1, 1, 0]}, "no distribution"),
        ({"probabilities": [0.1] * 4}, r"sum to 0.4; give the mean of softmax\(logits\)"),
        ({"probabilities": [np.nan, 0, 0, 1]}, "probabilities has values that are not finite"),
    ],
)
def test_heads_that_do_not_fit_are_refused(settings: dict, message: str) -> None:
    fitting = {
        "weight": np.zeros((3, 4)),
        "weight_gradient": np.zeros((3, 4)),
        "images": 2,
        "bias": np.zeros(4),
        "bias_gradient": np.zeros(4),
    }
    with pytest.raises(ValueError, match=message):
        Head(**(fitting | settings))


def test_methods_say_what_they_need() -> None:
    head = Head(np.zeros((3, 4)), np.ones((3, 4)), 2)
    with pytest.raises(ValueError, match="this head has none"):
        labels.restore(head, "ilrg")
    with pytest.raises(ValueError, match="method must be one of minimum, identity, ilrg, llg"):
        labels.restore(head, "guess")


def test_a_method_of_ones_own_is_restored_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels, "METHODS", dict(labels.METHODS))
    head = labels.Head(np.zeros((2, 3)), np.zeros((2, 3)), images=4)
    with pytest.raises(ValueError, match="method must be one of minimum, identity, ilrg, llg, not"):
        labels.restore(head, "first")
    labels.register("first", lambda head: np.eye(head.classes, dtype=int)[0] * head.images)
    assert labels.restore(head, "first").tolist() == [4, 0, 0]
    with pytest.raises(ValueError, match="cannot be called 'llg'"):
        labels.register("llg", labels.llg)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([2, 2], r"returns 3 whole numbers .*; own returned int64 values of shape \(2,\)"),
        ([[4, 0, 0]], r"of shape \(1, 3\)"),
        (None, "returned object values"),
        ([True, True, False], "returned bool values"),
        ([1, 1, 1], r"that sum to 4; own returned \[1, 1, 1\]"),
        ([5, -1, 0], r"returned \[5, -1, 0\]"),
        ([2.5, 1.5, 0], r"returned \[2.5, 1.5, 0.0\]"),
        ([np.nan, 4, 0], "returned"),
    ],
)
def test_what_a_method_of_ones_own_returns_is_checked(
    monkeypatch: pytest.MonkeyPatch, counts: object, message: str
) -> None:
    head = labels.Head(np.zeros((2, 3)), np.zeros((2, 3)), images=4)
    monkeypatch.setitem(labels.METHODS, "own", lambda head: counts)
    with pytest.raises(ValueError, match=message):
        labels.restore(head, "own")


def test_whole_floats_are_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    head = labels.Head(np.zeros((2, 3)), np.zeros((2, 3)), images=4)
    monkeypatch.setitem(labels.METHODS, "own", lambda head: [3.0, 1.0, 0.0])
    assert labels.as_list(labels.restore(head, "own")) == [0, 0, 0, 1]


class Between(nnx.Module):
    """A gate in the middle with as many outputs as there are classes, and a head."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(3, 5, (3, 3), rngs=rngs)
        self.gate = nnx.Linear(5, 5, rngs=rngs)
        self.head = nnx.Linear(5, 5, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = nnx.relu(self.conv(x)).mean((1, 2))
        return self.head(x * nnx.sigmoid(self.gate(x)))


class BetweenLinen(linen.Module):
    @linen.compact
    def __call__(self, x: Array) -> Array:
        x = nnx.relu(linen.Conv(5, (3, 3))(x)).mean((1, 2))
        return linen.Dense(5, name="a_head")(x * nnx.sigmoid(linen.Dense(5, name="gate")(x)))


def test_a_known_head_is_taken_where_another_layer_has_as_many_outputs() -> None:
    images, classes = tiny.noise((6, 8, 8, 3)), [0, 1, 1, 4, 4, 4]
    space = Preprocessing(size=8)
    variables = BetweenLinen().init(jax.random.key(0), images)
    for net, name in (
        (Net.from_nnx(Between(), space), ("head",)),
        (Net.from_linen(BetweenLinen(), variables, space), ("params", "a_head")),
    ):
        held, _ = evidence.simulate(net, images, classes)
        found = labels.head_of(net, held)
        layer: Any = net.variables
        gradient: Any = held.values
        for key in name:
            layer, gradient = layer[key], gradient[key]
        np.testing.assert_array_equal(found.weight, layer["kernel"])
        np.testing.assert_array_equal(found.weight_gradient, gradient["kernel"])
        np.testing.assert_array_equal(labels.restore(found), np.bincount(classes, minlength=5))
        with pytest.raises(ValueError, match=r"the one linear layer with 5 outputs; here: .*gate"):
            labels.head_of(dataclasses.replace(net, head=None), held)


class Alone(nnx.Module):
    """A head of another kind."""

    def __init__(self, kind: str) -> None:
        rngs = nnx.Rngs(0)
        self.head: Any = (
            nnx.LinearGeneral(3, 5, rngs=rngs)
            if kind == "general"
            else nnx.Conv(3, 5, (1, 1), rngs=rngs)
        )

    def __call__(self, x: Array) -> Array:
        return self.head(x).mean((1, 2))


def test_other_heads_are_guessed_or_refused_in_words() -> None:
    images = tiny.noise((3, 8, 8, 3))
    net = Net.from_nnx(Alone("general"), Preprocessing(size=8))
    held, _ = evidence.simulate(net, images, [0, 1, 1])
    np.testing.assert_array_equal(labels.head_of(net, held).weight, net.variables["head"]["kernel"])
    net = Net.from_nnx(Alone("convolution"), Preprocessing(size=8))
    held, _ = evidence.simulate(net, images, [0, 1, 1])
    with pytest.raises(ValueError, match=r"here: none .Alone must end in .*no convolution"):
        labels.head_of(net, held)

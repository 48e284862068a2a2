"""Label counts out of the last layer's gradient, exact where the theory says so."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jinv import models
from jinv.attacks import labels
from jinv.attacks.labels import Head


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
    with pytest.raises(ValueError, match="there are: minimum, identity, ilrg, llg"):
        labels.restore(head, "guess")

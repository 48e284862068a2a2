"""Every prior against loops over Python floats, and its gradient against finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jinv.net import Moments
from jinv.objective import priors

WEIGHTINGS = ("published", "relative", "standardised")
SHAPES = pytest.mark.parametrize("shape", [(3, 5, 4, 3), (1, 2, 7, 1)], ids=["rgb", "gray"])
CHANNELS = (4, 6, 3)


@pytest.fixture
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def normal(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def close(found: Any, expected: float) -> None:
    assert jnp.asarray(found).shape == ()
    assert jnp.asarray(found).dtype == jnp.float64
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def gradients_agree(loss: Callable[..., Any], *args: Any, order: int) -> None:
    """With central differences; forward mode too where one order is checked."""
    modes = ["fwd", "rev"] if order == 1 else ["rev"]
    check_grads(jax.jit(loss), args, order, modes, eps=1e-5, atol=1e-5, rtol=1e-5)


# --- references ----------------------------------------------------------------------------------


def neighbour_pairs(x: np.ndarray) -> list[list[float]]:
    """Differences of horizontal, vertical, falling and rising diagonal neighbours."""
    batch, height, width, channels = x.shape
    directions: list[list[float]] = []
    for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1)):
        found = []
        for b in range(batch):
            for i in range(height):
                for j in range(width):
                    for c in range(channels):
                        if i + dy < height and 0 <= j + dx < width:
                            found.append(float(x[b, i, j, c] - x[b, i + dy, j + dx, c]))
        directions.append(found)
    return directions


def length(values: Any) -> float:
    return math.sqrt(sum(float(v) ** 2 for v in values))


def batch_norm_reference(
    moments: list[Moments], running: list[Moments], first: float, weighting: str, eps: float
) -> float:
    total = 0.0
    for layer, (batch, stored) in enumerate(zip(moments, running, strict=True)):
        count = len(stored.mean)
        means = [batch.mean[c] - stored.mean[c] for c in range(count)]
        variances = [batch.var[c] - stored.var[c] for c in range(count)]
        if weighting == "published":
            value = length(means) + length(variances)
        elif weighting == "relative":
            value = length(means) / length(math.sqrt(v + eps) for v in stored.var)
            value += length(variances) / length(v + eps for v in stored.var)
        else:
            value = length(means[c] / math.sqrt(stored.var[c] + eps) for c in range(count))
            value += length(variances[c] / (stored.var[c] + eps) for c in range(count))
            value /= math.sqrt(count)
        total += value * (first if layer == 0 else 1)
    return total


def layers(seed: int = 0) -> list[Moments]:
    """Random moments of three layers, of very different sizes."""
    rng = np.random.default_rng(seed)
    return [
        Moments(scale * rng.standard_normal(count), scale**2 * rng.uniform(0.1, 2, count))
        for scale, count in zip((1.0, 5.0, 0.2), CHANNELS, strict=True)
    ]


# --- norm ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("float64")
def test_norm_is_the_root_of_the_sum_of_squares() -> None:
    x = normal((3, 4, 5))
    close(priors.norm(jnp.asarray(x)), length(x.ravel()))
    rows = priors.norm(jnp.asarray(x), axis=(1, 2))
    np.testing.assert_allclose(rows, [length(row.ravel()) for row in x], rtol=1e-12)
    gradients_agree(priors.norm, jnp.asarray(x), order=2)


def test_norm_of_zeros_has_zero_gradient() -> None:
    """Also of one zero row among others."""
    assert float(priors.norm(jnp.zeros(5))) == 0
    np.testing.assert_array_equal(jax.grad(priors.norm)(jnp.zeros(5)), np.zeros(5))
    x = jnp.asarray([[3.0, 4.0], [0.0, 0.0]])
    value, gradient = jax.value_and_grad(lambda x: priors.norm(x, axis=1).sum())(x)
    assert float(value) == 5
    np.testing.assert_allclose(gradient, [[0.6, 0.8], [0, 0]], rtol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_norm_of_non_finite_is_not_finite(bad: float) -> None:
    """Or images that broke would look perfect."""
    assert not np.isfinite(priors.norm(jnp.asarray([1.0, bad])))
    images = jnp.ones((2, 4, 4, 3)).at[0, 1, 1, 0].set(bad)
    for prior in (priors.total_variation_l2, priors.total_variation_l1, priors.l2):
        assert not np.isfinite(prior(images)), prior.__name__
    moments = (Moments(jnp.asarray([0.0, bad]), jnp.ones(2)),)
    for weighting in WEIGHTINGS:
        running = (Moments(jnp.zeros(2), jnp.ones(2)),)
        assert not np.isfinite(priors.batch_norm(moments, running, weighting=weighting))


# --- images --------------------------------------------------------------------------------------


@SHAPES
@pytest.mark.usefixtures("float64")
def test_total_variation_l2_is_its_formula(shape: tuple[int, ...]) -> None:
    x = normal(shape)
    expected = sum(length(direction) for direction in neighbour_pairs(x))
    close(priors.total_variation_l2(jnp.asarray(x)), expected)
    gradients_agree(priors.total_variation_l2, jnp.asarray(x), order=2)


@SHAPES
@pytest.mark.usefixtures("float64")
def test_total_variation_l1_is_its_formula(shape: tuple[int, ...]) -> None:
    x = normal(shape)
    expected = sum(
        sum(abs(d) for d in direction) / len(direction) for direction in neighbour_pairs(x)
    )
    close(priors.total_variation_l1(jnp.asarray(x)), expected)
    gradients_agree(priors.total_variation_l1, jnp.asarray(x), order=1)


@SHAPES
@pytest.mark.usefixtures("float64")
def test_l2_is_its_formula(shape: tuple[int, ...]) -> None:
    x = normal(shape)
    expected = sum(length(image.ravel()) for image in x) / len(x)
    close(priors.l2(jnp.asarray(x)), expected)
    gradients_agree(priors.l2, jnp.asarray(x), order=2)


@pytest.mark.parametrize("prior", [priors.total_variation_l2, priors.total_variation_l1])
def test_total_variation_of_a_constant_image_is_zero(prior: Callable[..., Any]) -> None:
    """With a gradient of 0, not NaN; each image and channel may have its own constant."""
    constants = jnp.asarray(normal((2, 1, 1, 3)), jnp.float32)
    images = jnp.broadcast_to(constants, (2, 5, 4, 3))
    value, gradient = jax.jit(jax.value_and_grad(prior))(images)
    assert float(value) == 0
    np.testing.assert_array_equal(gradient, np.zeros_like(images))


def test_l2_of_black_images_has_zero_gradient() -> None:
    value, gradient = jax.value_and_grad(priors.l2)(jnp.zeros((2, 3, 3, 1)))
    assert float(value) == 0
    np.testing.assert_array_equal(gradient, np.zeros((2, 3, 3, 1)))


# --- BatchNorm -----------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.usefixtures("float64")
def test_batch_norm_is_its_formula(weighting: priors.LayerWeighting) -> None:
    moments, running = layers(0), layers(1)
    stored = [Moments(jnp.asarray(m.mean), jnp.asarray(m.var)) for m in running]

    def loss(moments: list[Moments]) -> jax.Array:
        return priors.batch_norm(moments, stored, first_multiplier=10, weighting=weighting, eps=0.5)

    arrays = [Moments(jnp.asarray(m.mean), jnp.asarray(m.var)) for m in moments]
    close(loss(arrays), batch_norm_reference(moments, running, 10, weighting, 0.5))
    gradients_agree(loss, arrays, order=2)
    # With no multiplier and the usual eps, of which two weightings take notice.
    expected = batch_norm_reference(moments, running, 1, weighting, 1e-3)
    close(priors.batch_norm(arrays, stored, weighting=weighting), expected)


def test_published_weighting_is_the_default() -> None:
    moments, running = layers(0), layers(1)
    found = priors.batch_norm(moments, running)
    expected = batch_norm_reference(moments, running, 1, "published", 0)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_matching_moments_give_batch_norm_loss_zero(weighting: priors.LayerWeighting) -> None:
    """With a gradient of 0, not NaN."""
    running = [Moments(jnp.asarray(m.mean), jnp.asarray(m.var)) for m in layers()]

    def loss(moments: list[Moments]) -> jax.Array:
        return priors.batch_norm(moments, running, first_multiplier=10, weighting=weighting)

    value, gradient = jax.value_and_grad(loss)(running)
    assert float(value) == 0
    for leaf in jax.tree.leaves(gradient):
        np.testing.assert_array_equal(leaf, np.zeros_like(leaf))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("dead", ["one channel", "all channels"])
def test_running_var_of_zero_gives_finite_losses(
    weighting: priors.LayerWeighting, dead: str
) -> None:
    var = jnp.zeros(3) if dead == "all channels" else jnp.asarray([1.0, 0.0, 2.0])
    running = [Moments(jnp.zeros(3), var)]

    def loss(moments: list[Moments]) -> jax.Array:
        return priors.batch_norm(moments, running, weighting=weighting)

    for moments in ([Moments(jnp.asarray([0.1, 0.2, 0.3]), jnp.ones(3))], running):
        value, gradient = jax.value_and_grad(loss)(moments)
        assert np.isfinite(value)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_mismatched_number_of_layers_is_an_error() -> None:
    with pytest.raises(ValueError, match="3 layers' moments against 2 running ones"):
        priors.batch_norm(layers(), layers()[:2])


def test_unknown_weighting_is_an_error() -> None:
    with pytest.raises(ValueError, match="no layer weighting is called 'equal'"):
        priors.batch_norm(layers(), layers(), weighting="equal")  # type: ignore[arg-type]


# --- disagreement --------------------------------------------------------------------------------


def disagreement_reference(teacher: Any, student: Any, temperature: float) -> Any:
    """R_adi in torch, with its own KL divergence."""
    torch = pytest.importorskip("torch")
    p = torch.softmax(student / temperature, dim=1)
    q = torch.softmax(teacher / temperature, dim=1)
    middle = 0.5 * (p + q)
    p, q, middle = (torch.clamp(x, 0.01, 0.99) for x in (p, q, middle))
    kl = torch.nn.KLDivLoss(reduction="batchmean")
    jensen_shannon = 0.5 * kl(torch.log(p), middle) + 0.5 * kl(torch.log(q), middle)
    return 1 - torch.clamp(jensen_shannon, 0.0, 1.0)


@pytest.mark.parametrize(
    ("spread", "temperature"),
    [(1.0, 3.0), (4.0, 3.0), (12.0, 3.0), (4.0, 1.0)],
    ids=["soft", "some clamped", "mostly clamped", "cold"],
)
@pytest.mark.usefixtures("float64")
def test_disagreement_equals_torch(spread: float, temperature: float) -> None:
    torch = pytest.importorskip("torch")
    teacher, student = spread * normal((4, 6), 0), spread * normal((4, 6), 1)
    tensors = [torch.tensor(x, requires_grad=True) for x in (teacher, student)]
    expected = disagreement_reference(tensors[0], tensors[1], temperature)
    expected.backward()
    value, gradients = jax.value_and_grad(
        lambda t, s: priors.disagreement(t, s, temperature), argnums=(0, 1)
    )(jnp.asarray(teacher), jnp.asarray(student))
    close(value, expected.item())
    assert 0 < float(value) < 1
    for found, tensor in zip(gradients, tensors, strict=True):
        np.testing.assert_allclose(found, tensor.grad, rtol=1e-8, atol=1e-12)


@pytest.mark.usefixtures("float64")
def test_disagreement_passes_the_gradient_check() -> None:
    """With no probability at the clamps, where it is smooth."""
    teacher, student = jnp.asarray(normal((3, 5), 0)), jnp.asarray(normal((3, 5), 1))
    gradients_agree(priors.disagreement, teacher, student, order=2)


def test_disagreement_of_equal_networks_is_one() -> None:
    logits = jnp.asarray(normal((4, 6)), jnp.float32)
    value, gradient = jax.value_and_grad(priors.disagreement, argnums=1)(logits, logits)
    np.testing.assert_allclose(value, 1, atol=1e-6)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_disagreement_rewards_what_the_student_gets_wrong() -> None:
    """And never leaves [0, 1]."""
    teacher = 50 * jnp.eye(4)[jnp.zeros(3, int)]
    right, wrong = teacher, 50 * jnp.eye(4)[jnp.ones(3, int)]
    assert 0 <= float(priors.disagreement(teacher, wrong)) < 0.5
    assert float(priors.disagreement(teacher, right)) > 0.99

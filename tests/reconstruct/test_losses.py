"""The reconstructor's losses against loops, against torch, and against differences."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jinv.reconstruct import losses
from jinv.scores import lpips


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, shape)


def naive(found: np.ndarray, sets: np.ndarray, members: np.ndarray, alpha: float) -> np.ndarray:
    values = []
    for image, others, chosen in zip(found, sets, members, strict=True):
        apart = [image - other for other, keep in zip(others, chosen, strict=True) if keep]
        each = np.asarray([0.5 * (np.mean(d**2) + np.mean(np.abs(d))) for d in apart])
        weights = np.exp(-alpha * (each - each.min()))
        values.append((weights * each).sum() / weights.sum())
    return np.asarray(values)


def test_an_image_s_loss_is_the_mean_of_mse_and_mae() -> None:
    found, truth = drawn(3, 4, 5, 2), drawn(3, 4, 5, 2, seed=1)
    expected = naive(found, truth[:, None], np.ones((3, 1), bool), 100)
    np.testing.assert_allclose(losses.image_loss(found, truth), expected, rtol=1e-6)
    np.testing.assert_array_equal(losses.image_loss(truth, truth), 0)


@pytest.mark.parametrize("alpha", [0.0, 3.0, 100.0])
def test_a_set_s_loss_is_the_softmin_of_its_images_losses(alpha: float) -> None:
    found, sets = drawn(3, 4, 4, 1), drawn(3, 5, 4, 4, 1, seed=1)
    labels, set_labels = np.arange(3), np.asarray([[0, 1, 2, 0, 1]] * 3)
    members = labels[:, None] == set_labels
    with jax.enable_x64(True):
        every = losses.set_loss(jnp.asarray(found), jnp.asarray(sets), alpha=alpha)
        some = losses.set_loss(jnp.asarray(found), jnp.asarray(sets), members, alpha=alpha)
    np.testing.assert_allclose(every, naive(found, sets, members | True, alpha), rtol=1e-12)
    np.testing.assert_allclose(some, naive(found, sets, members, alpha), rtol=1e-12)


def test_a_set_of_one_image_is_that_image() -> None:
    found, truth = drawn(3, 4, 4, 1), drawn(3, 4, 4, 1, seed=1)
    np.testing.assert_allclose(
        losses.set_loss(found, truth[:, None]), losses.image_loss(found, truth), rtol=1e-6
    )


def test_gradients_pass_through_the_weights_as_torch_s_do() -> None:
    found, sets = drawn(2, 3, 3, 1), drawn(2, 4, 3, 3, 1, seed=1)
    ours = torch.from_numpy(found).requires_grad_()
    apart = ours[:, None] - torch.from_numpy(sets)
    each = 0.5 * (apart.square().mean((2, 3, 4)) + apart.abs().mean((2, 3, 4)))
    (torch.softmax(-20 * each, 1) * each).sum(1).mean().backward()
    assert ours.grad is not None

    def loss(x: Any) -> Any:
        return losses.set_loss(x, jnp.asarray(sets), alpha=20).mean()

    with jax.enable_x64(True):
        gradient = np.asarray(jax.grad(loss)(jnp.asarray(found)))
        step = 1e-6 * drawn(*found.shape, seed=2)
        difference = (loss(found + step) - loss(found - step)) / 2
    np.testing.assert_allclose(gradient, ours.grad.numpy(), rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose((gradient * step).sum(), difference, rtol=1e-6)


def test_members_that_do_not_count_get_no_gradient() -> None:
    found, sets = drawn(2, 3, 3, 1), drawn(2, 2, 3, 3, 1, seed=1)
    members = np.asarray([[True, False], [True, True]])
    gradient = jax.grad(lambda s: losses.set_loss(found, s, members).sum())(jnp.asarray(sets))
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[0, 1], 0)
    assert np.abs(gradient[0, 0]).max() > 0


def test_lpips_is_added_before_the_softmin() -> None:
    heads = [jnp.ones(3), jnp.ones(3)]

    def perceptual(a: Any, b: Any) -> Any:
        return lpips.distance(lambda x: [x, jax.nn.relu(x)], heads, a, b)

    found, sets = drawn(2, 4, 4, 3), drawn(2, 3, 4, 4, 3, seed=1)
    repeated, flat = np.repeat(found, 3, 0), sets.reshape(6, 4, 4, 3)
    pairs = perceptual((repeated + 1) / 2, (flat + 1) / 2).reshape(2, 3)
    each = np.asarray(losses.image_loss(repeated, flat)).reshape(2, 3) + np.asarray(pairs)
    weights = np.exp(-7 * each)
    expected = (weights * each).sum(1) / weights.sum(1)
    np.testing.assert_allclose(
        losses.set_loss(found, sets, alpha=7, perceptual=perceptual), expected, rtol=1e-5
    )
    np.testing.assert_allclose(
        losses.image_loss(found, sets[:, 0], perceptual), each[:, 0], rtol=1e-5
    )


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3, 3, 1\) have no images \(2, 1, 4, 3, 1\)"):
        losses.image_loss(jnp.zeros((2, 3, 3, 1)), jnp.zeros((2, 4, 3, 1)))

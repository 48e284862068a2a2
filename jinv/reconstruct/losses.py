"""What a reconstructor learns to make small (arXiv 2505.14323), images (B, H, W, C) in [-1, 1].

Every loss is one number an image; a step takes the batch's mean.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

ALPHA = 100.0
"""The published sharpness of the softmin."""

Perceptual = Callable[[Array, Array], Array]
"""LPIPS of pixels in [0, 1] with its variables bound, see `jinv.scores.lpips.differentiable`:
(found (B, H, W, C), truth (K B, H, W, C), K for each found) -> (K B,)."""


def image_loss(found: Array, truth: Array, perceptual: Perceptual | None = None) -> Array:
    """(MSE + MAE) / 2, and LPIPS if it is given: (B,).

    Args:
      found: reconstructions.
      truth: the image of each.
      perceptual: LPIPS.
    """
    return _errors(found, truth[:, None], perceptual)[:, 0]


def set_loss(
    found: Array,
    sets: Array,
    members: Array | None = None,
    *,
    alpha: float = ALPHA,
    perceptual: Perceptual | None = None,
) -> Array:
    """Return the loss (B,) of reconstructions against whichever of several images they resemble.

    sum_k w_k l_k with w = softmax(-alpha l) and l_k the `image_loss` against image k. Gradients
    pass through the weights, too.

    Args:
      found: reconstructions.
      sets: (B, K, H, W, C), the training images that each may be of.
      members: (B, K) booleans, which of these count, such as `labels[:, None] == set_labels` where
        the reconstructor was told a class; all by default. Each needs one.
      alpha: sharpness of the softmin.
      perceptual: LPIPS.
    """
    errors = _errors(found, sets, perceptual)
    sharp = -alpha * errors
    if members is not None:
        sharp = jnp.where(members, sharp, -jnp.inf)
    return (jax.nn.softmax(sharp, -1) * errors).sum(-1)


def _errors(found: Array, sets: Array, perceptual: Perceptual | None) -> Array:
    """(B, K) losses against every image of a set (B, K, H, W, C)."""
    if sets.shape != (len(found), sets.shape[1], *found.shape[1:]):
        raise ValueError(f"reconstructions {found.shape} have no images {sets.shape} to be of")
    apart = found[:, None] - sets
    axes = (-3, -2, -1)
    errors = 0.5 * (jnp.square(apart).mean(axes) + jnp.abs(apart).mean(axes))
    if perceptual is not None:
        flat = sets.reshape(-1, *sets.shape[2:])
        errors = errors + perceptual((found + 1) / 2, (flat + 1) / 2).reshape(errors.shape)
    return errors

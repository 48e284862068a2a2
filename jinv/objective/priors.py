"""What makes an array look like an image or like training data.

Arrays -> scalar, one equation each. Images are (B, H, W, C). Nothing here
knows a network: the BatchNorm prior compares moments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from jinv.net import Moments

LayerWeighting = Literal["published", "relative", "standardised"]


def norm(x: Array, axis: int | tuple[int, ...] | None = None) -> Array:
    """||x||_2 over `axis` (all by default), with gradient 0, not NaN, where x is 0."""
    return root(jnp.square(x).sum(axis))


def root(square: Array) -> Array:
    """sqrt(x), with gradient 0, not infinite, where x is 0."""
    zero = square == 0  # asked this way round, NaN stays NaN
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, square)))


def _absolute(x: Array) -> Array:
    """|x|, with gradient 0 at 0 (that of `jnp.abs` is 1): clipped pixels often are equal."""
    return jnp.where(x == 0, 0, jnp.abs(x))


def _neighbour_differences(images: Array) -> tuple[Array, ...]:
    """Subtract neighbours: horizontal, vertical, and along both diagonals."""
    return (
        images[:, :, :-1] - images[:, :, 1:],
        images[:, :-1] - images[:, 1:],
        images[:, 1:, :-1] - images[:, :-1, 1:],
        images[:, :-1, :-1] - images[:, 1:, 1:],
    )


def total_variation_l2(images: Array) -> Array:
    """TV_2 = sum over the four neighbour directions d of ||x - shift_d(x)||_2 over the batch.

    arXiv 1912.08795, R_TV as in the authors' code.
    """
    return sum((norm(d) for d in _neighbour_differences(images)), jnp.zeros(()))


def total_variation_l1(images: Array) -> Array:
    """TV_1 = sum over the four neighbour directions d of mean |x - shift_d(x)|."""
    return sum((_absolute(d).mean() for d in _neighbour_differences(images)), jnp.zeros(()))


def l2(images: Array) -> Array:
    """mean_i ||x_i||_2 over the images of the batch. arXiv 1912.08795, R_l2."""
    return norm(images, axis=(1, 2, 3)).mean()


def batch_norm(
    moments: Sequence[Moments],
    running: Sequence[Moments],
    *,
    first_multiplier: float = 1.0,
    weighting: LayerWeighting = "published",
    eps: float = 1e-3,
) -> Array:
    """sum_l w_l (||mu_l - mu^_l||_2 + ||var_l - var^_l||_2). arXiv 1912.08795, equation 4.

    Args:
      moments: of the batch, at the input of every BatchNorm layer in forward order.
      running: the networks' running statistics, same order.
      first_multiplier: w of the first layer; the others' is 1.
      weighting: the units of the two norms.
        "published": the layer's own; layers of large activations dominate.
        "relative": each norm over the norm of the running statistic it is compared to (means
        over the norm of the standard deviations, since means may all be near 0).
        "standardised": channel by channel in units of the running standard deviation (means)
        and variance, over sqrt(channels): every channel of every layer counts alike.
      eps: added to running variances that divide; some are exactly 0 in published networks.

    Raises:
      ValueError: different numbers of layers, or an unknown weighting.
    """
    if len(moments) != len(running):
        raise ValueError(f"{len(moments)} layers' moments against {len(running)} running ones")
    total = jnp.zeros(())
    for i, (batch, stored) in enumerate(zip(moments, running, strict=True)):
        mean, var = batch.mean - stored.mean, batch.var - stored.var
        scale = stored.var + eps
        if weighting == "published":
            layer = norm(mean) + norm(var)
        elif weighting == "relative":
            layer = norm(mean) / norm(jnp.sqrt(scale)) + norm(var) / norm(scale)
        elif weighting == "standardised":
            layer = (norm(mean / jnp.sqrt(scale)) + norm(var / scale)) / jnp.sqrt(mean.size)
        else:
            raise ValueError(f"no layer weighting is called {weighting!r}")
        total = total + layer * (first_multiplier if i == 0 else 1.0)
    return total


def disagreement(teacher: Array, student: Array, temperature: float = 3.0) -> Array:
    """R_adi = 1 - clip(JS, 0, 1) of two networks' logits (B, classes).

    JS = (KL(M || p) + KL(M || q)) / 2 with p, q the softmax at `temperature`, M = (p + q) / 2,
    all three clamped to [0.01, 0.99]; KL is summed over classes, averaged over the batch.
    arXiv 1912.08795, equation 7, in the direction of KL that the authors' code computes.
    """
    p, q = jax.nn.softmax(teacher / temperature), jax.nn.softmax(student / temperature)
    p, q, middle = (jnp.clip(x, 0.01, 0.99) for x in (p, q, (p + q) / 2))

    def divergence(other: Array) -> Array:
        return (middle * (jnp.log(middle) - jnp.log(other))).sum(-1).mean()

    return 1 - jnp.clip((divergence(p) + divergence(q)) / 2, 0, 1)

"""AlexNet in its one-column form (arXiv 1404.5997), torchvision's `alexnet`: no BatchNorm."""

from __future__ import annotations

import functools

import jax
from flax import nnx
from jax import Array

from jinv.models.layers import Conv2d, Linear, Sequential, dropout, flatten, redraw
from jinv.models.pooling import adaptive_average_pool, max_pool


class AlexNet(nnx.Module):
    """Five convolutions and three linear layers."""

    def __init__(self, *, classes: int = 1000, rngs: nnx.Rngs) -> None:
        conv = functools.partial(Conv2d, bias=True, rngs=rngs)
        pool = functools.partial(max_pool, window=3, stride=2)
        self.features = Sequential(
            conv(3, 64, 11, stride=4, padding=2),
            jax.nn.relu,
            pool,
            conv(64, 192, 5, padding=2),
            jax.nn.relu,
            pool,
            conv(192, 384, 3, padding=1),
            jax.nn.relu,
            conv(384, 256, 3, padding=1),
            jax.nn.relu,
            conv(256, 256, 3, padding=1),
            jax.nn.relu,
            pool,
        )
        self.classifier = Sequential(
            dropout(0.5),
            Linear(256 * 6 * 6, 4096, rngs=rngs),
            jax.nn.relu,
            dropout(0.5),
            Linear(4096, 4096, rngs=rngs),
            jax.nn.relu,
            Linear(4096, classes, rngs=rngs),
        )
        # torch's default for convolutions: U(-a, a) with a = 1 / sqrt(fan-in).
        redraw(self, rngs, jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"))

    def __call__(self, x: Array) -> Array:
        """(B, H, W, 3) -> logits (B, classes)."""
        return self.classifier(flatten(adaptive_average_pool(self.features(x), 6)))

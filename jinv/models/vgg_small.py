"""A small VGG without BatchNorm for gray images of 28 or 32 px, as arXiv 2505.14323 wants one."""

from __future__ import annotations

import functools

import jax
from flax import nnx
from jax import Array

from jinv.models.layers import Conv2d, Layer, Linear, Sequential, flatten
from jinv.models.pooling import adaptive_average_pool, max_pool

WIDTHS = (32, 64, 128)
FEATURES = 256
_GRID = 4


class VGGSmall(nnx.Module):
    """Two 3x3 convolutions and a pooling in each of three stages, then two linear layers.

    The paper says no more than VGG, no BatchNorm, 256 features, 1 channel, 32 px. Chosen here: the
    widths, and that the last stage's 4 x 4 grid is flattened, which keeps what is where; of 28 px
    the 3 x 3 grid is stretched to it. Names are as in torchvision's VGG.
    """

    def __init__(self, *, channels: int = 1, classes: int = 26, rngs: nnx.Rngs) -> None:
        layers: list[Layer] = []
        inputs = channels
        for width in WIDTHS:
            for _ in range(2):
                conv = Conv2d(inputs, width, 3, padding=1, bias=True, rngs=rngs)
                layers += [conv, jax.nn.relu]
                inputs = width
            layers.append(functools.partial(max_pool, window=2, stride=2))
        self.features = Sequential(*layers)
        first = Linear(inputs * _GRID**2, FEATURES, rngs=rngs)
        last = Linear(FEATURES, classes, rngs=rngs)
        self.classifier = Sequential(first, jax.nn.relu, last)

    def __call__(self, x: Array) -> Array:
        """(B, H, W, channels) -> logits (B, classes)."""
        return self.classifier(flatten(adaptive_average_pool(self.features(x), _GRID)))

"""A small VGG without BatchNorm for gray images of 28 or 32 px, as arXiv 2505.14323 wants one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jinv.models.layers import Blank, Conv2d, Linear, adaptive_average_pool, max_pool

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
        layers: list[nnx.Module] = []
        inputs = channels
        for width in WIDTHS:
            for _ in range(2):
                layers += [Conv2d(inputs, width, 3, padding=1, bias=True, rngs=rngs), Blank()]
                inputs = width
            layers.append(Blank())
        self.features = nnx.List(layers)
        first = Linear(inputs * _GRID**2, FEATURES, rngs=rngs)
        self.classifier = nnx.List([first, Blank(), Linear(FEATURES, classes, rngs=rngs)])

    def __call__(self, x: Array) -> Array:
        """(B, H, W, channels) -> logits (B, classes)."""
        convs = [layer for layer in self.features if isinstance(layer, Conv2d)]
        for first, second in zip(convs[::2], convs[1::2], strict=True):
            x = max_pool(jax.nn.relu(second(jax.nn.relu(first(x)))), 2, 2)
        x = adaptive_average_pool(x, _GRID)
        # The first linear layer counts its inputs channel by channel, as torch flattens.
        x = jnp.transpose(x, (0, 3, 1, 2)).reshape(x.shape[0], -1)
        return self.classifier[2](jax.nn.relu(self.classifier[0](x)))

"""VGG with BatchNorm (arXiv 1409.1556): torchvision's `vgg*_bn`."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jinv.models.layers import (
    BatchNorm2d,
    Blank,
    Conv2d,
    Linear,
    adaptive_average_pool,
    max_pool,
)


class VGG(nnx.Module):
    """`depths` 3x3 convolutions in each of the five stages, then three linear layers."""

    def __init__(self, depths: Sequence[int], *, classes: int = 1000, rngs: nnx.Rngs) -> None:
        layers: list[nnx.Module] = []
        inputs = 3
        for depth, width in zip(depths, (64, 128, 256, 512, 512), strict=True):
            for _ in range(depth):
                conv = Conv2d(inputs, width, 3, padding=1, bias=True, rngs=rngs)
                layers += [conv, BatchNorm2d(width), Blank()]
                inputs = width
            layers.append(Blank())
        self.features = nnx.List(layers)
        self.depths = tuple(depths)
        self.classifier = nnx.List(
            [
                Linear(512 * 7 * 7, 4096, rngs=rngs),
                Blank(),
                Blank(),
                Linear(4096, 4096, rngs=rngs),
                Blank(),
                Blank(),
                Linear(4096, classes, rngs=rngs),
            ]
        )

    def __call__(self, x: Array) -> Array:
        """(B, H, W, 3) -> logits (B, classes)."""
        layers = iter(self.features)
        for depth in self.depths:
            for _ in range(depth):
                conv, norm, _ = next(layers), next(layers), next(layers)
                x = jax.nn.relu(norm(conv(x)))
            next(layers)
            x = max_pool(x, 2, 2)
        x = adaptive_average_pool(x, 7)
        # The first linear layer counts its inputs channel by channel, as torch flattens.
        x = jnp.transpose(x, (0, 3, 1, 2)).reshape(x.shape[0], -1)
        x = jax.nn.relu(self.classifier[0](x))
        x = jax.nn.relu(self.classifier[3](x))
        return self.classifier[6](x)

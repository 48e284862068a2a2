"""VGG (arXiv 1409.1556): torchvision's `vgg*`, and `vgg*_bn` with BatchNorm."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
from flax import nnx
from jax import Array

from jinv.models.layers import BatchNorm2d, Conv2d, Layer, Linear, Sequential, dropout, flatten
from jinv.models.pooling import adaptive_average_pool, max_pool

_pool = functools.partial(max_pool, window=2, stride=2)


class VGG(nnx.Module):
    """`depths` 3x3 convolutions in each of the five stages, then three linear layers."""

    def __init__(
        self,
        depths: Sequence[int],
        *,
        batch_norm: bool = False,
        classes: int = 1000,
        rngs: nnx.Rngs,
    ) -> None:
        layers: list[Layer] = []
        inputs = 3
        for depth, width in zip(depths, (64, 128, 256, 512, 512), strict=True):
            for _ in range(depth):
                layers.append(Conv2d(inputs, width, 3, padding=1, bias=True, rngs=rngs))
                if batch_norm:
                    layers.append(BatchNorm2d(width))
                layers.append(jax.nn.relu)
                inputs = width
            layers.append(_pool)
        self.features = Sequential(*layers)
        self.classifier = Sequential(
            Linear(512 * 7 * 7, 4096, rngs=rngs),
            jax.nn.relu,
            dropout(0.5),
            Linear(4096, 4096, rngs=rngs),
            jax.nn.relu,
            dropout(0.5),
            Linear(4096, classes, rngs=rngs),
        )

    def stages(self, x: Array) -> list[Array]:
        """(B, H, W, 3) -> each stage's last activation, before the pooling that ends it."""
        found: list[Array] = []
        *layers, _ = self.features  # the last pooling ends what small images can go through
        for layer in layers:
            if layer is _pool:
                found.append(x)
            x = layer(x)
        return [*found, x]

    def __call__(self, x: Array) -> Array:
        """(B, H, W, 3) -> logits (B, classes)."""
        return self.classifier(flatten(adaptive_average_pool(self.features(x), 7)))

"""VGG (arXiv 1409.1556): torchvision's `vgg*`, and `vgg*_bn` with BatchNorm."""

from __future__ import annotations

import itertools
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
    serial,
)


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
        layers: list[nnx.Module] = []
        inputs = 3
        for depth, width in zip(depths, (64, 128, 256, 512, 512), strict=True):
            for _ in range(depth):
                layers.append(Conv2d(inputs, width, 3, padding=1, bias=True, rngs=rngs))
                if batch_norm:
                    layers.append(BatchNorm2d(width))
                layers.append(Blank())
                inputs = width
            layers.append(Blank())
        self.features = nnx.List(layers)
        self.batch_norm = batch_norm
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

    def stages(self, x: Array) -> list[Array]:
        """(B, H, W, 3) -> each stage's last activation, before the pooling that ends it."""
        layers = iter(self.features)
        group = 3 if self.batch_norm else 2  # convolution, perhaps BatchNorm, the ReLU's place
        found: list[Array] = []
        for depth in self.depths:
            x = max_pool(x, 2, 2) if found else x
            for _ in range(depth):
                x = jax.nn.relu(serial(tuple(itertools.islice(layers, group)), x))
            next(layers)
            found.append(x)
        return found

    def __call__(self, x: Array) -> Array:
        """(B, H, W, 3) -> logits (B, classes)."""
        x = max_pool(self.stages(x)[-1], 2, 2)
        x = adaptive_average_pool(x, 7)
        # The first linear layer counts its inputs channel by channel, as torch flattens.
        x = jnp.transpose(x, (0, 3, 1, 2)).reshape(x.shape[0], -1)
        x = jax.nn.relu(self.classifier[0](x))
        x = jax.nn.relu(self.classifier[3](x))
        return self.classifier[6](x)

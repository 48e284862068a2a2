"""SqueezeNet (arXiv 1602.07360), torchvision's `squeezenet1_*`: no BatchNorm, no linear layer."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jinv.models.layers import Conv2d, Layer, Sequential, dropout, mean, redraw
from jinv.models.pooling import max_pool

# Squeezed and expanded channels of the fire modules, each followed by a pooling but the last.
V1_0 = (((16, 64), (16, 64), (32, 128)), ((32, 128), (48, 192), (48, 192), (64, 256)), ((64, 256),))
V1_1 = (((16, 64), (16, 64)), ((32, 128), (32, 128)), ((48, 192), (48, 192), (64, 256), (64, 256)))


class Fire(nnx.Module):
    """A 1x1 convolution to few channels, then 1x1 and 3x3 ones to many, side by side."""

    def __init__(self, inputs: int, squeezed: int, expanded: int, *, rngs: nnx.Rngs) -> None:
        conv = functools.partial(Conv2d, bias=True, rngs=rngs)
        self.squeeze = conv(inputs, squeezed, 1)
        self.expand1x1 = conv(squeezed, expanded, 1)
        self.expand3x3 = conv(squeezed, expanded, 3, padding=1)

    def __call__(self, x: Array) -> Array:
        """(B, H, W, inputs) -> (B, H, W, 2 * expanded)."""
        x = jax.nn.relu(self.squeeze(x))
        return jax.nn.relu(jnp.concatenate([self.expand1x1(x), self.expand3x3(x)], -1))


class SqueezeNet(nnx.Module):
    """A stem, fire modules in `groups` between poolings, and a 1x1 convolution to the classes."""

    def __init__(
        self,
        groups: Sequence[Sequence[tuple[int, int]]],
        *,
        stem: int,
        kernel: int,
        classes: int = 1000,
        rngs: nnx.Rngs,
    ) -> None:
        pool = functools.partial(max_pool, window=3, stride=2, ceil=True)
        first = Conv2d(3, stem, kernel, stride=2, bias=True, rngs=rngs)
        features: list[Layer] = [first, jax.nn.relu]
        inputs = stem
        for group in groups:
            features.append(pool)
            for squeezed, expanded in group:
                features.append(Fire(inputs, squeezed, expanded, rngs=rngs))
                inputs = 2 * expanded
        self.features = Sequential(*features)
        last = Conv2d(inputs, classes, 1, bias=True, rngs=rngs)
        self.classifier = Sequential(dropout(0.5), last, jax.nn.relu, mean)
        redraw(self, rngs, jax.nn.initializers.he_uniform())
        last.weight = nnx.Param(0.01 * jax.random.normal(rngs.params(), last.weight.shape))

    def __call__(self, x: Array) -> Array:
        """(B, H, W, 3) -> logits (B, classes)."""
        return self.classifier(self.features(x))

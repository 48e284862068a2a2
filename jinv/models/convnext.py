"""ConvNeXt (arXiv 2201.03545), torchvision's `convnext_*`: LayerNorm, no BatchNorm."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jinv.models.layers import (
    Conv2d,
    Layer,
    LayerNorm,
    Linear,
    Sequential,
    gelu,
    identity,
    mean,
    redraw,
    stochastic_depth,
)

_norm = functools.partial(LayerNorm, eps=1e-6)


class Block(nnx.Module):
    """Depthwise 7x7, LayerNorm, expand 4 times, project; residual, scaled a channel."""

    def __init__(self, channels: int, *, drop: float, rngs: nnx.Rngs) -> None:
        self.layer_scale = nnx.Param(jnp.full((channels, 1, 1), 1e-6))
        # What changes between channels first and last in torch keeps its number.
        self.block = Sequential(
            Conv2d(channels, channels, 7, padding=3, groups=channels, bias=True, rngs=rngs),
            identity,
            _norm(channels),
            Linear(channels, 4 * channels, rngs=rngs),
            gelu,
            Linear(4 * channels, channels, rngs=rngs),
            identity,
        )
        self.stochastic_depth = stochastic_depth(drop)

    def __call__(self, x: Array) -> Array:
        """(B, H, W, channels) -> the same shape."""
        scale = self.layer_scale[:, 0, 0].astype(x.dtype)
        return x + self.stochastic_depth(scale * self.block(x))


class ConvNeXt(nnx.Module):
    """Four stages of `depths` blocks and `widths` channels; `drop` is the last block's rate."""

    def __init__(
        self,
        depths: Sequence[int],
        widths: Sequence[int],
        *,
        drop: float,
        classes: int = 1000,
        rngs: nnx.Rngs,
    ) -> None:
        conv = functools.partial(Conv2d, bias=True, rngs=rngs)
        inputs, done = widths[0], 0
        features: list[Layer] = [Sequential(conv(3, inputs, 4, stride=4), _norm(inputs))]
        for depth, width in zip(depths, widths, strict=True):
            if done:
                features.append(Sequential(_norm(inputs), conv(inputs, width, 2, stride=2)))
            blocks = []
            for _ in range(depth):
                rate = drop * done / (sum(depths) - 1)
                blocks.append(Block(width, drop=rate, rngs=rngs))
                done += 1
            features.append(Sequential(*blocks))
            inputs = width
        self.features = Sequential(*features)
        self.classifier = Sequential(_norm(inputs), identity, Linear(inputs, classes, rngs=rngs))
        draw = jax.nn.initializers.normal(0.02)
        redraw(self, rngs, draw, draw)

    def __call__(self, x: Array) -> Array:
        """(B, H, W, 3) -> logits (B, classes)."""
        return self.classifier(mean(self.features(x)))

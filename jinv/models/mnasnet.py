"""MnasNet-B1 (arXiv 1807.11626), torchvision's `mnasnet*`."""

from __future__ import annotations

import functools

import jax
from flax import nnx
from jax import Array

from jinv.models.layers import (
    BatchNorm2d,
    Conv2d,
    Layer,
    Linear,
    Sequential,
    dropout,
    mean,
    round_channels,
    stage,
)

# kernel, stride of the first, expansion, channels, repeats
STACKS = (
    (3, 2, 3, 24, 3),
    (5, 2, 3, 40, 3),
    (5, 2, 6, 80, 3),
    (3, 1, 6, 96, 2),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)

_norm = functools.partial(BatchNorm2d, momentum=1 - 0.9997)


class InvertedResidual(nnx.Module):
    """Expand 1x1, depthwise k x k, project 1x1 (linear); residual where shapes allow."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        kernel: int,
        stride: int,
        expansion: int,
        rngs: nnx.Rngs,
    ) -> None:
        inner = inputs * expansion
        conv = functools.partial(Conv2d, rngs=rngs)
        self.layers = Sequential(
            conv(inputs, inner, 1),
            _norm(inner),
            jax.nn.relu,
            conv(inner, inner, kernel, stride=stride, padding=kernel // 2, groups=inner),
            _norm(inner),
            jax.nn.relu,
            conv(inner, outputs, 1),
            _norm(outputs),
        )
        self.residual = stride == 1 and inputs == outputs

    def __call__(self, x: Array) -> Array:
        """(B, H, W, inputs) -> (B, ceil(H / stride), ceil(W / stride), outputs)."""
        y = self.layers(x)
        return x + y if self.residual else y


class MNASNet(nnx.Module):
    """`width` times B1's channels, rounded to multiples of 8, but for the last 1280."""

    def __init__(self, width: float, *, classes: int = 1000, rngs: nnx.Rngs) -> None:
        conv = functools.partial(Conv2d, rngs=rngs)
        stem, inputs = round_channels(32 * width), round_channels(16 * width)
        layers: list[Layer] = [
            conv(3, stem, 3, stride=2, padding=1),
            _norm(stem),
            jax.nn.relu,
            conv(stem, stem, 3, padding=1, groups=stem),
            _norm(stem),
            jax.nn.relu,
            conv(stem, inputs, 1),
            _norm(inputs),
        ]
        for kernel, stride, expansion, channels, repeats in STACKS:
            block = functools.partial(
                InvertedResidual, kernel=kernel, expansion=expansion, rngs=rngs
            )
            outputs = round_channels(channels * width)
            layers.append(Sequential(*stage(block, inputs, outputs, repeats, stride)))
            inputs = outputs
        self.layers = Sequential(*layers, conv(inputs, 1280, 1), _norm(1280), jax.nn.relu)
        self.classifier = Sequential(dropout(0.2), Linear(1280, classes, rngs=rngs))

    def __call__(self, x: Array) -> Array:
        """(B, H, W, 3) -> logits (B, classes)."""
        return self.classifier(mean(self.layers(x)))

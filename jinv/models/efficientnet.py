"""EfficientNet (arXiv 1905.11946), as torchvision's `efficientnet_b*` in inference."""

from __future__ import annotations

import math
from typing import Any, cast

import jax
from flax import nnx
from jax import Array

from jinv.models.layers import BatchNorm2d, Blank, Conv2d, Linear, round_channels, serial

# expansion, kernel, stride of the first, channels, repeats
STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)


class SqueezeExcitation(nnx.Module):
    """Channels weighted by what a bottleneck makes of their means (arXiv 1709.01507)."""

    def __init__(self, channels: int, squeezed: int, *, rngs: nnx.Rngs) -> None:
        self.fc1 = Conv2d(channels, squeezed, 1, bias=True, rngs=rngs)
        self.fc2 = Conv2d(squeezed, channels, 1, bias=True, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """(B, H, W, channels) -> the same shape."""
        means = x.mean((1, 2), keepdims=True)
        return x * jax.nn.sigmoid(self.fc2(jax.nn.silu(self.fc1(means))))


def _conv_norm(
    inputs: int,
    outputs: int,
    kernel: int,
    eps: float,
    rngs: nnx.Rngs,
    *,
    stride: int = 1,
    groups: int = 1,
) -> nnx.List:
    padding = kernel // 2
    conv = Conv2d(inputs, outputs, kernel, stride=stride, padding=padding, groups=groups, rngs=rngs)
    return nnx.List([conv, BatchNorm2d(outputs, eps=eps)])


def _activated(layers: Any, x: Array) -> Array:
    return jax.nn.silu(serial(layers, x))


class MBConv(nnx.Module):
    """Expand 1x1, depthwise k x k, weight channels, project 1x1 (linear); residual if it fits."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        expansion: int,
        kernel: int,
        stride: int,
        eps: float,
        rngs: nnx.Rngs,
    ) -> None:
        inner = inputs * expansion
        expand = [] if expansion == 1 else [_conv_norm(inputs, inner, 1, eps, rngs)]
        self.block = nnx.List(
            [
                *expand,
                _conv_norm(inner, inner, kernel, eps, rngs, stride=stride, groups=inner),
                SqueezeExcitation(inner, max(1, inputs // 4), rngs=rngs),
                _conv_norm(inner, outputs, 1, eps, rngs),
            ]
        )
        self.residual = stride == 1 and inputs == outputs

    def __call__(self, x: Array) -> Array:
        """(B, H, W, inputs) -> (B, ceil(H / stride), ceil(W / stride), outputs)."""
        *activated, weigh, project = cast(list[Any], list(self.block))
        y = x
        for layers in activated:
            y = _activated(layers, y)
        y = serial(project, weigh(y))
        return x + y if self.residual else y


class EfficientNet(nnx.Module):
    """`width` times B0's channels, `depth` times its blocks, rounded up; `eps` of BatchNorm.

    Without stochastic depth and dropout, which inference does not have.
    """

    def __init__(
        self,
        *,
        width: float = 1.0,
        depth: float = 1.0,
        eps: float = 1e-5,
        classes: int = 1000,
        rngs: nnx.Rngs,
    ) -> None:
        inputs = round_channels(32 * width)
        features = [_conv_norm(3, inputs, 3, eps, rngs, stride=2)]
        for expansion, kernel, first_stride, channels, repeats in STAGES:
            outputs = round_channels(channels * width)
            blocks = []
            for i in range(math.ceil(repeats * depth)):
                stride = first_stride if i == 0 else 1
                blocks.append(
                    MBConv(
                        inputs,
                        outputs,
                        expansion=expansion,
                        kernel=kernel,
                        stride=stride,
                        eps=eps,
                        rngs=rngs,
                    )
                )
                inputs = outputs
            features.append(nnx.List(blocks))
        features.append(_conv_norm(inputs, 4 * inputs, 1, eps, rngs))
        self.features = nnx.List(features)
        self.classifier = nnx.List([Blank(), Linear(4 * inputs, classes, rngs=rngs)])

    def __call__(self, x: Array) -> Array:
        """(B, H, W, 3) -> logits (B, classes)."""
        stem, *stages, head = list(self.features)
        x = _activated(stem, x)
        for blocks in stages:
            x = serial(blocks, x)
        x = _activated(head, x)
        return self.classifier[1](x.mean((1, 2)))

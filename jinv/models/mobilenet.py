"""MobileNetV2 (arXiv 1801.04381)."""

from __future__ import annotations

from typing import Any

from flax import nnx
from jax import Array

from jinv.models.layers import BatchNorm2d, Blank, Conv2d, Linear, relu6, serial

# expansion, channels, repeats, stride of the first
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def _conv_norm(
    inputs: int, outputs: int, kernel: int, rngs: nnx.Rngs, *, stride: int = 1, groups: int = 1
) -> nnx.List:
    conv = Conv2d(
        inputs,
        outputs,
        kernel,
        stride=stride,
        padding=kernel // 2,
        groups=groups,
        rngs=rngs,
    )
    return nnx.List([conv, BatchNorm2d(outputs)])


def _activated(layers: Any, x: Array) -> Array:
    return relu6(serial(layers, x))


class InvertedResidual(nnx.Module):
    """Expand 1x1, depthwise 3x3, project 1x1 (linear); residual where shapes allow."""

    def __init__(
        self, inputs: int, outputs: int, *, stride: int, expansion: int, rngs: nnx.Rngs
    ) -> None:
        inner = inputs * expansion
        expand = [] if expansion == 1 else [_conv_norm(inputs, inner, 1, rngs)]
        depthwise = _conv_norm(inner, inner, 3, rngs, stride=stride, groups=inner)
        self.conv = nnx.List(
            [*expand, depthwise, Conv2d(inner, outputs, 1, rngs=rngs), BatchNorm2d(outputs)]
        )
        self.residual = stride == 1 and inputs == outputs

    def __call__(self, x: Array) -> Array:
        """(B, H, W, inputs) -> (B, H / stride, W / stride, outputs)."""
        *activated, project, norm = list(self.conv)
        y = x
        for layers in activated:
            y = _activated(layers, y)
        y = norm(project(y))
        return x + y if self.residual else y


class MobileNetV2(nnx.Module):
    """torchvision's `mobilenet_v2`, width 1."""

    def __init__(self, *, classes: int = 1000, rngs: nnx.Rngs) -> None:
        features: list[nnx.Module] = [_conv_norm(3, 32, 3, rngs, stride=2)]
        inputs = 32
        for expansion, channels, repeats, first_stride in STAGES:
            for i in range(repeats):
                stride = first_stride if i == 0 else 1
                features.append(
                    InvertedResidual(
                        inputs, channels, stride=stride, expansion=expansion, rngs=rngs
                    )
                )
                inputs = channels
        features.append(_conv_norm(inputs, 1280, 1, rngs))
        self.features = nnx.List(features)
        self.classifier = nnx.List([Blank(), Linear(1280, classes, rngs=rngs)])

    def __call__(self, x: Array) -> Array:
        """(B, H, W, 3) -> logits (B, classes)."""
        stem, *blocks, head = list(self.features)
        x = _activated(stem, x)
        for block in blocks:
            x = block(x)
        x = _activated(head, x)
        return self.classifier[1](x.mean((1, 2)))

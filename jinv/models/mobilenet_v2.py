"""MobileNetV2 (arXiv 1801.04381)."""

from __future__ import annotations

import functools

from flax import nnx
from jax import Array

from jinv.models.layers import (
    BatchNorm2d,
    Conv2d,
    Linear,
    Sequential,
    conv_norm,
    dropout,
    mean,
    relu6,
    stage,
)

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


class InvertedResidual(nnx.Module):
    """Expand 1x1, depthwise 3x3, project 1x1 (linear); residual where shapes allow."""

    def __init__(
        self, inputs: int, outputs: int, *, stride: int, expansion: int, rngs: nnx.Rngs
    ) -> None:
        inner = inputs * expansion
        activated = functools.partial(conv_norm, activation=relu6, rngs=rngs)
        self.conv = Sequential(
            *([] if expansion == 1 else [activated(inputs, inner, 1)]),
            activated(inner, inner, 3, stride=stride, groups=inner),
            Conv2d(inner, outputs, 1, rngs=rngs),
            BatchNorm2d(outputs),
        )
        self.residual = stride == 1 and inputs == outputs

    def __call__(self, x: Array) -> Array:
        """(B, H, W, inputs) -> (B, H / stride, W / stride, outputs)."""
        y = self.conv(x)
        return x + y if self.residual else y


class MobileNetV2(nnx.Module):
    """torchvision's `mobilenet_v2`, width 1."""

    def __init__(self, *, classes: int = 1000, rngs: nnx.Rngs) -> None:
        activated = functools.partial(conv_norm, activation=relu6, rngs=rngs)
        features: list[nnx.Module] = [activated(3, 32, 3, stride=2)]
        inputs = 32
        for expansion, channels, repeats, stride in STAGES:
            block = functools.partial(InvertedResidual, expansion=expansion, rngs=rngs)
            features += stage(block, inputs, channels, repeats, stride)
            inputs = channels
        self.features = Sequential(*features, activated(inputs, 1280, 1))
        self.classifier = Sequential(dropout(0.2), Linear(1280, classes, rngs=rngs))

    def __call__(self, x: Array) -> Array:
        """(B, H, W, 3) -> logits (B, classes)."""
        return self.classifier(mean(self.features(x)))

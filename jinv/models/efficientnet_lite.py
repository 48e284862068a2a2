"""EfficientNet-Lite: EfficientNet (arXiv 1905.11946) with ReLU6, without squeeze-excitation.

Attribute names and TensorFlow's "SAME" padding are those of the published PyTorch files.
"""

from __future__ import annotations

import math

from flax import nnx
from jax import Array

from jinv.models.layers import (
    BatchNorm2d,
    Conv2d,
    Linear,
    dropout,
    mean,
    relu6,
    round_channels,
    stochastic_depth,
)

# repeats, kernel, stride of the first, expansion, channels
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
EPS = 1e-3
STOCHASTIC_DEPTH = 0.2
"""Rate at which the block after the last would be dropped in training; it grows linearly."""


def _norm(features: int) -> BatchNorm2d:
    return BatchNorm2d(features, eps=EPS)


class Block(nnx.Module):
    """Expand 1x1, depthwise k x k, project 1x1 (linear); residual where shapes allow."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        kernel: int,
        stride: int,
        expansion: int,
        drop: float,
        rngs: nnx.Rngs,
    ) -> None:
        inner = inputs * expansion
        self.expands = expansion != 1
        if self.expands:
            self._expand_conv = Conv2d(inputs, inner, 1, rngs=rngs)
            self._bn0 = _norm(inner)
        self._depthwise_conv = Conv2d(
            inner, inner, kernel, stride=stride, padding="SAME", groups=inner, rngs=rngs
        )
        self._bn1 = _norm(inner)
        self._project_conv = Conv2d(inner, outputs, 1, rngs=rngs)
        self._bn2 = _norm(outputs)
        self.residual = stride == 1 and inputs == outputs
        self.stochastic_depth = stochastic_depth(drop)

    def __call__(self, x: Array) -> Array:
        """(B, H, W, inputs) -> (B, ceil(H / stride), ceil(W / stride), outputs)."""
        y = relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + self.stochastic_depth(y) if self.residual else y


class EfficientNetLite(nnx.Module):
    """Stem and head keep their width; the first and last stage keep their depth.

    `drop` is the rate of dropout before the linear layer.
    """

    def __init__(
        self,
        *,
        width: float,
        depth: float,
        drop: float = 0.2,
        classes: int = 1000,
        rngs: nnx.Rngs,
    ) -> None:
        self._conv_stem = Conv2d(3, 32, 3, stride=2, padding="SAME", rngs=rngs)
        self._bn0 = _norm(32)
        blocks: list[Block] = []
        inputs = 32
        inner = range(1, len(STAGES) - 1)
        counts = [
            math.ceil(row[0] * depth) if stage in inner else row[0]
            for stage, row in enumerate(STAGES)
        ]
        for count, (_, kernel, first_stride, expansion, channels) in zip(
            counts, STAGES, strict=True
        ):
            outputs = round_channels(channels * width)
            for i in range(count):
                blocks.append(
                    Block(
                        inputs,
                        outputs,
                        kernel=kernel,
                        stride=first_stride if i == 0 else 1,
                        expansion=expansion,
                        drop=STOCHASTIC_DEPTH * len(blocks) / sum(counts),
                        rngs=rngs,
                    )
                )
                inputs = outputs
        self._blocks = nnx.List(blocks)
        self._conv_head = Conv2d(inputs, 1280, 1, rngs=rngs)
        self._bn1 = _norm(1280)
        self._dropout = dropout(drop)
        self._fc = Linear(1280, classes, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """(B, H, W, 3) -> logits (B, classes)."""
        x = relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        x = relu6(self._bn1(self._conv_head(x)))
        return self._fc(self._dropout(mean(x)))

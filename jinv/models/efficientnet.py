"""EfficientNet (arXiv 1905.11946) and EfficientNetV2 (arXiv 2104.00298), torchvision's."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
from flax import nnx
from jax import Array

from jinv.models.layers import (
    BatchNorm2d,
    Linear,
    Sequential,
    SqueezeExcitation,
    conv_norm,
    dropout,
    mean,
    round_channels,
    stochastic_depth,
)


class Stage(NamedTuple):
    """A row of the papers' tables: blocks of one kind, the first of which has the stride."""

    expansion: int
    kernel: int
    stride: int
    channels: int
    repeats: int
    fused: bool = False


B0 = (
    Stage(1, 3, 1, 16, 1),
    Stage(6, 3, 2, 24, 2),
    Stage(6, 5, 2, 40, 2),
    Stage(6, 3, 2, 80, 3),
    Stage(6, 5, 1, 112, 3),
    Stage(6, 5, 2, 192, 4),
    Stage(6, 3, 1, 320, 1),
)
V2_S = (
    Stage(1, 3, 1, 24, 2, fused=True),
    Stage(4, 3, 2, 48, 4, fused=True),
    Stage(4, 3, 2, 64, 4, fused=True),
    Stage(4, 3, 2, 128, 6),
    Stage(6, 3, 1, 160, 9),
    Stage(6, 3, 2, 256, 15),
)
V2_M = (
    Stage(1, 3, 1, 24, 3, fused=True),
    Stage(4, 3, 2, 48, 5, fused=True),
    Stage(4, 3, 2, 80, 5, fused=True),
    Stage(4, 3, 2, 160, 7),
    Stage(6, 3, 1, 176, 14),
    Stage(6, 3, 2, 304, 18),
    Stage(6, 3, 1, 512, 5),
)
V2_L = (
    Stage(1, 3, 1, 32, 4, fused=True),
    Stage(4, 3, 2, 64, 7, fused=True),
    Stage(4, 3, 2, 96, 7, fused=True),
    Stage(4, 3, 2, 192, 10),
    Stage(6, 3, 1, 224, 19),
    Stage(6, 3, 2, 384, 25),
    Stage(6, 3, 1, 640, 7),
)
STOCHASTIC_DEPTH = 0.2
"""Rate at which the block after the last would be dropped in training; it grows linearly."""


class MBConv(nnx.Module):
    """Expand 1x1, depthwise k x k, weigh channels, project 1x1 (linear); residual if it fits.

    Fused: expand k x k, project 1x1; or one k x k convolution where nothing expands.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        stage: Stage,
        stride: int,
        norm: type[BatchNorm2d] | functools.partial[BatchNorm2d],
        drop: float,
        rngs: nnx.Rngs,
    ) -> None:
        conv = functools.partial(conv_norm, norm=norm, rngs=rngs)
        activated = functools.partial(conv, activation=jax.nn.silu)
        inner = round_channels(inputs * stage.expansion)
        layers: list[nnx.Module]
        if stage.fused and inner == inputs:
            layers = [activated(inputs, outputs, stage.kernel, stride=stride)]
        elif stage.fused:
            layers = [
                activated(inputs, inner, stage.kernel, stride=stride),
                conv(inner, outputs, 1),
            ]
        else:
            layers = [activated(inputs, inner, 1)] if inner != inputs else []
            layers += [
                activated(inner, inner, stage.kernel, stride=stride, groups=inner),
                SqueezeExcitation(inner, max(1, inputs // 4), activation=jax.nn.silu, rngs=rngs),
                conv(inner, outputs, 1),
            ]
        self.block = Sequential(*layers)
        self.residual = stride == 1 and inputs == outputs
        self.stochastic_depth = stochastic_depth(drop)

    def __call__(self, x: Array) -> Array:
        """(B, H, W, inputs) -> (B, ceil(H / stride), ceil(W / stride), outputs)."""
        y = self.block(x)
        return x + self.stochastic_depth(y) if self.residual else y


class EfficientNet(nnx.Module):
    """A stem of `stem` channels, `stages`, a 1x1 convolution to `last` channels, a linear layer.

    All but `last`, 4 times the last stage's by default, are `width` times as wide, and stages
    `depth` times as deep, rounded up. `eps` and `momentum` are BatchNorm's.
    """

    def __init__(
        self,
        stages: Sequence[Stage] = B0,
        *,
        stem: int = 32,
        last: int | None = None,
        width: float = 1.0,
        depth: float = 1.0,
        drop: float = 0.2,
        eps: float = 1e-5,
        momentum: float = 0.1,
        classes: int = 1000,
        rngs: nnx.Rngs,
    ) -> None:
        norm = functools.partial(BatchNorm2d, eps=eps, momentum=momentum)
        conv = functools.partial(conv_norm, norm=norm, activation=jax.nn.silu, rngs=rngs)
        repeats = [math.ceil(stage.repeats * depth) for stage in stages]
        inputs, done = round_channels(stem * width), 0
        features = [conv(3, inputs, stride=2)]
        for stage, count in zip(stages, repeats, strict=True):
            blocks, outputs = [], round_channels(stage.channels * width)
            for i in range(count):
                block = MBConv(
                    inputs,
                    outputs,
                    stage=stage,
                    stride=stage.stride if i == 0 else 1,
                    norm=norm,
                    drop=STOCHASTIC_DEPTH * done / sum(repeats),
                    rngs=rngs,
                )
                blocks.append(block)
                inputs, done = outputs, done + 1
            features.append(Sequential(*blocks))
        last = last or 4 * inputs
        self.features = Sequential(*features, conv(inputs, last, 1))
        self.classifier = Sequential(dropout(drop), Linear(last, classes, rngs=rngs))

    def __call__(self, x: Array) -> Array:
        """(B, H, W, 3) -> logits (B, classes)."""
        return self.classifier(mean(self.features(x)))

"""MobileNetV3 (arXiv 1905.02244), torchvision's `mobilenet_v3_large` and `_small`."""

from __future__ import annotations

import functools
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
    hard_sigmoid,
    hard_swish,
    mean,
    round_channels,
)


class Block(NamedTuple):
    """A row of the paper's tables 1 and 2; `hard`: hard swish instead of ReLU."""

    kernel: int
    expanded: int
    outputs: int
    squeezes: bool
    hard: bool
    stride: int


LARGE = (
    Block(3, 16, 16, False, False, 1),
    Block(3, 64, 24, False, False, 2),
    Block(3, 72, 24, False, False, 1),
    Block(5, 72, 40, True, False, 2),
    Block(5, 120, 40, True, False, 1),
    Block(5, 120, 40, True, False, 1),
    Block(3, 240, 80, False, True, 2),
    Block(3, 200, 80, False, True, 1),
    Block(3, 184, 80, False, True, 1),
    Block(3, 184, 80, False, True, 1),
    Block(3, 480, 112, True, True, 1),
    Block(3, 672, 112, True, True, 1),
    Block(5, 672, 160, True, True, 2),
    Block(5, 960, 160, True, True, 1),
    Block(5, 960, 160, True, True, 1),
)
SMALL = (
    Block(3, 16, 16, True, False, 2),
    Block(3, 72, 24, False, False, 2),
    Block(3, 88, 24, False, False, 1),
    Block(5, 96, 40, True, True, 2),
    Block(5, 240, 40, True, True, 1),
    Block(5, 240, 40, True, True, 1),
    Block(5, 120, 48, True, True, 1),
    Block(5, 144, 48, True, True, 1),
    Block(5, 288, 96, True, True, 2),
    Block(5, 576, 96, True, True, 1),
    Block(5, 576, 96, True, True, 1),
)

_conv_norm = functools.partial(
    conv_norm, norm=functools.partial(BatchNorm2d, eps=1e-3, momentum=0.01)
)


class InvertedResidual(nnx.Module):
    """Expand 1x1, depthwise k x k, perhaps weigh channels, project 1x1; residual if it fits."""

    def __init__(self, inputs: int, row: Block, *, rngs: nnx.Rngs) -> None:
        inner = row.expanded
        activated = functools.partial(
            _conv_norm, activation=hard_swish if row.hard else jax.nn.relu, rngs=rngs
        )
        layers: list[nnx.Module] = [activated(inputs, inner, 1)] if inner != inputs else []
        layers.append(activated(inner, inner, row.kernel, stride=row.stride, groups=inner))
        if row.squeezes:
            squeezed = round_channels(inner // 4)
            layers.append(SqueezeExcitation(inner, squeezed, gate=hard_sigmoid, rngs=rngs))
        self.block = Sequential(*layers, _conv_norm(inner, row.outputs, 1, rngs=rngs))
        self.residual = row.stride == 1 and inputs == row.outputs

    def __call__(self, x: Array) -> Array:
        """(B, H, W, inputs) -> (B, ceil(H / stride), ceil(W / stride), outputs)."""
        y = self.block(x)
        return x + y if self.residual else y


class MobileNetV3(nnx.Module):
    """A stem of 16 channels, `blocks`, a 1x1 convolution, two linear layers of `last` units."""

    def __init__(
        self, blocks: Sequence[Block], last: int, *, classes: int = 1000, rngs: nnx.Rngs
    ) -> None:
        activated = functools.partial(_conv_norm, activation=hard_swish, rngs=rngs)
        inputs = 16
        features: list[nnx.Module] = [activated(3, inputs, stride=2)]
        for row in blocks:
            features.append(InvertedResidual(inputs, row, rngs=rngs))
            inputs = row.outputs
        self.features = Sequential(*features, activated(inputs, 6 * inputs, 1))
        self.classifier = Sequential(
            Linear(6 * inputs, last, rngs=rngs),
            hard_swish,
            dropout(0.2),
            Linear(last, classes, rngs=rngs),
        )

    def __call__(self, x: Array) -> Array:
        """(B, H, W, 3) -> logits (B, classes)."""
        return self.classifier(mean(self.features(x)))

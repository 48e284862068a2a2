"""ShuffleNetV2 (arXiv 1807.11164), torchvision's `shufflenet_v2_*`."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jinv.models.layers import BatchNorm2d, Conv2d, Linear, Sequential, conv_norm, mean, stage
from jinv.models.pooling import max_pool

DEPTHS = (4, 8, 4)


def channel_shuffle(x: Array) -> Array:
    """Return the channels of the two halves in turn: 0, C/2, 1, C/2 + 1, ..."""
    return jnp.stack(jnp.split(x, 2, -1), -1).reshape(x.shape)


class InvertedResidual(nnx.Module):
    """Half of the channels pass, or all are halved in size, beside 1x1, depthwise 3x3 and 1x1."""

    def __init__(self, inputs: int, outputs: int, *, stride: int, rngs: nnx.Rngs) -> None:
        half = outputs // 2
        conv = functools.partial(Conv2d, rngs=rngs)

        def depthwise(channels: int) -> Conv2d:
            return conv(channels, channels, 3, stride=stride, padding=1, groups=channels)

        self.branch1 = Sequential()
        if stride > 1:
            self.branch1 = Sequential(
                depthwise(inputs),
                BatchNorm2d(inputs),
                conv(inputs, half, 1),
                BatchNorm2d(half),
                jax.nn.relu,
            )
        self.branch2 = Sequential(
            conv(inputs if stride > 1 else half, half, 1),
            BatchNorm2d(half),
            jax.nn.relu,
            depthwise(half),
            BatchNorm2d(half),
            conv(half, half, 1),
            BatchNorm2d(half),
            jax.nn.relu,
        )
        self.stride = stride

    def __call__(self, x: Array) -> Array:
        """(B, H, W, inputs) -> (B, ceil(H / stride), ceil(W / stride), outputs)."""
        left, right = (x, x) if self.stride > 1 else jnp.split(x, 2, -1)
        return channel_shuffle(jnp.concatenate([self.branch1(left), self.branch2(right)], -1))


class ShuffleNetV2(nnx.Module):
    """Three stages of `widths` channels between a stem of 24 and a 1x1 convolution to `last`."""

    def __init__(
        self, widths: Sequence[int], last: int = 1024, *, classes: int = 1000, rngs: nnx.Rngs
    ) -> None:
        activated = functools.partial(conv_norm, activation=jax.nn.relu, rngs=rngs)
        self.conv1 = activated(3, 24, stride=2)
        inputs = 24
        for number, (depth, width) in enumerate(zip(DEPTHS, widths, strict=True), 2):
            block = functools.partial(InvertedResidual, rngs=rngs)
            setattr(self, f"stage{number}", Sequential(*stage(block, inputs, width, depth, 2)))
            inputs = width
        self.conv5 = activated(inputs, last, 1)
        self.fc = Linear(last, classes, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """(B, H, W, 3) -> logits (B, classes)."""
        x = max_pool(self.conv1(x), 3, 2, padding=1)
        for number in range(2, 2 + len(DEPTHS)):
            x = getattr(self, f"stage{number}")(x)
        return self.fc(mean(self.conv5(x)))

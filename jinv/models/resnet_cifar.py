"""ResNets for 32 px images: 3x3 stem, no max-pool.

Attribute names are those of the widely shared CIFAR code (kuangliu's, and the one that
DeepInversion's CIFAR experiments load). With `projection=False` it is the ResNet-20 of arXiv
1512.03385, section 4.2, whose shortcuts have no parameters.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jinv.models.layers import BatchNorm2d, Conv2d, Linear, Sequential, conv_norm, mean, stage


class Block(nnx.Module):
    """Two 3x3 convolutions; the shortcut is a 1x1 convolution, or subsampling and zeros."""

    def __init__(
        self, inputs: int, width: int, *, stride: int, projection: bool, rngs: nnx.Rngs
    ) -> None:
        self.conv1 = Conv2d(inputs, width, 3, stride=stride, padding=1, rngs=rngs)
        self.bn1 = BatchNorm2d(width)
        self.conv2 = Conv2d(width, width, 3, padding=1, rngs=rngs)
        self.bn2 = BatchNorm2d(width)
        self.shortcut = Sequential()
        if projection and (stride > 1 or inputs != width):
            self.shortcut = conv_norm(inputs, width, 1, stride=stride, rngs=rngs)
        self.stride = stride
        self.new_channels = 0 if projection else width - inputs

    def __call__(self, x: Array) -> Array:
        """(B, H, W, inputs) -> (B, H / stride, W / stride, width)."""
        y = jax.nn.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        shortcut = self.shortcut(x)
        if self.new_channels:
            half = self.new_channels // 2
            shortcut = shortcut[:, :: self.stride, :: self.stride]
            shortcut = jnp.pad(shortcut, ((0, 0), (0, 0), (0, 0), (half, self.new_channels - half)))
        return jax.nn.relu(y + shortcut)


class ResNet(nnx.Module):
    """Stages of `widths` with `depths` blocks; every stage but the first halves the image."""

    def __init__(
        self,
        depths: Sequence[int],
        *,
        widths: Sequence[int] = (64, 128, 256, 512),
        projection: bool = True,
        classes: int = 10,
        rngs: nnx.Rngs,
    ) -> None:
        self.conv1 = Conv2d(3, widths[0], 3, padding=1, rngs=rngs)
        self.bn1 = BatchNorm2d(widths[0])
        inputs = widths[0]
        self.stages = len(depths)
        block = functools.partial(Block, projection=projection, rngs=rngs)
        for number, (depth, width) in enumerate(zip(depths, widths, strict=True), 1):
            blocks = stage(block, inputs, width, depth, 1 if number == 1 else 2)
            setattr(self, f"layer{number}", Sequential(*blocks))
            inputs = width
        self.linear = Linear(inputs, classes, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """(B, H, W, 3) -> logits (B, classes)."""
        x = jax.nn.relu(self.bn1(self.conv1(x)))
        for number in range(1, self.stages + 1):
            x = getattr(self, f"layer{number}")(x)
        return self.linear(mean(x))

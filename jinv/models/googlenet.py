"""GoogLeNet (arXiv 1409.4842) with BatchNorm, torchvision's `googlenet`.

Its published weights take images normalised with mean and deviation 0.5, which is what
torchvision's `transform_input` makes of those normalised for the other networks.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jinv.models.convolution import Padding
from jinv.models.layers import BatchNorm2d, Conv2d, Linear, Named, Sequential, dropout, mean, redraw
from jinv.models.pooling import max_pool

# Inputs; channels of the branches: 1x1; reduction and 3x3; reduction and "5x5"; pooled.
BLOCKS = {
    "inception3a": (192, 64, 96, 128, 16, 32, 32),
    "inception3b": (256, 128, 128, 192, 32, 96, 64),
    "inception4a": (480, 192, 96, 208, 16, 48, 64),
    "inception4b": (512, 160, 112, 224, 24, 64, 64),
    "inception4c": (512, 128, 128, 256, 24, 64, 64),
    "inception4d": (512, 112, 144, 288, 32, 64, 64),
    "inception4e": (528, 256, 160, 320, 32, 128, 128),
    "inception5a": (832, 256, 160, 320, 32, 128, 128),
    "inception5b": (832, 384, 192, 384, 48, 128, 128),
}
POOLED = {"inception3a": 3, "inception4a": 3, "inception5a": 2}
"""Blocks after a pooling with stride 2, and its window."""


def basic_conv(
    inputs: int,
    outputs: int,
    kernel: int | tuple[int, int],
    padding: Padding = 0,
    *,
    stride: int = 1,
    rngs: nnx.Rngs,
) -> Named:
    """Return a convolution, BatchNorm and a ReLU, torchvision's `BasicConv2d`.

    Args:
      inputs, outputs, kernel, padding, stride: of the convolution, which has no bias.
      rngs: of the weights.
    """
    return Named(
        conv=Conv2d(inputs, outputs, kernel, stride=stride, padding=padding, rngs=rngs),
        bn=BatchNorm2d(outputs, eps=1e-3),
        relu=jax.nn.relu,
    )


class Inception(nnx.Module):
    """Four branches side by side."""

    def __init__(self, row: tuple[int, int, int, int, int, int, int], *, rngs: nnx.Rngs) -> None:
        inputs, one, three_reduced, three, five_reduced, five, pooled = row
        conv = functools.partial(basic_conv, rngs=rngs)
        self.branch1 = conv(inputs, one, 1)
        self.branch2 = Sequential(
            conv(inputs, three_reduced, 1), conv(three_reduced, three, 3, padding=1)
        )
        # 3x3 where the paper has 5x5: the published weights were trained so.
        self.branch3 = Sequential(
            conv(inputs, five_reduced, 1), conv(five_reduced, five, 3, padding=1)
        )
        self.branch4 = Sequential(
            functools.partial(max_pool, window=3, stride=1, padding=1), conv(inputs, pooled, 1)
        )

    def __call__(self, x: Array) -> Array:
        """(B, H, W, inputs) -> (B, H, W, sum of the branches' channels)."""
        branches = (self.branch1, self.branch2, self.branch3, self.branch4)
        return jnp.concatenate([branch(x) for branch in branches], -1)


class Auxiliary(nnx.Module):
    """The weights of a classifier on a middle layer, kept for the way back to torch."""

    def __init__(self, inputs: int, classes: int, *, rngs: nnx.Rngs) -> None:
        self.conv = basic_conv(inputs, 128, 1, rngs=rngs)
        self.fc1 = Linear(2048, 1024, rngs=rngs)
        self.fc2 = Linear(1024, classes, rngs=rngs)


class GoogLeNet(nnx.Module):
    """Nine inception blocks."""

    def __init__(self, *, classes: int = 1000, rngs: nnx.Rngs) -> None:
        conv = functools.partial(basic_conv, rngs=rngs)
        self.conv1 = conv(3, 64, 7, stride=2, padding=3)
        self.conv2 = conv(64, 64, 1)
        self.conv3 = conv(64, 192, 3, padding=1)
        for name, row in BLOCKS.items():
            setattr(self, name, Inception(row, rngs=rngs))
        self.aux1 = Auxiliary(512, classes, rngs=rngs)
        self.aux2 = Auxiliary(528, classes, rngs=rngs)
        self.dropout = dropout(0.2)
        self.fc = Linear(1024, classes, rngs=rngs)
        draw = jax.nn.initializers.normal(0.01)
        redraw(self, rngs, draw, draw)

    def __call__(self, x: Array) -> Array:
        """(B, H, W, 3) -> logits (B, classes)."""
        pool = functools.partial(max_pool, stride=2, ceil=True)
        x = self.conv3(self.conv2(pool(self.conv1(x), 3)))
        for name in BLOCKS:
            x = pool(x, POOLED[name]) if name in POOLED else x
            x = getattr(self, name)(x)
        return self.fc(self.dropout(mean(x)))

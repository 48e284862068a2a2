"""Wide ResNets for 32 px images (arXiv 1605.07146): BatchNorm and ReLU before every convolution.

Attribute names are those of the widely shared `wresnet.py` of torch, which works on data-free
distillation (CMI, NAYER) and on distillation (CRD) publish their teachers for.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jinv.models.layers import BatchNorm2d, Conv2d, Linear, Named, Sequential, mean, stage


class Block(nnx.Module):
    """Two 3x3 convolutions; where channels change, the shortcut is a 1x1 convolution."""

    def __init__(self, inputs: int, width: int, *, stride: int, rngs: nnx.Rngs) -> None:
        self.bn1 = BatchNorm2d(inputs)
        self.conv1 = Conv2d(inputs, width, 3, stride=stride, padding=1, rngs=rngs)
        self.bn2 = BatchNorm2d(width)
        self.conv2 = Conv2d(width, width, 3, padding=1, rngs=rngs)
        self.convShortcut = (
            Conv2d(inputs, width, 1, stride=stride, rngs=rngs) if inputs != width else None
        )

    def __call__(self, x: Array) -> Array:
        """(B, H, W, inputs) -> (B, H / stride, W / stride, width)."""
        y = jax.nn.relu(self.bn1(x))
        # A convolution sees what the first one sees; without one the images pass as they are.
        shortcut = x if self.convShortcut is None else self.convShortcut(y)
        y = jax.nn.relu(self.bn2(self.conv1(y)))
        return shortcut + self.conv2(y)


class WideResNet(nnx.Module):
    """WRN-depth-width: three stages of (depth - 4) / 6 blocks; the last two halve the image."""

    def __init__(self, depth: int, width: int, *, classes: int = 10, rngs: nnx.Rngs) -> None:
        block = functools.partial(Block, rngs=rngs)

        def layers(inputs: int, outputs: int, stride: int) -> Named:
            return Named(layer=Sequential(*stage(block, inputs, outputs, (depth - 4) // 6, stride)))

        self.conv1 = Conv2d(3, 16, 3, padding=1, rngs=rngs)
        self.block1 = layers(16, 16 * width, 1)
        self.block2 = layers(16 * width, 32 * width, 2)
        self.block3 = layers(32 * width, 64 * width, 2)
        self.bn1 = BatchNorm2d(64 * width)
        self.fc = Linear(64 * width, classes, rngs=rngs)
        self.fc.bias = nnx.Param(jnp.zeros(classes))

    def __call__(self, x: Array) -> Array:
        """(B, H, W, 3) -> logits (B, classes)."""
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(mean(jax.nn.relu(self.bn1(x))))

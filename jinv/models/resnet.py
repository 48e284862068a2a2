"""ResNet (arXiv 1512.03385), ResNeXt (1611.05431), Wide ResNet (1605.07146) for ImageNet."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from flax import nnx
from jax import Array

from jinv.models.layers import BatchNorm2d, Conv2d, Linear, Sequential, conv_norm, mean
from jinv.models.pooling import max_pool


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(
        self,
        inputs: int,
        width: int,
        *,
        stride: int = 1,
        groups: int = 1,
        base_width: int = 64,
        rngs: nnx.Rngs,
    ) -> None:
        if groups != 1 or base_width != 64:
            raise ValueError("a basic block has neither groups nor another base width")
        self.conv1 = Conv2d(inputs, width, 3, stride=stride, padding=1, rngs=rngs)
        self.bn1 = BatchNorm2d(width)
        self.conv2 = Conv2d(width, width, 3, padding=1, rngs=rngs)
        self.bn2 = BatchNorm2d(width)
        self.downsample = _downsample(inputs, width, stride, rngs)

    def __call__(self, x: Array) -> Array:
        """(B, H, W, inputs) -> (B, H / stride, W / stride, width)."""
        y = jax.nn.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return jax.nn.relu(y + self.downsample(x))


class Bottleneck(nnx.Module):
    """1x1, 3x3 (strided: "ResNet v1.5"), 1x1 convolutions and a shortcut."""

    expansion = 4

    def __init__(
        self,
        inputs: int,
        width: int,
        *,
        stride: int = 1,
        groups: int = 1,
        base_width: int = 64,
        rngs: nnx.Rngs,
    ) -> None:
        inner, outputs = width * base_width // 64 * groups, width * self.expansion
        self.conv1 = Conv2d(inputs, inner, 1, rngs=rngs)
        self.bn1 = BatchNorm2d(inner)
        self.conv2 = Conv2d(inner, inner, 3, stride=stride, padding=1, groups=groups, rngs=rngs)
        self.bn2 = BatchNorm2d(inner)
        self.conv3 = Conv2d(inner, outputs, 1, rngs=rngs)
        self.bn3 = BatchNorm2d(outputs)
        self.downsample = _downsample(inputs, outputs, stride, rngs)

    def __call__(self, x: Array) -> Array:
        """(B, H, W, inputs) -> (B, H / stride, W / stride, 4 * width)."""
        y = jax.nn.relu(self.bn1(self.conv1(x)))
        y = jax.nn.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return jax.nn.relu(y + self.downsample(x))


def _downsample(inputs: int, outputs: int, stride: int, rngs: nnx.Rngs) -> Sequential:
    if stride == 1 and inputs == outputs:
        return Sequential()
    return conv_norm(inputs, outputs, 1, stride=stride, rngs=rngs)


class ResNet(nnx.Module):
    """torchvision's `ResNet`: 7x7 stem, max-pool, four stages, mean, linear."""

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        *,
        groups: int = 1,
        base_width: int = 64,
        classes: int = 1000,
        rngs: nnx.Rngs,
    ) -> None:
        self.conv1 = Conv2d(3, 64, 7, stride=2, padding=3, rngs=rngs)
        self.bn1 = BatchNorm2d(64)
        inputs = 64

        def stage(width: int, depth: int, stride: int) -> Sequential:
            nonlocal inputs
            blocks = []
            for i in range(depth):
                blocks.append(
                    block(
                        inputs,
                        width,
                        stride=stride if i == 0 else 1,
                        groups=groups,
                        base_width=base_width,
                        rngs=rngs,
                    )
                )
                inputs = width * block.expansion
            return Sequential(*blocks)

        self.layer1 = stage(64, depths[0], 1)
        self.layer2 = stage(128, depths[1], 2)
        self.layer3 = stage(256, depths[2], 2)
        self.layer4 = stage(512, depths[3], 2)
        self.fc = Linear(inputs, classes, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """(B, H, W, 3) -> logits (B, classes)."""
        x = jax.nn.relu(self.bn1(self.conv1(x)))
        x = max_pool(x, 3, 2, padding=1)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        return self.fc(mean(x))

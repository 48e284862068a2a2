"""DenseNet-BC (arXiv 1608.06993), torchvision's `densenet*`."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jinv.models.layers import BatchNorm2d, Conv2d, Layer, Linear, Named, mean
from jinv.models.pooling import average_pool, max_pool


class DenseLayer(nnx.Module):
    """BatchNorm and ReLU before a 1x1 convolution to 4 * growth channels, and before a 3x3 one."""

    def __init__(self, inputs: int, growth: int, *, rngs: nnx.Rngs) -> None:
        self.norm1 = BatchNorm2d(inputs)
        self.conv1 = Conv2d(inputs, 4 * growth, 1, rngs=rngs)
        self.norm2 = BatchNorm2d(4 * growth)
        self.conv2 = Conv2d(4 * growth, growth, 3, padding=1, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """(B, H, W, inputs) -> (B, H, W, inputs + growth): the new channels come last."""
        y = self.conv1(jax.nn.relu(self.norm1(x)))
        return jnp.concatenate([x, self.conv2(jax.nn.relu(self.norm2(y)))], -1)


def _transition(inputs: int, outputs: int, rngs: nnx.Rngs) -> Named:
    return Named(
        norm=BatchNorm2d(inputs),
        relu=jax.nn.relu,
        conv=Conv2d(inputs, outputs, 1, rngs=rngs),
        pool=functools.partial(average_pool, window=2, stride=2),
    )


class DenseNet(nnx.Module):
    """Four dense blocks of `depths` layers that add `growth` channels each; half of all go on."""

    def __init__(
        self,
        depths: Sequence[int],
        *,
        growth: int = 32,
        stem: int = 64,
        classes: int = 1000,
        rngs: nnx.Rngs,
    ) -> None:
        features: dict[str, Layer] = {
            "conv0": Conv2d(3, stem, 7, stride=2, padding=3, rngs=rngs),
            "norm0": BatchNorm2d(stem),
            "relu0": jax.nn.relu,
            "pool0": functools.partial(max_pool, window=3, stride=2, padding=1),
        }
        channels = stem
        for number, depth in enumerate(depths, 1):
            layers = {
                f"denselayer{i + 1}": DenseLayer(channels + i * growth, growth, rngs=rngs)
                for i in range(depth)
            }
            features[f"denseblock{number}"] = Named(**layers)
            channels += depth * growth
            if number < len(depths):
                features[f"transition{number}"] = _transition(channels, channels // 2, rngs)
                channels //= 2
        self.features = Named(**features, norm5=BatchNorm2d(channels))
        self.classifier = Linear(channels, classes, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """(B, H, W, 3) -> logits (B, classes)."""
        return self.classifier(mean(jax.nn.relu(self.features(x))))

"""The LeNet of Deep Leakage from Gradients (arXiv 1906.08935): smooth, without BatchNorm."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jinv.models.layers import Blank, Conv2d, Linear


class LeNet(nnx.Module):
    """Three 5x5 convolutions of 12 channels with sigmoids, two of them halving, and a linear layer.

    Weights are drawn from U(-0.5, 0.5), as in the authors' code.
    """

    def __init__(
        self, *, channels: int = 1, size: int = 28, classes: int = 10, rngs: nnx.Rngs
    ) -> None:
        def conv(inputs: int, stride: int) -> Conv2d:
            return Conv2d(inputs, 12, 5, stride=stride, padding=2, bias=True, rngs=rngs)

        convs = (conv(channels, 2), conv(12, 2), conv(12, 1))
        self.body = nnx.List([m for layer in convs for m in (layer, Blank())])
        self.fc = nnx.List([Linear(12 * ((size + 3) // 4) ** 2, classes, rngs=rngs)])
        drawn = nnx.state(self, nnx.Param)
        nnx.update(
            self,
            jax.tree.map(
                lambda p: jax.random.uniform(rngs.params(), p.shape, minval=-0.5, maxval=0.5), drawn
            ),
        )

    def __call__(self, x: Array) -> Array:
        """(B, H, W, channels) -> logits (B, classes)."""
        for layer in self.body:
            if not isinstance(layer, Blank):
                x = jax.nn.sigmoid(layer(x))
        # The linear layer counts its inputs channel by channel, as torch flattens.
        return self.fc[0](jnp.transpose(x, (0, 3, 1, 2)).reshape(x.shape[0], -1))

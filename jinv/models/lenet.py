"""The LeNet of Deep Leakage from Gradients (arXiv 1906.08935): smooth, without BatchNorm."""

from __future__ import annotations

import jax
from flax import nnx
from jax import Array

from jinv.models.layers import Conv2d, Linear, Sequential, flatten


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
        self.body = Sequential(*(m for layer in convs for m in (layer, jax.nn.sigmoid)))
        self.fc = Sequential(Linear(12 * ((size + 3) // 4) ** 2, classes, rngs=rngs))
        drawn = nnx.state(self, nnx.Param)
        nnx.update(
            self,
            jax.tree.map(
                lambda p: jax.random.uniform(rngs.params(), p.shape, minval=-0.5, maxval=0.5), drawn
            ),
        )

    def __call__(self, x: Array) -> Array:
        """(B, H, W, channels) -> logits (B, classes)."""
        return self.fc(flatten(self.body(x)))

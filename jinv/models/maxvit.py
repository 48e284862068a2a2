"""MaxViT (arXiv 2204.01697), torchvision's `maxvit_t`: BatchNorm in its convolutions alone."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jinv.models.layers import (
    BatchNorm2d,
    Conv2d,
    Layer,
    LayerNorm,
    Linear,
    Named,
    Sequential,
    SqueezeExcitation,
    conv_norm,
    dropout,
    gelu,
    identity,
    mean,
    redraw,
    stochastic_depth,
)
from jinv.models.pooling import average_pool

HEAD = 32
"""Channels of an attention head."""

_norm = functools.partial(BatchNorm2d, eps=1e-3, momentum=0.01)
_activated = functools.partial(conv_norm, norm=_norm, activation=gelu)


class MBConv(nnx.Module):
    """BatchNorm, expand 1x1, depthwise 3x3, weigh channels, project 1x1; and a shortcut."""

    def __init__(
        self, inputs: int, outputs: int, *, stride: int, drop: float, rngs: nnx.Rngs
    ) -> None:
        inner = 4 * outputs
        conv = functools.partial(Conv2d, bias=True, rngs=rngs)
        shortcut: list[Layer] = (
            [conv(inputs, outputs, 1)] if inputs != outputs or stride > 1 else []
        )
        if stride > 1:
            shortcut.insert(0, functools.partial(average_pool, window=3, stride=stride, padding=1))
        self.proj = Sequential(*shortcut)
        self.layers = Named(
            pre_norm=_norm(inputs),
            conv_a=_activated(inputs, inner, 1, rngs=rngs),
            conv_b=_activated(inner, inner, 3, stride=stride, groups=inner, rngs=rngs),
            squeeze_excitation=SqueezeExcitation(
                inner, outputs // 4, activation=jax.nn.silu, rngs=rngs
            ),
            conv_c=conv(inner, outputs, 1),
        )
        self.stochastic_depth = stochastic_depth(drop)

    def __call__(self, x: Array) -> Array:
        """(B, H, W, inputs) -> (B, ceil(H / stride), ceil(W / stride), outputs)."""
        return self.proj(x) + self.stochastic_depth(self.layers(x))


class Attention(nnx.Module):
    """Attention within squares of `side` x `side` positions, biased by how they lie to each other.

    relative_position_bias_table: ((2 side - 1)^2, heads), as in torch.
    """

    def __init__(self, channels: int, side: int, *, rngs: nnx.Rngs) -> None:
        heads = channels // HEAD
        self.to_qkv = Linear(channels, 3 * channels, rngs=rngs)
        self.merge = Linear(channels, channels, rngs=rngs)
        table = 0.02 * jax.random.normal(rngs.params(), ((2 * side - 1) ** 2, heads))
        self.relative_position_bias_table = nnx.Param(table)
        # Which row of the table each pair of positions has: a buffer in torch's files.
        self.relative_position_index = nnx.BatchStat(jnp.asarray(_relative_positions(side)))

    def __call__(self, x: Array) -> Array:
        """(B, squares, side^2, channels) -> the same shape."""
        batch, squares, places, channels = x.shape
        heads = (batch, squares, places, 3, channels // HEAD, HEAD)
        query, key, value = jnp.moveaxis(self.to_qkv(x).reshape(heads), 3, 0)
        scores = jnp.einsum("bgihd,bgjhd->bghij", query, key * channels**-0.5)
        bias = self.relative_position_bias_table[...][self.relative_position_index[...]]
        scores = scores + jnp.moveaxis(bias, -1, 0).astype(x.dtype)
        weights = jax.nn.softmax(scores, -1)
        return self.merge(jnp.einsum("bghij,bgjhd->bgihd", weights, value).reshape(x.shape))


def _relative_positions(side: int) -> np.ndarray:
    """Return (side^2, side^2): (rows apart) (2 side - 1) + columns apart, both from 0."""
    rows, columns = np.indices((side, side)).reshape(2, -1)
    apart = [place[:, None] - place + side - 1 for place in (rows, columns)]
    return (apart[0] * (2 * side - 1) + apart[1]).astype(np.int32)


class PartitionAttention(nnx.Module):
    """A transformer layer within windows of 7 x 7 neighbours, or a `grid` spread over the image."""

    def __init__(
        self, channels: int, side: int, *, grid: bool, drop: float, rngs: nnx.Rngs
    ) -> None:
        self.attn_layer = Sequential(
            LayerNorm(channels), Attention(channels, side, rngs=rngs), dropout(0.0)
        )
        self.mlp_layer = Sequential(
            LayerNorm(channels),
            Linear(channels, 4 * channels, rngs=rngs),
            gelu,
            Linear(4 * channels, channels, rngs=rngs),
            dropout(0.0),
        )
        self.side = side
        self.grid = grid
        self.stochastic_dropout = stochastic_depth(drop)

    def __call__(self, x: Array) -> Array:
        """(B, H, W, channels) -> the same shape.

        Raises:
          ValueError: the squares do not fill height and width.
        """
        batch, height, width, channels = x.shape
        side = self.side
        if height % side or width % side:
            raise ValueError(
                f"{height} x {width} positions are no multiple of {side}: MaxViT takes images "
                f"whose sides are multiples of {32 * side} px"
            )
        # A window has neighbours; a square of the grid takes every (height / side)-th position.
        rows, columns = height // side, width // side
        if self.grid:
            split, order = (side, rows, side, columns), (0, 2, 4, 1, 3, 5)
        else:
            split, order = (rows, side, columns, side), (0, 1, 3, 2, 4, 5)
        x = x.reshape(batch, *split, channels).transpose(order)
        shape = x.shape
        x = x.reshape(batch, rows * columns, side * side, channels)
        x = x + self.stochastic_dropout(self.attn_layer(x))
        x = x + self.stochastic_dropout(self.mlp_layer(x))
        return x.reshape(shape).transpose(np.argsort(order)).reshape(batch, height, width, channels)


class MaxViT(nnx.Module):
    """A stem, then stages of `depths` layers and `widths` channels: MBConv, windows, grid."""

    def __init__(
        self,
        depths: Sequence[int],
        widths: Sequence[int],
        *,
        side: int = 7,
        drop: float = 0.2,
        classes: int = 1000,
        rngs: nnx.Rngs,
    ) -> None:
        inputs = widths[0]
        self.stem = Sequential(
            _activated(3, inputs, stride=2, rngs=rngs),
            Sequential(Conv2d(inputs, inputs, 3, padding=1, bias=True, rngs=rngs)),
        )
        rates = iter(np.linspace(0, drop, sum(depths)).tolist())
        blocks = []
        for depth, width in zip(depths, widths, strict=True):
            layers = []
            for i in range(depth):
                rate = next(rates)
                attention = functools.partial(PartitionAttention, width, side, drop=rate, rngs=rngs)
                layer = Named(
                    MBconv=MBConv(inputs, width, stride=1 if i else 2, drop=rate, rngs=rngs),
                    window_attention=attention(grid=False),
                    grid_attention=attention(grid=True),
                )
                layers.append(Named(layers=layer))
                inputs = width
            blocks.append(Named(layers=Sequential(*layers)))
        self.blocks = Sequential(*blocks)
        self.classifier = Sequential(
            mean,
            identity,
            LayerNorm(inputs),
            Linear(inputs, inputs, rngs=rngs),
            jnp.tanh,
            Linear(inputs, classes, bias=False, rngs=rngs),
        )
        normal = jax.nn.initializers.normal(0.02)
        redraw(self, rngs, normal, normal)

    def __call__(self, x: Array) -> Array:
        """(B, H, W, 3) -> logits (B, classes)."""
        return self.classifier(self.blocks(self.stem(x)))

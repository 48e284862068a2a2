"""Inception v3 (arXiv 1512.00567), torchvision's `inception_v3`, for images of 299 px.

As for GoogLeNet, its published weights take images normalised with mean and deviation 0.5.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jinv.models.googlenet import basic_conv
from jinv.models.layers import Linear, dropout, mean, redraw
from jinv.models.pooling import average_pool, max_pool

_pool = functools.partial(max_pool, window=3, stride=2)
_mean_pool = functools.partial(average_pool, window=3, stride=1, padding=1)

# Kernels and the paddings that keep the size.
_ROW, _COLUMN = ((1, 7), (0, 3)), ((7, 1), (3, 0))
_SHORT_ROW, _SHORT_COLUMN = ((1, 3), (0, 1)), ((3, 1), (1, 0))


def _side_by_side(*branches: Array) -> Array:
    return jnp.concatenate(branches, -1)


class InceptionA(nnx.Module):
    """1x1, 5x5, two 3x3, pooled: 64 + 64 + 96 + `pooled` channels."""

    def __init__(self, inputs: int, pooled: int, *, rngs: nnx.Rngs) -> None:
        conv = functools.partial(basic_conv, rngs=rngs)
        self.branch1x1 = conv(inputs, 64, 1)
        self.branch5x5_1 = conv(inputs, 48, 1)
        self.branch5x5_2 = conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = conv(inputs, 64, 1)
        self.branch3x3dbl_2 = conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = conv(96, 96, 3, padding=1)
        self.branch_pool = conv(inputs, pooled, 1)

    def __call__(self, x: Array) -> Array:
        """(B, H, W, inputs) -> (B, H, W, 224 + pooled)."""
        return _side_by_side(
            self.branch1x1(x),
            self.branch5x5_2(self.branch5x5_1(x)),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            self.branch_pool(_mean_pool(x)),
        )


class InceptionB(nnx.Module):
    """Strided: 3x3, two 3x3, pooled: 384 + 96 channels more."""

    def __init__(self, inputs: int, *, rngs: nnx.Rngs) -> None:
        conv = functools.partial(basic_conv, rngs=rngs)
        self.branch3x3 = conv(inputs, 384, 3, stride=2)
        self.branch3x3dbl_1 = conv(inputs, 64, 1)
        self.branch3x3dbl_2 = conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = conv(96, 96, 3, stride=2)

    def __call__(self, x: Array) -> Array:
        """(B, H, W, inputs) -> (B, about H / 2, about W / 2, inputs + 480)."""
        return _side_by_side(
            self.branch3x3(x),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            _pool(x),
        )


class InceptionC(nnx.Module):
    """1x1, 7x7 and two 7x7 as rows and columns of `inner` channels, pooled: 192 channels each."""

    def __init__(self, inputs: int, inner: int, *, rngs: nnx.Rngs) -> None:
        conv = functools.partial(basic_conv, rngs=rngs)
        self.branch1x1 = conv(inputs, 192, 1)
        self.branch7x7_1 = conv(inputs, inner, 1)
        self.branch7x7_2 = conv(inner, inner, *_ROW)
        self.branch7x7_3 = conv(inner, 192, *_COLUMN)
        self.branch7x7dbl_1 = conv(inputs, inner, 1)
        self.branch7x7dbl_2 = conv(inner, inner, *_COLUMN)
        self.branch7x7dbl_3 = conv(inner, inner, *_ROW)
        self.branch7x7dbl_4 = conv(inner, inner, *_COLUMN)
        self.branch7x7dbl_5 = conv(inner, 192, *_ROW)
        self.branch_pool = conv(inputs, 192, 1)

    def __call__(self, x: Array) -> Array:
        """(B, H, W, inputs) -> (B, H, W, 768)."""
        one = self.branch1x1(x)
        once = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        return _side_by_side(one, once, twice, self.branch_pool(_mean_pool(x)))


class InceptionD(nnx.Module):
    """Strided: 3x3, a row, a column and 3x3, pooled: 320 + 192 channels more."""

    def __init__(self, inputs: int, *, rngs: nnx.Rngs) -> None:
        conv = functools.partial(basic_conv, rngs=rngs)
        self.branch3x3_1 = conv(inputs, 192, 1)
        self.branch3x3_2 = conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = conv(inputs, 192, 1)
        self.branch7x7x3_2 = conv(192, 192, *_ROW)
        self.branch7x7x3_3 = conv(192, 192, *_COLUMN)
        self.branch7x7x3_4 = conv(192, 192, 3, stride=2)

    def __call__(self, x: Array) -> Array:
        """(B, H, W, inputs) -> (B, about H / 2, about W / 2, inputs + 512)."""
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return _side_by_side(three, self.branch7x7x3_4(seven), _pool(x))


class InceptionE(nnx.Module):
    """1x1, a row beside a column, the same after a 3x3, pooled: 320 + 768 + 768 + 192 channels."""

    def __init__(self, inputs: int, *, rngs: nnx.Rngs) -> None:
        conv = functools.partial(basic_conv, rngs=rngs)
        self.branch1x1 = conv(inputs, 320, 1)
        self.branch3x3_1 = conv(inputs, 384, 1)
        self.branch3x3_2a = conv(384, 384, *_SHORT_ROW)
        self.branch3x3_2b = conv(384, 384, *_SHORT_COLUMN)
        self.branch3x3dbl_1 = conv(inputs, 448, 1)
        self.branch3x3dbl_2 = conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = conv(384, 384, *_SHORT_ROW)
        self.branch3x3dbl_3b = conv(384, 384, *_SHORT_COLUMN)
        self.branch_pool = conv(inputs, 192, 1)

    def __call__(self, x: Array) -> Array:
        """(B, H, W, inputs) -> (B, H, W, 2048)."""
        one = self.branch1x1(x)
        once = self.branch3x3_1(x)
        once = _side_by_side(self.branch3x3_2a(once), self.branch3x3_2b(once))
        twice = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        twice = _side_by_side(self.branch3x3dbl_3a(twice), self.branch3x3dbl_3b(twice))
        return _side_by_side(one, once, twice, self.branch_pool(_mean_pool(x)))


class Auxiliary(nnx.Module):
    """The weights of a classifier on a middle layer, kept for the way back to torch."""

    def __init__(self, inputs: int, classes: int, *, rngs: nnx.Rngs) -> None:
        self.conv0 = basic_conv(inputs, 128, 1, rngs=rngs)
        self.conv1 = basic_conv(128, 768, 5, rngs=rngs)
        self.fc = Linear(768, classes, rngs=rngs)


class InceptionV3(nnx.Module):
    """A stem of five convolutions, eleven blocks."""

    def __init__(self, *, classes: int = 1000, rngs: nnx.Rngs) -> None:
        conv = functools.partial(basic_conv, rngs=rngs)
        self.Conv2d_1a_3x3 = conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = conv(32, 32, 3)
        self.Conv2d_2b_3x3 = conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = conv(64, 80, 1)
        self.Conv2d_4a_3x3 = conv(80, 192, 3)
        self.Mixed_5b = InceptionA(192, 32, rngs=rngs)
        self.Mixed_5c = InceptionA(256, 64, rngs=rngs)
        self.Mixed_5d = InceptionA(288, 64, rngs=rngs)
        self.Mixed_6a = InceptionB(288, rngs=rngs)
        self.Mixed_6b = InceptionC(768, 128, rngs=rngs)
        self.Mixed_6c = InceptionC(768, 160, rngs=rngs)
        self.Mixed_6d = InceptionC(768, 160, rngs=rngs)
        self.Mixed_6e = InceptionC(768, 192, rngs=rngs)
        self.AuxLogits = Auxiliary(768, classes, rngs=rngs)
        self.Mixed_7a = InceptionD(768, rngs=rngs)
        self.Mixed_7b = InceptionE(1280, rngs=rngs)
        self.Mixed_7c = InceptionE(2048, rngs=rngs)
        self.dropout = dropout(0.5)
        self.fc = Linear(2048, classes, rngs=rngs)
        draw = jax.nn.initializers.normal(0.1)
        redraw(self, rngs, draw, draw)

    def __call__(self, x: Array) -> Array:
        """(B, H, W, 3) -> logits (B, classes)."""
        x = _pool(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))
        x = _pool(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        x = self.Mixed_6e(self.Mixed_6d(x))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return self.fc(self.dropout(mean(x)))

"""RegNet X and Y (arXiv 2003.13678), torchvision's `regnet_x_*` and `regnet_y_*`."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from itertools import groupby

import jax
import numpy as np
from flax import nnx
from jax import Array

from jinv.models.layers import (
    Layer,
    Linear,
    Named,
    SqueezeExcitation,
    conv_norm,
    identity,
    mean,
    redraw,
    round_channels,
    stage,
)

STEM = 32


def widths(depth: int, initial: int, slope: float, step: float) -> Iterator[tuple[int, int]]:
    """Yield width and depth of every stage.

    Block j of the network would be initial + slope j wide; that is rounded to initial * step^k
    for a whole k, and to a multiple of 8 (equations 2 to 4). Equal blocks make a stage.

    Args:
      depth: number of blocks, d.
      initial: width of the first one, w_0.
      slope: w_a.
      step: w_m.
    """
    # In float32, as torchvision has it.
    wanted = np.arange(depth, dtype=np.float32) * np.float32(slope) + np.float32(initial)
    powers = np.rint(np.log(wanted / np.float32(initial)) / np.float32(np.log(step)))
    rounded = np.rint(initial * np.float32(step) ** powers / 8) * 8
    for width, blocks in groupby(rounded.astype(int).tolist()):
        yield width, len(list(blocks))


class Block(nnx.Module):
    """1x1, grouped 3x3, in RegNetY weighed channels, 1x1, and a shortcut."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        stride: int,
        group: int,
        squeezes: bool,
        rngs: nnx.Rngs,
    ) -> None:
        conv = functools.partial(conv_norm, rngs=rngs)
        activated = functools.partial(conv, activation=jax.nn.relu)
        changes = stride > 1 or inputs != outputs
        self.proj = conv(inputs, outputs, 1, stride=stride) if changes else identity
        layers: dict[str, Layer] = {
            "a": activated(inputs, outputs, 1),
            "b": activated(outputs, outputs, 3, stride=stride, groups=outputs // group),
        }
        if squeezes:
            layers["se"] = SqueezeExcitation(outputs, round(inputs / 4), rngs=rngs)
        self.f = Named(**layers, c=conv(outputs, outputs, 1))

    def __call__(self, x: Array) -> Array:
        """(B, H, W, inputs) -> (B, ceil(H / stride), ceil(W / stride), outputs)."""
        return jax.nn.relu(self.proj(x) + self.f(x))


class RegNet(nnx.Module):
    """Stages of `depth` blocks in all, see `widths`; `group` channels a group, Y if `squeezes`."""

    def __init__(
        self,
        depth: int,
        initial: int,
        slope: float,
        step: float,
        group: int,
        *,
        squeezes: bool = False,
        classes: int = 1000,
        rngs: nnx.Rngs,
    ) -> None:
        self.stem = conv_norm(3, STEM, stride=2, activation=jax.nn.relu, rngs=rngs)
        stages, inputs = {}, STEM
        for number, (wanted, count) in enumerate(widths(depth, initial, slope, step), 1):
            each = min(group, wanted)
            outputs = round_channels(wanted, each)
            block = functools.partial(Block, group=each, squeezes=squeezes, rngs=rngs)
            blocks = enumerate(stage(block, inputs, outputs, count, 2))
            stages[f"block{number}"] = Named(**{f"block{number}-{i}": b for i, b in blocks})
            inputs = outputs
        self.trunk_output = Named(**stages)
        self.fc = Linear(inputs, classes, rngs=rngs)
        redraw(self, rngs, linear=jax.nn.initializers.normal(0.01))

    def __call__(self, x: Array) -> Array:
        """(B, H, W, 3) -> logits (B, classes)."""
        return self.fc(mean(self.trunk_output(self.stem(x))))

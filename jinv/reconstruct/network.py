"""The reconstructor of arXiv 2505.14323: a head's normalised weights -> one of its training images.

Sizes are the published ones, to the last parameter that their three digits show: every bypass has a
1x1 convolution, also where the channels stay, and the first layer has one bias a channel.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jinv import checks, training
from jinv.checks import Count
from jinv.models.abstract import abstract
from jinv.models.convolution import learned, pointwise
from jinv.models.layers import BatchNorm2d
from jinv.watch import Moments, Path, Record, Variables, hand_out, switch, watch

_SIDE = 4
"""Pixels a side of the map that the first layer makes."""
_KEPT = ("running_mean", "running_var", "num_batches_tracked")
"""What a BatchNorm layer keeps and no gradient changes."""


@dataclasses.dataclass(frozen=True)
class Config:
    """A reconstructor. Defaults: MNIST, one image of a class that is asked for.

    Attributes:
      inputs: numbers that it is given: of a head's normalised weights, or of a feature.
      width: G, channels of the last map.
      size: 32 or 64, pixels a side.
      channels: 1 for gray images, 3 for RGB.
      classes: how many there are if it is told the class of the image; None if it is not.
    """

    inputs: Count = 2570
    width: Count = 256
    size: int = 32
    channels: int = 1
    classes: Count | None = 10

    def __post_init__(self) -> None:
        checks.fields(self)
        checks.one_of("size", self.size, (32, 64))
        checks.one_of("channels", self.channels, (1, 3))

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of every map, from the first of 4 x 4 pixels to the image's size."""
        last = (self.width,) * (2 if self.size == 64 else 1)
        return (4 * self.width, 2 * self.width, self.width, *last)


@dataclasses.dataclass(frozen=True)
class Execution:
    """How it is computed; with float32 nothing here changes a value, but for rounding.

    Attributes:
      dtype: of maps and products; moments, weights and images are float32.
      merged: spare the products that upsampling repeats, see `upsampled_convolution`. A third of
        all products.
    """

    dtype: Literal["float32", "bfloat16"] = "float32"
    merged: bool = True

    def __post_init__(self) -> None:
        checks.fields(self)


def upsampled(x: Array) -> Array:
    """(B, H, W, C) -> (B, 2 H, 2 W, C), every pixel four times."""
    return _interleaved([[x, x], [x, x]])


def _interleaved(phases: list[list[Array]]) -> Array:
    """Return images (B, 2 H, 2 W, C) whose pixel (2 y + i, 2 x + j) is pixel (y, x) of one of four.

    Args:
      phases: the four, phases[i][j] (B, H, W, C).
    """
    whole = jnp.stack([jnp.stack(row, 3) for row in phases], 2)
    batch, height, _, width, _, channels = whole.shape
    return whole.reshape(batch, 2 * height, 2 * width, channels)


def upsampled_convolution(x: Array, weight: Array) -> Array:
    """Return a 3x3 convolution of `upsampled(x)` with 4 instead of 9 products a weight.

    Of three neighbours in the upsampled image two are the same pixel, so that their weights may be
    added first: an even row of the result has the weights (w_0, w_1 + w_2) of two rows of x, an odd
    row (w_0 + w_1, w_2), and so it is with columns. These are four 2x2 convolutions of x.

    Args:
      x: (B, H, W, I).
      weight: (3, 3, I, O).
    """

    def folded(w: Array, phase: int) -> Array:
        pair = (w[0], w[1] + w[2]) if phase == 0 else (w[0] + w[1], w[2])
        return jnp.stack(pair)

    def one(i: int, j: int) -> Array:
        taps = folded(weight, i)  # of rows
        taps = jnp.moveaxis(folded(jnp.moveaxis(taps, 1, 0), j), 0, 1)
        return learned(x, taps, ((1 - i, i), (1 - j, j)))

    return _interleaved([[one(i, j) for j in (0, 1)] for i in (0, 1)])


class Conv2d(nnx.Module):
    """A convolution with bias that is learned, bias 0 and weights from U(-bound, bound) at first.

    weight: (kernel, kernel, inputs, outputs), kernel 1 or 3; images keep their size.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, *, bound: float, rngs: nnx.Rngs):
        shape = (kernel, kernel, inputs, outputs)
        self.weight = nnx.Param(_uniform(rngs, shape, bound))
        self.bias = nnx.Param(jnp.zeros(outputs))
        self.kernel = kernel

    def __call__(self, x: Array) -> Array:
        """(B, H, W, inputs) -> (B, H, W, outputs)."""
        weight, bias = self.weight[...].astype(x.dtype), self.bias[...].astype(x.dtype)
        if self.kernel == 1:
            return pointwise(x, weight, 1) + bias
        return learned(x, weight, ((1, 1), (1, 1))) + bias

    def upsampled(self, x: Array) -> Array:
        """Return what it makes of the upsampled image (B, 2 H, 2 W, inputs)."""
        weight, bias = self.weight[...].astype(x.dtype), self.bias[...].astype(x.dtype)
        return upsampled_convolution(x, weight) + bias


def _uniform(rngs: nnx.Rngs, shape: tuple[int, ...], bound: float) -> Array:
    return jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)


def _kaiming(inputs: int, outputs: int, kernel: int, *, rngs: nnx.Rngs) -> Conv2d:
    """Return a convolution with He's uniform initialisation, fan-in mode."""
    bound = math.sqrt(6 / (inputs * kernel * kernel))
    return Conv2d(inputs, outputs, kernel, bound=bound, rngs=rngs)


class First(nnx.Module):
    """Numbers (B, inputs) -> a map (B, 4, 4, channels): one product, one bias a channel.

    The same as a transposed convolution of an image of 1 x 1 pixels.
    """

    def __init__(self, inputs: int, channels: int, *, rngs: nnx.Rngs) -> None:
        shape = (inputs, _SIDE * _SIDE * channels)
        self.weight = nnx.Param(_uniform(rngs, shape, math.sqrt(6 / inputs)))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x: Array) -> Array:
        """(B, inputs) -> (B, 4, 4, channels)."""
        bias = self.bias[...].astype(x.dtype)
        y = x @ self.weight[...].astype(x.dtype)
        return y.reshape(len(x), _SIDE, _SIDE, -1) + bias


class Block(nnx.Module):
    """BatchNorm, ReLU, twice the size, conv3, BatchNorm, ReLU, conv3, beside twice the size, conv1.

    A 1x1 convolution of pixels that are the same is the same: with `merged` it comes first.
    """

    def __init__(self, inputs: int, outputs: int, *, merged: bool, rngs: nnx.Rngs) -> None:
        self.bn1 = BatchNorm2d(inputs)
        self.conv1 = _kaiming(inputs, outputs, 3, rngs=rngs)
        self.bn2 = BatchNorm2d(outputs)
        self.conv2 = _kaiming(outputs, outputs, 3, rngs=rngs)
        self.bypass = _kaiming(inputs, outputs, 1, rngs=rngs)
        self.merged = merged

    def __call__(self, x: Array) -> Array:
        """(B, H, W, inputs) -> (B, 2 H, 2 W, outputs)."""
        y = jax.nn.relu(self.bn1(x))
        y = self.conv1.upsampled(y) if self.merged else self.conv1(upsampled(y))
        y = self.conv2(jax.nn.relu(self.bn2(y)))
        return y + (upsampled(self.bypass(x)) if self.merged else self.bypass(upsampled(x)))


class Network(nnx.Module):
    """The first layer, three or four blocks, then BatchNorm, ReLU, conv3 and tanh."""

    def __init__(
        self, config: Config, execution: Execution = Execution(), *, rngs: nnx.Rngs
    ) -> None:
        widths = config.widths
        self.first = First(config.inputs + (config.classes or 0), widths[0], rngs=rngs)
        self.blocks = nnx.List(
            [
                Block(inputs, outputs, merged=execution.merged, rngs=rngs)
                for inputs, outputs in itertools.pairwise(widths)
            ]
        )
        self.bn = BatchNorm2d(widths[-1])
        # Glorot's, with torch's gain of tanh.
        bound = 5 / 3 * math.sqrt(6 / (9 * (widths[-1] + config.channels)))
        self.conv = Conv2d(widths[-1], config.channels, 3, bound=bound, rngs=rngs)
        self.dtype = execution.dtype

    def __call__(self, x: Array) -> Array:
        """(B, inputs + classes) -> images (B, size, size, channels) in [-1, 1]."""
        if self.dtype != "float32":
            x = x.astype(self.dtype)
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        x = self.conv(jax.nn.relu(self.bn(x)))
        return jnp.tanh(x.astype(jnp.promote_types(x.dtype, jnp.float32)))


@dataclasses.dataclass(frozen=True, eq=False)
class Reconstructor:
    """A reconstructor as pure functions of its variables, a nested dict of arrays.

    Attributes:
      config: of the network.
      apply: (variables, x (B, inputs), labels (B,) or None) -> images (B, size, size, channels) in
        [-1, 1]. BatchNorm layers normalise with their running statistics.
      train_apply: the same with the batch's own moments, -> (images, these moments in forward
        order).
      statistics: paths of (running mean, running variance) in the same order.
    """

    config: Config
    apply: Callable[..., Array] = dataclasses.field(repr=False)
    train_apply: Callable[..., tuple[Array, tuple[Moments, ...]]] = dataclasses.field(repr=False)
    statistics: tuple[tuple[Path, Path], ...] = dataclasses.field(repr=False)
    _pixels: tuple[int, ...] = dataclasses.field(repr=False)

    @functools.cached_property
    def compiled(self) -> Callable[..., Array]:
        """Return `apply`, compiled once for every shape."""
        return jax.jit(self.apply)

    def init(self, key: Array) -> dict[Any, Any]:
        """Return variables to begin with."""
        model = Network(self.config, rngs=nnx.Rngs(params=key))
        return nnx.to_pure_dict(nnx.state(model))

    def with_statistics(
        self, variables: Variables, moments: tuple[Moments, ...], batch: int, momentum: float = 0.1
    ) -> Variables:
        """Return the variables after a batch, see `training.with_moments`.

        Args:
          variables: before.
          moments: of the batch, from `train_apply`.
          batch: images in it.
          momentum: weight of the batch, torch's.
        """
        counts = [batch * pixels for pixels in self._pixels]
        return training.with_moments(
            variables, self.statistics, moments, counts, (momentum,) * len(counts)
        )


def make(config: Config, execution: Execution = Execution()) -> Reconstructor:
    """Return the functions of a reconstructor; nothing is computed or allocated."""
    model = abstract(functools.partial(Network, config, execution))
    watch(model)
    switch(model, training=False)
    graphdef, shapes = nnx.split(model)
    switch(model, training=True)
    train_graphdef = nnx.graphdef(model)

    def run(
        graphdef: Any, training: bool, variables: Variables, x: Array, labels: Array | None
    ) -> tuple[Array, Record]:
        record = Record("the reconstructor", training)
        fresh = nnx.merge(graphdef, variables)
        hand_out(record, fresh)
        return fresh(_told(config, x, labels)), record

    def apply(variables: Variables, x: Array, labels: Array | None = None) -> Array:
        return run(graphdef, False, variables, x, labels)[0]

    def train_apply(
        variables: Variables, x: Array, labels: Array | None = None
    ) -> tuple[Array, tuple[Moments, ...]]:
        images, record = run(train_graphdef, True, variables, x, labels)
        return images, tuple(record.moments)

    record = Record("")

    def trace(variables: Variables, x: Array) -> Array:
        nonlocal record
        labels = None if config.classes is None else jnp.zeros(1, jnp.int32)
        images, record = run(graphdef, False, variables, x, labels)
        return images

    x = jax.ShapeDtypeStruct((1, config.inputs), jnp.float32)
    jax.eval_shape(trace, nnx.to_pure_dict(shapes), x)
    pixels = tuple(count or 0 for count in record.counts)
    return Reconstructor(config, apply, train_apply, tuple(record.statistics), pixels)


def _told(config: Config, x: Array, labels: Array | None) -> Array:
    """Numbers and, one-hot, the class.

    Raises:
      ValueError: they are not what the reconstructor takes.
    """
    if x.ndim != 2 or x.shape[1] != config.inputs:
        raise ValueError(
            f"the reconstructor takes {config.inputs} numbers for each image, not {x.shape}"
        )
    if config.classes is None:
        if labels is not None:
            raise ValueError("this reconstructor is not told classes: leave the labels out")
        return x
    if labels is None or jnp.shape(labels) != (len(x),):
        shape = None if labels is None else jnp.shape(labels)
        raise ValueError(
            f"this reconstructor is told the class of each of the {len(x)} images: give labels "
            f"({len(x)},), not {shape}"
        )
    return jnp.concatenate([x, jax.nn.one_hot(labels, config.classes, dtype=x.dtype)], 1)


def parameters(variables: Variables) -> dict[Any, Any]:
    """Return the variables that training changes: no running statistics, no counters."""
    return {
        key: parameters(value) if isinstance(value, Mapping) else value
        for key, value in variables.items()
        if key not in _KEPT
    }


def count(config: Config) -> int:
    """Return the number of parameters; nothing is allocated."""
    model = abstract(functools.partial(Network, config))
    leaves = jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    return sum(math.prod(leaf.shape) for leaf in leaves)

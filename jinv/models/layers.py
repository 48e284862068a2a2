"""Layers that torchvision's networks are made of, NHWC, with torch's names and defaults."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jinv.models.convolution import Padding, convolve
from jinv.net import batch_moments


class Conv2d(nnx.Module):
    """`torch.nn.Conv2d`; `padding` in pixels a side, or TensorFlow's "SAME".

    weight: (kernel, kernel, inputs / groups, outputs); computed in the dtype of the images.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        *,
        stride: int = 1,
        padding: Padding = 0,
        groups: int = 1,
        bias: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        shape = (kernel, kernel, inputs // groups, outputs)
        # He et al. 2015, fan-out mode, as torchvision initialises its CNNs.
        std = math.sqrt(2 / (kernel * kernel * outputs / groups))
        self.weight = nnx.Param(std * jax.random.normal(rngs.params(), shape))
        self.bias = nnx.Param(jnp.zeros(outputs)) if bias else None
        self.stride = stride
        self.padding = padding
        self.groups = groups

    def __call__(self, x: Array) -> Array:
        """(B, H, W, inputs) -> (B, H', W', outputs)."""
        y = convolve(
            x,
            self.weight[...].astype(x.dtype),
            stride=self.stride,
            padding=self.padding,
            groups=self.groups,
        )
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class BatchNorm2d(nnx.Module):
    """`torch.nn.BatchNorm2d`: normalises with the running statistics, or with the batch's own.

    Running statistics are never updated here: gradients and clients' updates are computed by
    functions of variables.
    """

    def __init__(self, features: int, *, eps: float = 1e-5) -> None:
        self.use_running_average = True
        self.weight = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))
        self.running_mean = nnx.BatchStat(jnp.zeros(features))
        self.running_var = nnx.BatchStat(jnp.ones(features))
        self.num_batches_tracked = nnx.BatchStat(jnp.zeros((), jnp.int32))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        """(..., features) -> (..., features)."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean, var = self.running_mean[...], self.running_var[...].astype(wide.dtype)
        if not self.use_running_average:
            mean, var = batch_moments(wide, near=mean)
        scale = self.weight[...] * jax.lax.rsqrt(var + self.eps)
        shift = self.bias[...] - mean * scale
        return (wide * scale + shift).astype(x.dtype)


class Linear(nnx.Linear):
    """`torch.nn.Linear`; weight: (inputs, outputs)."""

    weight: nnx.Param
    bias: nnx.Param

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs) -> None:
        nnx.Module.__init__(self)
        bound = 1 / math.sqrt(inputs)

        def uniform(shape: tuple[int, ...]) -> Array:
            return jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)

        self.weight = nnx.Param(uniform((inputs, outputs)))
        self.bias = nnx.Param(uniform((outputs,)))

    def __call__(self, x: Array) -> Array:  # type: ignore[override]
        """(B, inputs) -> (B, outputs)."""
        return x @ self.weight[...].astype(x.dtype) + self.bias[...].astype(x.dtype)


class Blank(nnx.Module):
    """Holds the place of a layer without parameters, so that numbering is torch's."""


@jax.custom_jvp
def relu6(x: Array) -> Array:
    """min(max(x, 0), 6), with gradient 0 at both kinks as in torch."""
    return jnp.clip(x, 0, 6)


@relu6.defjvp
def _relu6_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    return relu6(x), jnp.where((x > 0) & (x < 6), dx, jnp.zeros_like(dx))


def max_pool(x: Array, window: int, stride: int, padding: int = 0) -> Array:
    """Return the maximum over windows; the gradient goes to a window's first, as in torch.

    Along the width, then along the height: 2 k instead of k * k shifted slices, of half the size
    (with the gradient 9 times as fast as one pass, 10 % of a ResNet-18 step).

    Args:
      x: (B, H, W, C).
      window: k, side of the windows.
      stride: between two windows.
      padding: pixels a side, which count as minus infinity.
    """
    if padding:
        pads = ((0, 0), (padding, padding), (padding, padding), (0, 0))
        x = jnp.pad(x, pads, constant_values=-jnp.inf)
    return _running_maximum(_running_maximum(x, window, stride, 2), window, stride, 1)


def _running_maximum(x: Array, window: int, stride: int, axis: int) -> Array:
    count = (x.shape[axis] - window) // stride + 1
    best = jax.lax.slice_in_dim(x, 0, (count - 1) * stride + 1, stride, axis)
    for i in range(1, window):
        part = jax.lax.slice_in_dim(x, i, i + (count - 1) * stride + 1, stride, axis)
        best = jnp.where((part > best) | jnp.isnan(part), part, best)
    return best


def adaptive_average_pool(x: Array, size: int) -> Array:
    """`torch.nn.AdaptiveAvgPool2d`: (B, H, W, C) -> (B, size, size, C)."""
    rows, columns = (_pooling_matrix(n, size, x.dtype) for n in x.shape[1:3])
    return jnp.einsum("ih,jw,bhwc->bijc", rows, columns, x)


def _pooling_matrix(length: int, size: int, dtype: jnp.dtype) -> Array:
    """Row i averages entries floor(i n / s) .. ceil((i + 1) n / s)."""
    position = jnp.arange(length)
    start = (jnp.arange(size) * length) // size
    stop = -((-(jnp.arange(size) + 1) * length) // size)
    inside = (position >= start[:, None]) & (position < stop[:, None])
    return (inside / inside.sum(1, keepdims=True)).astype(dtype)


def round_channels(channels: float) -> int:
    """The nearest multiple of 8, or the next if that were over 10 % less; at least 8."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def serial(layers: Sequence[nnx.Module], x: Array) -> Array:
    """Call layers one after the other, skipping blanks."""
    for layer in layers:
        if not isinstance(layer, Blank):
            x = layer(x)
    return x

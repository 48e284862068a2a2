"""2-D convolution, NHWC x HWIO, in the form that is fastest on the backend at hand.

`backend.choices` says which form that is; all give the same, backward as well as forward, with
respect to images and to weights.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from jinv import backend

Padding = int | tuple[int, int] | Literal["SAME"]
Pads = tuple[tuple[int, int], tuple[int, int]]


def convolve(
    x: Array, weight: Array, *, stride: int = 1, padding: Padding = 0, groups: int = 1
) -> Array:
    """Return the cross-correlation (B, H', W', O) of images with a weight.

    Args:
      x: (B, H, W, I).
      weight: (height, width, I / groups, O).
      stride: of the window, along both axes.
      padding: pixels a side, of all sides or of rows and columns; or TensorFlow's "SAME".
      groups: channels are split into so many, each with filters of its own.
    """
    pads = _pads(x.shape[1:3], weight.shape[:2], stride, padding)
    use = backend.choices()
    height, width, inputs, outputs = weight.shape
    if groups == 1:
        if stride > 1 and inputs < _FEW and use.stem == "folded":
            return folded(x, weight, stride, pads)
        narrow = height == width == 1 and not any(map(any, pads))
        if narrow and use.pointwise == "product":
            return pointwise(x, weight, stride)
        if not narrow and use.strided == "unfolded" and _unfolding_pays(x, weight, stride, pads):
            return unfolded(x, weight, stride, pads)
    elif inputs == 1 and groups == outputs:
        if use.depthwise == "slices":
            return depthwise(x, weight, stride, pads)
    elif use.grouped == "split":
        return split(x, weight, stride, pads, groups)
    if groups == 1 and use.images == "in_parts" and len(x) > _PART:
        return in_parts(x, weight, stride, pads)
    return direct(x, weight, stride, pads, groups)


def direct(x: Array, weight: Array, stride: int, pads: Pads, groups: int) -> Array:
    """Return what XLA's own convolution gives: the reference.

    Args:
      x, weight, stride, groups: see `convolve`.
      pads: (before, after) of rows and of columns.
    """
    return lax.conv_general_dilated(
        x,
        weight,
        (stride, stride),
        pads,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


_PART = 16
"""Images over which XLA sums a gradient of weights at once on a CPU. It first lays their pixels
side by side, which takes 2 to 4 times as long for 128 images as for eight times 16."""


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def in_parts(x: Array, weight: Array, stride: int, pads: Pads) -> Array:
    """`direct`, with the gradient of the weights as a sum over parts of the images.

    Differentiable in any mode, to any order; without the weights' gradient it is `direct`.

    Args:
      x, weight, stride, pads: see `direct`.
    """
    return direct(x, weight, stride, pads, 1)


def _in_parts_jvp(
    stride: int, pads: Pads, primals: tuple[Array, Array], tangents: tuple[Any, Any]
) -> tuple[Array, Array]:
    x, weight = primals
    of_images, of_weight = tangents
    y = in_parts(x, weight, stride, pads)
    tangent = jnp.zeros_like(y)
    if not isinstance(of_images, SymbolicZero):
        tangent += in_parts(of_images, weight, stride, pads)
    if not isinstance(of_weight, SymbolicZero):
        parts = [x[i : i + _PART] for i in range(0, len(x), _PART)]
        tangent += jnp.concatenate([direct(part, of_weight, stride, pads, 1) for part in parts])
    return y, tangent


in_parts.defjvp(_in_parts_jvp, symbolic_zeros=True)


def split(x: Array, weight: Array, stride: int, pads: Pads, groups: int) -> Array:
    """Convolve every group of channels alone, but narrow ones several together.

    Args:
      x, weight, stride, pads, groups: see `direct`.
    """
    together = _together(groups, weight.shape[2])
    weight, count = _joined(weight, groups, together), groups // together
    parts = zip(jnp.split(x, count, -1), jnp.split(weight, count, -1), strict=True)
    return jnp.concatenate([direct(part, w, stride, pads, 1) for part, w in parts], -1)


_NARROW, _JOINED = 16, 32
"""Channels of a group below which a CPU gains by joining groups, and up to how many: three times as
fast with 4 channels, 1.5 times with 8, in spite of the zeros."""


def _together(groups: int, inputs: int) -> int:
    """How many groups of so many inputs are convolved as one; it divides their number."""
    most = _JOINED // inputs if inputs < _NARROW else 1
    return max(n for n in range(1, most + 1) if groups % n == 0)


def _joined(weight: Array, groups: int, together: int) -> Array:
    """Weights of fewer groups, with zeros between channels of groups that were apart."""
    if together == 1:
        return weight
    height, width, inputs, outputs = weight.shape
    apart = weight.reshape(height, width, inputs, -1, together, outputs // groups)
    none = [(0, 0)] * 4
    # Not times an identity matrix: XLA's gradient of that, a sum, has ended in a crash.
    rows = [
        jnp.pad(apart[..., i : i + 1, :], (*none, (i, together - 1 - i), (0, 0)))
        for i in range(together)
    ]
    return jnp.concatenate(rows, 2).reshape(height, width, together * inputs, outputs)


def _unfolding_pays(x: Array, weight: Array, stride: int, pads: Pads) -> bool:
    """Strided, or few output pixels for the size of the weights.

    XLA's input gradient convolves a cotangent spread with zeros when strided, and otherwise
    spends its time transposing the weights (512 x 512 x 3 x 3 at 4 x 4 pixels: 10.1 ms, unfolded
    4.2 ms). The 3-channel stem is faster in XLA.
    """
    inputs, outputs = weight.shape[2:]
    height, width = _output_size(x.shape[1:3], weight.shape, stride, pads)
    return (stride > 1 and inputs > 3) or x.shape[0] * height * width <= 2 * outputs


def unfolded(x: Array, weight: Array, stride: int, pads: Pads) -> Array:
    """Lay patches side by side (im2col), then take one matrix product.

    Args:
      x, weight, stride, pads: see `direct`.
    """
    outputs = weight.shape[-1]
    windows = [w for row in _shifted(x, weight, stride, pads) for w in row]
    return jnp.concatenate(windows, -1) @ weight.reshape(-1, outputs)


_FEW = 8
"""Channels below which a GPU's matrix units have too little to multiply."""


def folded(x: Array, weight: Array, stride: int, pads: Pads) -> Array:
    """Convolve blocks of stride x stride pixels, laid behind each other as channels, with stride 1.

    Args:
      x, weight, stride, pads: see `direct`.
    """
    height, width = _output_size(x.shape[1:3], weight.shape, stride, pads)
    rows, columns = (-(-side // stride) for side in weight.shape[:2])
    (top, _), (left, _) = pads
    x = _blocks(x, stride, (height + rows - 1, width + columns - 1), (top, left))
    weight = _blocks(weight[None], stride, (rows, columns), (0, 0))[0]
    return direct(x, weight, 1, ((0, 0), (0, 0)), 1)


def _blocks(x: Array, side: int, counts: tuple[int, int], before: tuple[int, int]) -> Array:
    """(N, H, W, C, ...) -> (N, *counts, side side C, ...), with zeros before and behind.

    Rows and columns behind the last block are left out.
    """
    sides = zip(counts, before, x.shape[1:3], strict=True)
    edges = [(zeros, side * count - size - zeros, 0) for count, zeros, size in sides]
    none = (0, 0, 0)
    x = lax.pad(x, jnp.zeros((), x.dtype), (none, *edges, *(none,) * (x.ndim - 3)))
    batch, _, _, channels, *rest = x.shape
    x = x.reshape(batch, counts[0], side, counts[1], side, channels, *rest)
    return jnp.moveaxis(x, 2, 3).reshape(batch, *counts, side * side * channels, *rest)


def pointwise(x: Array, weight: Array, stride: int) -> Array:
    """1x1 convolution as a matrix product."""
    return x[:, ::stride, ::stride] @ weight[0, 0]


_LARGE, _WIDE = 256, 16
"""Pixels and channels from which on XLA's gradient of weights is the slower one on a CPU."""


def learned(x: Array, weight: Array, pads: Pads) -> Array:
    """Return a convolution of stride 1 whose weight's gradient is wanted, too.

    Where `convolve` serves attacks, which want the images' alone, to any order and in any mode,
    this serves training: in reverse mode.

    Args:
      x, weight, pads: see `direct`.
    """
    height, width = _output_size(x.shape[1:3], weight.shape, 1, pads)
    wide = height * width >= _LARGE and min(weight.shape[2:]) >= _WIDE
    if wide and backend.choices().weights == "products":
        return by_products(x, weight, pads)
    return direct(x, weight, 1, pads, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def by_products(x: Array, weight: Array, pads: Pads) -> Array:
    """`direct`, with the gradient of the weights as one matrix product each of the k*k.

    XLA's convolution for it has windows as large as the images.

    Args:
      x, weight, pads: see `direct`.
    """
    return direct(x, weight, 1, pads, 1)


def _by_products_forward(x: Array, weight: Array, pads: Pads) -> tuple[Array, tuple[Array, Array]]:
    return direct(x, weight, 1, pads, 1), (x, weight)


def _by_products_backward(
    pads: Pads, residuals: tuple[Array, Array], dy: Array
) -> tuple[Array, Array]:
    x, weight = residuals
    pull = jax.linear_transpose(lambda x: direct(x, weight, 1, pads, 1), x)
    windows = _shifted(x, weight, 1, pads)
    inputs, outputs = weight.shape[2:]
    # Flat first: XLA multiplies the slices themselves more slowly.
    flat = dy.reshape(-1, outputs)
    dweight = [[window.reshape(-1, inputs).T @ flat for window in row] for row in windows]
    return pull(dy)[0], jnp.stack([jnp.stack(row) for row in dweight])


by_products.defvjp(_by_products_forward, _by_products_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def depthwise(x: Array, weight: Array, stride: int, pads: Pads) -> Array:
    """One filter a channel, as a sum of k*k shifted slices times their weights.

    Differentiable in reverse mode to any order; JAX's own rule for the slices would fill k*k
    arrays with zeros (15 times slower for 5x5 with stride 2, 10 to 15 % of an EfficientNet step).

    Args:
      x: (B, H, W, C).
      weight: (k, k, C).
      stride, pads: see `direct`.
    """
    height, width = _output_size(x.shape[1:3], weight.shape, stride, pads)
    # XLA adds in float32 inside a kernel anyway; asked for, the sum would also be written so.
    y = jnp.zeros((x.shape[0], height, width, x.shape[3]), x.dtype)
    for i, row in enumerate(_shifted(x, weight, stride, pads)):
        for j, window in enumerate(row):
            y = y + window * weight[i, j, 0]
    return y


def _depthwise_forward(
    x: Array, weight: Array, stride: int, pads: Pads
) -> tuple[Array, tuple[Array, Array]]:
    return depthwise(x, weight, stride, pads), (x, weight)


def _depthwise_backward(
    stride: int, pads: Pads, residuals: tuple[Array, Array], dy: Array
) -> tuple[Array, Array]:
    x, weight = residuals
    windows = _shifted(x, weight, stride, pads)
    dweight = [[(window * dy).sum((0, 1, 2)) for window in row] for row in windows]
    dx = _depthwise_transposed(dy, weight, stride, pads, x.shape[1:3])
    return dx, jnp.asarray(dweight)[:, :, None]


depthwise.defvjp(_depthwise_forward, _depthwise_backward)


def _depthwise_transposed(
    dy: Array, weight: Array, stride: int, pads: Pads, size: tuple[int, ...]
) -> Array:
    """What `depthwise` does to images of this size, transposed: a convolution for each phase.

    Pixel `stride * m + a` of the padded images met weights a, a + stride, ... on its way to
    outputs m, m - 1, ...
    """
    batch, *outputs, channels = dy.shape
    counts = [-(-(n + sum(pad)) // stride) for n, pad in zip(size, pads, strict=True)]

    def phase(a: int, b: int) -> Array:
        taps = weight[a::stride, b::stride][::-1, ::-1]
        if not taps.size:
            return jnp.zeros((batch, *counts, channels), dy.dtype)
        top, left = ((k - 1, n - m) for k, n, m in zip(taps.shape, counts, outputs, strict=False))
        return depthwise(dy, taps, 1, (top, left))

    rows = [jnp.stack([phase(a, b) for b in range(stride)], 3) for a in range(stride)]
    dx = jnp.stack(rows, 2).reshape(batch, *(stride * n for n in counts), channels)
    (top, _), (left, _) = pads
    return dx[:, top : top + size[0], left : left + size[1]]


def _shifted(x: Array, weight: Array, stride: int, pads: Pads) -> list[list[Array]]:
    """For each row and column of the kernel, the image pixels that it multiplies."""
    height, width = _output_size(x.shape[1:3], weight.shape, stride, pads)
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    rows = [x[:, i : i + (height - 1) * stride + 1 : stride] for i in range(weight.shape[0])]
    columns = [slice(j, j + (width - 1) * stride + 1, stride) for j in range(weight.shape[1])]
    return [[row[:, :, column] for column in columns] for row in rows]


def _output_size(
    size: tuple[int, ...], kernel: tuple[int, ...], stride: int, pads: Pads
) -> tuple[int, int]:
    height, width = (
        (n + sum(pad) - k) // stride + 1 for n, k, pad in zip(size, kernel, pads, strict=False)
    )
    return height, width


def _pads(size: tuple[int, ...], kernel: tuple[int, ...], stride: int, padding: Padding) -> Pads:
    if padding == "SAME":
        rows, columns = lax.padtype_to_pads(size, kernel, (stride, stride), "SAME")
        return rows, columns
    above, left = pair(padding)
    return (above, above), (left, left)


def pair(sides: int | tuple[int, int]) -> tuple[int, int]:
    """Return height and width, given these or one number for both."""
    return (sides, sides) if isinstance(sides, int) else sides

"""Layers that torchvision's networks are made of, NHWC, with torch's names and defaults."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jinv.models.convolution import Padding, convolve, pair
from jinv.net import batch_moments


class Conv2d(nnx.Module):
    """`torch.nn.Conv2d`; `padding` in pixels a side, or TensorFlow's "SAME".

    Kernel and padding are one number, or those of height and width. weight: (height, width,
    inputs / groups, outputs); computed in the dtype of the images.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | tuple[int, int],
        *,
        stride: int = 1,
        padding: Padding = 0,
        groups: int = 1,
        bias: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        height, width = pair(kernel)
        shape = (height, width, inputs // groups, outputs)
        # He et al. 2015, fan-out mode, as torchvision initialises most of its CNNs.
        std = math.sqrt(2 / (height * width * outputs / groups))
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
    functions of variables. `momentum` is the weight that training gives a batch in them.
    """

    def __init__(self, features: int, *, eps: float = 1e-5, momentum: float = 0.1) -> None:
        self.use_running_average = True
        self.weight = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))
        self.running_mean = nnx.BatchStat(jnp.zeros(features))
        self.running_var = nnx.BatchStat(jnp.ones(features))
        self.num_batches_tracked = nnx.BatchStat(jnp.zeros((), jnp.int32))
        self.eps = eps
        self.momentum = momentum

    def __call__(self, x: Array) -> Array:
        """(..., features) -> (..., features)."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean, var = self.running_mean[...], self.running_var[...].astype(wide.dtype)
        if not self.use_running_average:
            mean, var = batch_moments(wide, near=mean)
        scale = self.weight[...] * jax.lax.rsqrt(var + self.eps)
        shift = self.bias[...] - mean * scale
        return (wide * scale + shift).astype(x.dtype)


class LayerNorm(nnx.Module):
    """`torch.nn.LayerNorm` over the channels, computed in float32."""

    def __init__(self, features: int, *, eps: float = 1e-5) -> None:
        self.weight = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        """(..., features) -> (..., features)."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        centred = wide - wide.mean(-1, keepdims=True)
        scale = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.eps)
        return (centred * scale * self.weight[...] + self.bias[...]).astype(x.dtype)


class Linear(nnx.Linear):
    """`torch.nn.Linear`; weight: (inputs, outputs)."""

    weight: nnx.Param
    bias: nnx.Param | None

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True, rngs: nnx.Rngs) -> None:
        nnx.Module.__init__(self)
        bound = 1 / math.sqrt(inputs)

        def uniform(shape: tuple[int, ...]) -> Array:
            return jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)

        self.weight = nnx.Param(uniform((inputs, outputs)))
        self.bias = nnx.Param(uniform((outputs,))) if bias else None

    def __call__(self, x: Array) -> Array:  # type: ignore[override]
        """(..., inputs) -> (..., outputs)."""
        y = x @ self.weight[...].astype(x.dtype)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


Layer = Callable[[Array], Array]
"""A module, or a function, which has no parameters."""


class Sequential(nnx.List[Any]):
    """`torch.nn.Sequential`: every layer is called with what the one before it returned.

    Layers are numbered as in torch, functions too.
    """

    def __init__(self, *layers: Layer) -> None:
        super().__init__(layers)

    def __call__(self, x: Array) -> Array:
        """Return what the last layer returns."""
        for layer in self:
            x = layer(x)
        return x


class Named(nnx.Module):
    """`torch.nn.Sequential` of layers that have names instead of numbers."""

    def __init__(self, **layers: Layer) -> None:
        for name, layer in layers.items():
            setattr(self, name, layer)
        self._order = tuple(layers)

    def __call__(self, x: Array) -> Array:
        """Return what the last layer returns."""
        for name in self._order:
            x = getattr(self, name)(x)
        return x


def conv_norm(
    inputs: int,
    outputs: int,
    kernel: int = 3,
    *,
    stride: int = 1,
    groups: int = 1,
    norm: Callable[[int], nnx.Module] = BatchNorm2d,
    activation: Layer | None = None,
    rngs: nnx.Rngs,
) -> Sequential:
    """Return a convolution that keeps the size (but for its stride), BatchNorm and an activation.

    torchvision's `Conv2dNormActivation`.

    Args:
      inputs, outputs, kernel, stride, groups: of the convolution, which has no bias.
      norm: makes the normalisation of so many channels.
      activation: none by default.
      rngs: of the weights.
    """
    conv = Conv2d(
        inputs, outputs, kernel, stride=stride, padding=kernel // 2, groups=groups, rngs=rngs
    )
    return Sequential(conv, norm(outputs), *([activation] if activation else []))


def stage(
    block: Callable[..., nnx.Module], inputs: int, outputs: int, depth: int, stride: int
) -> list[nnx.Module]:
    """Return equal blocks, the first of which changes the channels and has the stride.

    Args:
      block: `block(inputs, outputs, stride=...)` makes one.
      inputs, outputs: channels.
      depth: number of blocks.
      stride: of the first.
    """
    first = block(inputs, outputs, stride=stride)
    return [first, *(block(outputs, outputs, stride=1) for _ in range(depth - 1))]


class SqueezeExcitation(nnx.Module):
    """Weigh channels by what a bottleneck makes of their means (arXiv 1709.01507)."""

    def __init__(
        self,
        channels: int,
        squeezed: int,
        *,
        activation: Layer = jax.nn.relu,
        gate: Layer = jax.nn.sigmoid,
        rngs: nnx.Rngs,
    ) -> None:
        self.fc1 = Conv2d(channels, squeezed, 1, bias=True, rngs=rngs)
        self.fc2 = Conv2d(squeezed, channels, 1, bias=True, rngs=rngs)
        self.activation = activation
        self.gate = gate

    def __call__(self, x: Array) -> Array:
        """(B, H, W, channels) -> the same shape."""
        means = x.mean((1, 2), keepdims=True)
        return x * self.gate(self.fc2(self.activation(self.fc1(means))))


def dropout(rate: float) -> nnx.Dropout:
    """Return `torch.nn.Dropout`, which is on only in training with a key, see `Net.train_apply`."""
    return nnx.Dropout(rate, deterministic=True)


def stochastic_depth(rate: float, rank: int = 4) -> nnx.Dropout:
    """Return torchvision's `StochasticDepth`: an image loses all of the branch, or nothing.

    Arrays of the branch have so many axes, images first (arXiv 1603.09382).
    """
    return nnx.Dropout(rate, broadcast_dims=tuple(range(1, rank)), deterministic=True)


def redraw(
    model: nnx.Module,
    rngs: nnx.Rngs,
    conv: jax.nn.initializers.Initializer | None = None,
    linear: jax.nn.initializers.Initializer | None = None,
) -> None:
    """Draw a network's weights anew, as torchvision initialises some in a way of their own.

    Args:
      model: the network, which is changed.
      rngs: to draw from.
      conv: draws the weights of convolutions, whose biases become 0; they stay by default.
      linear: the same of linear layers.
    """
    for _, layer in nnx.iter_modules(model):
        draw = conv if isinstance(layer, Conv2d) else linear
        if isinstance(layer, Conv2d | Linear) and draw is not None:
            layer.weight = nnx.Param(draw(rngs.params(), layer.weight.shape, jnp.float32))
            if layer.bias is not None:
                layer.bias = nnx.Param(jnp.zeros(layer.bias.shape))


@jax.custom_jvp
def relu6(x: Array) -> Array:
    """min(max(x, 0), 6), with gradient 0 at both kinks as in torch."""
    return jnp.clip(x, 0, 6)


@relu6.defjvp
def _relu6_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    return relu6(x), jnp.where((x > 0) & (x < 6), dx, jnp.zeros_like(dx))


def hard_sigmoid(x: Array) -> Array:
    """min(max(x + 3, 0), 6) / 6."""
    return relu6(x + 3) / 6


def hard_swish(x: Array) -> Array:
    """x times its `hard_sigmoid`."""
    return x * hard_sigmoid(x)


@jax.custom_jvp
def gelu(x: Array) -> Array:
    """x times the normal distribution's share below x, computed in float32 as in torch.

    JAX's own takes twice as long on CPU, and a fifth longer between two linear layers, backward.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (wide * _share_below(wide)).astype(x.dtype)


@gelu.defjvp
def _gelu_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    density = jnp.exp(-jnp.square(wide) / 2) / math.sqrt(2 * math.pi)
    return gelu(x), dx * (_share_below(wide) + wide * density).astype(x.dtype)


def _share_below(x: Array) -> Array:
    return 0.5 * (1 + jax.lax.erf(x / math.sqrt(2)))


def identity(x: Array) -> Array:
    """Hold the place of a layer that does nothing here, such as a change of axes."""
    return x


def flatten(x: Array) -> Array:
    """(B, H, W, C) -> (B, C H W): channel by channel, as torch's linear layers count."""
    return jnp.transpose(x, (0, 3, 1, 2)).reshape(x.shape[0], -1)


def mean(x: Array) -> Array:
    """(B, H, W, C) -> (B, C)."""
    return x.mean((1, 2))


def round_channels(channels: float, divisor: int = 8) -> int:
    """Return the nearest multiple of the divisor, or the next if that were over 10 % less."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded

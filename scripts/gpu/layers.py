"""Single layers of the zoo's networks as programs: forward, and the gradient of what comes in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jinv.models import layers
from jinv.models.convolution import convolve
from jinv.net import batch_moments


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution, BatchNorm with the moments of its input, and ReLU6.

    Attributes:
      kernel: side of the window; 0 for no convolution.
      inputs: channels.
      outputs: channels.
      size: of the incoming images.
      stride: of the window.
      groups: that channels are split into.
      residual: add something before the ReLU6.
      dtype: of the images.
      batch: images.
    """

    kernel: int
    inputs: int
    outputs: int
    size: int
    stride: int = 1
    groups: int = 1
    residual: bool = False
    dtype: str = "bfloat16"
    batch: int = 84

    def __str__(self) -> str:
        kind = f"{self.kernel}x{self.kernel}/{self.stride}" if self.kernel else "BatchNorm"
        groups = f" in {self.groups}" if self.groups > 1 else ""
        added = " + residual" if self.residual else ""
        return f"{kind} {self.inputs}->{self.outputs}{groups} at {self.size} px{added}"

    def smaller(self) -> Layer:
        """The same kind for `--tiny`."""
        groups = min(self.groups, 4)
        widths = (4, 4 if self.groups > 1 or not self.kernel else 8)
        return dataclasses.replace(
            self, inputs=widths[0], outputs=widths[1], size=8, groups=groups, batch=2
        )

    def noise(self, *shape: int) -> Array:
        """Normal numbers in the layer's dtype, some often; nothing is compiled for them."""
        some = np.random.default_rng(0).standard_normal(2**20).astype(jnp.dtype(self.dtype))
        return jnp.asarray(np.resize(some, shape))

    def convolution(self, weight: Array, x: Array) -> Array:
        """As the zoo has it."""
        return convolve(x, weight, stride=self.stride, padding=self.kernel // 2, groups=self.groups)

    @property
    def arrays(self) -> tuple[Array, Array]:
        """Weight and images."""
        weight = self.noise(
            max(self.kernel, 1), max(self.kernel, 1), self.inputs // self.groups, self.outputs
        )
        return weight, self.noise(self.batch, self.size, self.size, self.inputs)

    def __call__(self, weight: Array, residual: Array, x: Array) -> tuple[Array, Array, Array]:
        """Output, and moments of what BatchNorm sees."""
        y = self.convolution(weight, x) if self.kernel else x
        mean, var = jnp.zeros(self.outputs), jnp.ones(self.outputs)
        seen = batch_moments(y, near=mean)
        y = (y.astype(jnp.float32) * jax.lax.rsqrt(var + 1e-5) - mean).astype(y.dtype)
        return layers.relu6(y + residual if self.residual else y), *seen


def program(layer: Layer) -> Callable[[], Array]:
    """Compile a layer as the switches stand now; a call runs it."""
    weight, x = layer.arrays
    shape = jax.eval_shape(layer.convolution, weight, x).shape if layer.kernel else x.shape
    residual = cotangent = layer.noise(*shape)

    def both(weight: Array, residual: Array, x: Array, cotangent: Array) -> Array:
        found, back = jax.vjp(lambda x: layer(weight, residual, x), x)
        # What the moments receive depends on them, as in the prior.
        return back((cotangent, *(jnp.sin(moment) for moment in found[1:])))[0]

    arguments = (weight, residual, x, cotangent)
    compiled = jax.jit(both).lower(*arguments).compile()
    return lambda: compiled(*arguments)

"""Input gradients of ResNet-50's strided convolutions, beside PyTorch's.

XLA writes them as convolutions of a cotangent spread with zeros; whether it finds cuDNN's own
gradient behind that shows here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import torch

from benchmarks import timing
from gpu.layers import Layer
from gpu.part import Given

LAYERS = (
    Layer(7, 3, 64, 224, stride=2),
    Layer(3, 128, 128, 56, stride=2),
    Layer(3, 256, 256, 28, stride=2),
    Layer(3, 512, 512, 14, stride=2),
    Layer(1, 256, 512, 56, stride=2),
    Layer(1, 512, 1024, 28, stride=2),
    Layer(1, 1024, 2048, 14, stride=2),
)


def run(given: Given) -> None:
    """One row a layer."""
    torch.backends.cudnn.benchmark = True
    for layer in LAYERS[1:2] if given.tiny else LAYERS:
        one = layer.smaller() if given.tiny else layer
        found = timing.alternate({"ours": ours(one), "torch": torchs(one)})
        given.emit(
            case=str(one),
            dtype=one.dtype,
            **found["ours"]._asdict(),
            torch_ms=found["torch"].ms,
            torch_quartiles=found["torch"].quartiles,
            torch_ratio=found["torch"].ms / found["ours"].ms,
        )


def ours(layer: Layer) -> Callable[[], Any]:
    """The gradient of the images alone; what comes forward is not computed."""
    weight, x = layer.arrays
    cotangent = layer.noise(*jax.eval_shape(layer.convolution, weight, x).shape)

    def gradient(weight: jax.Array, x: jax.Array, cotangent: jax.Array) -> jax.Array:
        return jax.vjp(lambda x: layer.convolution(weight, x), x)[1](cotangent)[0]

    compiled = jax.jit(gradient).lower(weight, x, cotangent).compile()
    return lambda: compiled(weight, x, cotangent)


def torchs(layer: Layer) -> Callable[[], Any]:
    """The same, channels last."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    height = -(-layer.size // layer.stride)

    def laid(shape: tuple[int, ...]) -> torch.Tensor:
        noise = torch.randn(shape, device=device, dtype=getattr(torch, layer.dtype))
        return noise.to(memory_format=torch.channels_last)

    images = laid((layer.batch, layer.inputs, layer.size, layer.size))
    filters = laid((layer.outputs, layer.inputs, layer.kernel, layer.kernel))
    cotangent = laid((layer.batch, layer.outputs, height, height))
    pads = (layer.kernel // 2,) * 2
    stride = (layer.stride,) * 2

    def gradient() -> Started:
        torch.ops.aten.convolution_backward(
            cotangent, images, filters, None, stride, pads, (1, 1), False, (0, 0), 1,
            (True, False, False),
        )  # fmt: skip
        return Started()

    return gradient


class Started:
    """Work of PyTorch that is under way, to be waited for like JAX's arrays."""

    def block_until_ready(self) -> None:
        """Wait for all of it."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()

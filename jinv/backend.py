"""Every choice that depends on the processor: one switch each, and what it stands at where.

Nothing here changes a result beyond rounding. `CPU` is measured on two cores. `OTHER` (GPU, TPU) is
reasoned from the programs that XLA's compiler makes for an NVIDIA H100 of a DeepInversion step on
84 images of 224 px: the bytes that its kernels read and write. `make gpu-check` times both
positions of every switch on a card.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import jax


@dataclasses.dataclass(frozen=True)
class Choices:
    """The switches.

    Attributes:
      depthwise: convolution with one filter a channel as XLA's "convolution", or as a sum of
        shifted "slices" times weights.
      grouped: convolution in groups as one "convolution", or "split" into one a group, of narrow
        groups one for several.
      pointwise: 1x1 convolution as XLA's "convolution", or as a matrix "product".
      strided: convolution whose gradient XLA would spread with zeros, or that has few output
        pixels, as XLA's "convolution", or "unfolded" into a matrix product.
      weights: the gradient of a convolution's weights, where they are learned on large maps, as
        XLA's "convolution", or as "products" of shifted slices.
      images: the gradient of a convolution's weights of many images "together", or "in_parts" of
        them, which are added up.
      moments: mean and variance of a BatchNorm layer's input in "one_pass" over it, around the
        running mean, or in "two_passes", the second around the mean of the first.
      loop: steps that the host dispatches one by one ("python"), or several in one program
        ("scan").
      remat: keep convolutions' outputs only for the gradient of a network, and compute what lies
        between them again.
      seeds: candidates of a gradient inversion whose gradients fill memory, "together" or
        "in_turn".
      threefry: random bits by JAX's own loop ("jax"), or with its rounds "written_out".
    """

    depthwise: Literal["convolution", "slices"]
    grouped: Literal["convolution", "split"]
    pointwise: Literal["convolution", "product"]
    strided: Literal["convolution", "unfolded"]
    weights: Literal["convolution", "products"]
    images: Literal["together", "in_parts"]
    moments: Literal["one_pass", "two_passes"]
    loop: Literal["python", "scan"]
    remat: bool
    seeds: Literal["together", "in_turn"]
    threefry: Literal["jax", "written_out"]


CPU = Choices(
    depthwise="slices",  # 20 to 35 times as fast forward, 15 times backward
    grouped="split",  # 40 times as fast backward
    pointwise="product",  # 1.5 to 2 times as fast
    strided="unfolded",  # 2.4 times as fast on 4 x 4 pixels
    weights="products",  # 2.6 times as fast on 32 x 32 pixels, 1.5 times on 16 x 16
    images="in_parts",  # 2 to 4 times as fast with 128 images of 28 x 28 or 14 x 14 pixels
    moments="two_passes",
    loop="python",  # twice as fast: XLA runs convolutions inside loops on one thread
    remat=False,
    seeds="in_turn",  # caches hold one of them
    threefry="written_out",  # a quarter of the time
)

OTHER = Choices(
    # XLA joins the slices with the BatchNorm and activation before them, and with the moments after
    # them: MobileNetV2 moves 10.1 GB instead of 12.6 in bfloat16, 17.6 instead of 23.4 in float32,
    # for which cuDNN's grouped kernels are slow besides.
    depthwise="slices",
    # A kernel for each of a ResNeXt's 32 groups would not fill the card.
    grouped="convolution",
    # ResNet-50 moves 21.6 GB, as products 22.1: cuDNN adds bias and residual on the way.
    pointwise="convolution",
    # XLA finds cuDNN's own input gradient behind the one spread with zeros; unfolded 22.2 GB.
    strided="convolution",
    # cuDNN has kernels for it.
    weights="convolution",
    images="together",
    # XLA joins both sums with the layer's normalisation: 21.6 GB and 585 kernels of ResNet-50
    # instead of 23.4 and 691.
    moments="one_pass",
    loop="scan",  # measured on an H200: 11.2 ms a step of ResNet-50 instead of 12.6
    # XLA keeps no masks, and computes again what is cheap: 25.1 GB with it, for a quarter less
    # memory.
    remat=False,
    seeds="together",
    threefry="jax",  # JAX writes it out itself for GPUs
)

_chosen: contextvars.ContextVar[Choices | None] = contextvars.ContextVar("chosen", default=None)


def choices() -> Choices:
    """Return the switches as they stand on JAX's default backend."""
    return _chosen.get() or (CPU if jax.default_backend() == "cpu" else OTHER)


@contextlib.contextmanager
def choose(**changes: Any) -> Iterator[None]:
    """Set switches otherwise while programs are traced within, to compare.

    Programs that are compiled already stay as they are.

    Args:
      **changes: names of `Choices` and their values.
    """
    token = _chosen.set(dataclasses.replace(choices(), **changes))
    try:
        yield
    finally:
        _chosen.reset(token)

"""Every choice that depends on the processor: one switch each, and what it stands at where.

Nothing here changes a result beyond rounding. `CPU` is measured on two cores, `OTHER` (GPU, TPU) on
an NVIDIA H200, with DeepInversion steps on 84 images of 224 px and single layers of them. Comments
give the time relative to the other position. `make gpu-check` times both on a card.
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
      stem: strided convolution of few channels, such as a network's first, as XLA's "convolution",
        or "folded": of blocks of pixels, with stride 1.
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
    stem: Literal["convolution", "folded"]
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
    stem="convolution",  # 1.15 to 1.3 times as fast
    weights="products",  # 2.6 times as fast on 32 x 32 pixels, 1.5 times on 16 x 16
    images="in_parts",  # 2 to 4 times as fast with 128 images of 28 x 28 or 14 x 14 pixels
    moments="two_passes",
    loop="python",  # twice as fast: XLA runs convolutions inside loops on one thread
    remat=False,
    seeds="in_turn",  # caches hold one of them
    threefry="written_out",  # a quarter of the time
)

OTHER = Choices(
    # 0.5 to 0.9 a layer, and 0.1 in MobileNetV2 (6.3 ms a step instead of 68): slices move fewer
    # bytes, but XLA joins them with the layers before, which it then computes once a slice.
    depthwise="convolution",
    grouped="convolution",  # 0.7 with 4 channels a group, 0.1 with 16
    # 0.9 where cuDNN adds a residual on the way and 0.75 with a stride, but 1.1 to 1.3 where
    # channels get fewer. Products alone save 4% of MobileNetV2.
    pointwise="convolution",
    strided="convolution",  # 0.4 to 1: XLA finds cuDNN's own input gradient
    stem="folded",  # 0.45 to 0.65, and 0.93 of ResNet-50
    weights="convolution",  # 0.65
    images="together",  # 0.2 to 0.3
    moments="one_pass",  # 0.8: XLA joins both sums with the layer's normalisation
    loop="scan",  # 1, and the host is free meanwhile
    # XLA keeps no masks, and computes again what is cheap: 25.1 GB with it instead of 21.6, for a
    # quarter less memory.
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

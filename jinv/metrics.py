"""Numbers that say how good images are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jinv import image
from jinv.image import Preprocessing
from jinv.net import Net

PIXELS_RGB = Preprocessing(size=1, mean=(0.0,) * 3, std=(1.0,) * 3)
PIXELS_GRAY = Preprocessing(size=1, mean=(0.0,), std=(1.0,))


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A network's first choice: class index (B,) and its softmax probability (B,)."""

    index: np.ndarray
    probability: np.ndarray


def make_judge(net: Net) -> Callable[[Array | np.ndarray], Prediction]:
    """A compiled `pixels (B, H, W, C) in [0, 1] -> Prediction`, at the network's own size.

    Pixels are clipped to [0, 1] and resampled (bicubic) to what the network was trained on.
    """

    @jax.jit
    def predict(variables: dict, pixels: Array) -> tuple[Array, Array]:
        resized = image.resize(jnp.clip(pixels, 0, 1), net.preprocessing.size, "bicubic")
        space = PIXELS_GRAY if pixels.shape[-1] == 1 else PIXELS_RGB
        images = image.convert(jnp.clip(resized, 0, 1), space, net.preprocessing)
        probabilities = jax.nn.softmax(net.apply(variables, images).logits)
        return probabilities.argmax(-1), probabilities.max(-1)

    def judge(pixels: Array | np.ndarray) -> Prediction:
        index, probability = predict(net.variables, pixels)
        return Prediction(np.asarray(index), np.asarray(probability))

    return judge


def top1(prediction: Prediction, targets: Sequence[int]) -> float:
    """Share of images that are given their target class."""
    if len(targets) != len(prediction.index):
        raise ValueError(f"{len(targets)} targets for {len(prediction.index)} images")
    return float(np.mean(prediction.index == np.asarray(targets)))

"""Numbers that say how good images are."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import weakref
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jinv import image
from jinv.image import Preprocessing
from jinv.net import Net, Outputs, Variables


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a network says of a batch of images.

    Attributes:
      probabilities: (B, classes), softmax of the logits.
      features: (B, D) input of its last linear layer, None if it has none.
    """

    probabilities: np.ndarray
    features: np.ndarray | None = None

    @property
    def index(self) -> np.ndarray:
        """Class of the highest probability (B,)."""
        return self.probabilities.argmax(-1)

    @property
    def probability(self) -> np.ndarray:
        """Highest probability (B,)."""
        return self.probabilities.max(-1)


def make_judge(net: Net) -> Callable[[Array | np.ndarray], Prediction]:
    """Return a compiled `pixels (B, H, W, C) in [0, 1] -> Prediction`, at the network's own size.

    Pixels are clipped to [0, 1] and resampled (bicubic) to what the network was trained on; colours
    become gray for a network of one channel. All
    judges of one network share its programs, which last as long as the network.
    """
    if net not in _PREDICT:
        _PREDICT[net] = jax.jit(functools.partial(_predict, net.apply, net.preprocessing))
    predict = _PREDICT[net]

    def judge(pixels: Array | np.ndarray) -> Prediction:
        return Prediction(*jax.device_get(predict(net.variables, pixels)))

    return judge


# The values must not hold the keys: they know the network's `apply`, not the network.
_PREDICT: weakref.WeakKeyDictionary[Net, Callable] = weakref.WeakKeyDictionary()


def _predict(
    apply: Callable[[Variables, Array], Outputs],
    wanted: Preprocessing,
    variables: Variables,
    pixels: Array,
) -> tuple[Array, Array | None]:
    """Probabilities and features. No program computes the moments, which nobody asks for."""
    seen = image.for_channels(jnp.clip(pixels, 0, 1), wanted.channels)
    resized = image.resize(seen, wanted.size, "bicubic")
    space = image.pixels(resized.shape[-1])
    outputs = apply(variables, image.convert(jnp.clip(resized, 0, 1), space, wanted))
    return jax.nn.softmax(outputs.logits), outputs.features


def top1(prediction: Prediction, targets: Sequence[int]) -> float:
    """Share of images that are given their target class."""
    return float(np.mean(prediction.index == _matching(prediction, targets)))


def confidence(prediction: Prediction, targets: Sequence[int]) -> float:
    """Mean probability of the target class."""
    columns = _matching(prediction, targets)
    return float(prediction.probabilities[np.arange(len(columns)), columns].mean())


def _matching(prediction: Prediction, targets: Sequence[int]) -> np.ndarray:
    if len(targets) != len(prediction.index):
        raise ValueError(f"{len(targets)} targets for {len(prediction.index)} images")
    return np.asarray(targets)


def agreement(predictions: Sequence[Prediction]) -> float | None:
    """Share of (image, pair of networks) where both give the same class; None without a pair."""
    chosen = [prediction.index for prediction in predictions]
    pairs = list(itertools.combinations(chosen, 2))
    return float(np.mean([a == b for a, b in pairs])) if pairs else None


def pixel_distances(pixels: np.ndarray, others: np.ndarray | None = None) -> np.ndarray:
    """d_ij = sqrt(mean (x_i - y_j)^2) of images (B, H, W, C) and (M, H, W, C) -> (B, M), float64.

    Without others, among the images themselves.
    """
    flat = pixels.reshape(len(pixels), -1).astype(np.float64)
    rows = pixels if others is None else others
    return np.stack([np.sqrt(np.square(flat - row.ravel()).mean(1)) for row in rows], axis=1)


def feature_distances(features: np.ndarray, others: np.ndarray | None = None) -> np.ndarray:
    """d_ij = 1 - cos(f_i, g_j) of features (B, D) and (M, D) -> (B, M), float64.

    Without others, among the features themselves. Features that are all 0 have distance 1.
    """
    unit = _unit(features)
    return 1 - unit @ (unit if others is None else _unit(others)).T


def _unit(features: np.ndarray) -> np.ndarray:
    wide = np.asarray(features, np.float64)
    length = np.linalg.norm(wide, axis=1, keepdims=True)
    return wide / np.maximum(length, np.finfo(np.float32).tiny)


def diversity(distances: np.ndarray, groups: Sequence[int]) -> float | None:
    """Mean distance (B, B) over the pairs of one group; None if no two images share a group."""
    same = np.equal.outer(groups, groups)
    chosen = np.triu(same, 1)
    return float(distances[chosen].mean()) if chosen.any() else None

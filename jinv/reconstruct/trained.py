"""A trained reconstructor in a folder: what it takes, and its weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

import weights_convert
from jinv import checks, files
from jinv.files import write_atomic
from jinv.net import Variables
from jinv.reconstruct import network
from jinv.reconstruct.normalisation import Normalisation
from jinv.reconstruct.training import reconstruct
from jinv.runs import config as configs
from jinv.shadow.config import Config as Training

INDEX, WEIGHTS = "reconstructor.json", "reconstructor.safetensors"
Input = Literal["weights", "features"]
_MOST = 2**20
"""Bytes of a file that is read as an index."""
_PREFIX = "normalisation."


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a reconstructor was trained for.

    Attributes:
      input: "weights" of a head, all of them; or "features", one of which is one image's.
      network: sizes.
      size: P, coordinates of its input before those that never vary are dropped.
      training: of the heads.
      class_size: images of a class in a head's training set.
      fingerprint: of the features that it has learned from.
    """

    input: Input
    network: network.Config
    size: int
    training: Training
    class_size: int
    fingerprint: str

    def __post_init__(self) -> None:
        checks.fields(self)


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """A trained reconstructor.

    Attributes:
      origin: what it was trained for.
      net: as functions.
      variables: its variables.
      normalisation: of what it is given.
    """

    origin: Origin
    net: network.Reconstructor
    variables: Variables
    normalisation: Normalisation

    def of_weights(self, weights: np.ndarray) -> np.ndarray:
        """Return images (S, K, H, W, C) in [-1, 1] of heads (S, P): one a class, or one in all."""
        x = self.normalisation.normalised(weights)
        classes = self.net.config.classes
        labels = None if classes is None else np.tile(np.arange(classes), len(x))
        found = reconstruct(self.net, self.variables, np.repeat(x, classes or 1, 0), labels)
        return found.reshape(len(x), classes or 1, *found.shape[1:])

    def of_features(self, features: np.ndarray) -> np.ndarray:
        """Return images (S, C, H, W, C') in [-1, 1] of features (S, C, D), one of every class."""
        heads, classes, width = features.shape
        x = self.normalisation.normalised(features.reshape(-1, width))
        labels = None if self.net.config.classes is None else np.tile(np.arange(classes), heads)
        found = reconstruct(self.net, self.variables, x, labels)
        return found.reshape(heads, classes, *found.shape[1:])

    def save(self, folder: Path) -> None:
        """Write reconstructor.safetensors and, after it, reconstructor.json."""
        own: dict[str, np.ndarray] = {
            _PREFIX + "varying": np.asarray(self.normalisation.varying, np.int64),
            _PREFIX + "mean": np.asarray(self.normalisation.mean, np.float32),
            _PREFIX + "std": np.asarray(self.normalisation.std, np.float32),
        }
        weights_convert.write(folder / WEIGHTS, weights_convert.from_flax(self.variables) | own)
        write_atomic(folder / INDEX, json.dumps(configs.plain(self.origin), indent=2) + "\n")


def load(folder: str | Path, execution: network.Execution = network.Execution()) -> Trained:
    """Return the reconstructor of a folder that `jinv train-reconstructor` wrote.

    Args:
      folder: with reconstructor.json and reconstructor.safetensors.
      execution: how it is computed.

    Raises:
      ValueError: a file is missing, damaged, or not what the other says.
    """
    folder = files.path(folder)
    path = folder / INDEX
    try:
        with path.open("rb") as file:
            text = file.read(_MOST + 1)
        if len(text) > _MOST:
            raise ValueError(f"it has more than {_MOST} bytes")
        origin = configs.build(Origin, json.loads(text))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is missing or damaged: {error}; a folder of `jinv train-reconstructor` is "
            "needed"
        ) from None
    state = weights_convert.read(folder / WEIGHTS)
    own = {n: state.pop(n) for n in list(state) if n.startswith(_PREFIX)}
    try:
        net = network.make(origin.network, execution)
        shapes = jax.eval_shape(net.init, jax.random.key(0))
        variables = weights_convert.to_flax(state, shapes)
        normalisation = _normalisation(origin, own)
    except ValueError as error:
        raise ValueError(f"{folder / WEIGHTS}: {error}") from None
    return Trained(origin, net, variables, normalisation)


def _normalisation(origin: Origin, own: dict[str, Any]) -> Normalisation:
    inputs = origin.network.inputs
    try:
        varying, mean, std = (own[_PREFIX + name] for name in ("varying", "mean", "std"))
    except KeyError as error:
        raise ValueError(f"{error} is missing") from None
    sound = (
        varying.shape == mean.shape == std.shape == (inputs,)
        and varying.dtype == np.int64
        and np.isin(varying, np.arange(origin.size)).all()
        and np.isfinite(mean).all()
        and np.isfinite(std).all()
        and (std > 0).all()
    )
    if not sound:
        raise ValueError(f"its normalisation is not one of {inputs} numbers of {origin.size}")
    return Normalisation(origin.size, varying, mean, std)

"""From a feature to its image, learned from the attacker's own images.

A recovered feature is the truth's posterior mean. Along the directions that stay unknown it is
drawn to the mean of its class, and what other examples are like leaks into it. Pairs for training
are made so, without any head: of a feature x with class mean M, and another one y of the class,

    M + (1 - r^2)(x - M) + r sqrt(1 - r^2) (y - M)

has an error of r times the spread in its class that is not correlated with itself, as that of a
posterior mean. `Recovered.error` is r.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jinv.reconstruct import ridge
from jinv.reconstruct.ridge import HELD_OUT, Sums
from jinv.shadow.sampling import permutation


@dataclasses.dataclass(frozen=True, eq=False)
class Linear:
    """A linear map from features to images for each class.

    Attributes:
      regressions: of the classes.
      shape: (H, W, C) of images.
    """

    regressions: tuple[ridge.Regression, ...]
    shape: tuple[int, ...]

    @classmethod
    def fit(cls, features: np.ndarray, labels: np.ndarray, images: np.ndarray) -> Linear:
        """Return the maps that suit the attacker's own pairs, with penalties by held-out images.

        Args:
          features: (M, D).
          labels: (M,) from 0 on.
          images: (M, H, W, C), bytes or floats in [-1, 1].

        Raises:
          ValueError: a class has fewer than two images.
        """
        regressions = []
        for c in range(labels.max() + 1):
            members = np.flatnonzero(labels == c)
            if len(members) < 2:
                raise ValueError(f"class {c} has {len(members)} images: a map needs two and more")
            x, y = features[members], ridge.unit(images[members]).reshape(len(members), -1)
            held_out = np.arange(len(members)) % HELD_OUT == 0
            parts = [Sums.of(x[~held_out], y[~held_out])], [Sums.of(x[held_out], y[held_out])]
            regressions.append(ridge.regress(*parts))
        return cls(tuple(regressions), images.shape[1:])

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Return images (S, C, H, W, C') in [-1, 1] of features (S, C, D), one of every class."""
        found = [f(features[:, c].astype(np.float64)) for c, f in enumerate(self.regressions)]
        images = np.stack(found, 1).reshape(*features.shape[:2], *self.shape)
        return np.clip(images, -1, 1).astype(np.float32)


@dataclasses.dataclass
class Noisy:
    """Features as recovery finds them, for `jinv.reconstruct.training`, each the only one of a set.

    A seed is a permutation of the images with an error r for each, uniform between 0 and `most`,
    and another feature of its class.

    Attributes:
      features: (M, D) of the attacker's own images.
      labels: (M,).
      most: the largest r.
      sets: how many a seed has.
      nonnegative: features are behind a ReLU.
      seconds: that the host waited for them.
    """

    features: np.ndarray
    labels: np.ndarray
    most: float
    sets: int
    nonnegative: bool
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self._placed = jnp.asarray(self.features)
        classes = range(int(self.labels.max()) + 1)
        self._means = jnp.stack([self._placed[self.labels == c].mean(0) for c in classes])
        self._labels = jnp.asarray(self.labels)
        self._members = [np.flatnonzero(self.labels == c) for c in classes]

    def __call__(self, seed: int) -> tuple[Array, np.ndarray]:
        """Return features (S, D), and which images they are of (S, 1), of a seed."""
        order = permutation(len(self.labels), seed, 0)[: self.sets]
        others = np.empty_like(order)
        for c, members in enumerate(self._members):
            places = np.flatnonzero(self.labels[order] == c)
            drawn = permutation(len(members), seed, 1, c)
            others[places] = members[np.resize(drawn, len(places))]
        raw = np.random.Philox(np.random.SeedSequence((seed, 2))).random_raw(len(order))
        error = np.float32(self.most) * (raw >> np.uint64(40)).astype(np.float32) / 2**24
        found = _mixed(
            self._placed, self._means, self._labels, order, others, error, self.nonnegative
        )
        return found, order[:, None].astype(np.int32)


@jax.jit
def _mixed(
    features: Array,
    means: Array,
    labels: Array,
    order: Array,
    others: Array,
    error: Array,
    nonnegative: Array,
) -> Array:
    mean, r = means[labels[order]], error[:, None]
    own, other = features[order] - mean, features[others] - mean
    found = mean + (1 - r * r) * own + r * jnp.sqrt(1 - r * r) * other
    return jnp.where(nonnegative, jnp.maximum(found, 0), found)

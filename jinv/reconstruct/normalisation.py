"""Heads' weights as a reconstructor takes them, and random ones that no head was trained to."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jinv.shadow.statistics import Statistics

A = TypeVar("A", Array, np.ndarray)

JITTER = 1e-5
"""Added to every variance of random weights, as published."""


@dataclasses.dataclass(frozen=True, eq=False)
class Normalisation:
    """(w - mean) / std of the coordinates that vary among shadow models.

    Attributes:
      size: P, coordinates of a head.
      varying: (P',) which of them are kept.
      mean, std: (P',) of these.
      correlation: (P', P') of these, float64; None if it is not known.
    """

    size: int
    varying: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    correlation: np.ndarray | None = None

    @classmethod
    def of(cls, statistics: Statistics) -> Normalisation:
        """Return the normalisation by these statistics.

        Raises:
          ValueError: they are of a single head, or of heads that are all the same.
        """
        kept = statistics.varying
        if statistics.count < 2 or not len(kept):
            raise ValueError(
                f"the statistics are of {statistics.count} heads that are all the same: take more "
                "of them, of other seeds"
            )
        known = statistics.comoment is not None
        return cls(
            len(np.asarray(statistics.mean)),
            kept,
            np.asarray(statistics.mean)[kept],
            statistics.std[kept],
            statistics.correlation if known else None,
        )

    def normalised(self, weights: A) -> A:
        """(..., P) -> (..., P'), float32; of arrays of NumPy or JAX."""
        kept: Any = weights[..., self.varying]
        return (kept - self.mean.astype(np.float32)) / self.std.astype(np.float32)

    def weights(self, normalised: Array | np.ndarray, like: np.ndarray) -> np.ndarray:
        """Return the heads (..., P) that are normalised to these (..., P').

        Args:
          normalised: what they are normalised to.
          like: (P,) a head, for the coordinates that are the same in all.
        """
        found = np.broadcast_to(like, (*normalised.shape[:-1], self.size)).astype(np.float32)
        found[..., self.varying] = self.mean + self.std * np.asarray(normalised)
        return found

    def random(self, key: Array, count: int) -> Array:
        """Return random normalised weights (count, P') ~ N(0, correlation + 1e-5 I).

        Raises:
          ValueError: the correlation is not known.
        """
        return _random(key, self._factor, count)

    @functools.cached_property
    def _factor(self) -> Array:
        if self.correlation is None:
            raise ValueError(
                "random weights need the covariance of heads: compute statistics with "
                "`covariance=True`"
            )
        jittered = self.correlation + JITTER * np.eye(len(self.correlation))
        return jnp.asarray(np.linalg.cholesky(jittered), jnp.float32)


@functools.partial(jax.jit, static_argnums=2)
def _random(key: Array, factor: Array, count: int) -> Array:
    draws = jax.random.normal(key, (count, len(factor)))
    return jnp.matmul(draws, factor.T, precision="highest")

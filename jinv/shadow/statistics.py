"""Mean and covariance of shadow models' weights, a batch at a time, in float64."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jinv.files import write_atomic

_BLOCK = 2**22
"""Numbers of a batch that are held in float64 at once, for products."""
_SMALL = 2**16
"""And for moments alone: what caches hold."""


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What n weight vectors x of P coordinates have in common.

    Attributes:
      count: n.
      mean: (P,).
      squares: (P,) sum of (x - mean)^2.
      comoment: (P, P) sum of (x - mean)(x - mean)'; None if it was not asked for.
    """

    count: int
    mean: np.ndarray
    squares: np.ndarray
    comoment: np.ndarray | None = None

    @property
    def std(self) -> np.ndarray:
        """(P,) standard deviations, with n - 1 in the denominator; not a number of one vector."""
        with np.errstate(invalid="ignore"):
            return np.sqrt(self.squares / (self.count - 1))

    @property
    def varying(self) -> np.ndarray:
        """Indices of coordinates that are not the same in all vectors."""
        return np.flatnonzero(self.squares)

    @property
    def covariance(self) -> np.ndarray:
        """(P, P), with n - 1 in the denominator; not numbers of one vector."""
        with np.errstate(invalid="ignore"):
            return self._comoment / (self.count - 1)

    @property
    def correlation(self) -> np.ndarray:
        """Covariance of the coordinates that vary, each divided by its standard deviation."""
        kept = self.varying
        scale = np.sqrt(self.squares[kept])
        return self._comoment[np.ix_(kept, kept)] / np.outer(scale, scale)

    @property
    def _comoment(self) -> np.ndarray:
        if self.comoment is None:
            raise ValueError("these are moments of single coordinates: ask for the covariance")
        return self.comoment

    def save(self, path: str | Path) -> None:
        """Write count, mean, std and, where known, covariance to a .npz file."""
        arrays = {"count": np.asarray(self.count), "mean": self.mean, "std": self.std}
        if self.comoment is not None:
            arrays["covariance"] = self.covariance
        file = io.BytesIO()
        np.savez(file, **arrays)  # type: ignore[arg-type]
        write_atomic(path, file.getvalue())


def of(weights: np.ndarray, *, covariance: bool = True) -> Statistics:
    """Return the statistics of a batch of weight vectors (B, P); ValueError if B is 0.

    The covariance's products are computed on the device, if that is no CPU.
    """
    if weights.ndim != 2 or not weights.size:
        raise ValueError(f"weights are (models, coordinates), not {weights.shape}")
    width = weights.shape[1]
    rows = max(_BLOCK // width, width // 2) if covariance else max(1, _SMALL // width)
    found = None
    for start in range(0, len(weights), rows):
        part = _of_some(weights[start : start + rows], covariance)
        found = part if found is None else merged(found, part)
    assert found is not None
    return found


def _of_some(weights: np.ndarray, covariance: bool) -> Statistics:
    # From the first vector, so that what is constant varies by exactly 0.
    first = weights[0].astype(np.float64)
    apart = weights.astype(np.float64) - first
    mean = apart.mean(0)
    apart -= mean
    comoment = None
    if covariance and jax.default_backend() == "cpu":
        comoment = apart.T @ apart  # NumPy's is three times as fast as XLA's
    elif covariance:
        with jax.enable_x64(True):
            comoment = np.asarray(_products(apart))
    return Statistics(len(weights), first + mean, np.einsum("ij,ij->j", apart, apart), comoment)


@jax.jit
def _products(apart: jax.Array) -> jax.Array:
    return jnp.matmul(apart.T, apart, precision="highest")


def merged(a: Statistics, b: Statistics) -> Statistics:
    """Return the statistics of all vectors of both (Chan, Golub and LeVeque, 1979)."""
    count = a.count + b.count
    difference = b.mean - a.mean
    weight = a.count * b.count / count
    comoment = None
    if a.comoment is not None and b.comoment is not None:
        comoment = a.comoment + b.comoment + weight * np.outer(difference, difference)
    return Statistics(
        count,
        a.mean + difference * (b.count / count),
        a.squares + b.squares + weight * np.square(difference),
        comoment,
    )

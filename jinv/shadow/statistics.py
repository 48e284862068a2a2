"""Mean and covariance of shadow models' weights, a batch at a time, in float64.

A GPU computes and keeps them where the weights are. On a CPU NumPy does, whose products are three
times as fast as XLA's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jinv.files import write_arrays

_BLOCK = 2**22
"""Numbers of a batch that are held in float64 at once, for products."""
_SMALL = 2**16
"""And for moments alone: what caches hold."""
_DEVICE_BLOCK = 2**27
"""On a GPU, for either: a GiB, which XLA writes for products and need not for moments (not measured
on one)."""


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What n weight vectors x of P coordinates have in common.

    Arrays are NumPy's or, of what a GPU computed, JAX's in float64; methods return NumPy's.

    Attributes:
      count: n.
      mean: (P,).
      squares: (P,) sum of (x - mean)^2.
      comoment: (P, P) sum of (x - mean)(x - mean)'; None if it was not asked for.
    """

    count: int
    mean: np.ndarray | Array
    squares: np.ndarray | Array
    comoment: np.ndarray | Array | None = None

    @property
    def std(self) -> np.ndarray:
        """(P,) standard deviations, with n - 1 in the denominator; not a number of one vector."""
        with np.errstate(invalid="ignore"):
            return np.sqrt(np.asarray(self.squares) / (self.count - 1))

    @property
    def varying(self) -> np.ndarray:
        """Indices of coordinates that are not the same in all vectors."""
        return np.flatnonzero(np.asarray(self.squares))

    @property
    def covariance(self) -> np.ndarray:
        """(P, P), with n - 1 in the denominator; not numbers of one vector."""
        with np.errstate(invalid="ignore"):
            return self._comoment / (self.count - 1)

    @property
    def correlation(self) -> np.ndarray:
        """Covariance of the coordinates that vary, each divided by its standard deviation."""
        kept = self.varying
        scale = np.sqrt(np.asarray(self.squares)[kept])
        return self._comoment[np.ix_(kept, kept)] / np.outer(scale, scale)

    @property
    def _comoment(self) -> np.ndarray:
        if self.comoment is None:
            raise ValueError("these are moments of single coordinates: ask for the covariance")
        return np.asarray(self.comoment)

    def save(self, path: str | Path) -> None:
        """Write count, mean, std and, where known, covariance to a .npz file."""
        arrays = {"count": np.asarray(self.count), "mean": np.asarray(self.mean), "std": self.std}
        if self.comoment is not None:
            arrays["covariance"] = self.covariance
        write_arrays(path, arrays)


def of(
    weights: np.ndarray | Array, *, covariance: bool = True, kept: np.ndarray | None = None
) -> Statistics:
    """Return the statistics of a batch of weight vectors.

    Args:
      weights: (B, P), on the host or the device.
      covariance: whether products of coordinates are wanted too.
      kept: (B,) booleans, which vectors count; all by default.

    Raises:
      ValueError: there are no vectors.
    """
    if weights.ndim != 2 or not weights.size:
        raise ValueError(f"weights are (models, coordinates), not {weights.shape}")
    kept = np.ones(len(weights), bool) if kept is None else kept
    if not kept.any():
        raise ValueError(f"none of the {len(weights)} weight vectors is kept")
    some = _on_host if jax.default_backend() == "cpu" else _on_device
    return functools.reduce(merged, some(weights, kept, covariance))


def _on_host(
    weights: np.ndarray | Array, kept: np.ndarray, covariance: bool
) -> Iterator[Statistics]:
    weights = np.asarray(weights)  # of a CPU's JAX array a view
    weights = weights if kept.all() else weights[kept]
    width = weights.shape[1]
    rows = max(_BLOCK // width, width // 2) if covariance else max(1, _SMALL // width)
    for start in range(0, len(weights), rows):
        some = weights[start : start + rows]
        # From the first vector, so that what is constant varies by exactly 0.
        first = some[0].astype(np.float64)
        apart = some.astype(np.float64) - first
        mean = apart.mean(0)
        apart -= mean
        comoment = apart.T @ apart if covariance else None
        yield Statistics(len(some), first + mean, np.einsum("ij,ij->j", apart, apart), comoment)


def _on_device(
    weights: np.ndarray | Array, kept: np.ndarray, covariance: bool
) -> Iterator[Statistics]:
    rows = max(1, _DEVICE_BLOCK // weights.shape[1])
    for start in range(0, len(weights), rows):
        some, counted = weights[start : start + rows], kept[start : start + rows]
        if counted.any():
            with jax.enable_x64(True):
                found = _moments(some, counted, covariance)
            yield Statistics(int(counted.sum()), *found)


@functools.partial(jax.jit, static_argnames="covariance")
def _moments(weights: Array, kept: Array, covariance: bool) -> tuple[Array, Array, Array | None]:
    """Return mean, squares and comoment of the vectors that are kept."""
    # A mask, not a selection: one program, however many are kept.
    first = weights[jnp.argmax(kept)].astype(jnp.float64)
    count, kept = kept.sum(), kept[:, None]
    apart = jnp.where(kept, weights.astype(jnp.float64) - first, 0)
    mean = apart.sum(0) / count
    apart = jnp.where(kept, apart - mean, 0)
    comoment = jnp.matmul(apart.T, apart, precision="highest") if covariance else None
    return first + mean, jnp.square(apart).sum(0), comoment


def merged(a: Statistics, b: Statistics) -> Statistics:
    """Return the statistics of all vectors of both (Chan, Golub and LeVeque, 1979)."""
    count = a.count + b.count
    on_device = isinstance(a.mean, Array)
    sums = _jitted_sums if on_device else _sums
    with jax.enable_x64(True) if on_device else contextlib.nullcontext():
        return Statistics(
            count,
            *sums(
                (a.mean, a.squares, a.comoment),
                (b.mean, b.squares, b.comoment),
                b.count / count,
                a.count * b.count / count,
            ),
        )


def _sums(a: Any, b: Any, share: Any, weight: Any) -> tuple[Any, Any, Any]:
    """Return mean, squares and comoment of two batches, whose arrays are NumPy's or JAX's."""
    difference = b[0] - a[0]
    comoment = None
    if a[2] is not None and b[2] is not None:
        comoment = a[2] + b[2] + weight * (difference[:, None] * difference)
    squares = a[1] + b[1] + weight * (difference * difference)
    return a[0] + difference * share, squares, comoment


_jitted_sums = jax.jit(_sums)

"""Mean and covariance of shadow models' weights, a batch at a time, in float64."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Of n weight vectors x of P coordinates.

    Attributes:
      count: n.
      mean: (P,).
      comoment: (P, P) sum of (x - mean)(x - mean)'.
    """

    count: int
    mean: np.ndarray
    comoment: np.ndarray

    @property
    def covariance(self) -> np.ndarray:
        """(P, P), with n - 1 in the denominator."""
        return self.comoment / (self.count - 1)

    @property
    def std(self) -> np.ndarray:
        """(P,) standard deviations."""
        return np.sqrt(np.diagonal(self.comoment) / (self.count - 1))

    @property
    def varying(self) -> np.ndarray:
        """Indices of coordinates that are not the same in all vectors."""
        return np.flatnonzero(np.diagonal(self.comoment))

    @property
    def correlation(self) -> np.ndarray:
        """Covariance of the coordinates that vary, each divided by its standard deviation."""
        kept = self.varying
        comoment = self.comoment[np.ix_(kept, kept)]
        scale = np.sqrt(np.diagonal(comoment))
        return comoment / np.outer(scale, scale)


def of(weights: np.ndarray) -> Statistics:
    """Of a batch (B, P)."""
    if weights.ndim != 2 or not weights.size:
        raise ValueError(f"weights are (models, coordinates), not {weights.shape}")
    # From the first vector, so that what is constant varies by exactly 0.
    apart = weights.astype(np.float64) - weights[0]
    mean = apart.mean(0)
    apart -= mean
    return Statistics(len(weights), weights[0] + mean, apart.T @ apart)


def merged(a: Statistics, b: Statistics) -> Statistics:
    """Of all vectors of both (Chan, Golub and LeVeque, 1979)."""
    count = a.count + b.count
    difference = b.mean - a.mean
    between = np.outer(difference, difference) * (a.count * b.count / count)
    mean = a.mean + difference * (b.count / count)
    return Statistics(count, mean, a.comoment + b.comoment + between)

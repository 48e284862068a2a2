"""Numbers that say how good a whole set of images is, as papers on generated images report them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy.special import entr

from jinv.scores import judging

_ROWS = 4096
"""Rows that are brought to float64 at once."""


def inception_score(probabilities: np.ndarray, splits: int = 1) -> tuple[float, float]:
    """Return exp(mean_i KL(p_i || mean_j p_j)) of predictions p (N, C): mean and std over splits.

    arXiv 1606.03498, with the network's own classes. It is 1 if all predictions are the same, and C
    if every image is surely of one class and all classes are as frequent. The images fall into
    `splits` parts at random, the same way every time: an order of classes does not matter. Parts
    of few images have lower scores.

    Raises:
      ValueError: there are fewer images than splits.
    """
    count = len(probabilities)
    if not 1 <= splits <= count:
        raise ValueError(f"{count} images cannot fall into {splits} splits")
    entropies = np.concatenate([entr(block).sum(1) for block in _blocks(probabilities)])
    order = np.random.default_rng(0).permutation(count)
    scores = []
    for part in np.array_split(order, splits):
        mean = sum(block.sum(0) for block in _blocks(probabilities, part)) / len(part)
        scores.append(np.exp(entr(mean).sum() - entropies[part].mean()))
    return float(np.mean(scores)), float(np.std(scores))


def frechet_distance(features: np.ndarray, others: np.ndarray) -> float:
    """Return |m - n|^2 + Tr(S + T - 2 (S T)^(1/2)) of features (N, D) and (M, D), in float64.

    The FID of arXiv 1706.08500, with whatever network's features: m, n are the means, S, T the
    unbiased covariances. With S = A'A and T = B'B, the trace of (S T)^(1/2) is the sum of the
    singular values of A B'. So no root of a singular matrix is drawn, and there may be fewer images
    than dimensions, which makes the distance larger.

    Raises:
      ValueError: one set has less than two images.
    """
    if min(len(features), len(others)) < 2:
        raise ValueError(
            f"covariances need two images: there are {len(features)} and {len(others)}"
        )
    (m, a), (n, b) = _moments(features), _moments(others)
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    trace = np.square(a).sum() + np.square(b).sum() - 2 * cross
    # Rounding must not make it negative.
    return float(max(np.square(m - n).sum() + trace, 0.0))


def _moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean (D,), and A (at most D, D) with covariance A'A."""
    count, width = features.shape
    mean = sum(block.sum(0) for block in _blocks(features)) / count
    if count <= width:
        return mean, (np.asarray(features, np.float64) - mean) / np.sqrt(count - 1)
    covariance = np.zeros((width, width))
    for block in _blocks(features):
        covariance += (block - mean).T @ (block - mean) / (count - 1)
    values, vectors = np.linalg.eigh(covariance)
    return mean, np.sqrt(np.maximum(values, 0))[:, None] * vectors.T


def nearest_distances(features: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return every feature's (B, D) cosine distance to the nearest of the others (M, D): (B,)."""
    nearest = np.full(len(features), np.inf)
    for block in _blocks(others):
        nearest = np.minimum(nearest, judging.feature_distances(features, block).min(1))
    return nearest


def confusion_matrix(labels: np.ndarray, given: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return how many images of class i (N,) were given class j (N,), of this shape."""
    rows, columns = shape
    flat = np.asarray(labels, np.int64) * columns + given
    return np.bincount(flat, minlength=rows * columns).reshape(shape)


def class_means(values: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Return the mean of the values (N,) over the images of each class (classes,); NaN for none."""
    counts = np.bincount(labels, minlength=classes)
    totals = np.bincount(labels, np.asarray(values, np.float64), classes)
    return np.where(counts, totals / np.maximum(counts, 1), np.nan)


def spread(indices: np.ndarray, most: int) -> np.ndarray:
    """Return the indices, or `most` of them at even distances where there are more."""
    chosen = np.linspace(0, len(indices) - 1, min(most, len(indices)))
    return indices[np.rint(chosen).astype(int)]


def _blocks(values: np.ndarray, chosen: np.ndarray | None = None) -> Iterator[np.ndarray]:
    """Yield the rows, or those that are chosen, in float64, some at a time."""
    count = len(values) if chosen is None else len(chosen)
    for start in range(0, count, _ROWS):
        rows = slice(start, start + _ROWS)
        yield np.asarray(values[rows] if chosen is None else values[chosen[rows]], np.float64)

"""How well an attack reconstructs, beside what it makes of weights that betray nothing.

A sample x is the least mean squared error, over pixels in [-1, 1], between a reconstruction and the
true training images (of its class). Under *true* weights these are of real heads, under *random*
weights of N(0, covariance + 1e-5 I), scored against the same images. An attacker claims a
reconstruction where x is small: TPR is the share of such claims under true weights, FPR under
random ones (arXiv 2505.14323).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import erf, erfinv

FPRS = (0.001, 0.01, 0.1)
"""Where the true positive rate is told."""

NEAREST_NEIGHBOUR = {"mnist": 0.0696, "cifar10": 0.1284, "celeba": 0.1217}
"""Published thresholds on x."""

LEVEL = 0.95
_C = 8.0
_MOST = 4.0
"""The largest mean squared error in [-1, 1]."""
_BLOCK = 2**24
"""Numbers of images that are compared at once."""


def mse(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return mean squared errors (n, K) of images (n, H, W, C) and sets (n, K, H, W, C)."""
    parts = []
    rows = max(1, _BLOCK // max(1, truth[0].size))
    for start in range(0, len(found), rows):
        apart = truth[start : start + rows].astype(np.float64)
        apart -= found[start : start + rows, None]
        parts.append(np.square(apart).mean((-3, -2, -1)))
    return np.concatenate(parts)


def min_mse(found: np.ndarray, sets: np.ndarray, members: np.ndarray | None = None) -> np.ndarray:
    """Return x (n,) of reconstructions (n, H, W, C) and their sets (n, K, H, W, C).

    Args:
      found: reconstructions, in [-1, 1].
      sets: the training images of each, in [-1, 1].
      members: (n, K) booleans, which images are of the reconstruction's class; all by default.

    Raises:
      ValueError: shapes do not fit, or a reconstruction has no image to be of.
    """
    if sets.shape != (len(found), sets.shape[1], *found.shape[1:]) or not sets.size:
        raise ValueError(f"reconstructions {found.shape} have no images {sets.shape} to be of")
    errors = mse(found, sets)
    if members is not None:
        if not members.any(1).all():
            raise ValueError("a reconstruction has no image of its class among the training images")
        errors = np.where(members, errors, np.inf)
    return errors.min(1)


def phi(x: np.ndarray) -> np.ndarray:
    """ln(x / 4) - ln(1 - x / 4), by which samples look Gaussian; finite also at 0 and 4."""
    share = np.clip(np.asarray(x, np.float64) / _MOST, 1e-12, 1 - 1e-12)
    return np.log(share) - np.log1p(-share)


class Curve(NamedTuple):
    """A receiver operating characteristic: points (FPR, TPR), both rising."""

    fpr: np.ndarray
    tpr: np.ndarray


class Gaussian(NamedTuple):
    """Mean and standard deviation of phi, by maximum likelihood."""

    mean: float
    std: float

    @classmethod
    def of(cls, values: np.ndarray) -> Gaussian:
        """Return the Gaussian fitted to values."""
        return cls(float(np.mean(values)), float(np.std(values)))

    def log_density(self, values: np.ndarray) -> np.ndarray:
        """Return ln p of values."""
        scaled = (values - self.mean) / self.std
        return -0.5 * np.square(scaled) - math.log(self.std * math.sqrt(2 * math.pi))


class Interval(NamedTuple):
    """A value and the ends of its confidence interval."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """Samples of one attacker in one setting.

    Attributes:
      true: (n,) x under true weights.
      random: (m,) x under random weights; as many, as published.
      groups: (n,) which head each true sample is of, if several are of one: heads are then what
        bootstrap draws. By default every sample is by itself.
      random_groups: (m,) the same of random samples.
    """

    true: np.ndarray
    random: np.ndarray
    groups: np.ndarray | None = None
    random_groups: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name in ("true", "random"):
            values = np.asarray(getattr(self, name), np.float64)
            if values.ndim != 1 or not values.size or not np.isfinite(values).all():
                raise ValueError(
                    f"samples under {name} weights are finite numbers (n,), at least one; not "
                    f"{np.shape(values)}"
                )
            object.__setattr__(self, name, values)
        for name, of in (("groups", self.true), ("random_groups", self.random)):
            told = getattr(self, name)
            if told is not None and np.shape(told) != of.shape:
                raise ValueError(f"{name} {np.shape(told)} do not fit samples {of.shape}")

    def tpr_at(self, fpr: float) -> float:
        """Return the highest TPR of a threshold on x whose FPR is at most so high.

        With fewer than 1 / fpr random samples no false claim is allowed.
        """
        return _tpr_at(self.true, self.random, fpr)

    def rates(self, threshold: float) -> tuple[float, float]:
        """Return (TPR, FPR) of claims where x <= threshold."""
        return float(np.mean(self.true <= threshold)), float(np.mean(self.random <= threshold))

    def cumulative(self) -> Curve:
        """Return the curve of thresholds on x, one point a value that occurs."""
        return _curve(-self.true, -self.random)

    def log_ratio(self, x: np.ndarray) -> np.ndarray:
        """Return ln p(phi | true) - ln p(phi | random) with both Gaussians."""
        ours, theirs = self.gaussians()
        values = phi(x)
        return ours.log_density(values) - theirs.log_density(values)

    def gaussians(self) -> tuple[Gaussian, Gaussian]:
        """Return the Gaussians fitted to phi under true and under random weights.

        Raises:
          ValueError: all samples are the same.
        """
        found = Gaussian.of(phi(self.true)), Gaussian.of(phi(self.random))
        for name, gaussian in zip(("true", "random"), found, strict=True):
            if not gaussian.std > 0:
                raise ValueError(
                    f"all samples under {name} weights are the same, which no Gaussian fits: take "
                    "more of them, or the cumulative curve alone"
                )
        return found

    def neyman_pearson(self, points: int = 2000) -> Curve:
        """Return the curve of claims where the log-likelihood ratio exceeds C, C in [-8, 8]."""
        steps = np.linspace(_C, -_C, points)
        return Curve(
            *(
                1 - np.searchsorted(np.sort(self.log_ratio(x)), steps, "right") / len(x)
                for x in (self.random, self.true)
            )
        )

    def analytic(self, fpr: np.ndarray) -> Curve:
        """Return the curve of thresholds on phi if both were the fitted Gaussians."""
        (c0, s0), (c1, s1) = self.gaussians()
        argument = (c0 - c1) / (math.sqrt(2) * s0) + s1 / s0 * erfinv(1 - 2 * np.asarray(fpr))
        return Curve(np.asarray(fpr, np.float64), (1 - erf(argument)) / 2)

    def intervals(
        self,
        fprs: Sequence[float] = FPRS,
        *,
        level: float = LEVEL,
        resamples: int = 1000,
        seed: int = 0,
    ) -> dict[float, Interval]:
        """Return TPR at these FPRs with bootstrap intervals: of what heads would vary by chance.

        True and random heads are drawn anew, with replacement; ends are percentiles of the TPRs.
        Where ten false claims are allowed (m FPR = 10) they hold about as often as they say, 90 %
        instead of 95 % at worst; with fewer the threshold is known too badly.

        Args:
          fprs: where.
          level: how often the interval shall hold the true value.
          resamples: how many draws.
          seed: of the draws.
        """
        rng = np.random.Generator(np.random.Philox(seed))
        ours, theirs = (
            _drawing(self.true, self.groups),
            _drawing(self.random, self.random_groups),
        )
        tprs = np.asarray(
            [[_tpr_at(a, b, fpr) for fpr in fprs] for a, b in _draws(rng, resamples, ours, theirs)]
        )
        tail = 100 * (1 - level) / 2
        low, high = np.percentile(tprs, [tail, 100 - tail], axis=0)
        return {
            fpr: Interval(self.tpr_at(fpr), float(low[i]), float(high[i]))
            for i, fpr in enumerate(fprs)
        }

    def told(self, *, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
        """Return TPRs and their intervals as plain values, see `intervals`."""
        found = self.intervals(resamples=resamples, seed=seed)
        return {
            "tpr_at_fpr": {f"{at:g}": interval.value for at, interval in found.items()},
            "intervals": {f"{at:g}": [i.low, i.high] for at, i in found.items()},
        }

    def summary(self, threshold: float, *, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
        """Return plain values for a summary: TPRs with intervals, and what a threshold gives.

        Args:
          threshold: on x, such as the mean distance of nearest neighbours.
          resamples, seed: see `intervals`.
        """
        tpr, fpr = self.rates(threshold)
        return {
            "samples": {"true": len(self.true), "random": len(self.random)},
            "median_mse": {
                "true": float(np.median(self.true)),
                "random": float(np.median(self.random)),
            },
            **self.told(resamples=resamples, seed=seed),
            "at_threshold": {"mse": float(threshold), "tpr": tpr, "fpr": fpr},
        }


def _tpr_at(true: np.ndarray, random: np.ndarray, fpr: float) -> float:
    # Rounding up 0.1 * 30 must not cost a claim.
    allowed = math.floor(fpr * len(random) * (1 + 1e-12))
    if allowed >= len(random):
        return 1.0
    return float(np.mean(true < np.partition(random, allowed)[allowed]))


def _curve(true: np.ndarray, random: np.ndarray) -> Curve:
    """Return (0, 0), and claims where a score is at least each of those that occur."""
    values = np.unique(np.concatenate([true, random]))[::-1]
    rates = (1 - np.searchsorted(np.sort(s), values, "left") / len(s) for s in (random, true))
    return Curve(*(np.concatenate([[0.0], rate]) for rate in rates))


Draw = Callable[[np.random.Generator], np.ndarray]


def _drawing(values: np.ndarray, groups: np.ndarray | None) -> Draw:
    """Return what draws samples anew, group by group."""
    if groups is None:
        return lambda rng: values[rng.integers(0, len(values), len(values))]
    order = np.argsort(groups, kind="stable")
    _, counts = np.unique(groups, return_counts=True)
    parts = np.split(values[order], np.cumsum(counts)[:-1])

    def drawn(rng: np.random.Generator) -> np.ndarray:
        return np.concatenate([parts[i] for i in rng.integers(0, len(parts), len(parts))])

    return drawn


def _draws(rng: np.random.Generator, count: int, *draws: Draw) -> Iterator[tuple[np.ndarray, ...]]:
    for _ in range(count):
        yield tuple(draw(rng) for draw in draws)


class Neighbours(NamedTuple):
    """Every image's nearest other image of its class.

    Attributes:
      mse: (M,) to it, in [-1, 1].
      nearest: (M,) which it is.
    """

    mse: np.ndarray
    nearest: np.ndarray


def nearest_neighbours(images: np.ndarray, labels: np.ndarray | None = None) -> Neighbours:
    """Return the nearest other image of the same class for every image (M, H, W, C) in [-1, 1].

    The mean of `mse` is the threshold below which a reconstruction is nearer to its image than
    other images of the class usually are; compare `NEAREST_NEIGHBOUR`.

    Args:
      images: in [-1, 1].
      labels: (M,) classes; one class by default.

    Raises:
      ValueError: a class has a single image.
    """
    flat = images.reshape(len(images), -1).astype(np.float32)
    labels = np.zeros(len(flat), int) if labels is None else labels
    errors, nearest = np.empty(len(flat)), np.empty(len(flat), int)
    for c in np.unique(labels):
        members = np.flatnonzero(labels == c)
        if len(members) < 2:
            raise ValueError(f"class {c} has a single image, and so no nearest other one")
        ours = flat[members] - flat[members].mean(0)  # small numbers round less
        squares = np.square(ours).sum(1)
        rows = max(1, _BLOCK // len(members))
        for start in range(0, len(members), rows):
            some = slice(start, start + rows)
            apart = squares[None] - 2 * ours[some] @ ours.T
            apart[np.arange(len(apart)), np.arange(start, start + len(apart))] = np.inf
            nearest[members[some]] = members[apart.argmin(1)]
        exact = flat[members].astype(np.float64) - flat[nearest[members]]
        errors[members] = np.square(exact).mean(1)
    return Neighbours(errors, nearest)


def ranks(
    found: np.ndarray,
    candidates: np.ndarray,
    truth: np.ndarray,
    labels: np.ndarray | None = None,
    candidate_labels: np.ndarray | None = None,
) -> np.ndarray:
    """Return the place (n,) of the true image among candidates by the reconstruction's MSE.

    1 is first; of candidates that are as near the true one comes last.

    Args:
      found: reconstructions (n, H, W, C).
      candidates: images (M, H, W, C).
      truth: (n,) which candidate is each reconstruction's true one.
      labels: (n,) classes of the reconstructions, with `candidate_labels`: only candidates of the
        class are counted.
      candidate_labels: (M,) classes of the candidates.

    Raises:
      ValueError: only one kind of labels is given.
    """
    if (labels is None) != (candidate_labels is None):
        raise ValueError("labels of reconstructions and of candidates are needed, or of neither")
    if labels is None or candidate_labels is None:
        labels, candidate_labels = np.zeros(len(found), int), np.zeros(len(candidates), int)
    ours = found.reshape(len(found), -1).astype(np.float64)
    theirs = candidates.reshape(len(candidates), -1)
    places = np.empty(len(found), int)
    for c in np.unique(labels):
        asked, among = np.flatnonzero(labels == c), np.flatnonzero(candidate_labels == c)
        some = theirs[among].astype(np.float64)
        squares = np.square(some).sum(1)
        rows = max(1, _BLOCK // max(1, len(among)))
        for start in range(0, len(asked), rows):
            chosen = asked[start : start + rows]
            scores = squares - 2 * ours[chosen] @ some.T
            true = theirs[truth[chosen]].astype(np.float64)
            own = np.square(true).sum(1) - 2 * np.einsum("ij,ij->i", ours[chosen], true)
            # A copy of the true image counts against it, whatever rounding says.
            near = scores <= own[:, None] + 1e-9 * (1 + np.abs(own[:, None]))
            itself = among[None] == truth[chosen][:, None]
            places[chosen] = 1 + (near & ~itself).sum(1)
    return places


def top(places: np.ndarray, k: int) -> float:
    """Return the share of reconstructions whose true image is among the first k, see `ranks`."""
    return float(np.mean(places <= k))

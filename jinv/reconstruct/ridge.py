"""The control: ridge regression from a class's own weights and bias to its image.

No network, and seconds of training: an attack that does not clearly beat it has learned nothing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import numpy as np
import scipy.linalg
from jax import Array

from jinv.shadow.sampling import Sets
from jinv.shadow.store import Layout

PENALTIES = tuple(10.0 ** (k / 2) for k in range(-8, 19))
HELD_OUT = 10
"""Every tenth image of the data is held out when the penalty is chosen."""
_BLOCK = 2**25
"""Numbers of images that are held in float64 at once."""


@dataclasses.dataclass(frozen=True, eq=False)
class Sums:
    """All that a regression has to know of n pairs x (P,), y (Q,).

    Attributes:
      count: n.
      mean_x, mean_y: (P,) and (Q,).
      xx: (P, P) sum of (x - mean_x)(x - mean_x)'.
      xy: (P, Q) sum of (x - mean_x)(y - mean_y)'.
      yy: sum of |y - mean_y|^2.
    """

    count: int
    mean_x: np.ndarray
    mean_y: np.ndarray
    xx: np.ndarray
    xy: np.ndarray
    yy: float

    @classmethod
    def of(cls, x: np.ndarray, y: np.ndarray) -> Sums:
        """Return the sums of pairs (n, P) and (n, Q), in float64.

        Raises:
          ValueError: there are no pairs.
        """
        if len(x) != len(y) or not len(x):
            raise ValueError(f"{x.shape} and {y.shape} are no pairs")
        x, y = np.array(x, np.float64), np.array(y, np.float64)
        mean_x, mean_y = x.mean(0), y.mean(0)
        x -= mean_x
        y -= mean_y
        return cls(len(x), mean_x, mean_y, x.T @ x, x.T @ y, float(np.vdot(y, y)))

    def __add__(self, other: Sums) -> Sums:
        """Return the sums of the pairs of both (Chan, Golub and LeVeque, 1979)."""
        count = self.count + other.count
        dx, dy = other.mean_x - self.mean_x, other.mean_y - self.mean_y
        share, weight = other.count / count, self.count * other.count / count
        return Sums(
            count,
            self.mean_x + share * dx,
            self.mean_y + share * dy,
            self.xx + other.xx + weight * np.outer(dx, dx),
            self.xy + other.xy + weight * np.outer(dx, dy),
            self.yy + other.yy + weight * float(dy @ dy),
        )

    def around(self, mean_x: np.ndarray, mean_y: np.ndarray) -> Sums:
        """Return the sums of squares around other points than the means."""
        dx, dy = self.mean_x - mean_x, self.mean_y - mean_y
        return Sums(
            self.count,
            mean_x,
            mean_y,
            self.xx + self.count * np.outer(dx, dx),
            self.xy + self.count * np.outer(dx, dy),
            self.yy + self.count * float(dy @ dy),
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Regression:
    """y = mean_y + (x - mean_x) B with one slope B for several groups, each with its own means.

    Attributes:
      slope: B (P, Q).
      mean_x: (groups, P).
      mean_y: (groups, Q).
      penalty: lambda of |y - ...|^2 + lambda |B|^2 with every coordinate of x scaled to variance 1.
      errors: penalty -> mean squared error a number of y, of what was held out.
    """

    slope: np.ndarray
    mean_x: np.ndarray
    mean_y: np.ndarray
    penalty: float
    errors: dict[float, float]

    def __call__(self, x: np.ndarray, group: int = 0) -> np.ndarray:
        """(..., P) of a group -> (..., Q)."""
        return self.mean_y[group] + (x - self.mean_x[group]) @ self.slope


def regress(
    train: Sequence[Sums], held_out: Sequence[Sums], penalties: Sequence[float] = PENALTIES
) -> Regression:
    """Return the regression of all pairs, with the penalty that suits those held out best.

    Args:
      train: of the pairs of each group that a penalty is tried with.
      held_out: of the others.
      penalties: to choose from, all positive.
    """
    scale, xx, xy = _together(train)
    values, vectors = np.linalg.eigh(xx * np.outer(scale, scale))
    ours = vectors.T @ (scale[:, None] * xy)
    held = [h.around(t.mean_x, t.mean_y) for t, h in zip(train, held_out, strict=True)]
    turned = scale[:, None] * vectors
    _, held_xx, held_xy = _together(held)
    theirs = turned.T @ held_xy
    # |y - x V D C|^2 = yy - 2 d . rowsum(V' xy * C) + d' (V' xx V * C C') d with diagonal D = d.
    linear = (theirs * ours).sum(1)
    square = (turned.T @ held_xx @ turned) * (ours @ ours.T)
    numbers = sum(h.count for h in held) * len(held[0].mean_y)
    squares = sum(h.yy for h in held)
    errors = {}
    for penalty in penalties:
        d = 1 / (np.maximum(values, 0) + penalty)
        error = squares - 2 * d @ linear + d @ square @ d
        errors[float(penalty)] = float(error / numbers)
    best = min(errors, key=lambda penalty: errors[penalty])
    every = [t + h for t, h in zip(train, held_out, strict=True)]
    return Regression(
        _slope(every, best),
        np.stack([s.mean_x for s in every]),
        np.stack([s.mean_y for s in every]),
        best,
        errors,
    )


def _together(groups: Sequence[Sums]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """1 / standard deviation of every x (0 of what does not vary), xx and xy of all groups."""
    xx, xy = np.zeros_like(groups[0].xx), np.zeros_like(groups[0].xy)
    for group in groups:
        xx += group.xx
        xy += group.xy
    std = np.sqrt(np.diag(xx) / sum(group.count for group in groups))
    return np.divide(1, std, out=np.zeros_like(std), where=std > 0), xx, xy


def _slope(sums: Sequence[Sums], penalty: float) -> np.ndarray:
    scale, xx, xy = _together(sums)
    matrix = xx * np.outer(scale, scale) + penalty * np.eye(len(xx))
    solved = scipy.linalg.solve(matrix, scale[:, None] * xy, assume_a="pos")
    return scale[:, None] * solved


@dataclasses.dataclass(frozen=True, eq=False)
class Attack:
    """Reconstructs the image of every class of a linear head.

    Attributes:
      layout: of the heads' weights.
      shape: (H, W, C) of images.
      regressions: one a class, or a single one for all.
    """

    layout: Layout
    shape: tuple[int, ...]
    regressions: tuple[Regression, ...]

    def reconstruct(self, weights: np.ndarray | Array) -> np.ndarray:
        """(S, P) -> images (S, classes, H, W, C) in [-1, 1], float32."""
        rows = class_rows(self.layout, weights)
        found = [self._images(c, rows[:, c]) for c in range(rows.shape[1])]
        return np.stack(found, 1)

    def of(self, weights: np.ndarray | Array, labels: np.ndarray) -> np.ndarray:
        """Return the image of one class of each head: (S, P) and (S,) -> (S, H, W, C)."""
        rows = class_rows(self.layout, weights)
        images = np.empty((len(rows), *self.shape), np.float32)
        for c in np.unique(labels):
            images[labels == c] = self._images(c, rows[labels == c, c])
        return images

    def _images(self, c: int, rows: np.ndarray) -> np.ndarray:
        """Return the images (S, H, W, C) of a class, from its weights and biases (S, D + 1)."""
        several = len(self.regressions) > 1
        found = self.regressions[c](rows) if several else self.regressions[0](rows, c)
        return np.clip(found.reshape(-1, *self.shape), -1, 1).astype(np.float32)


class Fitting:
    """Gathers heads and their training images, batch by batch; `fit` ends it.

    What it holds does not grow with the number of heads.

    Args:
      layout: of the heads' weights; they are linear.
      images: (M, H, W, C), bytes or floats in [-1, 1].
    """

    def __init__(self, layout: Layout, images: np.ndarray) -> None:
        self._classes = len(class_rows(layout, np.zeros((1, layout.size)))[0])
        self._layout = layout
        self._images = images
        # Of each class: the pairs without and with an image that is held out.
        self._sums: list[list[Sums | None]] = [[None, None] for _ in range(self._classes)]

    def add(self, weights: np.ndarray | Array, sets: Sets) -> None:
        """Take heads (S, P), and what each was trained on.

        The image of a class is the mean of its images in a set.

        Raises:
          ValueError: there are not as many sets as heads, or none.
        """
        if not 0 < len(weights) == len(sets.indices):
            raise ValueError(f"{len(weights)} heads were trained on {len(sets.indices)} sets")
        rows = class_rows(self._layout, weights)
        for c, x, y, held_out in self._pairs(rows, sets):
            for part in (0, 1):
                chosen = held_out == part
                if chosen.any():
                    new, before = Sums.of(x[chosen], y[chosen]), self._sums[c][part]
                    self._sums[c][part] = new if before is None else before + new

    def _pairs(
        self, rows: np.ndarray, sets: Sets
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
        """Yield (class, x, y, which are held out), some sets at a time."""
        pixels = self._images[0].size
        models = max(1, _BLOCK // (sets.indices.shape[1] * pixels))
        for start in range(0, len(rows), models):
            some = slice(start, start + models)
            indices, labels = sets.indices[some], sets.labels[some]
            for c in range(self._classes):
                model, place = np.nonzero(labels == c)
                if not len(model):
                    continue
                shown = indices[model, place]
                # Sorted by model: every model's images are next to each other.
                present, first, counts = np.unique(model, return_index=True, return_counts=True)
                images = unit(self._images[shown]).reshape(len(shown), pixels)
                y = np.add.reduceat(images, first) / counts[:, None]
                held_out = np.add.reduceat(shown % HELD_OUT == 0, first, dtype=int) > 0
                yield c, rows[some][present, c], y, held_out

    def fit(self, *, pooled: bool = False, penalties: Sequence[float] = PENALTIES) -> Attack:
        """Return the attack.

        The penalty is the best one for heads that had a held-out image of the class, of those
        that heads without any fit; then all heads count.

        Args:
          pooled: one slope for all classes, which needs fewer heads, instead of one for each.
          penalties: see `regress`.

        Raises:
          ValueError: there are too few heads.
        """
        train: list[Sums] = []
        held_out: list[Sums] = []
        for c, (ours, theirs) in enumerate(self._sums):
            if ours is None or theirs is None:
                raise ValueError(
                    f"class {c} had {'no held-out image' if ours else 'no image'} in any head: add "
                    "more heads"
                )
            train.append(ours)
            held_out.append(theirs)
        fit = functools.partial(regress, penalties=penalties)
        groups = [(train, held_out)] if pooled else zip(zip(train), zip(held_out), strict=True)
        found = tuple(fit(ours, theirs) for ours, theirs in groups)
        return Attack(self._layout, self._images.shape[1:], found)


def class_rows(layout: Layout, weights: np.ndarray | Array) -> np.ndarray:
    """Return the weights and the bias of every class: heads (S, P) -> (S, classes, D + 1), float64.

    Raises:
      ValueError: the heads are not linear.
    """
    shapes = dict(layout.shapes)
    weight, bias = shapes.get("weight", ()), shapes.get("bias", ())
    if len(shapes) != 2 or len(weight) != 2 or bias != weight[:1]:
        raise ValueError(
            "ridge reads the image of a class from the class's own weights: it needs linear heads, "
            f"weight (classes, D) and bias (classes,), not {layout.shapes}"
        )
    parts = layout.split(np.asarray(weights, np.float64))
    return np.concatenate([parts["weight"], parts["bias"][..., None]], -1)


def unit(images: np.ndarray) -> np.ndarray:
    """Return images in [-1, 1]: bytes are scaled, floats are left as they are."""
    return images / 127.5 - 1 if images.dtype == np.uint8 else images

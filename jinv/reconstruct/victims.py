"""Heads under attack, and how near an attacker comes to the images that they were trained on."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import numpy as np

from jinv.reconstruct.evaluation import (
    Evaluation,
    Neighbours,
    mse,
    nearest_neighbours,
    ranks,
    top,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Victims:
    """Heads of images that no part of an attack has seen.

    Attributes:
      images: (M, H, W, C) in [-1, 1].
      labels: (M,) their classes.
      indices: (S, N) which of them each head was trained on; where an attacker tells an image of
        every class, as many of each.
      weights: (S, P).
      random: (S, P) weights that betray nothing, see `Normalisation.random`.
      shown: how many of a head's first images an attacker is to find that makes one image a head;
        None for all.
    """

    images: np.ndarray
    labels: np.ndarray
    indices: np.ndarray
    weights: np.ndarray
    random: np.ndarray
    shown: int | None = None

    def first(self, count: int) -> Victims:
        """Return the first of them, with all images."""
        found = dataclasses.replace(
            self,
            indices=self.indices[:count],
            weights=self.weights[:count],
            random=self.random[:count],
        )
        found.__dict__["neighbours"] = self.neighbours
        return found

    @functools.cached_property
    def neighbours(self) -> Neighbours:
        """Return the nearest other image of every image's class."""
        return nearest_neighbours(self.images, self.labels)

    @functools.cached_property
    def classes(self) -> np.ndarray:
        """Return the classes (K,) of which every head has seen images."""
        return np.unique(self.labels[self.indices])

    @property
    def threshold(self) -> float:
        """Return the mean MSE of an image and the nearest other of its class."""
        return float(self.neighbours.mse.mean())

    def asked(self, found: np.ndarray) -> np.ndarray:
        """Return the reconstructions (n, H, W, C) that count, in the order of `samples`."""
        shown = found[:, self.classes] if found.shape[1] > 1 else found
        return shown.reshape(-1, *found.shape[2:])

    def samples(self, found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the least MSE of each reconstruction (n,), and which image it is of (n,).

        Args:
          found: (S, classes, H, W, C), whose image of class c counts against the training images of
            class c; or (S, 1, H, W, C), which counts against all that are `shown`.
        """
        size = found.shape[2:]
        indices = self.indices[:, : self.shown] if found.shape[1] == 1 else self.indices
        truth = self.images[indices]
        if found.shape[1] == 1:
            errors = mse(found[:, 0], truth)[:, None]
        else:
            own = self.labels[indices]
            errors = np.stack(
                [
                    np.where(own == c, mse(found[:, c].reshape(-1, *size), truth), np.inf)
                    for c in self.classes
                ],
                1,
            )
        nearest = errors.argmin(2)
        return errors.min(2).ravel(), np.take_along_axis(indices, nearest, 1).ravel()


class Attacked(NamedTuple):
    """What an attacker made of victims: n reconstructions.

    Attributes:
      found: (n, H, W, C) reconstructions.
      samples: (n,) their least MSE.
      truth: (n,) which image that is of.
      evaluation: of these samples and those under random weights.
      top1: share of reconstructions whose true image is the nearest of all images of its class (of
        all images, where an attacker tells one image a head).
    """

    found: np.ndarray
    samples: np.ndarray
    truth: np.ndarray
    evaluation: Evaluation
    top1: float


def attacked(victims: Victims, found: np.ndarray, random: np.ndarray) -> Attacked:
    """Return how near reconstructions come.

    Args:
      victims: the heads.
      found: of their weights, see `Victims.samples`.
      random: of random weights, likewise.
    """
    samples, truth = victims.samples(found)
    others, _ = victims.samples(random)
    several = found.shape[1] > 1
    each = len(victims.classes) if several else 1
    heads = np.repeat(np.arange(len(found)), each)
    shown = victims.asked(found)
    told = (victims.labels[truth], victims.labels) if several else (None, None)
    places = ranks(shown, victims.images, truth, *told)
    evaluation = Evaluation(samples, others, heads, heads)
    return Attacked(shown, samples, truth, evaluation, top(places, 1))

"""Which examples a shadow model is trained on: a function of a seed alone.

Every seed permutes the data and cuts it into disjoint sets, so that a shadow is named by (seed,
position) and its images need not be kept with its weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

import numpy as np

from jinv import checks
from jinv.checks import Class, Count, Some


class Sets(NamedTuple):
    """Training sets of S shadow models.

    Attributes:
      indices: (S, N) positions in the data.
      labels: (S, N) what each example is trained to be.
    """

    indices: np.ndarray
    labels: np.ndarray


def permutation(count: int, *seed: int) -> np.ndarray:
    """0 to count - 1 in an order that no version of NumPy changes."""
    # Generator.permutation may change between versions; the raw numbers of Philox may not.
    raw = np.random.Philox(np.random.SeedSequence(seed)).random_raw(count)
    return np.argsort(raw, kind="stable")


def balanced(
    labels: np.ndarray, seed: int, class_size: int, sets: int, positive: Sequence[int] | None = None
) -> Sets:
    """Sets of `class_size` examples of every class, classes in rising order.

    Args:
      labels: (M,) of the data.
      seed: which permutation.
      class_size: examples of each class in a set.
      sets: how many; no example is in two of them.
      positive: classes whose examples get label 1, all others 0; by default labels are kept.

    Raises:
      ValueError: the smallest class has too few examples.
    """
    classes = np.unique(labels)
    columns = []
    for c in classes:
        members = np.flatnonzero(labels == c)
        if len(members) < sets * class_size:
            raise ValueError(
                f"{sets} sets of {class_size} need {sets * class_size} examples of class {c}; "
                f"there are {len(members)}: at most {len(members) // class_size} sets"
            )
        order = permutation(len(members), seed, int(c))[: sets * class_size]
        columns.append(members[order].reshape(sets, class_size))
    indices = np.concatenate(columns, 1)
    return Sets(indices.astype(np.int32), relabelled(labels[indices], positive))


def relabelled(labels: np.ndarray, positive: Sequence[int] | None) -> np.ndarray:
    """1 for the positive classes and 0 for all others; as they are without positive classes."""
    told = labels if positive is None else np.isin(labels, positive)
    return told.astype(np.int32)


def random_labels(count: int, seed: int, class_size: int, sets: int, classes: int) -> Sets:
    """Return sets of examples whose own classes do not matter, labelled at random.

    Every label is given `class_size` times in a set: out-of-distribution shadows.

    Args:
      count: number of examples there are.
      seed: of the permutation.
      class_size: examples of each label in a set.
      sets: how many sets.
      classes: number of labels.

    Raises:
      ValueError: there are too few examples.
    """
    size = class_size * classes
    if count < sets * size:
        raise ValueError(f"{sets} sets of {size} need {sets * size} examples; there are {count}")
    indices = permutation(count, seed)[: sets * size].reshape(sets, size)
    labels = np.broadcast_to(np.repeat(np.arange(classes), class_size), indices.shape)
    return Sets(indices.astype(np.int32), labels.astype(np.int32))


def one_against_many(
    identities: np.ndarray, seed: int, class_size: int, sets: int, others: int = 9
) -> Sets:
    """CelebA's sets: `class_size` images of one person, label 1, and `others` times as many.

    People are taken in the order of a permutation, again from its front when all have had their
    turn; images of a person and of the others are drawn anew for every set, without repeats in it.

    Args:
      identities: (M,) who is in each image.
      seed: which permutation.
      class_size: images of the person.
      sets: how many.
      others: images of other people, label 0, for each of the person's.

    Raises:
      ValueError: nobody has so many images, or there are too few of others.
    """
    people, counts = np.unique(identities, return_counts=True)
    fitting = people[counts >= class_size]
    wanted = others * class_size
    if not len(fitting) or len(identities) - counts.max() < wanted:
        raise ValueError(
            f"a set needs {class_size} images of one person and {wanted} of others: there are not "
            "enough"
        )
    order = permutation(len(fitting), seed)
    by_person = np.argsort(identities, kind="stable")
    starts = dict(zip(people.tolist(), np.cumsum(counts) - counts, strict=True))
    sizes = dict(zip(people.tolist(), counts, strict=True))
    indices = np.empty((sets, class_size + wanted), np.int32)
    for i in range(sets):
        person = int(fitting[order[i % len(order)]])
        start, size = starts[person], sizes[person]
        indices[i, :class_size] = by_person[start + permutation(size, seed, i)[:class_size]]
        # Positions among all images but the person's.
        drawn = _few(len(identities) - int(size), wanted, seed, i)
        indices[i, class_size:] = by_person[np.where(drawn < start, drawn, drawn + size)]
    labels = np.repeat([1, 0], [class_size, wanted])
    return Sets(indices, np.broadcast_to(labels, indices.shape).astype(np.int32))


def _few(count: int, wanted: int, *seed: int) -> np.ndarray:
    """`wanted` different numbers below `count`, without permuting all of them."""
    source = np.random.Philox(np.random.SeedSequence((*seed, 1)))
    found: dict[int, None] = {}
    while len(found) < wanted:
        # The remainder favours small numbers by less than one in 2^64 / count.
        for raw in source.random_raw(wanted):
            if len(found) < wanted:
                found.setdefault(int(raw) % count)
    return np.fromiter(found, np.int64, wanted)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Which examples a shadow model is trained on.

    Attributes:
      kind: "balanced", as many of every class; "random_labels", out of distribution;
        "one_against_many", one person against others, where labels say who is in an image.
      class_size: examples of each class, or of the person.
      sets: shadow models a seed.
      positive: of "balanced": classes that get label 1, all others 0; by default labels are kept.
      classes: of "random_labels".
      others: of "one_against_many": images of others for each of the person's.
    """

    kind: Literal["balanced", "random_labels", "one_against_many"] = "balanced"
    class_size: Count = 1
    sets: Count = 5120
    positive: Annotated[tuple[Class, ...], Some()] | None = None
    classes: Count = 10
    others: Count = 9

    def __post_init__(self) -> None:
        checks.fields(self)
        others = {"balanced": "positive", "random_labels": "classes", "one_against_many": "others"}
        del others[self.kind]
        checks.unused(self, f"kind is {self.kind!r}", *others.values())

    def draw(self, labels: np.ndarray, seed: int) -> Sets:
        """Return the training sets of a seed."""
        if self.kind == "balanced":
            return balanced(labels, seed, self.class_size, self.sets, self.positive)
        if self.kind == "random_labels":
            return random_labels(len(labels), seed, self.class_size, self.sets, self.classes)
        return one_against_many(labels, seed, self.class_size, self.sets, self.others)

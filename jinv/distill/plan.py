"""Which images of which classes a synthetic data set is made of, batch by batch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

Order = Literal["mixed", "classes"]


class Batch(NamedTuple):
    """Images that are optimised together.

    Attributes:
      number: of the batch, which decides what is random in it.
      targets: class of every image.
      wanted: so many images, from the first on, are kept; the rest fills the batch up.
    """

    number: int
    targets: tuple[int, ...]
    wanted: int


def plan(missing: Mapping[int, int], size: int, order: Order, first: int = 0) -> list[Batch]:
    """Return the batches that make so many images of every class.

    Args:
      missing: class -> number of images.
      size: of a batch.
      order: "mixed": one image of every class, then a second one of every class, and so on;
        "classes": every batch is of one class.
      first: number of the first batch.
    """
    parts = list(_mixed(missing, size) if order == "mixed" else _by_class(missing, size))
    return [
        Batch(number, tuple(itertools.islice(itertools.cycle(part), size)), len(part))
        for number, part in enumerate(parts, first)
    ]


def _mixed(missing: Mapping[int, int], size: int) -> Iterator[tuple[int, ...]]:
    rounds = range(max(missing.values(), default=0))
    targets = (c for i in rounds for c, count in missing.items() if i < count)
    yield from iter(lambda: tuple(itertools.islice(targets, size)), ())


def _by_class(missing: Mapping[int, int], size: int) -> Iterator[tuple[int, ...]]:
    for c, count in missing.items():
        for start in range(0, count, size):
            yield (c,) * min(size, count - start)

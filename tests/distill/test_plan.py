"""Which batches a synthetic data set is made of."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from jinv.distill.plan import plan


def test_mixed_batches_take_classes_in_turn() -> None:
    batches = plan({3: 2, 1: 1, 7: 2}, 2, "mixed", first=4)
    assert [(b.number, b.targets, b.wanted) for b in batches] == [
        (4, (3, 1), 2),
        (5, (7, 3), 2),
        (6, (7, 7), 1),
    ]


def test_published_batches_hold_every_class_once() -> None:
    batches = plan(dict.fromkeys(range(100), 5), 100, "mixed")
    assert [b.targets for b in batches] == [tuple(range(100))] * 5


def test_batches_of_one_class() -> None:
    batches = plan({0: 5, 2: 2}, 4, "classes")
    assert [(b.targets, b.wanted) for b in batches] == [
        ((0,) * 4, 4),
        ((0,) * 4, 1),
        ((2,) * 4, 2),
    ]


@pytest.mark.parametrize("order", ["mixed", "classes"])
def test_as_many_of_each_class_as_were_asked_for(order: Any) -> None:
    missing = {0: 7, 5: 1, 9: 13, 2: 0}
    found: Counter[int] = Counter()
    for batch in plan(missing, 6, order):
        assert len(batch.targets) == 6
        found += Counter(batch.targets[: batch.wanted])
    assert found == Counter(missing)


def test_nothing_missing_makes_no_batch() -> None:
    assert plan({}, 6, "mixed") == []
    assert plan({1: 0}, 6, "classes") == []

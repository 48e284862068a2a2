"""Training sets of shadow models: balanced, disjoint, named by their seed alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jinv.shadow import sampling

LABELS = np.random.default_rng(0).integers(0, 10, 4000)
PERMUTATION = (0, 1, 2, 7, 5, 6, 4, 3)


def test_a_seed_gives_the_same_sets_for_ever() -> None:
    """The very numbers: weights are kept without their images."""
    np.testing.assert_array_equal(sampling.permutation(8, 3), PERMUTATION)
    again = [sampling.balanced(LABELS, 7, 2, 100) for _ in range(2)]
    np.testing.assert_array_equal(again[0].indices, again[1].indices)
    other = sampling.balanced(LABELS, 8, 2, 100)
    assert (again[0].indices != other.indices).mean() > 0.9


@pytest.mark.parametrize("class_size", [1, 4])
def test_balanced_sets_hold_every_class_equally_often_and_share_nothing(class_size: int) -> None:
    sets = sampling.balanced(LABELS, 1, class_size, 80)
    assert sets.indices.shape == (80, 10 * class_size)
    np.testing.assert_array_equal(LABELS[sets.indices], sets.labels)
    for row in sets.labels:
        np.testing.assert_array_equal(np.bincount(row), np.full(10, class_size))
    assert len(np.unique(sets.indices)) == sets.indices.size


def test_fewer_sets_are_the_first_of_more() -> None:
    few, many = (sampling.balanced(LABELS, 1, 1, sets).indices for sets in (10, 300))
    np.testing.assert_array_equal(few, many[:10])


def test_classes_may_be_told_apart_in_two_groups() -> None:
    sets = sampling.balanced(LABELS, 1, 1, 50, positive=(1, 3, 5, 7, 9))
    np.testing.assert_array_equal(sets.labels, LABELS[sets.indices] % 2)


def test_random_labels_have_nothing_to_do_with_the_examples() -> None:
    sets = sampling.random_labels(4000, 2, 2, 100, classes=10)
    np.testing.assert_array_equal(np.bincount(sets.labels.ravel()), np.full(10, 200))
    assert len(np.unique(sets.indices)) == sets.indices.size
    assert abs((LABELS[sets.indices] == sets.labels).mean() - 0.1) < 0.03


def test_one_person_against_many() -> None:
    people = np.random.default_rng(1).integers(100, 160, 1500)
    sets = sampling.one_against_many(people, 5, class_size=3, sets=120)
    assert sets.indices.shape == (120, 30)
    for indices, labels in zip(sets.indices, sets.labels, strict=True):
        assert len(np.unique(indices)) == 30
        assert len(np.unique(people[indices[labels == 1]])) == 1
        assert people[indices[0]] not in people[indices[labels == 0]]
    first = people[sets.indices[:60, 0]]
    assert len(np.unique(first)) == 60  # everybody once before anybody twice
    drawn = np.bincount(sets.indices[:, 3:].ravel(), minlength=1500)
    assert drawn.max() < 12  # no image is favoured


def test_too_few_examples_are_told() -> None:
    with pytest.raises(ValueError, match=r"500 sets of 1 need 500 examples of class 0.*at most"):
        sampling.balanced(LABELS, 0, 1, 500)
    with pytest.raises(ValueError, match="need 5000 examples; there are 4000"):
        sampling.random_labels(4000, 0, 1, 500, classes=10)
    with pytest.raises(ValueError, match="a set needs 5 images of one person"):
        sampling.one_against_many(np.arange(100), 0, 5, 10)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("balanced", {"classes": 9}),
        ("balanced", {"others": 3}),
        ("random_labels", {"positive": (1,)}),
        ("random_labels", {"others": 3}),
        ("one_against_many", {"positive": (1,)}),
        ("one_against_many", {"classes": 9}),
    ],
)
def test_options_of_another_kind_are_refused_by_name(kind: Any, options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=rf"{name}: .* plays no part: kind is '{kind}'"):
        sampling.Sampling(kind, **options)


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="kind must be one of balanced, random_labels"):
        sampling.Sampling("balancd")  # type: ignore[arg-type]

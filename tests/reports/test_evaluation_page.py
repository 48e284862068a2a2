"""The page of an evaluation: which classes its picture shows, and what stands in it."""

from __future__ import annotations

import re

import numpy as np

from jinv.reports import evaluation


def words(svg: bytes) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]+)</text>", svg.decode())


def test_few_classes_are_all_drawn_with_their_numbers() -> None:
    """What is none of the data's classes comes last, as one."""
    counts = np.array([[5, 0, 2, 1], [0, 7, 11, 0]])
    matched = np.array([2, 1])
    assert evaluation.most_confused(matched, counts).tolist() == [0, 1]
    found = words(evaluation.confusion(["ape & co", "bee"], matched, counts))
    numbers = [word for word in found if word.isdigit()]
    assert numbers == ["2", "6", "11", "7"]
    assert [found.count(name) for name in ("ape &amp; co", "bee", "another")] == [2, 2, 1]
    alone = evaluation.confusion(["bee"], matched[1:], np.array([[0, 7, 0, 0]]))
    assert "another" not in words(alone)


def test_of_many_classes_those_with_the_most_mistakes_are_drawn() -> None:
    """Both of a pair, if the data has both."""
    counts = np.zeros((60, 70), int)
    matched = np.arange(60) + 10
    counts[np.arange(60), matched] = 100
    for i in range(20):
        counts[3 * i, matched[3 * i + 1]] = 20 - i  # 0 for 1, 3 for 4, ...
    counts[2, 0] = 50  # of a class that the data has not
    chosen = evaluation.most_confused(matched, counts)
    pairs = [i for i in range(60) if i % 3 < 2]
    assert {2, *pairs[:38]} <= set(chosen.tolist())
    assert 40 <= len(chosen) <= 41
    drawn = evaluation.confusion([f"class {i}" for i in chosen], matched[chosen], counts[chosen])
    found = words(drawn)
    assert found.count("class 0") == 2
    assert "100" not in found

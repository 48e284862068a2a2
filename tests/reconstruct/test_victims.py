"""Samples of victims, against loops."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from jinv.reconstruct.victims import Victims, attacked


@pytest.fixture
def victims() -> Victims:
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (12, 4, 4, 1)).astype(np.float32)
    labels = np.arange(12) % 3
    indices = np.array([[0, 3, 1, 4, 2, 5], [6, 9, 7, 10, 8, 11]])
    weights = rng.normal(size=(2, 5)).astype(np.float32)
    return Victims(images, labels, indices, weights, weights)


@pytest.mark.parametrize("each", [True, False])
def test_the_least_error_of_a_class_or_of_all(victims: Victims, each: bool) -> None:
    rng = np.random.default_rng(1)
    found = rng.uniform(-1, 1, (2, 3 if each else 1, 4, 4, 1)).astype(np.float32)
    samples, truth = victims.samples(found)
    expected = []
    for head in range(2):
        for c in range(found.shape[1]):
            among = [i for i in victims.indices[head] if not each or victims.labels[i] == c]
            errors = {
                i: np.square(found[head, c] - victims.images[i].astype(float)).mean() for i in among
            }
            best = min(errors, key=lambda i: errors[i])
            expected.append((errors[best], best))
    np.testing.assert_allclose(samples, [error for error, _ in expected], rtol=1e-6)
    np.testing.assert_array_equal(truth, [image for _, image in expected])


def test_only_shown_images_count_for_one_image_a_head(victims: Victims) -> None:
    one = dataclasses.replace(victims, shown=1)
    found = victims.images[victims.indices[:, 2:3]]
    samples, truth = one.samples(found)
    np.testing.assert_array_equal(truth, victims.indices[:, 0])
    assert samples.min() > 0
    assert victims.samples(found)[0].max() == 0


def test_who_gives_the_images_back_is_always_right(victims: Victims) -> None:
    found = victims.images[victims.indices[:, ::2]]
    outcome = attacked(victims, found, np.ones_like(found))
    assert outcome.samples.max() == 0
    assert outcome.top1 == 1
    assert outcome.evaluation.tpr_at(0.01) == 1
    np.testing.assert_array_equal(outcome.truth, victims.indices[:, ::2].ravel())
    np.testing.assert_array_equal(outcome.evaluation.groups, [0, 0, 0, 1, 1, 1])


def test_the_first_victims_have_all_images(victims: Victims) -> None:
    one = victims.first(1)
    assert len(one.weights) == len(one.indices) == 1
    assert one.threshold == victims.threshold
    assert len(one.images) == 12

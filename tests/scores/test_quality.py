"""Scores of whole sets of images against plain formulas and cases whose answers are known."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg

from jinv.scores import judging, quality

RNG = np.random.default_rng(0)


def naive_inception_score(probabilities: np.ndarray) -> float:
    """exp of the mean of KL(p || mean of all p), term by term."""
    mean = probabilities.mean(0)
    total = 0.0
    for row in probabilities:
        total += sum(p * np.log(p / q) for p, q in zip(row, mean, strict=True) if p > 0)
    return float(np.exp(total / len(probabilities)))


def naive_frechet(x: np.ndarray, y: np.ndarray) -> float:
    s, t = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(s @ t).real
    return float(np.square(x.mean(0) - y.mean(0)).sum() + np.trace(s + t - 2 * root))


@pytest.mark.parametrize("count", [2, 50, 5000])
def test_inception_score_is_its_formula(count: int) -> None:
    probabilities = RNG.dirichlet(np.full(7, 0.3), count)
    found = quality.inception_score(probabilities)
    assert found == pytest.approx((naive_inception_score(probabilities), 0.0), rel=1e-9)
    single = quality.inception_score(probabilities.astype(np.float32))[0]
    assert single == pytest.approx(found[0], rel=1e-5)


def test_inception_score_of_known_cases() -> None:
    """Sure and even: as many as classes. All the same: 1. Half and half of two sure ones: 2."""
    sure = np.eye(6)[np.arange(60) % 6]
    assert quality.inception_score(sure)[0] == pytest.approx(6)
    assert quality.inception_score(np.tile(RNG.dirichlet(np.ones(6)), (9, 1)))[0] == pytest.approx(
        1
    )
    assert quality.inception_score(np.eye(6)[np.arange(60) % 2])[0] == pytest.approx(2)


@pytest.mark.parametrize("order", [np.arange(1000) // 100, np.arange(1000) % 10])
def test_splits_of_the_inception_score_do_not_depend_on_the_order_of_classes(
    order: np.ndarray,
) -> None:
    """Neither of images class after class nor of those in turn: every split has all classes."""
    mean, std = quality.inception_score(np.eye(10)[order], 10)
    assert 9 < mean < 10
    assert 0 < std < 0.2
    with pytest.raises(ValueError, match="3 images cannot fall into 4 splits"):
        quality.inception_score(np.eye(3), 4)


def test_splits_are_parts_of_the_images() -> None:
    probabilities = RNG.dirichlet(np.full(4, 0.5), 30)
    order = np.random.default_rng(0).permutation(30)
    scores = [naive_inception_score(probabilities[part]) for part in np.array_split(order, 4)]
    expected = (np.mean(scores), np.std(scores))
    assert quality.inception_score(probabilities, 4) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("count", [40, 9000])
def test_frechet_distance_is_its_formula(count: int) -> None:
    x = RNG.normal(size=(count, 8)) @ RNG.normal(size=(8, 8))
    y = RNG.normal(1, 2, (count // 2, 8))
    expected = naive_frechet(x, y)
    assert quality.frechet_distance(x, y) == pytest.approx(expected, rel=1e-8)
    assert quality.frechet_distance(y, x) == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_of_known_gaussians() -> None:
    """One dimension: (m - n)^2 + (s - t)^2, s and t the deviations."""
    x, y = np.array([[1.0], [3.0]]), np.array([[10.0], [16.0]])
    s, t = np.sqrt(2), np.sqrt(18)
    assert quality.frechet_distance(x, y) == pytest.approx((2 - 13) ** 2 + (s - t) ** 2)
    shifted = RNG.normal(size=(50, 5))
    found = quality.frechet_distance(shifted, shifted + np.array([3, 4, 0, 0, 0]))
    assert found == pytest.approx(25, rel=1e-9)


def test_frechet_distance_of_fewer_images_than_dimensions() -> None:
    """There, S T is singular; x and y in planes that share no direction have Tr S + Tr T."""
    x = np.zeros((4, 300))
    y = np.zeros((6, 300))
    x[:, :20], y[:, 20:50] = RNG.normal(size=(4, 20)), RNG.normal(size=(6, 30))
    spans = np.trace(np.cov(x, rowvar=False)) + np.trace(np.cov(y, rowvar=False))
    expected = np.square(x.mean(0) - y.mean(0)).sum() + spans
    assert quality.frechet_distance(x, y) == pytest.approx(expected, rel=1e-10)
    same = RNG.normal(size=(5, 300)).astype(np.float32)
    assert 0 <= quality.frechet_distance(same, same[::-1]) < 1e-9
    with pytest.raises(ValueError, match="two images: there are 1 and 5"):
        quality.frechet_distance(same[:1], same)


def test_the_nearest_is_among_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "_ROWS", 3)
    x, y = RNG.normal(size=(5, 4)), RNG.normal(size=(10, 4))
    y[7] = 2 * x[1]
    found = quality.nearest_distances(x, y)
    np.testing.assert_allclose(found, judging.feature_distances(x, y).min(1), atol=1e-12)
    assert found[1] == pytest.approx(0, abs=1e-12)


def test_confusions_and_means_of_classes() -> None:
    labels, given = np.array([0, 0, 2, 2, 2]), np.array([1, 1, 3, 0, 3])
    expected = [[0, 2, 0, 0], [0, 0, 0, 0], [1, 0, 0, 2]]
    assert quality.confusion_matrix(labels, given, (3, 4)).tolist() == expected
    means = quality.class_means(np.array([1.0, 2, 3, 4, 8]), labels, 3)
    np.testing.assert_array_equal(means, [1.5, np.nan, 5])


def test_a_sample_is_spread_over_all() -> None:
    indices = np.arange(100, 200)
    assert quality.spread(indices, 4).tolist() == [100, 133, 166, 199]
    assert quality.spread(indices[:3], 4).tolist() == [100, 101, 102]

"""Scores of reconstructions against their formulas written out, and against scikit-image."""

from __future__ import annotations

import builtins
import itertools
from typing import Any

import numpy as np
import pytest

from jinv.scores import similarity

SCORES = [similarity.psnr, similarity.ssim, similarity.fft_2d]


def pixels(count: int = 3, size: tuple[int, int] = (19, 14), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((count, *size, 3), np.float32)


def pair(noise: float = 0.1, **shape: Any) -> tuple[np.ndarray, np.ndarray]:
    """Reconstructions, each noisier than the last, and originals."""
    truth = pixels(**shape)
    rng = np.random.default_rng(99)
    levels = noise * np.arange(1, len(truth) + 1)[:, None, None, None]
    found = np.clip(truth + levels * rng.standard_normal(truth.shape), 0, 1)
    return found.astype(np.float32), truth


# --- pixels, windows, frequencies ----------------------------------------------------------------


def test_psnr_by_hand() -> None:
    truth = np.full((3, 4, 5, 3), 0.5)
    found = truth + np.asarray([0.1, -0.01, 0])[:, None, None, None]
    np.testing.assert_allclose(similarity.psnr(found, truth), [20, 40, np.inf])


def test_psnr_equals_scikit_images() -> None:
    skimage = pytest.importorskip("skimage.metrics")
    found, truth = pair()
    expected = [skimage.peak_signal_noise_ratio(truth[i], found[i], data_range=1) for i in range(3)]
    np.testing.assert_allclose(similarity.psnr(found, truth), expected, rtol=1e-6)


def ssim_written_out(found: np.ndarray, truth: np.ndarray) -> float:
    """Wang et al. 2004, equation 13, window by window; images (H, W, C)."""
    at = np.arange(-5, 6)
    weights = np.exp(-(at[:, None] ** 2 + at**2) / (2 * 1.5**2))
    weights /= weights.sum()
    values = []
    height, width, channels = found.shape
    for y, x, c in itertools.product(range(height - 10), range(width - 10), range(channels)):
        a = found[y : y + 11, x : x + 11, c].astype(np.float64)
        b = truth[y : y + 11, x : x + 11, c].astype(np.float64)
        mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
        var_a = (weights * (a - mean_a) ** 2).sum()
        var_b = (weights * (b - mean_b) ** 2).sum()
        covariance = (weights * (a - mean_a) * (b - mean_b)).sum()
        luminance = (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)
        structure = (2 * covariance + 0.03**2) / (var_a + var_b + 0.03**2)
        values.append(luminance * structure)
    return float(np.mean(values))


@pytest.mark.parametrize("size", [(19, 14), (11, 11)])
def test_ssim_equals_its_formula(size: tuple[int, int]) -> None:
    pytest.importorskip("skimage")
    found, truth = pair(size=size)
    expected = [ssim_written_out(found[i], truth[i]) for i in range(3)]
    scores = similarity.ssim(found, truth)
    np.testing.assert_allclose(scores, expected, rtol=1e-9)
    assert 0 < scores[2] < scores[1] < scores[0] < 1
    np.testing.assert_allclose(similarity.ssim(truth, truth), 1)


def test_ssim_of_gray_images() -> None:
    pytest.importorskip("skimage")
    found, truth = pair()
    found, truth = found[..., :1], truth[..., :1]
    expected = [ssim_written_out(found[i], truth[i]) for i in range(3)]
    np.testing.assert_allclose(similarity.ssim(found, truth), expected, rtol=1e-9)


def test_ssim_needs_a_window() -> None:
    pytest.importorskip("skimage")
    with pytest.raises(ValueError, match=r"11 x 11 pixels: images of 10 x 14 are too small"):
        similarity.ssim(*pair(size=(10, 14)))


def test_missing_scikit_image_says_how_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("skimage"):
            raise ModuleNotFoundError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"pip install scikit-image"):
        similarity.ssim(*pair())


def test_fft_2d_equals_its_sums() -> None:
    found, truth = pair()
    height, width = truth.shape[1:3]
    rows = np.exp(-2j * np.pi * np.outer(np.arange(height), np.arange(height)) / height)
    columns = np.exp(-2j * np.pi * np.outer(np.arange(width), np.arange(width)) / width)

    def magnitudes(x: np.ndarray) -> np.ndarray:
        transform = np.einsum("uh,vw,khwc->kuvc", rows, columns, x) / np.sqrt(height * width)
        return np.abs(transform)

    expected = np.abs(magnitudes(found) - magnitudes(truth)).mean((1, 2, 3))
    np.testing.assert_allclose(similarity.fft_2d(found, truth), expected, rtol=1e-9)
    np.testing.assert_allclose(
        similarity.fft_2d(np.roll(truth, (3, 5), (1, 2)), truth), 0, atol=1e-12
    )


@pytest.mark.parametrize("score", SCORES)
def test_images_are_scored_one_by_one(score: Any) -> None:
    if score is similarity.ssim:
        pytest.importorskip("skimage")
    found, truth = pair()
    expected = [score(found[i : i + 1], truth[i : i + 1])[0] for i in range(3)]
    np.testing.assert_allclose(score(found, truth), expected, rtol=1e-12)


@pytest.mark.parametrize("score", [*SCORES, similarity.match])
def test_what_does_not_pair_is_refused(score: Any) -> None:
    truth = pixels()
    with pytest.raises(ValueError, match=r"\(2, 19, 14, 3\) do not pair with originals \(3, 19"):
        score(truth[:2], truth)
    with pytest.raises(ValueError, match=r"reconstructions have the shape \(K, H, W, C\)"):
        score(truth[0], truth[0])
    with pytest.raises(ValueError, match=r"originals are pixels in .* not uint8: divide bytes"):
        score(truth, np.zeros(truth.shape, np.uint8))


# --- which is which ------------------------------------------------------------------------------


def squared_error(found: np.ndarray, truth: np.ndarray, order: Any) -> float:
    return sum(
        float(np.mean((found[j] - truth[i].astype(np.float64)) ** 2)) for i, j in enumerate(order)
    )


def test_match_is_the_best_of_all_orders() -> None:
    """Of unrelated images, where taking the nearest one by one would not do."""
    for seed in range(20):
        found, truth = pixels(5, (2, 2), seed), pixels(5, (2, 2), seed + 100)
        best = min(
            itertools.permutations(range(5)), key=lambda order: squared_error(found, truth, order)
        )
        assert similarity.match(found, truth).tolist() == list(best)


def test_match_undoes_a_permutation() -> None:
    found, truth = pair(count=6)
    order = np.random.default_rng(1).permutation(6)
    np.testing.assert_allclose(found[order][similarity.match(found[order], truth)], found)


def test_match_pairs_equal_labels_even_where_others_are_nearer() -> None:
    truth = pixels(4)
    found = truth[[1, 0, 3, 2]]  # exact, but for the wrong labels
    labels = np.asarray([7, 3, 7, 7])
    assert similarity.match(found, truth).tolist() == [1, 0, 3, 2]
    chosen = similarity.match(found, truth, labels, labels)
    np.testing.assert_array_equal(labels[chosen], labels)
    allowed = [
        order for order in itertools.permutations(range(4)) if (labels[list(order)] == labels).all()
    ]
    best = min(allowed, key=lambda order: squared_error(found, truth, order))
    assert chosen.tolist() == list(best)


def test_match_with_unequal_labels_keeps_as_many_as_it_can() -> None:
    """One restored label is wrong: the rest is paired by label, what is left by error."""
    truth = pixels(4)
    found = truth[[3, 1, 0, 2]]
    ours, theirs = np.asarray([1, 2, 5, 1]), np.asarray([1, 2, 1, 3])
    chosen = similarity.match(found, truth, ours, theirs)
    assert sorted(chosen) == [0, 1, 2, 3]
    hits = (ours[chosen] == theirs).sum()
    orders = [np.asarray(order) for order in itertools.permutations(range(4))]
    assert hits == max((ours[order] == theirs).sum() for order in orders) == 3
    allowed = [order for order in orders if (ours[order] == theirs).sum() == 3]
    best = min(allowed, key=lambda order: squared_error(found, truth, order))
    assert chosen.tolist() == best.tolist()


def test_match_refuses_what_it_cannot_use() -> None:
    truth = pixels()
    with pytest.raises(ValueError, match=r"of both .* or of neither"):
        similarity.match(truth, truth, [1, 2, 3])
    with pytest.raises(ValueError, match=r"3 images need as many labels, not \(3,\) and \(2,\)"):
        similarity.match(truth, truth, [1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="not finite cannot be matched"):
        similarity.match(truth * np.nan, truth)


# --- identifiability -----------------------------------------------------------------------------


def nearest_is_own(found: np.ndarray, candidates: np.ndarray, distance: Any) -> float:
    hits = 0
    for k, image in enumerate(found):
        distances = [distance(image, candidate) for candidate in candidates]
        hits += int(np.argmin(distances)) == k
    return hits / len(found)


def channel_means(x: np.ndarray) -> np.ndarray:
    return x.mean((1, 2))


@pytest.mark.parametrize("noise", [0.005, 0.05, 3.0])
def test_identifiable_equals_a_search_one_by_one(noise: float) -> None:
    """Of small images, so that some are lost among 40 others."""
    found, truth = pair(noise, count=12, size=(2, 2))
    candidates = np.concatenate([truth, pixels(40, (2, 2), seed=5)])

    def mse(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.mean((a.astype(np.float64) - b) ** 2))

    def angle(a: np.ndarray, b: np.ndarray) -> float:
        a, b = (channel_means(x[None])[0].astype(np.float64) for x in (a, b))
        return 1 - float(a @ b) / float(np.linalg.norm(a) * np.linalg.norm(b))

    by_pixels = nearest_is_own(found, candidates, mse)
    by_features = nearest_is_own(found, candidates, angle)
    assert similarity.identifiable(found, candidates) == by_pixels
    assert similarity.identifiable(found, candidates, channel_means) == by_features
    if noise == 0.05:
        assert 0 < by_pixels < 1
        assert 0 < by_features < 1


def test_ties_identify_nobody() -> None:
    truth = pixels(4)
    assert similarity.identifiable(truth, truth) == 1
    twins = np.concatenate([truth, truth[:1]])
    assert similarity.identifiable(truth, twins) == 3 / 4
    assert similarity.identifiable(np.zeros_like(truth), truth, channel_means) == 0
    assert similarity.identifiable(truth * np.nan, truth) == 0


def test_features_are_asked_for_a_few_images_at_a_time() -> None:
    """So that a network needs the memory of K images, whatever the number of candidates."""
    truth = pixels(4)
    seen = []

    def features(x: np.ndarray) -> np.ndarray:
        seen.append(len(x))
        return channel_means(x)

    candidates = np.concatenate([truth, pixels(6, seed=3)])
    assert similarity.identifiable(truth, candidates, features) == 1
    assert seen == [4, 4, 4, 2]
    with pytest.raises(ValueError, match="no features to compare by"):
        similarity.identifiable(truth, candidates, lambda x: None)


def test_identifiable_needs_originals_among_others() -> None:
    truth = pixels(4)
    with pytest.raises(ValueError, match=r"4 reconstructions need their originals .* not 3"):
        similarity.identifiable(truth, truth[:3])
    with pytest.raises(ValueError, match="at least two candidates, not 1"):
        similarity.identifiable(truth[:1], truth[:1])
    with pytest.raises(ValueError, match=r"\(19, 14, 3\) have no candidates \(19, 14, 1\)"):
        similarity.identifiable(truth, truth[..., :1])

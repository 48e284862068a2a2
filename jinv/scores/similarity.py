"""How near reconstructions are to originals.

Scores compare image k of `found` with image k of `truth`, pixels (K, H, W, C) in [0, 1]; `match`
says which reconstruction belongs to which original. Everything is computed in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import scipy.optimize

from jinv.scores import judging

SSIM_WINDOW = 11  # pixels a side: a Gaussian of sigma 1.5, cut at 3.5 sigma


def psnr(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """10 log10(1 / MSE) in dB (K,), MSE over pixels and channels; inf where the two are equal."""
    check_pairs(found, truth)
    error = np.square(_wide(found) - _wide(truth)).mean((1, 2, 3))
    with np.errstate(divide="ignore"):
        return -10 * np.log10(error)


def ssim(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Structural similarity (K,), at most 1; mean over windows and channels. Wang et al. 2004.

    Their Gaussian window (sigma 1.5), population covariance, K1 = 0.01, K2 = 0.03, data range 1.

    Raises:
      ImportError: scikit-image is missing.
      ValueError: images smaller than the window, 11 x 11 pixels.
    """
    try:
        from skimage.metrics import structural_similarity
    except ImportError as error:
        raise ImportError("SSIM needs scikit-image: pip install scikit-image") from error
    check_pairs(found, truth)
    height, width = found.shape[1:3]
    if min(height, width) < SSIM_WINDOW:
        raise ValueError(
            f"SSIM compares windows of {SSIM_WINDOW} x {SSIM_WINDOW} pixels: images of "
            f"{height} x {width} are too small"
        )
    scores = [
        structural_similarity(
            ours,
            theirs,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1,
            channel_axis=-1,
        )
        for ours, theirs in zip(_wide(found), _wide(truth), strict=True)
    ]
    return np.asarray(scores)


def fft_2d(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """mean | |F x| - |F y| | (K,), F the orthonormal 2-D Fourier transform of each channel.

    The FFT_2D of GradInversion, arXiv 2104.07586: blind to shifts (around the border).
    """
    check_pairs(found, truth)
    return np.abs(_magnitudes(found) - _magnitudes(truth)).mean((1, 2, 3))


def _magnitudes(pixels: np.ndarray) -> np.ndarray:
    return np.abs(np.fft.fft2(_wide(pixels), axes=(1, 2), norm="ortho"))


def match(
    found: np.ndarray,
    truth: np.ndarray,
    labels_found: Sequence[int] | np.ndarray | None = None,
    labels_truth: Sequence[int] | np.ndarray | None = None,
) -> np.ndarray:
    """Indices (K,) such that found[match] corresponds to truth, each reconstruction used once.

    The assignment of lowest total squared error; with labels, among those assignments that pair
    as many images of equal label as can be: all, if the two hold the same labels.

    Args:
      found: reconstructions in any order.
      truth: originals.
      labels_found: (K,) classes of the reconstructions.
      labels_truth: (K,) classes of the originals.

    Raises:
      ValueError: images or labels that make no pairs.
    """
    check_pairs(found, truth)
    costs = np.square(judging.pixel_distances(truth, found))
    if not np.isfinite(costs).all():
        raise ValueError("images that are not finite cannot be matched to originals")
    if (labels_found is None) != (labels_truth is None):
        raise ValueError("labels of both reconstructions and originals are needed, or of neither")
    if labels_found is not None and labels_truth is not None:
        ours, theirs = np.asarray(labels_found), np.asarray(labels_truth)
        if not ours.shape == theirs.shape == (len(truth),):
            raise ValueError(
                f"{len(truth)} images need as many labels, not {ours.shape} and {theirs.shape}"
            )
        # One pair of unequal labels costs more than all squared errors together.
        costs = costs + (len(truth) * costs.max() + 1) * np.not_equal.outer(theirs, ours)
    return scipy.optimize.linear_sum_assignment(costs)[1]


Features = Callable[[np.ndarray], np.ndarray | None]
"""Pixels (B, H, W, C) -> (B, D), such as `lambda pixels: judge(pixels).features`."""


def identifiable(
    found: np.ndarray, candidates: np.ndarray, features: Features | None = None
) -> float:
    """Image Identifiability Precision, arXiv 2104.07586 section 4.

    The share of reconstructions that are nearer to their own original than to any other candidate;
    a tie is a miss.

    Args:
      found: (K, H, W, C) reconstructions.
      candidates: (M, H, W, C): their K originals in the same order, then any number of other
        images of the same distribution.
      features: what images are compared by (cosine); is given at most K images at a time. By
        default the squared error of pixels.

    Raises:
      ValueError: fewer candidates than reconstructions, or images of other shapes.
    """
    _check_pixels(found, "reconstructions")
    _check_pixels(candidates, "candidates")
    count, total = len(found), len(candidates)
    if found.shape[1:] != candidates.shape[1:]:
        raise ValueError(f"images {found.shape[1:]} have no candidates {candidates.shape[1:]}")
    if total < max(count, 2):
        raise ValueError(
            f"{count} reconstructions need their originals among at least two candidates, "
            f"not {total}"
        )
    if features is None:
        distances = judging.pixel_distances(found, candidates)
    else:
        parts = [candidates[start : start + count] for start in range(0, total, count)]
        ours, *theirs = (features(part) for part in (found, *parts))
        known = [part for part in theirs if part is not None]
        if ours is None or not known:
            raise ValueError("a network without a last linear layer has no features to compare by")
        distances = judging.feature_distances(ours, np.concatenate(known))
    own = distances[np.arange(count), np.arange(count)]
    others = distances + np.where(np.eye(count, total, dtype=bool), np.inf, 0)
    return float(np.mean(own < others.min(1)))


def check_pairs(found: np.ndarray, truth: np.ndarray) -> None:
    """ValueError unless these are two equal shapes of pixels (K, H, W, C), not bytes."""
    _check_pixels(found, "reconstructions")
    _check_pixels(truth, "originals")
    if found.shape != truth.shape:
        raise ValueError(f"reconstructions {found.shape} do not pair with originals {truth.shape}")


def _check_pixels(pixels: np.ndarray, what: str) -> None:
    if pixels.ndim != 4 or not pixels.size:
        raise ValueError(f"{what} have the shape (K, H, W, C), not {pixels.shape}")
    if not np.issubdtype(pixels.dtype, np.floating):
        raise ValueError(f"{what} are pixels in [0, 1], not {pixels.dtype}: divide bytes by 255")


def _wide(pixels: np.ndarray) -> np.ndarray:
    return np.asarray(pixels, np.float64)

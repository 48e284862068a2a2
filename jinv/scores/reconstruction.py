"""Reconstructions beside their originals: matched, then scored by every measure."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from jinv import image
from jinv.scores import lpips, similarity

HIGHER, LOWER = "higher is nearer", "lower is nearer"
SCORES = {
    "psnr": ("PSNR [dB]", HIGHER),
    "ssim": ("SSIM", HIGHER),
    "lpips": ("LPIPS", LOWER),
    "fft_2d": ("FFT 2D", LOWER),
    "iip": ("IIP", HIGHER),
}
"""Name -> (title, which way is better)."""


@dataclasses.dataclass(frozen=True)
class Scored:
    """Reconstructions in their originals' order.

    Attributes:
      values: pixels (K, H, W, C) in [0, 1], not rounded.
      scores: name -> (K,) values, or one for all; None where a score is not available.
    """

    values: np.ndarray
    scores: dict[str, list[float] | float | None]

    def means(self) -> dict[str, float | None]:
        """Return every score's mean over the images; None where it is not available."""
        return {
            name: None if value is None else float(np.mean(value))
            for name, value in self.scores.items()
        }


class Scorer:
    """Scores reconstructions of known images.

    Args:
      truth: originals, pixels (K, H, W, C) in [0, 1].
      distractors: other images, bytes (M, H, W, 1, 3 or C), that a reconstruction might be taken
        for; they count for IIP only.
      distance: LPIPS, or why it is not available.
    """

    def __init__(
        self,
        truth: np.ndarray,
        distractors: np.ndarray | None,
        distance: lpips.Distance | str,
    ) -> None:
        self.truth = truth
        self._distance = distance
        self._distractors = np.empty((0,)) if distractors is None else distractors

    def psnr(self, values: np.ndarray) -> float:
        """Return the mean PSNR in dB of pixels (K, H, W, C), matched to the originals."""
        order = similarity.match(values, self.truth)
        return float(similarity.psnr(values[order], self.truth).mean())

    def __call__(self, values: np.ndarray) -> Scored:
        """Match pixels (K, H, W, C) in [0, 1] to the originals, and score them."""
        values = values[similarity.match(values, self.truth)]
        known, several = self._distance, len(self.truth) + len(self._distractors) > 1
        return Scored(
            values,
            {
                "psnr": _floats(similarity.psnr(values, self.truth)),
                "ssim": _floats(similarity.ssim(values, self.truth)),
                "lpips": None if isinstance(known, str) else _floats(known(values, self.truth)),
                "fft_2d": _floats(similarity.fft_2d(values, self.truth)),
                "iip": similarity.identifiable(values, self._candidates()) if several else None,
            },
        )

    def _candidates(self) -> np.ndarray:
        """Return originals and distractors; they take memory only while they are compared."""
        if not len(self._distractors):
            return self.truth
        channels = self.truth.shape[-1]
        others = image.for_channels(self._distractors, channels) / 255
        if others.shape[-1] != channels:
            others = np.repeat(others, channels, -1)
        return np.concatenate([self.truth, others])

    def missing(self, scored: Scored) -> dict[str, str]:
        """Return why there is none of some scores."""
        found = {}
        if isinstance(self._distance, str):
            found["lpips"] = self._distance
        if scored.scores["iip"] is None:
            found["iip"] = "one image, and no others to tell it from"
        return found


def perceptual(vgg16_weights: str | Path | None) -> lpips.Distance | str:
    """Return LPIPS, or why it is not available.

    Raises:
      FileNotFoundError: weights were given, and something that LPIPS needs is not there.
      ValueError: a file is damaged or of something else.
    """
    try:
        return lpips.load(vgg16_weights)
    except FileNotFoundError as error:
        if vgg16_weights is not None:
            raise
        return str(error)


def _floats(values: np.ndarray) -> list[float]:
    return [float(value) for value in values]

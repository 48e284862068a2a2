"""Statistics of classes against those of each class's images at once."""

from __future__ import annotations

import numpy as np
import pytest

import tiny
from jinv import training
from jinv.data import Dataset
from jinv.distill.class_moments import class_moments


def test_moments_are_those_of_all_images_of_a_class() -> None:
    """Whatever the batches: the last is padded, and classes are mixed."""
    net = tiny.network()
    rng = np.random.default_rng(0)
    labels = np.array([0, 1, 2, 3, 4, 5, 6, 2, 2, 5, 0], np.int32)
    images = rng.integers(0, 256, (11, 16, 16, 3), np.uint8)
    dataset = Dataset(images, labels, tuple("abcdefg"))
    found = class_moments(net, dataset, batch=4)
    for name in range(7):
        seen = training.normalised(net, images[labels == name])
        for ours, theirs in zip(found, net.apply(net.variables, seen).moments, strict=True):
            np.testing.assert_allclose(ours.mean[name], theirs.mean, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(ours.var[name], theirs.var, rtol=1e-3, atol=1e-5)


def test_every_class_needs_an_image() -> None:
    net = tiny.network()
    images = np.zeros((6, 16, 16, 3), np.uint8)
    dataset = Dataset(images, np.arange(6, dtype=np.int32), tuple("abcdefg"))
    with pytest.raises(ValueError, match="images of each of the 7 classes of tiny"):
        class_moments(net, dataset)

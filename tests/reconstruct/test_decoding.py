"""From features to images: linear maps, and features with recovery's errors."""

from __future__ import annotations

import numpy as np
import pytest

from jinv.reconstruct.decoding import Linear, Noisy


def test_linear_maps_of_each_class_are_found() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(400) % 2
    x = rng.normal(size=(400, 3)).astype(np.float32)
    maps = rng.normal(size=(2, 3, 4)) * 0.1
    images = np.einsum("md,mdq->mq", x, maps[labels]).reshape(400, 2, 2, 1) + 0.1
    found = Linear.fit(x, labels, images)(x[:4].reshape(2, 2, 3))
    np.testing.assert_allclose(found, images[:4].reshape(2, 2, 2, 2, 1), atol=1e-3)
    assert found.dtype == np.float32


def test_images_stay_in_range_and_few_are_refused() -> None:
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(40, 2)).astype(np.float32), np.arange(40) % 2
    images = np.where(x[:, :1, None, None] > 0, 255, 0).astype(np.uint8).reshape(40, 1, 1, 1)
    found = Linear.fit(x, labels, images)(100 * x.reshape(20, 2, 2))
    assert found.min() == -1
    assert found.max() == 1
    with pytest.raises(ValueError, match="class 1 has 0 images"):
        Linear.fit(x[:3], np.array([0, 0, 2]), images[:3])


def noisy(most: float, sets: int = 3000, **changes: object) -> tuple[Noisy, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(2), 2000)
    x = (rng.normal(size=(4000, 3)) * [1, 2, 3] + labels[:, None] * 5).astype(np.float32)
    return Noisy(x, labels, most, sets, **({"nonnegative": False} | changes)), x  # type: ignore


def test_errors_are_as_large_as_promised_and_those_of_posterior_means() -> None:
    source, x = noisy(0.5)
    found, indices = source(0)
    error = np.asarray(found) - x[indices[:, 0]]
    # r is uniform on [0, 0.5]: the mean of its square is 1/12.
    np.testing.assert_allclose(np.square(error).mean(0), np.array([1, 4, 9]) / 12, rtol=0.1)
    centred = np.asarray(found) - np.array([0, 5])[indices[:, 0] // 2000][:, None]
    correlation = (centred * error).mean(0) / np.array([1, 4, 9])
    np.testing.assert_allclose(correlation, 0, atol=0.03)


def test_seeds_are_permutations_and_come_again() -> None:
    source, _ = noisy(0.3)
    (first, indices), (again, same) = source(1), source(1)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(indices, same)
    assert len(np.unique(indices)) == len(indices) == 3000
    other = source(2)[1]
    assert not np.array_equal(indices, other)


def test_without_error_features_are_themselves_and_relu_stays() -> None:
    source, x = noisy(0.0)
    found, indices = source(0)
    np.testing.assert_allclose(found, x[indices[:, 0]], atol=1e-5)
    source, _ = noisy(0.5, nonnegative=True)
    assert np.asarray(source(0)[0]).min() == 0

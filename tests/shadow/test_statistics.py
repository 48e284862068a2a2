"""Streaming statistics equal those of all weights at once."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from jinv.shadow import statistics


def weights() -> np.ndarray:
    """Correlated float32 vectors, far from 0 against their spread; two coordinates are constant."""
    rng = np.random.default_rng(0)
    found = rng.normal(size=(500, 6)) @ rng.normal(size=(6, 6)) * 1e-3 + 30
    found[:, 2], found[:, 4] = 0.1, 0.0
    return found.astype(np.float32)


@pytest.mark.parametrize("size", [1, 7, 500])
def test_batches_give_what_all_at_once_gives(size: int) -> None:
    data = weights()
    batches = (data[i : i + size] for i in range(0, len(data), size))
    found = functools.reduce(statistics.merged, map(statistics.of, batches))
    wide = data.astype(np.float64)
    np.testing.assert_allclose(found.mean, wide.mean(0), rtol=1e-14)
    np.testing.assert_allclose(found.covariance, np.cov(wide.T), rtol=1e-9, atol=1e-18)
    np.testing.assert_allclose(found.std, wide.std(0, ddof=1), rtol=1e-9)
    assert found.count == 500


@pytest.mark.parametrize("size", [3, 500])
def test_what_never_varies_is_reported_and_left_out(size: int) -> None:
    data = weights()
    batches = (data[i : i + size] for i in range(0, len(data), size))
    found = functools.reduce(statistics.merged, map(statistics.of, batches))
    np.testing.assert_array_equal(found.varying, [0, 1, 3, 5])
    expected = np.corrcoef(data[:, found.varying].astype(np.float64).T)
    np.testing.assert_allclose(found.correlation, expected, atol=1e-9)


def test_what_is_no_batch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(models, coordinates\), not \(4,\)"):
        statistics.of(np.zeros(4))

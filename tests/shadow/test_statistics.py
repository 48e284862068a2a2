"""Streaming statistics equal those of all weights at once."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jinv.shadow import statistics


def weights() -> np.ndarray:
    """Correlated float32 vectors, far from 0 against their spread; two coordinates are constant."""
    rng = np.random.default_rng(0)
    found = rng.normal(size=(500, 6)) @ rng.normal(size=(6, 6)) * 1e-3 + 30
    found[:, 2], found[:, 4] = 0.1, 0.0
    return found.astype(np.float32)


@pytest.fixture(params=["cpu", "gpu"], autouse=True)
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the statistics take themselves to be computed."""
    monkeypatch.setattr(statistics.jax, "default_backend", lambda: request.param)
    monkeypatch.setattr(statistics, "_DEVICE_BLOCK", 6 * 300)  # more than one block
    return str(request.param)


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


@pytest.mark.parametrize("covariance", [True, False])
@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_vectors_that_are_not_kept_do_not_count(array: Any, covariance: bool, where: str) -> None:
    """Though they are no numbers; and what a GPU computes stays there until it is asked for."""
    data, kept = weights(), np.arange(500) % 3 > 0
    wide = data[kept].astype(np.float64)
    data[~kept] = np.nan
    found = functools.reduce(
        statistics.merged,
        (
            statistics.of(array(data[some]), covariance=covariance, kept=kept[some])
            for some in (slice(0, 120), slice(120, 500))
        ),
    )
    assert found.count == kept.sum()
    assert isinstance(found.mean, np.ndarray if where == "cpu" else jax.Array)
    np.testing.assert_allclose(found.mean, wide.mean(0), rtol=1e-14)
    np.testing.assert_allclose(found.std, wide.std(0, ddof=1), rtol=1e-9)
    np.testing.assert_array_equal(found.varying, [0, 1, 3, 5])
    if covariance:
        np.testing.assert_allclose(found.covariance, np.cov(wide.T), rtol=1e-9, atol=1e-18)
    else:
        with pytest.raises(ValueError, match="ask for the covariance"):
            _ = found.covariance


def test_what_is_saved_is_in_float64(tmp_path: Path) -> None:
    statistics.of(weights()).save(tmp_path / "statistics.npz")
    with np.load(tmp_path / "statistics.npz") as saved:
        assert {saved[name].dtype for name in ("mean", "std", "covariance")} == {np.dtype(float)}
        np.testing.assert_allclose(saved["std"] ** 2, np.diag(saved["covariance"]), rtol=1e-12)


def test_what_is_no_batch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(models, coordinates\), not \(4,\)"):
        statistics.of(np.zeros(4))
    with pytest.raises(ValueError, match="none of the 500 weight vectors is kept"):
        statistics.of(weights(), kept=np.zeros(500, bool))

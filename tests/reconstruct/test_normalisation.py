"""Normalised weights, and random ones with the same covariance."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jinv.reconstruct.normalisation import JITTER, Normalisation
from jinv.shadow import statistics


def heads(count: int = 400) -> np.ndarray:
    """Correlated coordinates of different scales, and one that is the same in all."""
    rng = np.random.default_rng(0)
    drawn = rng.standard_normal((count, 4)) @ rng.standard_normal((4, 4)) * [1, 10, 0.01, 3] + 5
    return np.insert(drawn, 2, 7.0, axis=1).astype(np.float32)


def test_normalised_weights_have_mean_0_and_variance_1_and_no_constants() -> None:
    weights = heads()
    ours = Normalisation.of(statistics.of(weights))
    z = ours.normalised(weights)
    assert z.shape == (400, 4)
    assert z.dtype == np.float32
    np.testing.assert_allclose(z.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(z.std(0, ddof=1), 1, rtol=1e-4)
    np.testing.assert_allclose(ours.weights(z, weights[0]), weights, rtol=1e-5, atol=1e-5)
    on_device = jax.jit(ours.normalised)(weights)
    np.testing.assert_allclose(on_device, z, rtol=1e-5, atol=1e-6)


def test_random_weights_have_the_covariance_of_the_normalised_ones() -> None:
    weights = heads()
    ours = Normalisation.of(statistics.of(weights))
    z = np.asarray(ours.random(jax.random.key(0), 40000), np.float64)
    expected = np.corrcoef(np.delete(weights, 2, 1).T.astype(np.float64)) + JITTER * np.eye(4)
    np.testing.assert_allclose(np.cov(z.T), expected, atol=0.02)
    np.testing.assert_allclose(z.mean(0), 0, atol=0.02)
    np.testing.assert_array_equal(ours.random(jax.random.key(0), 40000), z.astype(np.float32))


def test_fewer_heads_than_coordinates_still_have_random_ones() -> None:
    ours = Normalisation.of(statistics.of(heads(3)))
    assert np.isfinite(ours.random(jax.random.key(0), 5)).all()


def test_what_has_no_normalisation_is_refused() -> None:
    with pytest.raises(ValueError, match="of 1 heads that are all the same"):
        Normalisation.of(statistics.of(heads(1)))
    alone = Normalisation.of(statistics.of(heads(), covariance=False))
    with pytest.raises(ValueError, match="covariance=True"):
        alone.random(jax.random.key(0), 1)

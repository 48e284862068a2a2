"""Epsilon by its definition, noise by the published algorithm, both by dp-accounting."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import scipy.integrate
import scipy.stats

from jinv import privacy


def hockey_stick(epsilon: float, sigma: float) -> float:
    """The least delta by definition: integral of (p - e^epsilon q)+, p N(1, s^2), q N(0, s^2)."""
    p, q = scipy.stats.norm(1, sigma).pdf, scipy.stats.norm(0, sigma).pdf
    start = 0.5 + epsilon * sigma**2  # where p = e^epsilon q
    return scipy.integrate.quad(
        lambda x: p(x) - math.exp(epsilon) * q(x), start, start + 40 * sigma, epsabs=1e-14
    )[0]


def balle_wang(epsilon: float, delta: float) -> float:
    """Noise multiplier by Algorithm 1 of arXiv 1805.06530, searched by halving."""
    cdf = scipy.stats.norm.cdf
    threshold = cdf(0) - math.exp(epsilon) * cdf(-math.sqrt(2 * epsilon))

    def plus(v: float) -> float:
        return cdf(math.sqrt(epsilon * v)) - math.exp(epsilon) * cdf(-math.sqrt(epsilon * (v + 2)))

    def minus(u: float) -> float:
        return cdf(-math.sqrt(epsilon * u)) - math.exp(epsilon) * cdf(-math.sqrt(epsilon * (u + 2)))

    rising = delta >= threshold
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        below = plus(middle) <= delta if rising else minus(middle) > delta
        low, high = (middle, high) if below else (low, middle)
    sign = -1 if rising else 1
    alpha = math.sqrt(1 + low / 2) + sign * math.sqrt(low / 2)
    return alpha / math.sqrt(2 * epsilon)


@pytest.mark.parametrize("sigma", [0.2, 0.5, 1.0, 4.0, 30.0])
@pytest.mark.parametrize("delta", [1e-6, 1e-3, 0.01])
def test_epsilon_is_where_the_divergence_is_delta(sigma: float, delta: float) -> None:
    epsilon = privacy.epsilon(sigma, delta)
    assert hockey_stick(epsilon, sigma) == pytest.approx(delta, rel=1e-5)


@pytest.mark.parametrize("epsilon", [0.05, 1.0, 8.0, 40.0])
@pytest.mark.parametrize("delta", [1e-6, 1e-3, 0.2])
def test_noise_is_that_of_the_analytic_gaussian_mechanism(epsilon: float, delta: float) -> None:
    found = privacy.calibrated_noise(epsilon, delta)
    assert found == pytest.approx(balle_wang(epsilon, delta), rel=1e-5)
    assert privacy.epsilon(found, delta) <= epsilon
    assert privacy.calibrated_noise(epsilon, delta, 9) == pytest.approx(3 * found, rel=1e-5)


def test_epsilon_at_the_ends() -> None:
    assert privacy.epsilon(0, 1e-5) == math.inf
    assert privacy.epsilon(0, 1e-5, 10, 0.1) == math.inf
    assert privacy.calibrated_noise(math.inf, 1e-5) == 0
    # Little noise: epsilon is about 1 / 2 s^2 + z / s, z the normal quantile of 1 - delta.
    for sigma in (1e-2, 1e-4):
        quantile = scipy.stats.norm.isf(1e-5)
        expected = 1 / (2 * sigma**2) + quantile / sigma
        assert privacy.epsilon(sigma, 1e-5) == pytest.approx(expected, rel=1e-3)
    # So much noise that delta alone covers it.
    assert privacy.epsilon(1e6, 1e-5) == 0
    assert scipy.stats.norm.cdf(0.5e-6) - scipy.stats.norm.cdf(-0.5e-6) < 1e-5


def test_epsilon_agrees_with_dp_accounting() -> None:
    """Its PLD accountant's numbers, found beforehand with its default settings."""
    pytest.importorskip("dp_accounting")
    assert privacy.epsilon(1.0, 1e-5) == pytest.approx(4.377178, abs=1e-5)
    assert privacy.epsilon(10.0, 1e-5, 100) == pytest.approx(4.377178, abs=1e-5)
    assert privacy.epsilon(1.1, 1e-5, 11700, 256 / 50000) == pytest.approx(2.641932, rel=1e-3)
    assert privacy.epsilon(1.0, 1e-5, 100, 0.1) == pytest.approx(7.046603, rel=1e-4)
    # Little noise: a fixed interval would take gigabytes.
    assert privacy.epsilon(0.01, 1e-5, 1, 0.1) < privacy.epsilon(0.01, 1e-5)


def test_one_sampled_round_is_amplified_as_theory_says() -> None:
    """(epsilon, delta) of everyone gives (log(1 + q (e^epsilon - 1)), q delta), to remove one."""
    pytest.importorskip("dp_accounting")
    q, sigma, delta = 0.1, 1.0, 1e-4
    expected = math.log1p(q * math.expm1(privacy.epsilon(sigma, delta)))
    assert privacy.epsilon(sigma, q * delta, 1, q) == pytest.approx(expected, rel=1e-4)


def test_calibrated_noise_agrees_with_dp_accounting() -> None:
    dp = pytest.importorskip("dp_accounting")
    from dp_accounting import pld

    def event(sigma: float) -> Any:
        one = dp.PoissonSampledDpEvent(0.1, dp.GaussianDpEvent(sigma))
        return dp.SelfComposedDpEvent(one, 20)

    found = privacy.calibrated_noise(3.0, 1e-5, 20, 0.1)
    theirs = dp.calibrate_dp_mechanism(
        lambda: pld.PLDAccountant(value_discretization_interval=1e-3),
        event,
        3.0,
        1e-5,
        dp.ExplicitBracketInterval(0.8 * found, 1.2 * found),
        tol=1e-4,
    )
    assert found == pytest.approx(theirs, rel=1e-3)
    assert privacy.epsilon(found, 1e-5, 20, 0.1) <= 3.0


def test_sampling_without_dp_accounting_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    assert privacy.epsilon(1.0, 1e-5) > 4
    with pytest.raises(ImportError, match=r"pip install 'jinv\[privacy\]'"):
        privacy.epsilon(1.0, 1e-5, 1, 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 1e-5), "noise_multiplier cannot be -1"),
        ((1, 0), "between 0 and 1"),
        ((1, 1), "between 0 and 1"),
        ((1, 1e-5, 0), "at least one round"),
        ((1, 1e-5, 1, 0), "sampling is a probability"),
        ((1, 1e-5, 1, 2), "sampling is a probability"),
    ],
)
def test_privacy_refuses(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        privacy.epsilon(*arguments)
    if "noise" not in message:
        with pytest.raises(ValueError, match=message):
            privacy.calibrated_noise(*arguments)


def test_noise_for_no_epsilon_is_refused() -> None:
    with pytest.raises(ValueError, match="epsilon must be positive"):
        privacy.calibrated_noise(0, 1e-5)

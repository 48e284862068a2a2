"""Epsilon by its definition, noise by the published algorithm, both by dp-accounting."""

from __future__ import annotations

import itertools
import math
import sys
from typing import Any

import numpy as np
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


def neyman_pearson(fpr: float, p: np.ndarray, q: np.ndarray) -> float:
    """Power by definition: the points of greatest p / q that have probability fpr under q."""
    order = np.argsort(-np.log(p / q))
    return float(np.interp(fpr, np.cumsum(q[order]), np.cumsum(p[order])))


@pytest.mark.parametrize("fpr", [1e-4, 0.01, 0.3, 0.99])
@pytest.mark.parametrize(("sigma", "rounds"), [(0.7, 1), (2.0, 9), (50.0, 4)])
def test_power_of_one_gaussian_against_another(fpr: float, sigma: float, rounds: int) -> None:
    """A threshold on their sum: N(0, T sigma^2) or N(T, T sigma^2)."""
    total = scipy.stats.norm(scale=math.sqrt(rounds) * sigma)
    expected = total.sf(total.isf(fpr) - rounds)
    assert privacy.power(fpr, sigma, rounds) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("fpr", [1e-3, 0.01, 0.1, 0.5, 0.95])
@pytest.mark.parametrize(("sigma", "sampling"), [(0.5, 0.2), (1.0, 0.5), (0.8, 0.9)])
@pytest.mark.parametrize("rounds", [1, 2])
def test_power_of_sampled_rounds_is_the_better_test_on_a_grid(
    fpr: float, sigma: float, sampling: float, rounds: int
) -> None:
    """Of two rounds over the plane; one of the two tests is for the client, one against."""
    pytest.importorskip("dp_accounting")
    x = np.linspace(-8 * sigma, 1 + 8 * sigma, 100_001 if rounds == 1 else 1001)
    without = scipy.stats.norm.pdf(x, 0, sigma)
    there = (1 - sampling) * without + sampling * scipy.stats.norm.pdf(x, 1, sigma)
    if rounds == 2:
        without, there = (np.multiply.outer(each, each).ravel() for each in (without, there))
    q, p = without / without.sum(), there / there.sum()
    expected = max(neyman_pearson(fpr, p, q), neyman_pearson(fpr, q, p))
    found = privacy.power(fpr, sigma, rounds, sampling)
    assert expected * (1 - 3e-3) < found < expected * (1.003 if fpr <= 0.1 else 1.05)


def test_power_of_many_sampled_rounds_is_that_of_the_likelihood_ratio() -> None:
    """By simulation, where a grid cannot go."""
    pytest.importorskip("dp_accounting")
    rng, sigma, q, rounds, count = np.random.default_rng(0), 1.5, 0.6, 6, 400_000
    noise = sigma * rng.standard_normal((2, count, rounds))
    noise[1] += rng.random((count, rounds)) < q
    ratio = np.log1p(q * np.expm1((2 * noise - 1) / (2 * sigma**2))).sum(-1)
    for fpr in (0.01, 0.1):
        there = np.mean(ratio[1] > np.quantile(ratio[0], 1 - fpr))
        missing = np.mean(ratio[0] < np.quantile(ratio[1], fpr))
        expected = max(there, missing)
        assert privacy.power(fpr, sigma, rounds, q) == pytest.approx(expected, rel=0.02)


def test_power_grows_with_fpr_and_rounds_and_falls_with_noise() -> None:
    pytest.importorskip("dp_accounting")

    def grows(values: list[float]) -> bool:
        return all(a < b for a, b in itertools.pairwise(values))

    for q in (0.3, 1.0):
        rates = [0.0, 1e-6, 1e-3, 0.1, 0.5, 0.9, 1.0]
        found = [privacy.power(fpr, 1.0, 3, q) for fpr in rates]
        assert grows(found)
        assert found[0] == 0
        assert found[-1] == 1
        assert all(tpr >= fpr for tpr, fpr in zip(found, rates, strict=True))
        assert grows([privacy.power(0.01, 1.0, rounds, q) for rounds in (1, 4, 32)])
        assert grows([privacy.power(0.01, sigma, 4, q) for sigma in (9.0, 1.0, 0.5)])
    assert grows([privacy.power(0.01, 1.0, 4, q) for q in (0.01, 0.5, 1.0)])


def test_power_without_noise_is_that_of_seeing_who_takes_part() -> None:
    pytest.importorskip("dp_accounting")
    assert privacy.power(0.0, 0.0) == 1
    assert privacy.power(0.0, 0.0, 1, 0.25) == 0.25
    assert privacy.power(0.1, 0.0, 2, 0.5) == pytest.approx(0.75 + 0.1 * 0.25)
    assert privacy.power(0.4, 0.0, 1, 0.25) == pytest.approx(max(0.25 + 0.3, 0.4 / 0.75))
    for fpr in (0.1, 0.4):
        exact = privacy.power(fpr, 0.0, 2, 0.5)
        assert exact - 1e-9 <= privacy.power(fpr, 0.02, 2, 0.5) <= 1.1 * exact


@pytest.mark.parametrize("fpr", [-0.1, 1.1, math.nan])
def test_rates_that_are_none_are_refused(fpr: float) -> None:
    with pytest.raises(ValueError, match="fpr is a rate between 0 and 1, not"):
        privacy.power(fpr, 1.0)
    for arguments in ((-1, 1, 1), (math.inf, 1, 1), (1, 0, 1), (1, 1, 0)):
        with pytest.raises(ValueError, match=r"noise_multiplier cannot|at least one|sampling is"):
            privacy.power(0.1, *arguments)


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

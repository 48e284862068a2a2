"""Differential privacy of the Gaussian mechanism: epsilon of a noise, and the noise for an epsilon.

Clients that add noise to their updates, and shadow models trained with DP-SGD, are accounted for
alike.
"""

from __future__ import annotations

import math

import numpy as np
import scipy.optimize
import scipy.special


def epsilon(noise_multiplier: float, delta: float, rounds: int = 1, sampling: float = 1.0) -> float:
    """Return epsilon of the (epsilon, delta) differential privacy of clipped updates with noise.

    The unit is a client: neighbours differ by adding or removing one client's whole update, whose
    norm is at most `clip`. That bounds what is betrayed of all its images together; it is no
    separate bound for each, as clipping every image's gradient would give. Telling any two updates
    of a client apart (local privacy, which counts against an attacker who sees the client's own
    message) is twice the distance: ask for `noise_multiplier / 2`. BatchNorm statistics, the
    number of images and labels sent beside the update are not covered.

    Where all clients take part in every round, exact: the least epsilon with

        Phi(1 / 2s - epsilon s) - e^epsilon Phi(-1 / 2s - epsilon s) <= delta

    at s = sigma / sqrt(rounds) (analytic Gaussian mechanism, arXiv 1805.06530, Theorem 8).
    Otherwise an upper bound that is close, by dp-accounting's PLD accountant.

    Args:
      noise_multiplier: sigma; 0 gives an infinite epsilon, unless it is no more probable than delta
        that the client takes part at all.
      delta: probability, between 0 and 1.
      rounds: how many updates a client may have sent.
      sampling: probability that a client takes part in a round (Poisson sampling). Counts only
        against those who see sums over clients and not who took part.

    Raises:
      ImportError: sampling below 1 without dp-accounting (the `privacy` extra).
    """
    _check(delta, rounds, sampling)
    if not 0 <= noise_multiplier < math.inf:
        raise ValueError(f"noise_multiplier cannot be {noise_multiplier}")
    if noise_multiplier == 0:
        return 0.0 if _rarely(delta, rounds, sampling) else math.inf
    if sampling < 1:
        return _sampled(noise_multiplier, delta, rounds, sampling)
    s = noise_multiplier / math.sqrt(rounds)
    if _gaussian_delta(0, s) <= delta:
        return 0.0
    most = 1 / (2 * s * s) + math.sqrt(-2 * math.log(delta)) / s
    return float(scipy.optimize.brentq(lambda e: _gaussian_delta(e, s) - delta, 0, most))


def calibrated_noise(target: float, delta: float, rounds: int = 1, sampling: float = 1.0) -> float:
    """Return the least noise multiplier with which `epsilon` is at most the target.

    Args:
      target: above 0; infinity needs no noise.
      delta, rounds, sampling: as for `epsilon`.

    Raises:
      ImportError: sampling below 1 without dp-accounting (the `privacy` extra).
      ValueError: an epsilon below what the accountant resolves.
    """
    _check(delta, rounds, sampling)
    if not target > 0:
        raise ValueError(f"epsilon must be positive, not {target}")
    if target == math.inf or _rarely(delta, rounds, sampling):
        return 0.0
    # Enough without sampling, which never costs privacy; twice, since the accountant rounds up.
    tail = math.sqrt(-2 * math.log(delta))
    most = math.sqrt(rounds) * (tail + math.sqrt(tail**2 + 2 * target)) / target

    def excess(noise_multiplier: float) -> float:
        return epsilon(noise_multiplier, delta, rounds, sampling) - target

    if excess(most) > 0:
        raise ValueError(f"epsilon {target:g} at delta {delta:g} is too small to account for")
    while excess(least := most / 2) <= 0:
        most = least
    tolerance = 1e-6
    found = scipy.optimize.brentq(excess, least, most, rtol=tolerance)
    return float(found * (1 + tolerance))


def _check(delta: float, rounds: int, sampling: float) -> None:
    if not 0 < delta < 1:
        raise ValueError(f"delta is a probability between 0 and 1, not {delta}")
    if rounds < 1:
        raise ValueError(f"there is at least one round, not {rounds}")
    if not 0 < sampling <= 1:
        raise ValueError(f"sampling is a probability above 0 and up to 1, not {sampling}")


def _rarely(delta: float, rounds: int, sampling: float) -> bool:
    """Whether a client takes part in any round with probability delta at most."""
    return 1 - (1 - sampling) ** rounds <= delta


def _gaussian_delta(epsilon: float, s: float) -> float:
    """The least delta of one Gaussian mechanism of noise multiplier s."""
    shift = 1 / (2 * s)
    ahead = scipy.special.ndtr(shift - epsilon * s)
    return float(ahead - np.exp(epsilon + scipy.special.log_ndtr(-shift - epsilon * s)))


def _sampled(noise_multiplier: float, delta: float, rounds: int, sampling: float) -> float:
    try:
        import dp_accounting
        from dp_accounting import pld
    except ImportError as error:
        raise ImportError(
            "privacy with sampling needs dp-accounting: pip install 'jinv[privacy]'"
        ) from error
    # The privacy loss of a round is tabulated. Its range grows with 1 / sigma^2: with a fixed
    # interval little noise would take all memory.
    reach = 1 / (2 * noise_multiplier**2) + 8 / noise_multiplier
    accountant = pld.PLDAccountant(value_discretization_interval=max(1e-4, reach / 20_000))
    one = dp_accounting.PoissonSampledDpEvent(
        sampling, dp_accounting.GaussianDpEvent(noise_multiplier)
    )
    accountant.compose(dp_accounting.SelfComposedDpEvent(one, rounds))
    return float(accountant.get_epsilon(delta))

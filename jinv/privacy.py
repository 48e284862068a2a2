"""Differential privacy of the Gaussian mechanism: epsilon of a noise, the noise for an epsilon, and
what noise leaves to the best test.

Clients that add noise to their updates, and shadow models trained with DP-SGD, are accounted for
alike.
"""

from __future__ import annotations

import functools
import math
from typing import Any

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
    _check_delta(delta)
    _check(rounds, sampling)
    _check_noise(noise_multiplier)
    if noise_multiplier == 0:
        return 0.0 if _rarely(delta, rounds, sampling) else math.inf
    if sampling < 1:
        return float(_accountant(noise_multiplier, rounds, sampling).get_epsilon(delta))
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
    _check_delta(delta)
    _check(rounds, sampling)
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


def power(fpr: float, noise_multiplier: float, rounds: int = 1, sampling: float = 1.0) -> float:
    """Return the largest true positive rate of any test for a client, at a false positive rate.

    The test sees every noisy sum, knows all other updates, and tells whether the client's counts
    among them, or whether it does not: the worse for the client of the two. So no attack on the
    client does better, whatever it knows; and who would have guessed a client's image, to a given
    error, with probability `fpr` before, reconstructs it with at most this probability
    (arXiv 2302.07225, 2307.03928).

    Where all clients take part in every round, exact, with the normal distribution function:

        Phi(Phi^-1(fpr) + sqrt(rounds) / sigma)

    Otherwise an upper bound: the least of e^epsilon fpr + delta(epsilon) over all epsilon, of
    either sign, with the delta of dp-accounting's PLD accountant. It is close to the better test
    at an fpr of at most 0.1; above, or with hardly any noise, it may exceed it by a tenth.

    Args:
      fpr: between 0 and 1.
      noise_multiplier, rounds, sampling: as for `epsilon`.

    Raises:
      ImportError: sampling below 1 without dp-accounting (the `privacy` extra).
      ValueError: numbers out of range.
    """
    _check(rounds, sampling)
    _check_noise(noise_multiplier)
    if not 0 <= fpr <= 1:
        raise ValueError(f"fpr is a rate between 0 and 1, not {fpr}")
    if noise_multiplier == 0:
        never = (1 - sampling) ** rounds  # leaves no trace, anything else is certain
        return float(max(1 - never * (1 - fpr), min(fpr / never, 1) if never else 1))
    if fpr in (0, 1):
        return float(fpr)
    if sampling == 1:
        shift = math.sqrt(rounds) / noise_multiplier
        return float(scipy.special.ndtr(scipy.special.ndtri(fpr) + shift))
    accountant = _accountant(noise_multiplier, rounds, sampling)
    # The best test asks for a ratio of probabilities of e^epsilon, and so
    # e^epsilon fpr <= tpr <= 1 and 1 - tpr <= e^epsilon (1 - fpr): further down is nothing to win.
    found = scipy.optimize.minimize_scalar(
        lambda e: math.exp(e) * fpr + accountant.get_delta(e),
        bounds=(-20, -math.log(fpr)),
        method="bounded",
    )
    return float(min(found.fun, 1))


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ValueError(f"delta is a probability between 0 and 1, not {delta}")


def _check_noise(noise_multiplier: float) -> None:
    if not 0 <= noise_multiplier < math.inf:
        raise ValueError(f"noise_multiplier cannot be {noise_multiplier}")


def _check(rounds: int, sampling: float) -> None:
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


@functools.lru_cache(8)
def _accountant(noise_multiplier: float, rounds: int, sampling: float) -> Any:
    """Return dp-accounting's, of all rounds."""
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
    return accountant

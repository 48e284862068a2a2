"""What DP-SGD of shadow models promises: epsilon of a noise, the noise for an epsilon, and a bound
on every attack.

The weights M(S) of a training set S are (epsilon, delta)-differentially private if for every set A
of weights

    P(M(S) in A) <= e^epsilon P(M(S') in A) + delta

whenever S and S' differ by adding or removing one example. `epsilon` is the least such number for T
compositions of the Gaussian mechanism of noise multiplier sigma on a Poisson sample of rate q. It
bounds one who has seen all T noisy gradients; the attacker of shadow models sees the last weights
only. Both directions count: q near 1 makes them differ much.

Accounting is by privacy loss distributions (arXiv 2106.08567, 2207.04380), rounded against us: it
is tight, as is Opacus' PRV accountant (arXiv 2106.02848), and they agree to four digits.

The epsilons of arXiv 2505.14323, Poisson sampling with q = 1 - 1/N, one step an epoch, are not
those of what it describes, which are up to 1.57 times as large. All are within 1.1 % of those of
q = 1/2 and two steps an epoch. That is what Opacus would make of batches of N - 1: its sampling
rate is one over the number of batches an epoch. To train for the published epsilon in this way,
double `Config.epochs` and set `Privacy.sampling` to 0.5.
"""

from __future__ import annotations

import dataclasses
import math

from jinv import privacy as accounting
from jinv.shadow.config import Config, Privacy


def epsilon(privacy: Privacy, examples: int, steps: int, delta: float | None = None) -> float:
    """epsilon of (epsilon, delta) differential privacy of one shadow model, an upper bound.

    Args:
      privacy: sigma and q; no noise gives infinity, infinite noise 0.
      examples: N.
      steps: T, `Config.steps`.
      delta: a probability between 0 and 1; None for N^-1.1, the paper's.

    Raises:
      ImportError: q below 1 without dp-accounting (the `privacy` extra).
      ValueError: a `target_epsilon` whose noise is not known yet, see `resolved`.
    """
    sigma, delta = privacy.sigma, _delta(examples, delta)
    q = privacy.probability(examples)
    if sigma == math.inf:
        return 0.0
    return accounting.epsilon(sigma, delta, steps, q)


def calibrate(
    target_epsilon: float,
    examples: int,
    steps: int,
    sampling: float | None = None,
    delta: float | None = None,
) -> float:
    """The least noise multiplier with which `epsilon` is at most the target, within 1e-5 of it.

    Args:
      target_epsilon: above 0; infinity gives no noise.
      examples: N.
      steps: T.
      sampling: q; None for 1 - 1/N, the paper's.
      delta: as for `epsilon`.

    Raises:
      ImportError: q below 1 without dp-accounting (the `privacy` extra).
      ValueError: no noise has that epsilon.
    """
    q = Privacy(None, 1.0, sampling, target_epsilon).probability(examples)
    return accounting.calibrated_noise(target_epsilon, _delta(examples, delta), steps, q)


def power(fpr: float, privacy: Privacy | None, examples: int, steps: int) -> float:
    """Return what no attack on an example of a shadow model exceeds: see `jinv.privacy.power`.

    Args:
      fpr: false positive rate of a membership test; or the probability to guess the example, to a
        given error, without the model. Then the bound is that of a reconstruction to this error.
      privacy: sigma and q; without it, or without noise, nothing is promised.
      examples: N.
      steps: T, `Config.steps`.

    Raises:
      ImportError: q below 1 without dp-accounting (the `privacy` extra).
      ValueError: a `target_epsilon` whose noise is not known yet, see `resolved`.
    """
    if privacy is None:
        return 1.0
    if privacy.sigma == math.inf:
        return fpr
    return accounting.power(fpr, privacy.sigma, steps, privacy.probability(examples))


def resolved(config: Config, examples: int, delta: float | None = None) -> Config:
    """The config with noise in place of `target_epsilon`; unchanged if there is none.

    Takes seconds. Call it once, before `make_train`.

    Args:
      config: of the training.
      examples: N.
      delta: as for `epsilon`.
    """
    privacy = config.privacy
    if privacy is None or privacy.target_epsilon is None:
        return config
    sigma = calibrate(
        privacy.target_epsilon, examples, config.steps(examples), privacy.sampling, delta
    )
    found = dataclasses.replace(privacy, noise_multiplier=sigma, target_epsilon=None)
    return dataclasses.replace(config, privacy=found)


def usual_delta(examples: int) -> float:
    """N^-1.1, the paper's delta for N examples."""
    return examples**-1.1


def _delta(examples: int, delta: float | None) -> float:
    if examples < 2:
        raise ValueError(f"privacy is accounted for at least 2 examples, not {examples}")
    return usual_delta(examples) if delta is None else delta

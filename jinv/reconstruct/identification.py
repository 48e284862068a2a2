"""Which of given candidates a head was trained on: membership inference on recovered features.

The sum y of a class's n recovered examples is their true sum but for N(0, V). If a candidate x is
one of them, y - x is the sum of n - 1 others; if it is not, y is that of n. A score is the
logarithm of the two densities' ratio, feature by feature:

    score(x) = sum_d log p_{n-1}(y_d - x_d) - log p_n(y_d)

where p_n is the density of the sum of n examples of the class and the error. It is 0 in all with
the probability that n features are, else normal with the class's mean and variance. Features of an
image are not independent, so that scores order candidates, but are no odds.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.scipy.stats import norm

from jinv.reconstruct.recovery import Prior, Recovered

_LEAST = 0.01
"""Of a feature's variance, that is taken to be unknown besides."""


def scores(
    recovered: Recovered, labels: np.ndarray, candidates: np.ndarray, prior: Prior
) -> np.ndarray:
    """Return (S, C, M) how much speaks for each candidate being in each class of each head.

    The score of a candidate of class c is [:, c]; of one whose class is not known, the largest.
    Classes of which a head has no example have -inf.

    Args:
      recovered: of S heads.
      labels: (N,) of their examples.
      candidates: (M, D) features by the same network.
      prior: with which the features were recovered.

    Raises:
      ValueError: the candidates are not (M, D), or not finite.
    """
    candidates = np.asarray(candidates, np.float32)
    if candidates.ndim != 2 or candidates.shape[1] != prior.means.shape[1] or not len(candidates):
        raise ValueError(f"candidates {candidates.shape} are not (M, {prior.means.shape[1]})")
    if not np.isfinite(candidates).all():
        raise ValueError("candidates are not all finite")
    counts = (np.asarray(labels) == np.arange(prior.classes)[:, None]).sum(1)
    found = np.full((len(recovered.means), prior.classes, len(candidates)), -np.inf, np.float32)
    placed = jnp.asarray(candidates)
    for c in np.flatnonzero(counts):
        zeros = None if prior.zeros is None else prior.zeros[c]
        own = (prior.means[c], prior.variances[c], zeros, placed)
        for head, means, variances in zip(
            found, recovered.means, recovered.mean_variances, strict=True
        ):
            head[c] = _of_class(int(counts[c]), means[c], variances[c], *own)
    return found


@functools.partial(jax.jit, static_argnums=0)
def _of_class(
    count: int,
    average: Array,
    error: Array,
    mean: Array,
    variance: Array,
    zero: Array | None,
    candidates: Array,
) -> Array:
    """(M,) scores in one class of one head."""
    # What is thought to be exact seldom is: a share of the spread stays unknown.
    error = count**2 * (error + _LEAST * variance)
    total = count * average

    def density(value: Array, others: int) -> Array:
        exact = norm.logpdf(value, 0, jnp.sqrt(error))
        if others == 0:
            return exact
        centre, square = others * mean, others * variance
        if zero is None:
            return norm.logpdf(value, centre, jnp.sqrt(square + error))
        none = zero**others
        positive = centre / (1 - none)
        spread = (square + centre**2) / (1 - none) - positive**2
        spread = jnp.maximum(spread, 1e-3 * square) + error
        rest = norm.logpdf(value, positive, jnp.sqrt(spread))
        return jnp.logaddexp(jnp.log(none) + exact, jnp.log1p(-none) + rest)

    alone = density(total, count).sum()
    return lax.map(
        lambda x: density(total - x, count - 1).sum() - alone, candidates, batch_size=256
    )


def ranks(found: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Return (S, N) how many candidates of all score higher than the true ones: 0 is best.

    Args:
      found: (S, N, M) scores, those of the class of each example.
      true: (S, N) positions of the examples among the candidates.
    """
    own = np.take_along_axis(found, true[:, :, None], 2)
    return (found > own).sum(2)

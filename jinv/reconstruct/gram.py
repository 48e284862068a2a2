"""From a head's weights to the Gram matrix of its training examples, and what the weights made of
each example.

A softmax head trained by full-batch SGD on features X (N, D) from W_0 ~ N(0, std^2) ends at

    W = c W_0 + A' X,        A = A(G, P), b = b(G, P) with G = X X', P = X W_0'

(`jinv.shadow.rowspace`): training depends on N x N numbers only. With G = L L' and P = std L Z,
where Z (N, C) is standard normal, B = A' L + c std Z' is what W is inside the span of X, and

    W W' = B B' + s^2 (D - N) I + noise of standard deviation s^2 sqrt((D - N) (1 + [i = j]))

with s = c std. All rows of A sum to 0, so that the mean of W's rows is c times that of W_0's and
says nothing of X. Known are therefore (C - 1) C / 2 numbers of W W' and C - 1 of b; unknown are L,
whose distribution the attacker knows from images of the same kind, and Z.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jinv.shadow import heads
from jinv.shadow.config import sgd
from jinv.shadow.rowspace import Moved, simulate

_FLOOR = 3e-5
"""Relative error of the known numbers beside their noise, when a fit ends."""
_TOLERANCE = 3e-4
"""Relative error of the known numbers that an explanation may leave."""
_ROUNDING = 3e-7
"""Of W W', relative to its largest eigenvalue, after a training in float32."""
_LARGEST = 0.3
"""Relative error that the known numbers are given at first, so that the start is good enough."""
_SHARES = np.array([1.0, 0.5, 0.25, 0.1, 0.03, 0.0])
"""Of a Gauss-Newton step, of which the best is taken ..."""
_FACTORS = np.array([0.2, 0.7, 1.0, 1.0, 1.0, 3.0])
"""... and what becomes of the relative error then."""
STEPS = 16
"""Gauss-Newton steps at most, from one start."""
NEAREST = 3
"""Further starts of heads that have not been explained well from the first."""
_DRAWS = 1000
"""Sets that tell how Gram matrices are distributed, at least."""


class Settings(NamedTuple):
    """Hyper-parameters that may be traced, as in `jinv.shadow.Config`."""

    lr: Any
    weight_decay: Any
    init_std: Any


class GramPrior(NamedTuple):
    """How Cholesky factors L of Gram matrices are distributed: mean + root @ N(0, I).

    Attributes:
      mean: (P,) the N (N + 1) / 2 numbers of L, row by row.
      root: (P, P).
      draws: (K, P) what L of K training sets is: mean + root @ draw.
      normal: (K, N, C) standard normal numbers that go with them: Z.
    """

    mean: np.ndarray
    root: np.ndarray
    draws: np.ndarray
    normal: np.ndarray


class Fit(NamedTuple):
    """What explains a head's weights best.

    Attributes:
      rows: A (N, C).
      cholesky: L (N, N).
      noise: () s, standard deviation of what is left of the initial weights.
      squares: () squared residuals and deviations from the prior, each in standard deviations.
      residual: () squared residuals alone.
      loss: () mean loss after training.
      covariance: (C (C - 1), C (C - 1)) of each class's sum of A's rows, along contrasts of
        outputs, as linearised at the solution; empty for N <= C, where it is small.
    """

    rows: Array
    cholesky: Array
    noise: Array
    squares: Array
    residual: Array
    loss: Array
    covariance: Array


def known(classes: int) -> int:
    """Return how many numbers of W W' and b say something of X."""
    return (classes - 1) * classes // 2 + classes - 1


def gram_prior(
    features: np.ndarray,
    labels: np.ndarray,
    wanted: np.ndarray,
    classes: int,
    seed: int = 0,
) -> GramPrior:
    """Return how Gram matrices of training sets are distributed, from sets drawn at random.

    Args:
      features: (M, D) the attacker's own.
      labels: (M,) theirs.
      wanted: (N,) labels of a training set.
      classes: C.
      seed: of the draws.
    """
    size = len(wanted) * (len(wanted) + 1) // 2
    rng = np.random.default_rng(seed)
    draws = max(_DRAWS, 2 * size)
    chosen = np.empty((draws, len(wanted)), np.intp)
    for label in np.unique(wanted):
        (places,), (members,) = np.nonzero(wanted == label), np.nonzero(labels == label)
        order = rng.random((draws, len(members))).argpartition(len(places) - 1, 1)
        chosen[:, places] = members[order[:, : len(places)]]
    triangle = np.tril_indices(len(wanted))
    found = np.empty((draws, size))
    for row, positions in zip(found, chosen, strict=True):
        x = np.asarray(features[positions], np.float64)
        gram = x @ x.T
        gram += 1e-9 * np.trace(gram) * np.eye(len(gram))
        row[:] = np.linalg.cholesky(gram)[triangle]
    covariance = np.atleast_2d(np.cov(found.T))
    # Fewer draws than numbers leave directions that never vary: they vary as the numbers alone do.
    share = size / (size + draws)
    covariance = (1 - share) * covariance + share * np.diag(np.diagonal(covariance))
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(np.maximum(values, 1e-10 * values[-1]))
    mean = found.mean(0)
    normal = rng.standard_normal((draws, len(wanted), classes))
    return GramPrior(mean, root, np.linalg.solve(root, (found - mean).T).T, normal)


def make_starts(steps: int, momentum: float) -> Callable[..., Array]:
    """Return the function that says where fits begin: to be compiled, in float64.

    (weights (S, C, D), bias (S, C), settings, labels, prior) -> (S, 1 + nearest, P). Training is
    simulated on the prior's draws. The first start is what a linear regression on these makes of
    W W' and b; the others are the draws that are most like it.

    Args:
      steps: of the training.
      momentum: its momentum.
    """

    def starts(
        weights: Array, bias: Array, settings: Settings, labels: Array, prior: GramPrior
    ) -> Array:
        classes, width = weights.shape[1:]
        examples = len(labels)
        contrasts = jnp.asarray(contrasts_of(classes))
        below, diagonal = np.tril_indices(classes - 1), np.arange(classes - 1)

        def seen(scattered: Array, bias: Array) -> Array:
            root = jnp.linalg.cholesky(contrasts.T @ scattered @ contrasts)
            root = root.at[diagonal, diagonal].set(jnp.log(root[diagonal, diagonal]))
            return jnp.append(root[below], contrasts.T @ bias)

        def of_draw(draw: Array, normal: Array) -> Array:
            cholesky = _cholesky(prior, draw, examples)
            moved, inside = _trained(settings, momentum, steps, labels, cholesky, normal)
            left = jnp.square(moved.kept * settings.init_std) * (width - examples)
            return seen(inside @ inside.T + left * jnp.eye(classes), moved.others["bias"])

        drawn = jax.vmap(of_draw)(jnp.asarray(prior.draws), jnp.asarray(prior.normal))
        usable = jnp.isfinite(drawn).all(1, keepdims=True)
        weights = after(weights, jnp.where(usable, drawn, 0))
        found = jax.vmap(lambda w, b: seen(w @ w.T, b))(weights, bias)
        count = usable.sum()
        mean = jnp.where(usable, drawn, 0).sum(0) / count
        scale = jnp.sqrt(jnp.where(usable, jnp.square(drawn - mean), 0).sum(0) / count)
        drawn = jnp.where(usable, (drawn - mean) / scale, 0)
        # A head unlike all draws is moved to their edge: a regression knows nothing beyond.
        found = jnp.clip(jnp.nan_to_num((found - mean) / scale), -4, 4)
        normal = drawn.T @ drawn + 1e-2 * count * jnp.eye(drawn.shape[1])
        regressed = found @ jnp.linalg.solve(normal, drawn.T @ prior.draws)
        distance = jnp.square(drawn).sum(1) - 2 * found @ drawn.T
        distance = jnp.where(usable[:, 0], distance, jnp.inf)
        nearest = lax.top_k(-distance, NEAREST)[1]
        return jnp.concatenate([regressed[:, None], prior.draws[nearest]], 1)

    return starts


def make_fit(steps: int, momentum: float) -> Callable[..., Fit]:
    """Return the function that fits one head: to be vmapped and compiled, in float64.

    (weights (C, D), bias (C,), settings, labels (N,), prior, start) -> Fit. It minimises the
    squares of residuals and of deviations from the prior, by Gauss-Newton steps in the space of
    the known numbers, which are fewer. They are made exact step by step: with their small noise at
    once, the first step would lead far away.

    Args:
      steps: of the training.
      momentum: its momentum.
    """

    def fit(
        weights: Array,
        bias: Array,
        settings: Settings,
        labels: Array,
        prior: GramPrior,
        start: Array,
    ) -> Fit:
        classes, width = weights.shape
        examples = len(labels)
        size = prior.root.shape[1]
        above = np.triu_indices(classes - 1)

        contrasts = jnp.asarray(contrasts_of(classes))

        def split(unknown: Array) -> tuple[Array, Array]:
            normal = unknown[size:].reshape(examples, classes - 1) @ contrasts.T
            return _cholesky(prior, unknown[:size], examples), normal

        def trained(unknown: Array) -> tuple[Moved, Array]:
            return _trained(settings, momentum, steps, labels, *split(unknown))

        noise = trained(start)[0].kept * settings.init_std
        left = noise**2 * (width - examples)
        values, vectors = jnp.linalg.eigh(contrasts.T @ (weights @ weights.T) @ contrasts)
        axes = contrasts @ vectors  # in which products are of independent sizes
        sizes = jnp.sqrt(jnp.maximum(values, noise**2 * width))
        scattered = axes.T @ weights @ weights.T @ axes - left * jnp.eye(classes - 1)
        numbers = scattered[above], contrasts.T @ bias
        scales = (
            (sizes[:, None] * sizes)[above],
            jnp.full(classes - 1, jnp.sqrt(jnp.square(bias).mean())),
        )
        deviations = (
            jnp.hypot(
                noise**2 * jnp.sqrt((width - examples) * (1.0 + (above[0] == above[1]))),
                _ROUNDING * values[-1],
            ),
            jnp.zeros(classes - 1),
        )
        measured, scale, deviation = map(jnp.concatenate, (numbers, scales, deviations))

        def expected(unknown: Array) -> Array:
            moved, inside = trained(unknown)
            inside = axes.T @ inside
            return jnp.append((inside @ inside.T)[above], contrasts.T @ moved.others["bias"])

        def linearised(unknown: Array) -> tuple[Array, Array]:
            value, pull = jax.vjp(expected, unknown)
            (rows,) = jax.vmap(pull)(jnp.eye(len(measured)))
            return value, rows

        def sigma(error: Array) -> Array:
            return jnp.hypot(deviation, (error + _FLOOR) * scale)

        def squares(unknown: Array, value: Array, error: Array) -> Array:
            return jnp.square((measured - value) / sigma(error)).sum() + jnp.square(unknown).sum()

        def unfinished(carry: tuple) -> Array:
            _, _, _, error, gain, count = carry
            return (count < STEPS) & ((error > _FLOOR) | (gain > 0.2))

        def step(carry: tuple) -> tuple:
            unknown, value, rows, error, _, count = carry
            sigmas = sigma(error)
            rows = rows / sigmas[:, None]
            residual = (measured - value) / sigmas + rows @ unknown
            normal = rows @ rows.T + jnp.eye(len(rows))
            full = rows.T @ jax.scipy.linalg.solve(normal, residual, assume_a="pos")
            tried = unknown + jnp.asarray(_SHARES)[:, None] * (full - unknown)
            found = jax.vmap(squares, (0, 0, None))(tried, jax.vmap(expected)(tried), error)
            best = jnp.nanargmin(jnp.where(jnp.isfinite(found), found, jnp.inf))
            best = jnp.where(jnp.isfinite(found[best]), best, len(_SHARES) - 1)
            taken = tried[best]
            error = error * jnp.asarray(_FACTORS)[best]
            return taken, *linearised(taken), error, found[-1] - found[best], count + 1

        def spread(unknown: Array) -> Array:
            member = jnp.asarray(labels == jnp.arange(classes)[:, None], unknown.dtype)

            def sums(unknown: Array) -> Array:
                return (member @ trained(unknown)[0].rows @ contrasts).ravel()

            (own,) = jax.vmap(jax.vjp(sums, unknown)[1])(jnp.eye(classes * (classes - 1)))
            rows = linearised(unknown)[1] / sigma(jnp.asarray(_TOLERANCE))[:, None]
            normal, across = rows @ rows.T + jnp.eye(len(rows)), rows @ own.T
            solved = jax.scipy.linalg.solve(normal, across, assume_a="pos")
            return own @ own.T - across.T @ solved

        carry = (start, *linearised(start), jnp.asarray(_LARGEST), jnp.asarray(jnp.inf), 0)
        unknown, value, *_ = lax.while_loop(unfinished, step, carry)
        moved, _ = trained(unknown)
        total = squares(unknown, value, jnp.asarray(_TOLERANCE))
        alone = total - jnp.square(unknown).sum()
        covariance = jnp.zeros((0, 0)) if examples <= classes else spread(unknown)
        return Fit(moved.rows, split(unknown)[0], noise, total, alone, moved.loss, covariance)

    return fit


def after(x: Array, other: Array) -> Array:
    """Return x, but not before `other` is there.

    On CPUs jaxlib's decompositions of many matrices share their work among XLA's threads and wait
    for it, on such a thread themselves: as many at once as there are threads wait forever. So there
    must be one after the other.
    """
    return x + 0 * other.sum()


def _cholesky(prior: GramPrior, unknown: Array, examples: int) -> Array:
    lower = prior.mean + prior.root @ unknown
    return jnp.zeros((examples, examples)).at[np.tril_indices(examples)].set(lower)


def _trained(
    settings: Settings, momentum: float, steps: int, labels: Array, cholesky: Array, normal: Array
) -> tuple[Moved, Array]:
    """Training from L and Z; and B (C, N), the weights inside the span of X."""
    head = heads.linear(normal.shape[1], 0.0)
    optimizer = sgd(settings.lr, momentum, settings.weight_decay)
    share = jnp.ones((steps, len(cholesky)), cholesky.dtype)
    gram, projected = cholesky @ cholesky.T, settings.init_std * cholesky @ normal
    others = {"bias": jnp.zeros(normal.shape[1])}
    moved = simulate(head, optimizer, share, others, gram, projected, labels)
    return moved, moved.rows.T @ cholesky + moved.kept * settings.init_std * normal.T


def contrasts_of(classes: int) -> np.ndarray:
    """Return (C, C - 1) orthonormal columns that sum to 0."""
    centred = np.eye(classes) - 1 / classes
    return np.linalg.svd(centred)[0][:, : classes - 1]

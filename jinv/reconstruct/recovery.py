"""Exact recovery: the features that a linear head was trained on, from its weights alone.

No shadow models are trained. The weights are W = c W_0 + A' X, and `jinv.reconstruct.gram` finds A
(N, C). What is left is linear: X given W and A. The attacker's own features give its prior, means M
of the classes and one covariance Q diag(l) Q' within them. With A' = U S V' and s, the deviation of
c W_0, the posterior mean is

    X = M + V Z Q',        Z = (U' (W - A' M) Q) * S l / (S^2 l + s^2)

A has rank C - 1: along one vector of the N examples (nearly their mean) nothing is known, and for
N > C along more: the examples of a class are told apart by the prior alone, their mean is not.
Where features are exactly 0 now and then, as after a ReLU, the classes' means are: of all their
shifts along the unknown vector, those are likely that make some 0 and none negative.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.special import log_ndtr

from jinv.reconstruct import gram
from jinv.reconstruct.gram import Fit, GramPrior, Settings
from jinv.shadow.config import Config, sgd
from jinv.shadow.rowspace import orthogonal_scale

CHUNK = 16
"""Heads at once."""


@dataclasses.dataclass(frozen=True, eq=False)
class Prior:
    """What an attacker knows of features: those of images of the same kind.

    Attributes:
      features: (M, D) the attacker's own.
      labels: (M,) theirs.
      means: (C, D) of the classes.
      scales: (C,) variance within a class, relative to all classes'.
      spread: (D,) l, variances within classes along the columns of Q.
      basis: (D, D) Q, orthonormal.
      zeros: (C, D) share of features that are exactly 0; None if features may be negative.
    """

    features: np.ndarray
    labels: np.ndarray
    means: np.ndarray
    scales: np.ndarray
    spread: np.ndarray
    basis: np.ndarray
    zeros: np.ndarray | None

    @classmethod
    def of(cls, features: np.ndarray, labels: np.ndarray, classes: int) -> Prior:
        """Return the prior that an attacker's own features give.

        Args:
          features: (M, D), finite.
          labels: (M,) from 0 to classes - 1, at least four of each.
          classes: C.

        Raises:
          ValueError: they are not so.
        """
        features, labels = np.asarray(features, np.float32), np.asarray(labels)
        if features.ndim != 2 or labels.shape != features.shape[:1]:
            raise ValueError(
                f"features {features.shape} and labels {labels.shape} are not (M, D) and (M,)"
            )
        if not np.isfinite(features).all():
            raise ValueError("the attacker's features are not all finite")
        counts = np.array([(labels == c).sum() for c in range(classes)])
        if counts.sum() != len(labels) or counts.min() < 4:
            raise ValueError(
                f"the attacker's images need labels from 0 to {classes - 1}, at least four of "
                f"each: there are {counts.tolist()}, and {len(labels) - counts.sum()} others"
            )
        means = np.stack([features[labels == c].mean(0, dtype=np.float64) for c in range(classes)])
        left = (features - means[labels]).astype(np.float64)
        # Variances along the axes of one half's covariance, measured on the other half: where
        # images are few, those of their own half would be too large and too small.
        order = np.random.default_rng(0).permutation(len(left))
        first, second = left[order[::2]], left[order[1::2]]
        basis = np.linalg.eigh(first.T @ first)[1]
        spread = np.square(second @ basis).mean(0)
        total = np.square(left).mean(0).sum()
        if not total:
            raise ValueError("the attacker's features do not vary within any class")
        spread = np.maximum(spread, 1e-6 * total / len(spread))
        scales = np.array([np.square(left[labels == c]).mean(0).sum() for c in range(classes)])
        zeros = None
        if features.min() >= 0:
            zero = np.stack([(features[labels == c] == 0).sum(0) for c in range(classes)])
            zeros = (zero + 0.5) / (counts[:, None] + 1)
        return cls(
            features,
            labels,
            means.astype(np.float32),
            np.maximum(scales / total, 1e-3).astype(np.float32),
            spread.astype(np.float32),
            basis.astype(np.float32),
            None if zeros is None else zeros.astype(np.float32),
        )

    @property
    def classes(self) -> int:
        """C."""
        return len(self.means)

    def gram(self, labels: np.ndarray) -> GramPrior:
        """Return how Gram matrices of training sets with these labels are distributed."""
        key = tuple(np.asarray(labels).tolist())
        if key not in self._grams:
            found = gram.gram_prior(self.features, self.labels, np.asarray(labels), self.classes)
            self._grams[key] = found
        return self._grams[key]

    @functools.cached_property
    def _grams(self) -> dict[tuple[int, ...], GramPrior]:
        return {}

    @functools.cached_property
    def variances(self) -> np.ndarray:
        """(C, D) of single features within a class."""
        return self.scales[:, None] * (np.square(self.basis) @ self.spread)


class Recovered(NamedTuple):
    """The training examples of S heads. A batch of NumPy arrays.

    Attributes:
      features: (S, N, D) their posterior means.
      variances: (S, N, D) theirs.
      means: (S, C, D) of the classes' examples: what is known for N > C, too.
      mean_variances: (S, C, D) theirs.
      error: (S, N) expected norm of a feature's error, relative to that of the class mean: 0
        perfect, 1 no better.
      misfit: (S,) by how many standard deviations weights and bias are less likely than those of
        such a training.
      noise: (S,) the mean square of what no example moves, relative to what the initial weights
        leave: 1, but for sqrt(2 / D).
      loss: (S,) mean loss on the training set, to be compared with the true one if that is known.
    """

    features: np.ndarray
    variances: np.ndarray
    means: np.ndarray
    mean_variances: np.ndarray
    error: np.ndarray
    misfit: np.ndarray
    noise: np.ndarray
    loss: np.ndarray

    @property
    def believable(self) -> np.ndarray:
        """(S,) whether the weights are those of such a training."""
        return np.array([not reason for reason in self.doubts()])

    def doubts(self) -> list[str]:
        """Return for every head why its examples are not to be believed, "" if they are."""
        width = self.features.shape[-1]
        unit = 2 / (9 * width)  # Wilson and Hilferty: the cube root is normal
        found = []
        for misfit, noise in zip(self.misfit, self.noise, strict=True):
            if not abs(np.cbrt(noise) - (1 - unit)) < NOISE_SIGMAS * np.sqrt(unit):
                found.append(
                    f"what no example moves is {np.sqrt(noise):.3g} times what init_std and "
                    "weight_decay leave: they are others, noise was added (DP), or it was not SGD"
                )
            elif not misfit < MISFIT_SIGMAS:
                found.append(
                    f"weights and bias are {misfit:.3g} standard deviations from what such a "
                    "training makes of such features: lr, epochs, momentum, labels or the "
                    "features' network are others"
                )
            else:
                found.append("")
        return found


_DOUBTS = np.array([0, 0.003, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32])
"""Errors of A, relative to its numbers' root mean square, of which the likeliest is taken."""
MISFIT_SIGMAS = 15.0
"""More are not believed. Real features are not normal: of 64 heads the largest had 2.5 to 13."""
NOISE_SIGMAS = 6.0
"""As far may the part that no example moves be from what is expected."""


def unrecoverable(config: Config, examples: int) -> str:
    """Return why heads of this training cannot be read exactly, "" if they can."""
    if config.head != "linear":
        return (
            "the units of a hidden layer that an example moves are those that the unknown initial "
            "weights make active for it, so that A does not follow from the Gram matrix; use a "
            "linear head (two classes for a binary one) or a learned attack"
        )
    if config.classes < 2:
        return "a head of one class learns nothing"
    if config.optimizer != "sgd":
        return (
            "Adam divides every coordinate by its own size: weights leave the span of the "
            "features; use a learned attack"
        )
    if config.privacy is not None:
        return (
            "DP-SGD's noise and sampling drive the training, so that A does not follow from the "
            "Gram matrix; use a learned attack"
        )
    if config.batch is not None and config.batch < examples:
        return "the order of the mini-batches is not known; only full batches can be read"
    return ""


def recover(
    weights: np.ndarray,
    bias: np.ndarray,
    config: Config,
    labels: np.ndarray,
    prior: Prior,
    *,
    chunk: int = CHUNK,
) -> Recovered:
    """Read the training examples of linear heads from their weights.

    For N <= C with labels all different every example is known but for one vector, see above. For
    several examples a class only their mean is; in which order they are then says nothing.

    Args:
      weights: (S, C, D) after training.
      bias: (S, C).
      config: how they were trained.
      labels: (N,) of each head's training set, the same for all heads.
      prior: of features by the same network.
      chunk: heads at once: does not change anything but time and memory.

    Raises:
      ValueError: arrays do not fit together, or such heads cannot be read; says why.
    """
    weights, bias, labels = np.asarray(weights), np.asarray(bias), np.asarray(labels)
    _check(weights, bias, config, labels, prior)
    fits = fit_all(weights, bias, config, labels, prior, chunk)
    # Where no fit was found, nothing is known but the prior.
    found = np.isfinite(fits.squares) & np.isfinite(fits.rows).all((1, 2))
    rows = np.where(found[:, None, None], fits.rows, 0)
    read = _reader(len(labels), prior)
    arrays = (weights, rows, fits.noise, fits.covariance)
    parts = [
        jax.device_get(read(*(np.asarray(a, np.float32) for a in part), labels))
        for part, _ in _chunks(arrays, min(chunk, len(weights)))
    ]
    features, variances, means, mean_variances = (
        np.concatenate(arrays)[: len(weights)] for arrays in zip(*parts, strict=True)
    )
    expected = np.sqrt(variances.sum(-1) / prior.variances[labels].sum(-1))
    unmoved = np.square(weights.mean(1, dtype=np.float64)).mean(-1) * config.classes
    rounding = np.square(1e-6 * np.abs(weights).max((1, 2)))  # of a training in float32
    return Recovered(
        features,
        variances,
        means,
        mean_variances,
        expected,
        _misfit(np.where(found, fits.squares, np.inf), config.classes),
        (unmoved + rounding) / (np.square(fits.noise) + rounding),
        np.asarray(fits.loss),
    )


def _check(
    weights: np.ndarray, bias: np.ndarray, config: Config, labels: np.ndarray, prior: Prior
) -> None:
    classes, width = prior.means.shape
    if config.head == "linear" and config.classes != classes:
        raise ValueError(f"the prior has {classes} classes, the config {config.classes}")
    if weights.ndim != 3 or bias.shape != weights.shape[:2] or not len(weights):
        raise ValueError(
            f"weights {weights.shape} and bias {bias.shape} are not (S, C, D) and (S, C)"
        )
    if config.head == "linear" and weights.shape[1:] != (classes, width):
        raise ValueError(
            f"weights {weights.shape} are not (S, {classes}, {width}), as the prior's classes and "
            "features are"
        )
    if not (np.isfinite(weights).all() and np.isfinite(bias).all()):
        raise ValueError("weights or biases are not all finite: the training diverged")
    if labels.ndim != 1 or not len(labels) or not np.isin(labels, np.arange(classes)).all():
        raise ValueError(f"labels must be (N,) numbers from 0 to {classes - 1}")
    if len(labels) >= width:
        raise ValueError(
            f"{len(labels)} examples of {width} features: there must be more features than examples"
        )
    for c in np.unique(labels):
        wanted, owned = (labels == c).sum(), (prior.labels == c).sum()
        if owned < 2 * wanted:
            raise ValueError(
                f"sets of {wanted} examples of class {c} need a prior of {2 * wanted}, not {owned}"
            )
    reason = unrecoverable(config, len(labels))
    if reason:
        raise ValueError(f"no exact recovery: {reason}")


def fit_all(
    weights: np.ndarray,
    bias: np.ndarray,
    config: Config,
    labels: np.ndarray,
    prior: Prior,
    chunk: int = CHUNK,
) -> Fit:
    """Return `jinv.reconstruct.gram.Fit` of S heads, as arrays of NumPy (S, ...).

    Args:
      weights: (S, C, D).
      bias: (S, C).
      config: how they were trained.
      labels: (N,).
      prior: of features.
      chunk: heads at once.
    """
    settings = Settings(*map(np.float64, (config.lr, config.weight_decay, config.init_std)))
    return _fit_all(weights, bias, config, settings, labels, prior.gram(labels), chunk)


def _fit_all(
    weights: np.ndarray,
    bias: np.ndarray,
    config: Config,
    settings: Settings,
    labels: np.ndarray,
    known: GramPrior,
    chunk: int,
) -> Fit:
    steps, classes = config.steps(len(labels)), config.classes
    weights, bias = weights.astype(np.float64), bias.astype(np.float64)
    number = gram.known(classes)
    chunk = min(chunk, len(weights))
    with jax.enable_x64(True):
        begin, program = _starting(steps, config.momentum), _fitting(steps, config.momentum)
        starts = [
            np.asarray(begin(*part, settings, labels, known))[:count]
            for part, count in _chunks((weights, bias), chunk)
        ]
        own = ((0, 0), (0, 0), (0, len(labels) * (classes - 1)))
        places = np.pad(np.concatenate(starts).swapaxes(0, 1), own)
        chosen, result = np.arange(len(weights)), None
        for start in places:
            parts = [
                jax.tree.map(
                    lambda a: a[:count],  # noqa: B023
                    jax.device_get(program(w, b, settings, labels, known, unknown)),
                )
                for (w, b, unknown), count in _chunks(
                    (weights[chosen], bias[chosen], start[chosen]), chunk
                )
            ]
            fits = jax.tree.map(lambda *a: np.concatenate(a), *parts)
            if result is None:
                result = fits
            else:
                again = abs(fits.squares - result.squares[chosen]) < 0.5
                better = fits.squares < result.squares[chosen]
                for whole, part in zip(result, fits, strict=True):
                    whole[chosen[better]] = part[better]
                chosen = chosen[~again]
            chosen = chosen[~(result.squares[chosen] < number)]
            if not len(chosen):
                break
    assert result is not None
    return result


class Guess(NamedTuple):
    """Hyper-parameters and how well they explain heads.

    Attributes:
      config: with them.
      misfit: median of the heads' `Recovered.misfit`.
    """

    config: Config
    misfit: float


def guess(
    weights: np.ndarray,
    bias: np.ndarray,
    config: Config,
    labels: np.ndarray,
    prior: Prior,
    *,
    lr: Sequence[float],
    epochs: Sequence[int] | None = None,
    weight_decay: Sequence[float] | None = None,
    refinements: int = 5,
) -> list[Guess]:
    """Return hyper-parameters from the one that explains some heads' weights best to the worst.

    All combinations are tried. Around the best, the learning rate is then refined between its
    neighbours. `init_std` is what the part of the weights that no example moves says. A few heads
    are enough; the time is that of `recover` a combination, and another compilation for each
    number of epochs. Where the product of learning rate and epochs is the same, and steps are
    small, training is: there the first of the list need not be the true one, but recovers as well.

    Args:
      weights: (S, C, D) after the training.
      bias: (S, C).
      config: what is known, such as momentum; lr, epochs, weight_decay and init_std are replaced.
      labels: (N,) of each head's training set.
      prior: of features by the same network.
      lr: learning rates to try.
      epochs: numbers of epochs to try; the config's by default.
      weight_decay: to try; the config's by default.
      refinements: how often the learning rates' spacing is halved around the best.

    Raises:
      ValueError: as `recover`, or there is nothing to try.
    """
    weights, bias, labels = np.asarray(weights), np.asarray(bias), np.asarray(labels)
    _check(weights, bias, config, labels, prior)
    if not len(lr):
        raise ValueError("no learning rate to try was given")

    def tried(**settings: Any) -> Guess:
        found = dataclasses.replace(config, **settings, init_std=0.0)
        optimizer = sgd(found.lr, found.momentum, found.weight_decay)
        kept = orthogonal_scale(optimizer, found.steps(len(labels)), 1.0, 0.0)
        unmoved = np.square(weights.mean(1, dtype=np.float64)).mean() * config.classes
        found = dataclasses.replace(found, init_std=float(np.sqrt(unmoved) / kept))
        squares = np.asarray(fit_all(weights, bias, found, labels, prior).squares)
        return Guess(found, float(np.median(_misfit(squares, config.classes))))

    grid = itertools.product(lr, epochs or (config.epochs,), weight_decay or (config.weight_decay,))
    found = [tried(lr=a, epochs=b, weight_decay=c) for a, b, c in grid]
    ordered = np.sort(np.unique(np.asarray(lr, float)))
    factor = float(np.sqrt((ordered[1:] / ordered[:-1]).max())) if len(ordered) > 1 else 1.2
    for _ in range(refinements):
        best = min(found, key=lambda g: g.misfit).config
        found += [
            tried(lr=best.lr * by, epochs=best.epochs, weight_decay=best.weight_decay)
            for by in (factor, 1 / factor)
        ]
        factor = float(np.sqrt(factor))
    return sorted(found, key=lambda g: g.misfit)


def _misfit(squares: np.ndarray, classes: int) -> np.ndarray:
    number = gram.known(classes)
    return (squares - number) / np.sqrt(2 * number)


def _chunks(arrays: Any, chunk: int) -> Any:
    """Yield (a part of all arrays, how many of it count): parts are of one size."""
    count = len(jax.tree.leaves(arrays)[0])
    for start in range(0, count, chunk):
        places = np.minimum(np.arange(start, start + chunk), count - 1)
        yield jax.tree.map(lambda a: a[places], arrays), min(chunk, count - start)  # noqa: B023


@functools.cache
def _starting(steps: int, momentum: float) -> Callable[..., Array]:
    return jax.jit(gram.make_starts(steps, momentum))


@functools.cache
def _fitting(steps: int, momentum: float) -> Callable[..., Fit]:
    fit = gram.make_fit(steps, momentum)
    return jax.jit(jax.vmap(fit, (0, 0, None, None, None, 0)))


Read = tuple[Array, Array, Array, Array]


def _reader(examples: int, prior: Prior) -> Callable[..., Read]:
    """Return (weights (S, C, D), A, s and covariance, see `Fit`, labels) -> part of `Recovered`."""
    zeros = None if prior.zeros is None else jnp.asarray(prior.zeros)
    arrays = tuple(
        map(jnp.asarray, (prior.means, prior.scales, prior.spread, prior.basis, prior.variances))
    )

    def read(weights: Any, rows: Any, noise: Any, covariance: Any, labels: Any) -> Read:
        return _reading(weights, rows, noise, covariance, labels, *arrays, zeros)

    return read


@jax.jit
@functools.partial(jax.vmap, in_axes=(0, 0, 0, 0, *(None,) * 7))
def _reading(
    weights: Array,
    rows: Array,
    noise: Array,
    covariance: Array,
    labels: Array,
    class_means: Array,
    scales: Array,
    spread: Array,
    basis: Array,
    variances: Array,
    zeros: Array | None,
) -> Read:
    examples, classes = rows.shape
    if covariance.size:
        rows, remaining = _corrected(
            weights, rows, noise, covariance, labels, class_means, scales, spread, basis
        )
    mean, root = class_means[labels], jnp.sqrt(scales[labels])
    left, sizes, right = jnp.linalg.svd((rows * root[:, None]).T, full_matrices=True)
    rank = min(examples, classes - 1)
    sizes, left = sizes[:rank, None], left[:, :rank]
    noise = jnp.square(noise) + jnp.square(1e-7 * jnp.abs(weights).max())
    total = jnp.square(sizes) * spread + noise  # (C - 1, D)
    measured = left.T @ (weights - rows.T @ mean) @ basis
    gain = sizes * spread
    known = jnp.zeros((examples, len(spread))).at[:rank].set(gain * measured / total)
    posterior = mean + root[:, None] * (right.T @ known @ basis.T)
    along = jnp.broadcast_to(spread, known.shape).at[:rank].set(spread * noise / total)
    along = along @ jnp.square(basis).T  # (N, D) variances along V
    mixing = right.T * root[:, None]
    variance = jnp.square(mixing) @ along

    member = (labels == jnp.arange(classes)[:, None]).astype(weights.dtype)
    counts = member.sum(1)
    averaging = member / jnp.maximum(counts, 1)[:, None]
    averages, mixed = averaging @ posterior, averaging @ mixing
    average_variance = jnp.square(mixed) @ along
    if zeros is not None:
        direction = jnp.linalg.svd(mixed * jnp.sqrt(along.mean(1)))[0][:, 0]
        among = jnp.square(direction @ mixed) @ along
        rest = average_variance - jnp.square(direction)[:, None] * among
        shift, shift_variance = _shift(
            averages, direction, among, rest, counts, class_means, variances, zeros
        )
        saved = among - shift_variance
        averages = jnp.maximum(averages + direction[:, None] * shift, 0)
        average_variance -= jnp.square(direction)[:, None] * saved
        own = direction[labels][:, None]
        posterior = jnp.maximum(posterior + own * shift, 0)
        variance -= jnp.square(own) * saved
    apart = jnp.sqrt(counts)[:, None] * class_means @ basis
    apart = gram.after(apart, averages)
    unsure = _unsure(measured, total, apart, jnp.square(rows).mean())
    if covariance.size:
        means = class_means @ basis
        seen = jnp.einsum("coep,oj,pj->jce", remaining, left, left)
        unsure += jnp.einsum("cd,jce,ed->jd", means, seen, means) / jnp.square(total)
    unsure = jnp.square(gain) * unsure
    unsure = unsure @ jnp.square(basis).T
    variance += jnp.square(mixing[:, :rank]) @ unsure
    average_variance += jnp.square(mixed[:, :rank]) @ unsure
    return posterior, variance, averages, average_variance


def _corrected(
    weights: Array,
    rows: Array,
    noise: Array,
    covariance: Array,
    labels: Array,
    class_means: Array,
    scales: Array,
    spread: Array,
    basis: Array,
) -> tuple[Array, Array]:
    """Return A (N, C), corrected by how well the classes' means M explain the weights.

    For N > C many Gram matrices explain W W', and sums of A's rows over classes are known to their
    `covariance` only, S. What is left of W beside A' M is D' M and the examples' own part, of
    covariance l B + s^2 for each feature, with B = A' A. Along the axes of B outputs are
    independent: with K = M (l B + s^2)^-1 M' and t = M (l B + s^2)^-1 (W - A' M) the correction is

        D = (1 + S K)^-1 S t

    and (1 + S K)^-1 S (C, C, C, C), of classes and outputs, is how far it may still be off.
    """
    classes = rows.shape[1]
    contrasts = jnp.asarray(gram.contrasts_of(classes), weights.dtype)
    inside = rows @ contrasts
    sizes, axes = jnp.linalg.eigh(inside.T @ (scales[labels][:, None] * inside))
    left = axes.T @ contrasts.T @ (weights - rows.T @ class_means[labels]) @ basis
    least = jnp.square(noise) + jnp.square(1e-7 * jnp.abs(weights).max())
    total = jnp.maximum(sizes, 0)[:, None] * spread + least  # (C - 1, D)
    means = class_means @ basis
    known = jnp.einsum("cd,jd,ed->cje", means, 1 / total, means)
    told = jnp.einsum("cd,jd->cj", means, left / total)
    counts = (labels == jnp.arange(classes)[:, None]).sum(1)
    # Linearised, errors come out too small; this much was found on FashionMNIST.
    factor = jnp.square(2 * counts.max())
    size = classes * (classes - 1)
    shape = (classes, classes - 1, classes, classes - 1)
    turned = jnp.einsum("cjek,ja,kb->caeb", factor * covariance.reshape(shape), axes, axes)
    apart = turned.reshape(size, size)
    # S K, whose K leaves every axis alone.
    product = jnp.einsum("xej,fje->xfj", apart.reshape(size, classes, classes - 1), known)
    matrix = jnp.eye(size) + product.reshape(size, size)
    remaining = jnp.linalg.solve(matrix, apart)
    found = (remaining @ told.ravel()).reshape(classes, classes - 1)
    outputs = contrasts @ axes
    sums = found @ outputs.T
    remaining = jnp.einsum("cjek,oj,pk->coep", remaining.reshape(shape), outputs, outputs)
    return rows + (sums / jnp.maximum(counts, 1)[:, None])[labels], remaining


def _unsure(measured: Array, total: Array, apart: Array, square: Array) -> Array:
    """Return what is lacking to 1 / total, (C - 1, D), because A is not known exactly.

    The covariance of a row of U' (W - A' M) Q is diag(total) + alpha^2 B' B, where B are the
    class means and alpha is the error of A's numbers: of some, the one that makes what was
    measured likeliest. As features are not normal, it is too large rather than too small. The
    features are therefore found without it.

    Args:
      measured: (C - 1, D).
      total: (C - 1, D).
      apart: B (C, D), each times the root of its examples' number.
      square: () mean square of A's numbers.
    """
    values, vectors = jnp.linalg.eigh(jnp.einsum("cd,jd,ed->jce", apart, 1 / total, apart))
    values = jnp.maximum(values, 0)
    seen = jnp.einsum("jce,cd,jd->je", vectors, apart, measured / total)
    alpha = jnp.asarray(_DOUBTS)[:, None, None] ** 2 * square
    shrunk = alpha / (1 + alpha * values)  # (R, C - 1, C)
    likelihood = (shrunk * jnp.square(seen) - jnp.log1p(alpha * values)).sum((1, 2))
    turned = jnp.einsum("jce,cd->jed", vectors, apart) / total[:, None]
    return jnp.einsum("jed,je->jd", jnp.square(turned), shrunk[likelihood.argmax()])


def _shift(
    averages: Array,
    direction: Array,
    among: Array,
    rest: Array,
    counts: Array,
    means: Array,
    variances: Array,
    zeros: Array,
) -> tuple[Array, Array]:
    """Return mean and variance (D,) of t, where classes' means are `averages + direction t`.

    Beforehand t is N(0, among). A class's mean is 0 with the probability that all its examples
    are, else positive, and measured up to N(0, rest) beside t. The product of such sums of two is
    expanded by the first class that is 0: its integral is over a narrow normal distribution, and
    the others are smooth beside it if the classes are in the order of their errors.
    """
    order = jnp.argsort(jnp.where(counts > 0, rest.mean(1), jnp.inf))
    averages, direction, rest, counts, means, variances, zeros = (
        a[order] for a in (averages, direction, rest, counts, means, variances, zeros)
    )
    there = (counts > 0)[:, None]
    counts = jnp.maximum(counts, 1)[:, None]
    width = jnp.sqrt(jnp.maximum(rest, 1e-8 * among))
    scale = jnp.sqrt(among)
    own = jnp.sqrt(variances / counts)
    log_zero = counts * jnp.log(zeros)
    log_positive = jnp.log1p(-jnp.exp(log_zero)) - log_ndtr(means / own)
    # Against the normal prior that the averages are made with.
    log_atom = log_zero + 0.5 * jnp.square(means / own) + jnp.log(own) - jnp.log(width)
    log_atom = jnp.where(there, log_atom, -jnp.inf)
    nodes, weights = map(jnp.asarray, np.polynomial.hermite_e.hermegauss(3))
    safe = jnp.where(jnp.abs(direction) < 1e-3, 1e-3, direction)[:, None]
    at_zero = (nodes[:, None, None] * width - averages) / safe  # (3, C, D)
    even = jnp.linspace(-4, 4, 33)[:, None] * scale  # (33, D)

    def logs(t: Array) -> tuple[Array, Array]:
        """(..., D) -> log densities (..., C, D) of being 0, of being positive."""
        values = averages + direction[:, None] * t[..., None, :]
        positive = jnp.where(there, log_positive + log_ndtr(values / width), 0)
        return log_atom - 0.5 * jnp.square(values / width), positive

    before = -0.5 * jnp.square(even / scale)
    terms = [before + logs(even)[1].sum(-2) + jnp.log(8 / 32 * scale)]
    places = [even]
    atom, positive = logs(at_zero)  # (3, C, C, D)
    either = jnp.logaddexp(atom, positive)
    index = jnp.arange(len(direction))
    earlier, later = index < index[:, None], index > index[:, None]
    others = jnp.where(earlier[..., None], positive, jnp.where(later[..., None], either, 0))
    first = others.sum(-2) + log_atom + jnp.log(width) - jnp.log(jnp.abs(safe))
    first += jnp.log(weights)[:, None, None] - 0.5 * jnp.square(at_zero / scale)
    terms.append(first.reshape(-1, first.shape[-1]))
    places.append(at_zero.reshape(-1, first.shape[-1]))
    log_weight, t = jnp.concatenate(terms), jnp.concatenate(places)
    weight = jax.nn.softmax(log_weight, 0)
    mean = (weight * t).sum(0)
    return mean, (weight * jnp.square(t - mean)).sum(0)

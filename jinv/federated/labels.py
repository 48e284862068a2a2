"""Which classes a batch held, read off the gradient of the last layer alone.

For mean cross-entropy of K images, logits z_k = W f_k + b and probabilities p_k = softmax(z_k),

    dL/db_c = (1/K) sum_k (p_kc - [y_k = c]),      dL/dW_c = (1/K) sum_k (p_kc - [y_k = c]) f_k

so that the number of images of class c is n_c = sum_k p_kc - K dL/db_c. Methods differ in how they
guess the probabilities, which the attacker does not see. All return counts that sum to K.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.optimize

from jinv import checks
from jinv.federated.evidence import Evidence
from jinv.net import Net, as_parameters


@dataclasses.dataclass(frozen=True)
class Head:
    """The last linear layer, its gradient, and what is known of the batch.

    Attributes:
      weight, bias: (D, C), (C,); no bias is None.
      weight_gradient, bias_gradient: of the mean loss, same shapes.
      images: K.
      probabilities: (C,) the attacker's guess of the mean prediction, such as the network's on
        noise or on public images; uniform if None.
      scaled: the gradients are known up to a positive factor only, as where a client clips.

    Raises:
      ValueError: shapes that do not fit, values that are not finite, no whole number of images, or
        probabilities that are no distribution.
    """

    weight: np.ndarray
    weight_gradient: np.ndarray
    images: int
    bias: np.ndarray | None = None
    bias_gradient: np.ndarray | None = None
    probabilities: np.ndarray | None = None
    scaled: bool = False

    def __post_init__(self) -> None:
        shape = np.shape(self.weight)
        if len(shape) != 2:
            raise ValueError(f"a head's weight is (D, C), one column a class, not {shape}")
        if np.shape(self.weight_gradient) != shape:
            raise ValueError(
                f"the head's gradient is {np.shape(self.weight_gradient)}, its weight {shape}"
            )
        classes = shape[1]
        for name in ("bias", "bias_gradient", "probabilities"):
            value = getattr(self, name)
            if value is not None and np.shape(value) != (classes,):
                raise ValueError(f"the head's {name} is {np.shape(value)}, not ({classes},)")
        if (self.bias is None) != (self.bias_gradient is None):
            raise ValueError("a head has a bias and its gradient, or neither")
        for name in ("weight", "weight_gradient", "bias", "bias_gradient", "probabilities"):
            if not np.isfinite(_numbers(name, getattr(self, name))).all():
                raise ValueError(f"the head's {name} has values that are not finite")
        if not checks.fits(checks.Count, self.images):
            raise ValueError(
                f"a batch has at least one image, a whole number of them, not {self.images!r}"
            )
        guess = self.guess
        if guess.min() < 0 or abs(guess.sum() - 1) > 0.01:
            raise ValueError(
                "the head's probabilities are no distribution: they run from "
                f"{guess.min():g} to {guess.max():g} and sum to {guess.sum():g}; give the mean of "
                "softmax(logits)"
            )

    @property
    def classes(self) -> int:
        """The number of classes, C."""
        return self.weight.shape[1]

    @property
    def guess(self) -> np.ndarray:
        """Mean probabilities (C,) that methods start from."""
        if self.probabilities is None:
            return np.full(self.classes, 1 / self.classes)
        return np.asarray(self.probabilities, np.float64)

    @property
    def signal(self) -> np.ndarray:
        """(C,) negative where a class is present: dL/db, or sum_d dL/dW_d without a bias.

        The sum is dL/db times the sum of a feature vector, which is positive after a ReLU.
        """
        if self.bias_gradient is not None:
            return np.asarray(self.bias_gradient, np.float64)
        return np.asarray(self.weight_gradient, np.float64).sum(0)


def _numbers(name: str, value: Any) -> np.ndarray:
    try:
        return np.asarray(() if value is None else value, np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"the head's {name} holds {checks.shown(value)}, no numbers") from None


def head_of(net: Net, evidence: Evidence, scaled: bool = False) -> Head:
    """Find the last linear layer of a network, with what the evidence says of it.

    A weight update of T local SGD steps counts as the mean of their gradients, -update / (lr T),
    at weights half-way between those before and after (as arXiv 2206.12395 interpolates); that of
    one step is its gradient, at the weights before.

    Raises:
      ValueError: the network's head is not known, and no linear layer, or several, give its
        classes.
    """
    values = as_parameters(net, evidence.values)
    layers = dict(_linear(values, (), net.classes))
    if net.head in layers:
        layers = {net.head: layers[net.head]}
    if len(layers) != 1:
        found = ", ".join(".".join(map(str, path)) for path in layers) or "none"
        raise ValueError(
            f"labels are read off the one linear layer with {net.classes} outputs; here: {found} "
            f"({net.name} must end in a layer like nnx.Linear or linen.Dense, no convolution; "
            "without one give the labels yourself, or optimise them with the images)"
        )
    ((path, (weight, bias)),) = layers.items()
    before: Any = net.variables
    change: Any = values
    for key in path:
        before, change = before[key], change[key]
    local = evidence.local
    scale = 1.0 if local is None else -1 / (local.lr * len(local.batches))
    share = 0.0 if local is None or len(local.batches) == 1 else 0.5

    def halfway(name: Any) -> np.ndarray:
        return np.asarray(before[name]) + share * np.asarray(change[name])

    return Head(
        halfway(weight),
        scale * np.asarray(change[weight]),
        evidence.images,
        None if bias is None else halfway(bias),
        None if bias is None else scale * np.asarray(change[bias]),
        scaled=scaled,
    )


def _linear(tree: Mapping[Any, Any], path: tuple[Any, ...], classes: int) -> Iterator[Any]:
    """(path of a layer, its names of weight and bias), for layers with so many outputs."""
    shapes = {key: np.shape(v) for key, v in tree.items() if not isinstance(v, Mapping)}
    for key, shape in shapes.items():
        if len(shape) == 2 and shape[1] == classes:
            yield path, (key, next((k for k, s in shapes.items() if s == (classes,)), None))
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _linear(value, (*path, key), classes)


def minimum(head: Head) -> np.ndarray:
    """The K classes with the most negative entry of dL/dW_c. GradInversion, arXiv 2104.07586.

    Needs features that are not negative; knows no class twice.
    """
    lowest = np.asarray(head.weight_gradient, np.float64).min(0)
    counts = np.zeros(head.classes, int)
    counts[np.argsort(lowest, kind="stable")[: head.images]] = 1
    return _repaired(counts.astype(float), head.images)


def identity(head: Head) -> np.ndarray:
    """n_c = K (p_c - dL/db_c) with the guessed probabilities; exact where the guess is.

    Without a bias, dL/db is the signal in units of a feature vector's sum; of a clipped gradient
    it is known up to a factor. Either unit follows from the signal's positive part.
    """
    signal = head.signal
    if head.bias_gradient is None or head.scaled:
        signal = signal / _unit(signal, head.guess)
    return _repaired(head.images * (head.guess - signal), head.images)


def ilrg(head: Head) -> np.ndarray:
    """Instance-wise label restoration from gradients (Ma et al., ICLR 2023).

    Each class's mean feature is estimated as e_c = dL/dW_c / dL/db_c, its prediction as
    p_c = softmax(W' e_c + b), and the counts solve sum_c n_c = K,
    sum_c n_c p_c[i] - n_i = K dL/db_i in the least-squares sense, n >= 0. e_c does not depend on
    a gradient's scale; where that is unknown, it and the counts are solved for in turn.

    Raises:
      ValueError: the head has no bias.
    """
    if head.bias_gradient is None or head.bias is None:
        raise ValueError("iLRG divides by the gradient of the head's bias: this head has none")
    bias_gradient = np.asarray(head.bias_gradient, np.float64)
    safe = np.where(bias_gradient == 0, np.finfo(float).eps, bias_gradient)
    embeddings = np.asarray(head.weight_gradient, np.float64) / safe  # (D, C), one column a class
    predictions = _softmax(embeddings.T @ np.asarray(head.weight, np.float64) + head.bias)
    equations = np.concatenate([predictions.T - np.eye(head.classes), np.ones((1, head.classes))])

    def solve(signal: np.ndarray) -> np.ndarray:
        # Counts are not negative: better than the paper's pseudo-inverse on trained networks.
        values = np.concatenate([head.images * signal, [head.images]])
        return scipy.optimize.nnls(equations, values)[0]

    if not head.scaled:
        return _repaired(solve(bias_gradient), head.images)
    mean = head.guess
    for _ in range(_TURNS):
        counts = solve(bias_gradient / _unit(bias_gradient, mean))
        mean = counts @ predictions / max(counts.sum(), 1e-30)
    return _repaired(counts, head.images)


_TURNS = 5


def llg(head: Head) -> np.ndarray:
    """Label leakage from gradients (Wainakh et al., arXiv 2105.09369).

    One image of class c lowers its signal by m = (1 + 1/C) / K times the sum of negative signals.
    Every class of negative signal is taken once, then repeatedly the one that is lowest after
    what has been taken.
    """
    signal = head.signal.copy()
    impact = (1 + 1 / head.classes) / head.images * signal[signal < 0].sum()
    counts = np.zeros(head.classes)
    for c in np.argsort(signal, kind="stable"):
        if signal[c] < 0 and counts.sum() < head.images:
            counts[c] += 1
            signal[c] -= impact
    while counts.sum() < head.images:
        c = int(np.argmin(signal))
        counts[c] += 1
        signal[c] -= impact
    return counts.astype(int)


Method = Callable[[Head], np.ndarray]
"""The last layer with its gradient -> number of images of every class (C,), summing to K."""

METHODS: dict[str, Method] = {
    "minimum": minimum,
    "identity": identity,
    "ilrg": ilrg,
    "llg": llg,
}


def register(name: str, method: Method) -> None:
    """Make a way of restoring labels of your own one of `METHODS`.

    Raises:
      ValueError: the name is taken.
    """
    checks.free("method of restoring labels", name, METHODS)
    METHODS[name] = method


def restore(head: Head, method: str = "identity") -> np.ndarray:
    """Restore the number of images of every class (C,), summing to K.

    Args:
      head: the last layer and its gradient.
      method: one of `METHODS`.

    Raises:
      ValueError: unknown method, or one that needs what the head has not, or whose counts are
        none.
    """
    checks.one_of("method", method, METHODS)
    counts = np.asarray(METHODS[method](head))
    wanted = f"a method of restoring labels returns {head.classes} whole numbers of images, one a"
    if counts.shape != (head.classes,) or counts.dtype.kind not in "iuf":
        raise ValueError(
            f"{wanted} class; {method} returned {counts.dtype} values of shape {counts.shape}"
        )
    if (counts < 0).any() or (counts % 1 != 0).any() or counts.sum() != head.images:
        raise ValueError(
            f"{wanted} class, that sum to {head.images}; {method} returned "
            f"{checks.shown(counts.tolist())}"
        )
    return counts.astype(int)


def as_list(counts: np.ndarray) -> list[int]:
    """List the class of every image, in rising order, from counts (C,)."""
    return np.repeat(np.arange(len(counts)), counts).tolist()


def orders(
    classes: Sequence[int], batches: Sequence[Sequence[int]], most: int, seed: int = 0
) -> list[list[int]]:
    """List ways to give restored classes to the images of local steps, at most so many of them.

    Counts do not say which image has which class. Without local steps that is no matter; with them
    it decides which classes share a batch. No two ways returned give all batches the same classes.

    Args:
      classes: K, in any order; they are the first way.
      batches: indices of the images of every step, as in `Evidence.local`.
      most: how many ways; fewer if there are no more.
      seed: of the random ways after the first.
    """
    rng = np.random.default_rng(seed)
    found: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    way = list(classes)
    # Every way is drawn sooner or later; where few are left, draws repeat.
    for _ in range(100 * most):
        found.setdefault(tuple(tuple(sorted(way[i] for i in b)) for b in batches), way)
        if len(found) == most:
            break
        way = rng.permutation(np.asarray(classes)).tolist()
    return list(found.values())


def scores(found: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Score counts (C,) against the true ones.

    `accuracy`: share of the K labels that are right with their multiplicity. `precision` and
    `recall`: of the classes found. `exact`: 1 if every count is right.
    """
    present, claimed = truth > 0, found > 0
    both = float(np.logical_and(present, claimed).sum())
    return {
        "accuracy": float(np.minimum(found, truth).sum() / truth.sum()),
        "precision": both / max(float(claimed.sum()), 1.0),
        "recall": both / max(float(present.sum()), 1.0),
        "exact": float(np.array_equal(found, truth)),
    }


def _unit(signal: np.ndarray, mean: np.ndarray) -> float:
    """What the signal is in units of: classes that are absent have dL/db_c = p_c."""
    absent = signal > 0
    unit = signal[absent].sum() / mean[absent].sum() if absent.any() else 1.0
    return float(unit) if unit > 0 else 1.0


def _repaired(wanted: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers that are not negative, sum to `total` and are nearest to those wanted.

    Rounded down; what is missing goes to the largest remainders, what is too much is taken where
    rounding was most generous.
    """
    wanted = np.clip(np.nan_to_num(wanted), 0, total)
    counts = np.rint(wanted).astype(int)
    while counts.sum() < total:
        counts[np.argmax(wanted - counts)] += 1
    while counts.sum() > total:
        counts[np.argmin(np.where(counts > 0, wanted - counts, np.inf))] -= 1
    return counts


def _softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)

"""Subnetworks of random networks (edge-popup, arXiv 1911.13299): weights stay, scores choose.

Every convolution and linear layer keeps a share of its frozen random weights: those whose scores
are largest in magnitude. BatchNorm has scale 1 and shift 0, no layer has a bias. All here are
functions of a network's variables, in which a masked layer has `scores` beside its weights.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jinv import checks
from jinv.checks import PositiveShare
from jinv.net import Net, Variables, leaves, parameters, with_parameters
from weights_convert import WeightsError
from weights_convert.subnetworks import SCORES

_WEIGHTS = ("weight", "kernel")
"""What torch and Flax call the weights of a layer."""


@dataclasses.dataclass(frozen=True)
class Subnetwork:
    """A random network, and how much of it stays.

    Attributes:
      kept: share of every layer's weights that stays, as the paper's k. The public code's
        `prune_rate` is the same where scores are trained (`SubnetConv`), and the share that is
        *removed* in `FixedSubnetConv`, in its help and where it scales weights.
      weights: of the random network: "signed_constant", sqrt(2 / n) with a random sign; or
        "kaiming_normal", N(0, 2 / n). n is the number of inputs of a unit.
      scale_by_kept: n counts the inputs that stay, n * kept: the paper's scaled weights.
    """

    kept: PositiveShare
    weights: Literal["signed_constant", "kaiming_normal"] = "signed_constant"
    scale_by_kept: bool = False

    def __post_init__(self) -> None:
        checks.fields(self)


def mask(scores: Array, kept: float) -> Array:
    """Return 1 where a score is among the largest in magnitude, 0 elsewhere, in their dtype.

    int((1 - kept) * n) of n are 0. Of equal ones those that come first in torch's order are, as
    with torch's stable sort. The gradient is that of |scores|, straight through the choice.
    """
    magnitude = jnp.abs(scores)
    in_torch = (scores.ndim - 1, scores.ndim - 2, *range(scores.ndim - 2))
    ordered = magnitude.transpose(in_torch)
    chosen = _largest(ordered.ravel(), int((1 - kept) * scores.size)).reshape(ordered.shape)
    chosen = chosen.transpose([in_torch.index(axis) for axis in range(scores.ndim)])
    # The difference is exactly 0: the mask stays exact.
    straight = magnitude - jax.lax.stop_gradient(magnitude)
    return chosen.astype(scores.dtype) + straight


@jax.jit
def _largest(magnitude: Array, removed: int | Array) -> Array:
    """Whether a number (N,) is not among the `removed` smallest, of equal ones the first.

    Numbers that are not negative are ordered as their bits: halving the interval of these finds the
    bound in 31 counts, on a CPU ten times faster than sorting.
    """
    bits = jax.lax.bitcast_convert_type(magnitude, jnp.dtype(f"uint{8 * magnitude.dtype.itemsize}"))

    def halve(_: Any, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = low + (high - low) // 2
        enough = jnp.sum(bits <= middle) >= removed
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    ends = jnp.zeros((), bits.dtype), jnp.array(jnp.iinfo(bits.dtype).max, bits.dtype)
    bound = jax.lax.fori_loop(0, jnp.iinfo(bits.dtype).bits, halve, ends)[0]
    equal = bits == bound
    first = removed - jnp.sum(bits < bound)
    return (bits > bound) | (equal & (jnp.cumsum(equal) > first))


def effective(variables: Variables, kept: float) -> dict[Any, Any]:
    """Return the variables of the network itself: weights times masks, without the scores."""
    found: dict[Any, Any] = {}
    for key, value in variables.items():
        if isinstance(value, Mapping):
            found[key] = effective(value, kept)
        elif key in _WEIGHTS and SCORES in variables:
            found[key] = value * mask(variables[SCORES], kept)
        elif key != SCORES:
            found[key] = value
    return found


def with_scores(variables: Variables, make: Callable[[Any], Any] = lambda leaf: leaf) -> dict:
    """Return variables, or their shapes, with scores beside the weights that are masked.

    Args:
      variables: of the network itself.
      make: gives the scores of a layer's weights.
    """
    found: dict[Any, Any] = {}
    for key, value in variables.items():
        found[key] = with_scores(value, make) if isinstance(value, Mapping) else value
        if key in _WEIGHTS and len(getattr(value, "shape", ())) > 1:
            found[SCORES] = make(value)
    return found


def draw(net: Net, config: Subnetwork, key: Array) -> dict[Any, Any]:
    """Return the variables of a random network of this architecture, with random scores.

    Scores are uniform in (-1, 1) / sqrt(n), n as in `Subnetwork`; running statistics are 0 and 1.

    Args:
      net: the architecture; what is neither weight, scale nor bias is taken from it.
      config: what to draw.
      key: of all that is random.
    """
    sizes: list[int] = []
    with_scores(net.variables, lambda leaf: sizes.append(leaf.size))
    weights_key, scores_key = jax.random.split(key)
    random = jax.random.normal if config.weights == "kaiming_normal" else jax.random.rademacher
    # For all layers at once: one program, not one for every shape.
    next_weights = _cut(random(weights_key, (sum(sizes),), jnp.float32))
    next_scores = _cut(jax.random.uniform(scores_key, (sum(sizes),), minval=-1, maxval=1))

    def weights(leaf: Array) -> Array:
        inputs = math.prod(leaf.shape[:-1]) * (config.kept if config.scale_by_kept else 1)
        return jnp.asarray(math.sqrt(2 / inputs) * next_weights(leaf.shape), leaf.dtype)

    def scores(leaf: Array) -> Array:
        inputs = math.prod(leaf.shape[:-1])
        return jnp.asarray(next_scores(leaf.shape) / math.sqrt(inputs), leaf.dtype)

    def frozen(tree: Variables) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        for name, value in tree.items():
            if isinstance(value, Mapping):
                found[name] = frozen(value)
            elif name in _WEIGHTS and value.ndim > 1:
                found[name] = weights(value)
            elif name in _CONSTANTS and value.ndim == 1:
                found[name] = jnp.full_like(value, _CONSTANTS[name])
            else:
                found[name] = value
        return found

    variables = with_parameters(net.variables, frozen(parameters(net)))
    return with_scores(with_parameters(variables, initial_statistics(net)), scores)


def _cut(values: Array) -> Callable[[tuple[int, ...]], np.ndarray]:
    """A function that returns the next of the values, in a shape."""
    rest = np.asarray(values)

    def cut(shape: tuple[int, ...]) -> np.ndarray:
        nonlocal rest
        first, rest = np.split(rest, [math.prod(shape)])
        return first.reshape(shape)

    return cut


def drawn(net: Net, config: Subnetwork, seed: int) -> Net:
    """Return the network of this architecture that random weights and scores make."""
    variables = draw(net, config, jax.random.key(seed))
    return dataclasses.replace(net, variables=effective(variables, config.kept))


_CONSTANTS = {"weight": 1, "scale": 1, "bias": 0}
"""Of layers without masks, and of masked layers' biases."""


def initial_statistics(net: Net) -> dict[Any, Any]:
    """Return running means of 0 and variances of 1, as before any training, nested as variables."""
    found: dict[Any, Any] = {}
    for paths, moments in zip(net.statistics, net.running_moments(), strict=True):
        for path, value in zip(paths, moments, strict=True):
            start = jnp.zeros_like(value) if path == paths[0] else jnp.ones_like(value)
            inner = found
            for part in path[:-1]:
                inner = inner.setdefault(part, {})
            inner[path[-1]] = start
    return found


def trainable(net: Net, variables: Variables, kept: float) -> Net:
    """Return a network whose parameters are its scores alone, ready for `training.run`.

    Args:
      net: the architecture.
      variables: with scores, see `draw`.
      kept: share of the weights that stays.
    """

    def masked(forward: Callable[..., Any]) -> Callable[..., Any]:
        def apply(variables: Variables, *arguments: Any, **keywords: Any) -> Any:
            return forward(effective(variables, kept), *arguments, **keywords)

        return apply

    return dataclasses.replace(
        net,
        apply=masked(net.apply),
        train_apply=None if net.train_apply is None else masked(net.train_apply),
        variables=variables,
        trained=frozenset(path for path, _ in leaves(variables) if path[-1] == SCORES),
    )


def check_kept(net: Net, variables: Variables, kept: float) -> str:
    """Compare the share that is said to be kept with what a trained subnetwork tells of it.

    The public code stores no share, and calls by one name what is kept and what is removed. Two
    things tell it. Scores of a fixed mask are 0 and 1. Otherwise a layer's running means follow
    from the sums of the weights that stayed: they are correlated, over a layer's channels, with
    means that noise has in training mode, and most with those under the right masks.

    Args:
      net: the architecture.
      variables: of it, with scores.
      kept: share of the weights that is said to stay.

    Returns:
      What was found, in words.

    Raises:
      WeightsError: another share fits clearly better; it says which.
    """
    every = [leaf for path, leaf in leaves(variables) if path[-1] == SCORES]
    density = float(sum((leaf != 0).sum() for leaf in every)) / sum(leaf.size for leaf in every)
    if density and all(bool(((leaf == 0) | (leaf == 1)).all()) for leaf in every):
        if abs(density - kept) > _NEAR:
            raise WeightsError(
                f"the scores are 0 and 1, a fixed mask that keeps {density:.3g} of the weights, "
                f"not {kept:g}{_mirrored(density, kept)}: give kept {density:.2g}"
            )
        return f"the fixed mask keeps {density:.3g} of the weights"
    if net.train_apply is None or not any(m.mean.any() for m in net.running_moments(variables)):
        return (
            f"nothing tells whether {kept:g} is the share that was kept: it has no running "
            "means but 0, as before any training"
        )
    agreement = _agreement(net, variables)
    given = agreement(kept)
    others = {share / 10 for share in range(1, 10)} | {round(1 - kept, 6)} - {0.0}
    best = max(sorted(others), key=agreement)
    if agreement(best) > given + _CLEARLY:
        raise WeightsError(
            f"the running means speak against kept {kept:g}{_mirrored(best, kept)}: they correlate "
            f"{given:.2f} with what this mask leaves, and {agreement(best):.2f} at kept {best:g}; "
            f"give kept {best:g}, or what lies near it"
        )
    return f"running means correlate {given:.2f} with what the mask leaves"


_NEAR = 0.01
"""Difference between the share of a fixed mask and the one that was said, which rounding makes."""
_CLEARLY = 0.05
"""Difference of correlations that rules a share out; between 0.3 and 0.4 it is about 0.1."""


def _mirrored(found: float, kept: float) -> str:
    """Say that what was removed was given for what was kept, if it was."""
    if abs(found - (1 - kept)) > _NEAR or abs(found - kept) <= _NEAR:
        return ""
    return f" ({kept:g} is the share that it removes: the public code's prune_rate means either)"


def _agreement(net: Net, variables: Variables) -> Callable[[float], float]:
    """Median correlation of running means with those of noise, as a function of the share kept."""
    space = net.preprocessing
    shape = (_NOISE, space.height, space.width, space.channels)
    noise = jax.random.normal(jax.random.key(0), shape)
    forward = jax.jit(net.mode(training=True))
    running = [np.asarray(moments.mean, np.float64) for moments in net.running_moments(variables)]

    @functools.cache
    def agreement(kept: float) -> float:
        seen = forward(effective(variables, kept), noise).moments
        pairs = [(np.asarray(s.mean, np.float64), r) for s, r in zip(seen, running, strict=True)]
        found = [np.corrcoef(s, r)[0, 1] for s, r in pairs if np.ptp(s) and np.ptp(r)]
        return float(np.median(found or [0.0]))

    return agreement


_NOISE = 4
"""Images of noise: at the end of a network enough positions are left for moments."""

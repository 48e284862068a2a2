"""What a client can do to its gradient or weight update before it sends it.

In this order, each optional: clip its norm, add noise, send the largest coordinates only, send few
bits of each. Everything after the noise is post-processing and leaves its privacy as it is.
"Layer" is one array of the tree: a kernel, a bias.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jinv import checks
from jinv.checks import NotNegative, Positive, PositiveShare, Range
from jinv.federated.evidence import Evidence, Parameters
from jinv.objective import priors

KeepPer = Literal["update", "layer"]


@dataclasses.dataclass(frozen=True)
class Defence:
    """What is done to a gradient or weight update u; by default nothing.

    Attributes:
      clip: u is scaled down to an L2 norm of at most `clip` over all layers; None leaves it.
      noise_multiplier: sigma: Gaussian noise of standard deviation sigma * clip is added to every
        coordinate (DP-FedAvg, arXiv 1710.06963; its epsilon: `jinv.privacy.epsilon`). Needs `clip`.
      keep: share of the coordinates that are sent, those of largest magnitude, at least one; the
        others are 0. Of two that are equal the one nearer to the front stays.
      keep_per: the share is of the whole "update", or of each "layer" (Deep Gradient Compression,
        arXiv 1712.01887).
      quantise: "sign": sign(u_i) times the mean magnitude of what the layer sends (EF-signSGD,
        arXiv 1901.09847; after pruning, sparse ternary compression, arXiv 1903.02891). 1 to 16:
        so many bits a coordinate, 2^bits levels evenly spaced from the least to the largest value
        that the layer sends (arXiv 1610.05492). None: float32.
      stochastic: a coordinate goes to either neighbouring level at random, so that its expectation
        is kept, as in QSGD (arXiv 1610.02132), instead of to the nearest. Needs bits.
    """

    clip: Positive | None = None
    noise_multiplier: NotNegative = 0.0
    keep: PositiveShare = 1.0
    keep_per: KeepPer = "update"
    quantise: Literal["sign"] | Annotated[int, Range(1, 16)] | None = None
    stochastic: bool = False

    def __post_init__(self) -> None:
        checks.fields(self)
        if self.noise_multiplier and self.clip is None:
            raise ValueError("noise_multiplier is in units of clip: set clip too")
        if self.keep == 1:
            checks.unused(self, "keep is 1: every coordinate is sent", "keep_per")
        if self.stochastic and self.quantise in (None, "sign"):
            raise ValueError("stochastic rounding is between levels: set quantise to some bits")

    def describe(self) -> str:
        """Short text for tables, such as "clip 1, noise 0.1" or "top 1% per layer, 4 bits"."""
        parts = []
        if self.clip is not None:
            parts.append(f"clip {self.clip:g}")
        if self.noise_multiplier:
            parts.append(f"noise {self.noise_multiplier:g}")
        if self.keep < 1:
            per = " per layer" if self.keep_per == "layer" else ""
            parts.append(f"top {100 * self.keep:g}%{per}")
        if self.quantise == "sign":
            parts.append("sign")
        elif self.quantise is not None:
            plural = "" if self.quantise == 1 else "s"
            kind = "stochastic " if self.stochastic else ""
            parts.append(f"{kind}{self.quantise} bit{plural}")
        return ", ".join(parts) or "none"


def apply(defence: Defence, key: Array, evidence: Evidence) -> Evidence:
    """Defend a client's evidence.

    Only `values` change: what is known of BatchNorm moments stays known.

    Args:
      defence: what it does.
      key: random key of noise and stochastic rounding.
      evidence: its undefended gradient or weight update.

    Raises:
      ValueError: values that are not finite.
    """
    leaves, structure = jax.tree.flatten(evidence.values)
    update = np.concatenate([np.ravel(leaf) for leaf in leaves])
    if not np.isfinite(update).all():
        raise ValueError("cannot defend values that are not finite: call `evidence.check(net)`")
    ends = np.cumsum([leaf.size for leaf in leaves])[:-1]

    def by_layer(change: Callable[..., np.ndarray], *flat: np.ndarray) -> np.ndarray:
        return np.concatenate(list(map(change, *(np.split(values, ends) for values in flat))))

    noise_key, rounding_key = jax.random.split(key)
    if defence.clip is not None:
        update = _clipped(update, defence.clip)
        if defence.noise_multiplier:
            deviation = defence.noise_multiplier * defence.clip
            update = update + deviation * np.asarray(jax.random.normal(noise_key, update.shape))
    if defence.keep < 1:
        pruned = functools.partial(_pruned, share=defence.keep)
        update = pruned(update) if defence.keep_per == "update" else by_layer(pruned, update)
    sparse = defence.keep < 1
    if defence.quantise == "sign":
        update = by_layer(functools.partial(_signs, sparse=sparse), update)
    elif defence.quantise is not None:
        draws = [jax.random.uniform(rounding_key, update.shape)] if defence.stochastic else []
        rounded = functools.partial(_rounded, bits=defence.quantise, sparse=sparse)
        update = by_layer(rounded, update, *map(np.asarray, draws))
    sent = [
        values.reshape(leaf.shape).astype(leaf.dtype, copy=False)
        for values, leaf in zip(np.split(update, ends), leaves, strict=True)
    ]
    return dataclasses.replace(evidence, values=jax.tree.unflatten(structure, sent))


def _clipped(values: np.ndarray, most: float) -> np.ndarray:
    norm = math.sqrt(float(np.square(values, dtype=np.float64).sum()))
    return values * (most / max(norm, most))


def _pruned(values: np.ndarray, share: float) -> np.ndarray:
    """Keep the round(share * size) largest magnitudes, at least one, and set the others to 0."""
    magnitudes = np.abs(values)
    count = max(1, round(share * values.size))
    least = np.partition(magnitudes, values.size - count)[values.size - count]
    sent = magnitudes > least
    ties = np.flatnonzero(magnitudes == least)
    sent[ties[: count - np.count_nonzero(sent)]] = True
    return np.where(sent, values, 0)


def _signs(layer: np.ndarray, sparse: bool) -> np.ndarray:
    count = np.count_nonzero(layer) if sparse else layer.size
    return np.sign(layer) * (float(np.abs(layer).sum(dtype=np.float64)) / max(count, 1))


def _rounded(
    layer: np.ndarray, up: np.ndarray | float = 0.5, *, bits: int, sparse: bool
) -> np.ndarray:
    """Round to floor(position + up) among the layer's levels: the nearest for `up` = 0.5."""
    sent = layer[layer != 0] if sparse else layer
    if not sent.size or (low := sent.min()) == (high := sent.max()):
        return layer
    step = (high - low) / (2**bits - 1)
    levels = low + step * np.clip(np.floor((layer - low) / step + up), 0, 2**bits - 1)
    return np.where(layer != 0, levels, 0) if sparse else levels


def as_sent(defence: Defence, found: Parameters, wanted: Parameters) -> Parameters:
    """Put an attacker's own gradient through a defence it knows, to compare it with `wanted`.

    Differentiable in `found`, and equal to `wanted` where the secret images are found, if there is
    no noise. Clipped like the victim's. Coordinates that were not sent are 0. A value that was
    sent in few bits stands for the interval that is rounded to it, a sign for its half-line:
    within it nothing is left to match, outside only the distance to it. Noise and stochastic
    rounding are zero on average and left out.

    Args:
      defence: the victim's.
      found: gradient or update of the attacker's images.
      wanted: the defended one, of the same structure.
    """
    if defence.clip is not None:
        norms = jnp.stack([priors.norm(leaf) for leaf in jax.tree.leaves(found)])
        factor = defence.clip / jnp.maximum(priors.norm(norms), defence.clip)
        found = jax.tree.map(lambda a: factor * a, found)
    sparse, quantise = defence.keep < 1, defence.quantise
    if quantise is not None and not defence.stochastic:

        def beyond(a: Array, b: Array) -> Array:
            return b + a - jnp.clip(a, *_interval(b, quantise, sparse))

        found = jax.tree.map(beyond, found, wanted)
    if sparse:
        found = jax.tree.map(lambda a, b: jnp.where(b != 0, a, 0), found, wanted)
    return found


def _interval(sent: Array, quantise: Literal["sign"] | int, sparse: bool) -> tuple[Array, Array]:
    """Find the least and largest values that are quantised to what a layer sent."""
    if quantise == "sign":
        return jnp.where(sent < 0, -jnp.inf, 0), jnp.where(sent > 0, jnp.inf, 0)
    there = sent != 0 if sparse else jnp.ones_like(sent, bool)
    low = jnp.where(there, sent, jnp.inf).min()
    high = jnp.where(there, sent, -jnp.inf).max()
    half = jnp.maximum(high - low, 0) / (2 * (2**quantise - 1))
    return sent - half, sent + half

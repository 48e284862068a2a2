"""What evidence says of the moments that a client's batch had at BatchNorm layers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jinv.net import Moments, Net

MEAN, VAR = "moments.{}.mean", "moments.{}.var"
"""Names of the moments at a BatchNorm layer, counted in forward order, in files of evidence."""
_NAME = re.compile(r"moments\.\d{1,6}\.(mean|var)")


def moments_of_update(
    before: Sequence[Moments],
    after: Sequence[Moments],
    counts: Sequence[int],
    momentum: float | Sequence[float] = 0.1,
) -> tuple[Moments, ...]:
    """Solve running statistics for the batch's moments: (after - (1 - m) before) / m.

    Args:
      before, after: running statistics of every BatchNorm layer in forward order.
      counts: n, values that a channel of each layer saw (images times pixels). torch's running
        variance takes in unbiased variances, n / (n - 1) times the biased ones returned here.
      momentum: m of all layers, or of each, in torch's sense.
    """

    def solved(new: Array, old: Array, m: float) -> Array:
        return (new - (1 - m) * old) / m

    momenta = (momentum,) * len(counts) if isinstance(momentum, int | float) else momentum
    return tuple(
        Moments(
            solved(new.mean, old.mean, m), jnp.maximum(solved(new.var, old.var, m), 0) * (n - 1) / n
        )
        for new, old, n, m in zip(after, before, counts, momenta, strict=True)
    )


def check(net: Net, moments: Sequence[Moments]) -> None:
    """Refuse moments that those of the network's BatchNorm layers cannot be.

    Raises:
      ValueError: names the layer whose moments are misshaped, not finite or below zero.
    """
    if len(moments) != len(net.statistics):
        raise ValueError(f"moments of {len(moments)} BatchNorm layers for {len(net.statistics)}")
    running = net.running_moments()
    for (path, _), found, own in zip(net.statistics, moments, running, strict=True):
        layer = ".".join(map(str, path[:-1]))
        for what, value, like in zip(("mean", "var"), found, own, strict=True):
            array = np.asarray(value)
            if array.shape != like.shape:
                raise ValueError(
                    f"the {what} at {layer} is of shape {array.shape}, not {like.shape}"
                )
            if not np.isfinite(array).all():
                raise ValueError(f"the {what} at {layer} is not finite")
        if np.any(np.asarray(found[1]) < 0):
            raise ValueError(f"the variance at {layer} is below zero")


def pop(state: dict[str, Any], net: Net) -> tuple[Moments, ...] | None:
    """Take the moments out of what was sent; None if there are none.

    Raises:
      ValueError: names those that are missing, or counts those that are too many.
    """
    found = {name: state.pop(name) for name in list(state) if _NAME.fullmatch(name)}
    if not found:
        return None
    count = max(len(net.statistics), 1 + max(int(name.split(".")[1]) for name in found))
    wanted = [form.format(i) for i in range(count) for form in (MEAN, VAR)]
    if lost := [name for name in wanted if name not in found]:
        raise ValueError(
            f"{len(net.statistics)} BatchNorm layers have as many moments; missing: "
            + ", ".join(lost[:10])
        )
    if count > len(net.statistics):
        raise ValueError(f"moments of {count} BatchNorm layers for {len(net.statistics)}")
    arrays: list[Any] = [np.asarray(found[name]) for name in wanted]
    return tuple(Moments(*pair) for pair in zip(arrays[::2], arrays[1::2], strict=True))


def solved(
    sent: Mapping[str, np.ndarray],
    net: Net,
    images: int,
    *,
    new: bool,
    momenta: Sequence[float],
    sides: tuple[int, int],
) -> tuple[Moments, ...]:
    """Solve running statistics under torch's names for the moments of the one batch they took in.

    Args:
      sent: name -> array, also of what is no statistic.
      net: the network as it was before.
      images: of the batch.
      new: the statistics are the new ones, not their changes.
      momenta: of every BatchNorm layer in torch's sense.
      sides: height and width of the images.

    Raises:
      ValueError: statistics that are missing, misshaped, unchanged or not of this momentum.
    """
    if net.counts is None:
        raise ValueError(f"{net.name} does not say how many values its BatchNorm layers see")
    running: list[Any] = jax.tree.map(lambda a: np.asarray(a, np.float64), [*net.running_moments()])
    before = [Moments(*pair) for pair in running]
    names = [tuple(".".join(map(str, path)) for path in pair) for pair in net.statistics]
    if lost := [name for pair in names for name in pair if name not in sent]:
        raise ValueError(
            "statistics: update needs moments or running statistics of every BatchNorm layer; "
            f"missing: {', '.join(lost[:10])}"
        )
    after = []
    for pair, old, momentum in zip(names, before, momenta, strict=True):
        for name, own in zip(pair, old, strict=True):
            if sent[name].shape != own.shape:
                raise ValueError(f"{name} is of shape {sent[name].shape}, not {own.shape}")
        changed: list[Any] = [sent[name].astype(np.float64) for name in pair]
        after.append(Moments(*(a if new else own + a for own, a in zip(old, changed, strict=True))))
        if np.any(after[-1].var < (1 - momentum) * old.var * (1 - 1e-3)):
            raise ValueError(
                f"{pair[1]} gives a variance below zero: is the layer's momentum {momentum}?"
            )
    if all(np.array_equal(a, b) for a, b in zip(_flat(after), _flat(before), strict=True)):
        raise ValueError(
            "the running statistics did not change: the client was in evaluation mode, or they "
            "were not sent"
        )
    counts = net.counts((images, *sides, net.preprocessing.channels))
    return moments_of_update(before, after, counts, momenta)


def _flat(moments: Sequence[Moments]) -> list[Array]:
    return [array for pair in moments for array in pair]

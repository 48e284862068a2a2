"""Running statistics of BatchNorm layers in training, as torch keeps them."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

from jinv.net import Moments, Net, Path, Variables, with_parameters


def with_statistics(
    net: Net,
    variables: Variables,
    moments: Sequence[Moments],
    shape: tuple[int, ...],
    momentum: float | None = None,
) -> Variables:
    """The variables after BatchNorm layers saw a batch: r <- (1 - m) r + m b, as torch does it.

    b is the batch's mean, and its unbiased variance, n / (n - 1) times the biased one.

    Args:
      net: the network.
      variables: its variables before.
      moments: of the batch, biased variances.
      shape: of the batch of images, which decides n.
      momentum: m of all layers; by default each layer's own.

    Raises:
      ValueError: a layer sees one value a channel, which has no variance.
    """
    assert net.counts is not None
    counts = net.counts(shape)
    if min(counts, default=2) < 2:
        raise ValueError(f"BatchNorm cannot learn from one value a channel: images {shape}")
    momenta = net.momenta if momentum is None else (momentum,) * len(counts)
    return with_moments(variables, net.statistics, moments, counts, momenta)


def with_moments(
    variables: Variables,
    statistics: Sequence[tuple[Path, Path]],
    moments: Sequence[Moments],
    counts: Sequence[int],
    momenta: Sequence[float],
) -> Variables:
    """Return the variables of any network after its BatchNorm layers saw a batch.

    Args:
      variables: before.
      statistics: paths of every layer's running mean and variance.
      moments: of the batch, biased variances, in the same order.
      counts: n of every layer: how many values of a channel its moments are of, at least 2.
      momenta: m of every layer, see `with_statistics`.
    """
    for paths, seen, n, m in zip(statistics, moments, counts, momenta, strict=True):
        new = Moments(seen.mean, seen.var * (n / (n - 1)))
        for path, now in zip(paths, new, strict=True):
            # From the variables as they are now: one layer may come twice.
            before: Any = functools.reduce(operator.getitem, path, variables)
            variables = _changed(variables, path, (1 - m) * before + m * now)
        layer: Any = functools.reduce(operator.getitem, paths[0][:-1], variables)
        if _COUNTER in layer:
            variables = _changed(variables, (*paths[0][:-1], _COUNTER), layer[_COUNTER] + 1)
    return variables


_COUNTER = "num_batches_tracked"


def _changed(variables: Variables, path: Path, value: Any) -> dict[Any, Any]:
    """The variables with another value at one path."""
    for key in reversed(path):
        value = {key: value}
    return with_parameters(variables, value)

"""A small attack of every module in `jinv.attacks.ATTACKS`, for the contract all of them keep."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import tiny
from jinv.attacks import begin, deepinversion, gradient_inversion
from jinv.attacks.deepinversion import Phase
from jinv.federated import evidence


def of_deepinversion() -> Any:
    """Two phases of different resolution."""
    config = deepinversion.Config(
        phases=(Phase(4, downscale=2, jitter=1), Phase(5, jitter=2)), coarse="small", warmup=2
    )
    return deepinversion.build(config, [deepinversion.Member(tiny.network())], [0, 3, 6])


def of_begin() -> Any:
    """Two networks jointly."""
    config = dataclasses.replace(begin.CONFIG, phases=(Phase(5, jitter=1),), warmup=2)
    nets = [tiny.network(i, name=f"net{i}") for i in range(2)]
    return deepinversion.build(config, begin.members(nets), [0, 3, 6])


def of_gradient_inversion() -> Any:
    """Two seeds with a consensus and noise, from a gradient of three images."""
    net = tiny.network()
    images = 0.5 * tiny.noise((3, 16, 16, 3), seed=4)
    held, _ = evidence.simulate(net, images, [2, 5, 5], statistics="exact")
    config = gradient_inversion.Config(steps=6, warmup=2, seeds=2, group_from=2, group_every=2)
    return gradient_inversion.build(config, net, held, [2, 5, 5])


EXAMPLES: dict[str, Callable[[], Any]] = {
    "deepinversion": of_deepinversion,
    "begin": of_begin,
    "gradient_inversion": of_gradient_inversion,
}
"""Name in `ATTACKS` -> builder of an attack on three images of 16 px with more than four steps."""

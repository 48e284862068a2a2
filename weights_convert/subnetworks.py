"""Checkpoints of the public code of arXiv 1911.13299 (edge-popup): scores beside weights.

In them a linear layer is a 1x1 convolution, BatchNorm has statistics alone, no layer has a bias,
and every name begins with ``module.``.
"""

from collections.abc import Mapping

import numpy as np

from weights_convert.errors import WeightsError, shown
from weights_convert.layout import Tree, shapes

SCORES = "scores"
WRAPPER = "state_dict"
"""Entry of a checkpoint that holds the network."""
_PREFIX = "module."
_CONSTANTS = {"weight": 1, "bias": 0}


def has_scores(state: Mapping[str, np.ndarray]) -> bool:
    """Tell whether a state_dict is that of a subnetwork."""
    return any(_last(name) == SCORES for name in state)


def completed(state: Mapping[str, np.ndarray], template: Tree) -> dict[str, np.ndarray]:
    """Return a state_dict with what the public code's networks do without.

    Linear layers get two axes. Where no layer has a scale or a bias of its own, scales are 1 and
    biases 0. All other names stay as they are, so that `to_flax` refuses what does not match.

    Args:
        state: arrays in torch's layout by torch's names, as `read` returns them.
        template: the network's tree, with a leaf called scores beside every masked weight.

    Raises:
        WeightsError: the state has no scores.
    """
    if not has_scores(state):
        raise WeightsError(
            "it has no scores: it is an ordinary network's, not a subnetwork's; leave `subnetwork` "
            "(--kept) out"
        )
    wanted = shapes(template)
    found = _without_prefix(state, wanted)
    for name in found.keys() & wanted.keys():
        if np.shape(found[name]) == (*wanted[name], 1, 1):
            found[name] = found[name].reshape(wanted[name])
    constants = _constants(wanted)
    if not constants & found.keys():
        for name in constants:
            found[name] = np.full(wanted[name], _CONSTANTS[_last(name)], np.float32)
    return found


def to_public(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return a subnetwork's state_dict as the public code has it; `WRAPPER` is not part of it.

    Args:
        state: arrays in torch's layout by torch's names, as `from_flax` returns them.

    Raises:
        WeightsError: a layer has a scale or a bias of its own, or the network is none that the
            public code could have.
    """
    shaped = {name: np.shape(value) for name, value in state.items()}
    constants = _constants(shaped)
    own = [n for n in constants if np.any(np.asarray(state[n]) != _CONSTANTS[_last(n)])]
    layers = {_layer(name) for name in state if _last(name) in (SCORES, "running_mean")}
    own += [name for name in state if _layer(name) not in layers]
    if own:
        raise WeightsError(
            f"{shown(min(own))} is none that networks of the public code have: their layers are "
            "convolutions and BatchNorm without scales and biases"
        )
    return {
        _PREFIX + name: value.reshape(*value.shape, 1, 1) if value.ndim == 2 else value
        for name, value in state.items()
        if name not in constants
    }


def _constants(wanted: Mapping[str, tuple[int, ...]]) -> set[str]:
    """Names of scales and biases."""
    return {n for n, shape in wanted.items() if _last(n) in _CONSTANTS and len(shape) == 1}


def _without_prefix(
    state: Mapping[str, np.ndarray], wanted: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """Remove what stands before the names of all layers, such as ``model.``."""
    ends = [name for name in wanted if _last(name) == SCORES]
    heads = [{n.removesuffix(end) for n in state if n.endswith(end)} for end in ends]
    common = set.intersection(*heads) if heads else set()
    prefix = min(common, key=len, default="")
    return {name.removeprefix(prefix): value for name, value in state.items()}


def _layer(name: str) -> str:
    return name.rpartition(".")[0]


def _last(name: str) -> str:
    return name.rpartition(".")[2]

"""Between torch's state_dict and a Flax tree whose paths are torch's names: transposes alone.

A leaf's torch name is its path joined by dots. Convolution kernels are OIHW in torch and HWIO
in Flax, linear weights (out, in) and (in, out); everything else is the same on both sides.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from weights_convert.errors import WeightsError

Path = tuple[str | int, ...]
Tree = Mapping[Any, Any]

_COUNTER = "num_batches_tracked"  # absent from files of torch < 0.4.1; an int64 in torch
_TO_FLAX = {4: (2, 3, 1, 0), 2: (1, 0)}
_TO_TORCH = {4: (3, 2, 0, 1), 2: (1, 0)}


def to_flax(state: Mapping[str, np.ndarray], template: Tree) -> dict:
    """Arrange a state_dict as the tree of a Flax network.

    Args:
        state: arrays in torch's layout by torch's names, as `read` returns them.
        template: nested dict with str or int keys and leaves that have ``shape`` and ``dtype``.

    Returns:
        A nested dict with the template's keys, shapes and element types, of contiguous arrays
        that share no memory with ``state``. ``num_batches_tracked`` that the state lacks is 0.

    Raises:
        WeightsError: names every missing, unexpected, misshaped or otherwise unusable tensor.
    """
    leaves = _by_name(template)
    problems = _Problems()
    for name in state.keys() - leaves.keys():
        problems.add("unexpected (in the file, not in the network)", name)
    arrays = {path: _fit(name, leaf, state, problems) for name, (path, leaf) in leaves.items()}
    problems.raise_any()
    return _nested(template, arrays)


def from_flax(variables: Tree) -> dict[str, np.ndarray]:
    """Arrange the tree of a Flax network as a state_dict: the inverse of `to_flax`.

    Args:
        variables: nested dict with str or int keys and NumPy or JAX arrays as leaves.

    Returns:
        Contiguous arrays in torch's layout by torch's names, in the order of the tree, numbered
        children by their number. ``num_batches_tracked`` is int64; bfloat16 becomes float32.
    """
    return {
        name: _to_torch(name, path, np.asarray(leaf))
        for name, (path, leaf) in _by_name(variables).items()
    }


class _Problems:
    """Names of unusable tensors, grouped by what is wrong with them."""

    def __init__(self) -> None:
        self._groups: dict[str, list[tuple[str, str]]] = {}

    def add(self, group: str, name: str, detail: str = "") -> None:
        self._groups.setdefault(group, []).append((name, detail))

    def raise_any(self) -> None:
        """Raise one error that lists them all, if there are any."""
        if not self._groups:
            return
        lines = ["the weights do not fit the network; check that the file is of this network"]
        for group, entries in sorted(self._groups.items()):
            lines.append(f"{len(entries)} {group}:")
            entries.sort(key=lambda entry: _natural(entry[0].split(".")))
            lines.extend(f"  {name}{detail}" for name, detail in entries)
        raise WeightsError("\n".join(lines))


def _fit(
    name: str, leaf: Any, state: Mapping[str, np.ndarray], problems: _Problems
) -> np.ndarray | None:
    """Return one leaf's array, or None after noting why there is none."""
    shape, dtype = tuple(leaf.shape), np.dtype(leaf.dtype)
    if name not in state:
        if name.split(".")[-1] == _COUNTER:
            return np.zeros(shape, dtype)
        problems.add("missing (in the network, not in the file)", name)
        return None
    array = np.asarray(state[name])
    wanted = _permuted(shape, _axes(name, len(shape), _TO_TORCH))
    if array.shape != wanted:
        problems.add("misshaped", name, f": file {array.shape}, network {wanted}")
        return None
    if _kind(array.dtype) != _kind(dtype):
        problems.add("of the wrong type", name, f": file {array.dtype}, network {dtype}")
        return None
    if not _fits(array, dtype):
        problems.add("not finite, or out of range", name, f": as {dtype}")
        return None
    axes = _axes(name, array.ndim, _TO_FLAX)
    return array.transpose(axes).astype(dtype, order="C", copy=True)


def _fits(array: np.ndarray, dtype: np.dtype) -> bool:
    """Tell whether all values are finite and stay so in ``dtype``."""
    if _kind(dtype) == "int" and array.size:
        limits = np.iinfo(dtype)
        return int(array.min()) >= limits.min and int(array.max()) <= limits.max
    with np.errstate(over="ignore"):
        return bool(np.isfinite(array).all() and np.isfinite(array.astype(dtype)).all())


def _kind(dtype: np.dtype) -> str:
    if dtype.name == "bfloat16" or np.issubdtype(dtype, np.floating):
        return "float"
    return "int" if np.issubdtype(dtype, np.integer) else dtype.name


def _to_torch(name: str, path: Path, array: np.ndarray) -> np.ndarray:
    if path[-1] == _COUNTER:
        return array.astype(np.int64, order="C")
    dtype = np.dtype(np.float32) if array.dtype.name == "bfloat16" else array.dtype
    return array.transpose(_axes(name, array.ndim, _TO_TORCH)).astype(dtype, order="C")


def _axes(name: str, rank: int, table: Mapping[int, tuple[int, ...]]) -> tuple[int, ...]:
    unchanged = tuple(range(rank))
    return table.get(rank, unchanged) if name.split(".")[-1] == "weight" else unchanged


def _permuted(shape: Sequence[int], axes: Sequence[int]) -> tuple[int, ...]:
    return tuple(shape[axis] for axis in axes)


def _natural(path: Sequence[str | int]) -> list[tuple[float, str]]:
    """Sort key: numbers by value and before words."""
    return [(int(k), "") if str(k).isdecimal() else (math.inf, str(k)) for k in path]


def _by_name(tree: Tree) -> dict[str, tuple[Path, Any]]:
    leaves: dict[str, tuple[Path, Any]] = {}
    for path, leaf in _walk(tree, ()):
        name = ".".join(map(str, path))
        if name in leaves:
            raise WeightsError(f"two leaves of the tree have the name {name}; rename one")
        leaves[name] = path, leaf
    if not leaves:
        raise WeightsError("the tree has no leaves; pass the network's variables")
    return leaves


def _walk(tree: Tree, path: Path) -> Iterator[tuple[Path, Any]]:
    """Yield paths and leaves in the tree's order, numbered children by their number."""
    numbered = all(str(key).isdecimal() for key in tree)
    for key in sorted(tree, key=lambda key: int(key)) if numbered else tree:
        if isinstance(tree[key], Mapping):
            yield from _walk(tree[key], (*path, key))
        else:
            yield (*path, key), tree[key]


def _nested(tree: Tree, arrays: Mapping[Path, np.ndarray | None], path: Path = ()) -> dict:
    """Copy the tree's nesting, empty dicts included, with arrays for leaves."""
    result: dict[Any, Any] = {}
    for key, child in tree.items():
        here = (*path, key)
        inner = isinstance(child, Mapping)
        result[key] = _nested(child, arrays, here) if inner else arrays[here]
    return result

"""Layers by their names: which are meant, which are absent, and which of these got lost."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

import weights_convert
from jinv.net import Net, Parameters


def names_of(tree: Parameters) -> set[str]:
    """Return the names of a tree's arrays."""
    return set(weights_convert.shapes(tree))


def check(net: Net, template: Parameters, values: Parameters, frozen: Sequence[str]) -> None:
    """Tell layers that were not trained from those that got lost.

    Args:
      net: the network.
      template: its parameters.
      values: what was sent, a part of these.
      frozen: beginnings of the names of layers that were not trained.

    Raises:
      ValueError: names layers that got lost, and names of `frozen` that mean none.
    """
    names, present = names_of(template), names_of(values)
    absent = names - present
    for begin in frozen:
        meant = {name for name in names if begins(name, begin)}
        if not meant:
            raise ValueError(f"frozen: {no_layer(begin, names)}")
        if meant & present:
            raise ValueError(f"frozen: {begin}, but {min(meant & present)} was sent")
        absent -= meant
    if not frozen:
        # BatchNorm layers often stay as they are, or with the client, or are trained alone.
        layers = {".".join(map(str, _parameters_of(path))) for path, _ in net.statistics}
        norms = {name for name in names if name.rpartition(".")[0] in layers}
        kept = names - norms if not norms & present else norms if present <= norms else names
        flags: dict[str, Any] = {}
        for name in sorted(kept):
            node, parts = flags, name.split(".")
            for part in parts[:-1]:
                node = node.setdefault(part, {})
            node[parts[-1]] = name in present
        absent = set(_lost(flags, "", top=True))
    if absent:
        listed = ", ".join(sorted(absent)[:10]) + (", ..." if len(absent) > 10 else "")
        raise ValueError(
            f"{len(absent)} of {len(names)} arrays are missing while others beside them are there: "
            f"{listed}; if they were not trained, name their layers with frozen: [...]"
        )


def _parameters_of(statistic: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the path of a BatchNorm layer's parameters, of Linen in another collection."""
    first, *rest = statistic[:-1] or ("",)
    return ("params" if first == "batch_stats" else first, *rest)


def _lost(flags: Mapping[str, Any], path: str, top: bool = False) -> Iterator[str]:
    """Find absent names that are no part of their own: (names, present or not) nested by layers.

    A network may lack parts, and a row of numbered layers its first and last ones. Inside a block,
    a layer does not stand alone.
    """
    order = sorted(flags, key=_number)
    used = [i for i, key in enumerate(order) if _any(flags[key])]
    numbered = all(key.isdecimal() for key in flags)
    row = order[used[0] : used[-1] + 1] if numbered and used else order
    for key in row:
        value, here = flags[key], f"{path}{key}"
        if isinstance(value, Mapping):
            if _any(value):
                yield from _lost(value, f"{here}.", top and len(flags) == 1)
            elif numbered or not top:
                yield from _all_names(value, here)
        elif not value:
            yield here


def _number(key: str) -> int:
    return int(key) if key.isdecimal() else 0


def begins(name: str, begin: str) -> bool:
    """Say whether a layer's name begins with these parts: `layer4.0.conv1` with `layer4`."""
    return name == begin or name.startswith(f"{begin}.")


def no_layer(begin: str, names: Iterable[str]) -> str:
    """Say that no layer's name begins so, and which come near."""
    parts = [name.split(".") for name in names]
    known = {".".join(part[:i]) for part in parts for i in range(1, len(part) + 1)}
    near = difflib.get_close_matches(str(begin), sorted(known)) or sorted({p[0] for p in parts})
    return f"no layer's name begins with {begin!r}; near it: {', '.join(near[:10])}"


def without_unchanged(tree: Parameters, frozen: Sequence[str], path: str = "") -> dict[Any, Any]:
    """Return a tree of changes without the frozen layers of which it says that nothing changed."""
    kept: dict[Any, Any] = {}
    for key, value in tree.items():
        name = f"{path}{key}"
        if isinstance(value, Mapping):
            if inner := without_unchanged(value, frozen, f"{name}."):
                kept[key] = inner
        elif np.any(value) or not any(begins(name, begin) for begin in frozen):
            kept[key] = value
    return kept


def _any(value: Any) -> bool:
    return any(map(_any, value.values())) if isinstance(value, Mapping) else value


def _all_names(value: Any, path: str) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _all_names(inner, f"{path}.{key}")
    else:
        yield path

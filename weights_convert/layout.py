"""Between torch's state_dict and a Flax tree whose paths are torch's names: transposes alone.

A leaf's torch name is its path joined by dots. What is called ``weight`` or ``scores`` is OIHW in
torch and HWIO in Flax if it has four axes, (out, in) and (in, out) if it has two. Everything else
keeps torch's axes, also tables such as ``relative_position_bias_table``. Whole numbers are int64 in
torch, int32 in JAX.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from weights_convert.errors import WeightsError, shown
from weights_convert.renames import namings, natural

Path = tuple[str | int, ...]
Tree = Mapping[Any, Any]
Leaves = Mapping[str, tuple[Path, Any]]

SHOWN = 10  # names of a list in an error message; the others are counted
# Last names of what training does not change.
BUFFERS = ("running_mean", "running_var", "num_batches_tracked", "relative_position_index")
_COUNTER = "num_batches_tracked"  # absent from files of torch < 0.4.1; an int64 in torch
_TO_FLAX = {4: (2, 3, 1, 0), 2: (1, 0)}
_KERNELS = ("weight", "scores")  # scores are those of a subnetwork's weights
_WIDENED = {"int32": np.int64, "bfloat16": np.float32}
_TO_TORCH = {4: (3, 2, 0, 1), 2: (1, 0)}

# Attributes under which wrappers hold a network, and objectives their own weights.
_WRAPPERS = frozenset(
    "module _module model _model net network backbone encoder _orig_mod".split()  # noqa: SIM905
)
_OBJECTIVES = frozenset("criterion loss loss_fn loss_func loss_function metric metrics".split())  # noqa: SIM905
# Words of names of single numbers that wrappers and training loops keep beside the weights.
_BOOKKEEPING = frozenset(
    "acc acc1 accuracy averaged best decay epoch iteration loss lr step steps updates".split()  # noqa: SIM905
)
_TREATED = {
    "weight_mask": "it was pruned: call torch.nn.utils.prune.remove, then save it again",
    "parametrizations": "its weights are parametrised: call remove_parametrizations, then save it",
    "weight_g": "its weights are split into norm and direction: call remove_weight_norm, then save",
    "_packed_params": "it is quantised: save the float network",
    "zero_point": "it is quantised: save the float network",
    "scores": "it is a subnetwork's: say which share of the weights stays, `subnetwork: {kept: K}`",
}
# Heads that only training needs, and the module that each hangs on.
_AUXILIARY = {"aux1": "inception4a", "aux2": "inception4d", "AuxLogits": "Mixed_6e"}
# Where torchvision's first MNASNet had as many channels at every width.
_MNASNET_STEM = (*(f"layers.{i}." for i in (0, 1, 3, 4, 6, 7)), "layers.8.0.")


def to_flax(state: Mapping[str, np.ndarray], template: Tree, *, partial: bool = False) -> dict:
    """Arrange a state_dict as the tree of a Flax network.

    Args:
        state: arrays in torch's layout by torch's names, as `read` returns them; see `match` for
            names that differ and for entries that belong to no layer.
        template: nested dict with str or int keys and leaves that have ``shape`` and ``dtype``.
        partial: leaves that the state lacks are left out, instead of missed.

    Returns:
        A nested dict with the template's keys, shapes and element types, of contiguous arrays
        that share no memory with ``state``. ``num_batches_tracked`` is rounded; one that is empty
        or that the state lacks is 0, and so are the auxiliary heads of GoogLeNet and Inception
        that it lacks: torchvision drops them after training, and the logits do without.

    Raises:
        WeightsError: says how many tensors are missing, unexpected, misshaped or otherwise
            unusable, and names them, the first ten of each kind.
    """
    leaves = _by_name(template)
    problems = _Problems()
    named = _matched(state, leaves, partial, problems)
    absent = _absent_heads(named, leaves)
    arrays = {
        path: _zeros(leaf) if name in absent else _fit(name, leaf, named, problems)
        for name, (path, leaf) in leaves.items()
        if not partial or name in named
    }
    problems.raise_any(named, leaves)
    return _nested(template, arrays, keep_empty=not partial)


def match(
    state: Mapping[str, np.ndarray], template: Tree, *, partial: bool = False
) -> dict[str, np.ndarray]:
    """Return a state's arrays under the network's own names.

    A prefix under which all of the network's names are found, such as ``model.``, is removed; with
    ``partial`` only one that is made of usual words. Names that others give to the same layers
    (see `naming`) are replaced if the state has all of them. Dropped are entries that belong to no
    layer: single numbers such as ``n_averaged`` and ``epoch``, weights of a loss, counters of
    layers that the network keeps without, and whatever lies outside the prefix.

    Args:
        state: arrays by torch's names.
        template: as for `to_flax`.
        partial: the state need not have all of the network's names.

    Raises:
        WeightsError: names that are not the network's, or several networks in one state.
    """
    leaves, problems = _by_name(template), _Problems()
    named = _matched(state, leaves, partial, problems)
    problems.raise_any(named, leaves)
    return named


def naming(state: Mapping[str, np.ndarray], template: Tree) -> str | None:
    """Return whose names a state has, such as "timm's"; None if they are the network's own.

    Names and shapes do not tell all of what a network computes: timm has some that differ from
    torchvision's of the same names in the padding or in BatchNorm's epsilon.
    """
    found = _other_names(state, _by_name(template))
    return found[0] if found else None


def shapes(template: Tree) -> dict[str, tuple[int, ...]]:
    """Return the shape in torch's layout of every leaf of a Flax tree, by torch's names."""
    return {
        name: _permuted(tuple(leaf.shape), _axes(name, len(leaf.shape), _TO_TORCH))
        for name, (_, leaf) in _by_name(template).items()
    }


def from_flax(variables: Tree) -> dict[str, np.ndarray]:
    """Arrange the tree of a Flax network as a state_dict: the inverse of `to_flax`.

    Args:
        variables: nested dict with str or int keys and NumPy or JAX arrays as leaves.

    Returns:
        Contiguous arrays in torch's layout by torch's names, in the order of the tree, numbered
        children by their number. ``num_batches_tracked`` and int32 become int64, bfloat16 float32.

    Raises:
        WeightsError: names layers that are not finite and variances below zero, or two leaves
            that have one name.
    """
    leaves, problems = _by_name(variables), _Problems()
    for name, (_, leaf) in leaves.items():
        array = np.asarray(leaf)
        if not _fits(array, array.dtype):
            problems.add(_UNFIT, name)
        elif _is_variance(name, leaves) and np.any(array < 0):
            problems.add(_NEGATIVE, name)
    problems.raise_any({}, leaves)
    return {name: _to_torch(name, path, np.asarray(leaf)) for name, (path, leaf) in leaves.items()}


_MISSING = "missing (in the network, not in the file)"
_UNEXPECTED = "unexpected (in the file, not in the network)"
_MISSHAPED = "misshaped"
_UNFIT = "not finite or out of range"
_NEGATIVE = "below zero, which no variance is"


class _Problems:
    """Names of unusable tensors, grouped by what is wrong with them."""

    def __init__(self) -> None:
        self._groups: dict[str, list[tuple[str, str]]] = {}

    def add(self, group: str, name: str, detail: str = "") -> None:
        self._groups.setdefault(group, []).append((name, detail))

    def raise_any(self, state: Mapping[str, np.ndarray], leaves: Leaves) -> None:
        """Raise one error that sums them up and names the first of each kind, if there are any."""
        if not self._groups:
            return
        counts = [f"{len(found)} {group.split(' (')[0]}" for group, found in self._ordered()]
        classes = self._classes(state, leaves)
        lines = [
            f"the weights do not fit the network's {len(leaves)} tensors: {', '.join(counts)}; "
            + self._advice(state, leaves, classes)
        ]
        for group, entries in self._ordered():
            lines.append(f"{len(entries)} {group}:")
            entries.sort(key=lambda entry: natural(entry[0].split(".")))
            lines.extend(f"  {shown(name)}{detail}" for name, detail in entries[:SHOWN])
            if len(entries) > SHOWN:
                last = shown(entries[-1][0])
                lines.append(f"  and {len(entries) - SHOWN} more, the last of them {last}")
        raise WeightsError("\n".join(lines), classes)

    def _ordered(self) -> list[tuple[str, list[tuple[str, str]]]]:
        return sorted(self._groups.items())

    def _advice(self, state: Mapping[str, np.ndarray], leaves: Leaves, classes: int | None) -> str:
        """Say what is the likely cause."""
        if classes is not None:
            return f"only the last layer differs: classes: {classes} fits the head of this file"
        strange = [name for name, _ in self._groups.get(_UNEXPECTED, ())]
        for part, cause in _TREATED.items():
            if any(part in name.split(".") for name in strange):
                return cause
        wrong = [name for name, _ in self._groups.get(_MISSHAPED, ())]
        if _is_first_mnasnet(state) and wrong and all(n.startswith(_MNASNET_STEM) for n in wrong):
            return (
                "the file is of torchvision's first version of MNASNet, whose first layers have "
                "other widths: it is another network"
            )
        if not self._groups.keys() & {_MISSING, _UNEXPECTED, _MISSHAPED}:
            return "the file is of this network, but its values cannot be used"
        missing = sum(not _is_counter(name) for name, _ in self._groups.get(_MISSING, ()))
        if strange and missing == sum(not _is_counter(name) for name in leaves):
            first = next(iter(leaves))
            return (
                f"not one name is the network's: the file has {shown(min(strange), 60)}, the "
                f"network {first}; check that the file is of this network and has its names"
            )
        return "check that the file is of this network"

    def _classes(self, state: Mapping[str, np.ndarray], leaves: Leaves) -> int | None:
        """Return the classes of the file's last layer, if that alone does not fit, and by these."""
        entries = self._groups.get(_MISSHAPED, [])
        if len(self._groups) != 1 or len({n.rpartition(".")[0] for n, _ in entries}) != 1:
            return None
        pairs = set()
        for name, _ in entries:
            shape = tuple(leaves[name][1].shape)
            wanted = _permuted(shape, _axes(name, len(shape), _TO_TORCH))
            found = np.shape(state[name])
            if len(found) != len(wanted) or found[1:] != wanted[1:]:
                return None
            pairs.add((found[0], wanted[0]))
        return pairs.pop()[0] if len(pairs) == 1 and len(entries) < 3 else None


def _matched(
    state: Mapping[str, np.ndarray], leaves: Leaves, partial: bool, problems: _Problems
) -> dict[str, np.ndarray]:
    """Return the state's arrays by the network's names, after noting names that are not."""
    others = None if partial else _other_names(state, leaves)
    if others is None:
        return _under(state, leaves, partial, problems)
    names = others[1]
    found = _under(state, {names[name]: leaf for name, leaf in leaves.items()}, False, problems)
    return {
        name: _reshaped(name, found[names[name]], leaf)
        for name, (_, leaf) in leaves.items()
        if names[name] in found
    }


def _other_names(
    state: Mapping[str, np.ndarray], leaves: Leaves
) -> tuple[str, dict[str, str]] | None:
    """Return whose names a state has, if not the network's, and theirs by the network's."""
    if _prefix(state, _needed(leaves), False)[1]:
        return None
    for origin, names in namings(leaves):
        if _prefix(state, {names[name] for name in _needed(leaves)}, False)[1]:
            return origin, names
    return None


def _needed(leaves: Leaves) -> set[str]:
    """Names without which there is no network."""
    heads = _heads(leaves)
    return {name for name in leaves if not _is_counter(name) and name not in heads}


def _heads(leaves: Leaves) -> dict[str, str]:
    """Return the head of every name that is of an auxiliary one."""
    modules = {name.partition(".")[0] for name in leaves}
    heads = {head for head, trunk in _AUXILIARY.items() if trunk in modules}
    return {name: head for name in leaves if (head := name.partition(".")[0]) in heads}


def _absent_heads(state: Mapping[str, Any], leaves: Leaves) -> set[str]:
    """Names of auxiliary heads of which the state has nothing."""
    heads = _heads(leaves)
    present = {heads[name] for name in state if name in heads}
    return {name for name, head in heads.items() if head not in present}


def _zeros(leaf: Any) -> np.ndarray:
    return np.zeros(tuple(leaf.shape), np.dtype(leaf.dtype))


def _reshaped(name: str, value: np.ndarray, leaf: Any) -> np.ndarray:
    """Give a layer that others hold with more or fewer axes the network's.

    A linear layer may be a convolution over the whole map, and a scale a channel have axes of one.
    """
    value, shape = np.asarray(value), tuple(leaf.shape)
    wanted = _permuted(shape, _axes(name, len(shape), _TO_TORCH))
    fits = value.ndim != len(wanted) and value.size == math.prod(wanted)
    return value.reshape(wanted) if fits and value.shape[:1] == wanted[:1] else value


def _under(
    state: Mapping[str, np.ndarray], leaves: Leaves, partial: bool, problems: _Problems
) -> dict[str, np.ndarray]:
    """Return the state's arrays without a prefix, after noting names that are none of these."""
    wanted = _needed(leaves)
    prefix, whole = _prefix(state, wanted, partial)
    added = "" if prefix or whole else _lost_prefix(state, wanted, partial)
    named = {}
    for name, value in state.items():
        inner = added + name.removeprefix(prefix)
        if not name.startswith(prefix):
            if not whole:
                problems.add(_UNEXPECTED, name)
        elif inner in leaves:
            named[inner] = value
        elif not _is_no_layer(inner, np.asarray(value), leaves):
            problems.add(_UNEXPECTED, name)
    return named


def _prefix(state: Mapping[str, Any], wanted: set[str], partial: bool) -> tuple[str, bool]:
    """Find the prefix of the network's names, and tell whether all of them have it."""
    counts: Counter[str] = Counter()
    for name in state:
        parts = name.split(".")
        for i in range(len(parts)):
            if ".".join(parts[i:]) in wanted:
                counts["".join(f"{part}." for part in parts[:i])] += 1
    whole = [prefix for prefix, count in counts.items() if count == len(wanted)]
    if "" in whole:
        return "", True
    if len(whole) > 1:
        names = ", ".join(shown(prefix.rstrip("."), 40) for prefix in sorted(whole)[:SHOWN])
        raise WeightsError(f"there are several such networks ({names}): {CHOOSE}")
    if whole:
        return whole[0], True
    if partial:
        # A part of a network may fit another part by chance.
        for prefix in [p for p in counts if not set(p.split(".")[:-1]) <= _WRAPPERS]:
            del counts[prefix]
    # Of prefixes that fit equally the shortest.
    return max(counts, key=lambda p: (counts[p], -len(p)), default=""), False


CHOOSE = (
    "choose one by its name, read(path, key=NAME), or write it to a file of its own with "
    "jinv convert --key NAME"
)


def _lost_prefix(state: Mapping[str, Any], wanted: set[str], partial: bool) -> str:
    """Find the prefix that all of the network's own names have, and those of the file lack."""
    first = min(wanted, default="").split(".")
    for i in range(1, len(first)):
        prefix = "".join(f"{part}." for part in first[:i])
        if not all(name.startswith(prefix) for name in wanted):
            break
        inner = {name.removeprefix(prefix) for name in wanted}
        if inner <= state.keys() or (
            partial and state.keys() & inner and not state.keys() & wanted
        ):
            return prefix
    return ""


def _is_first_mnasnet(state: Mapping[str, np.ndarray]) -> bool:
    first, block = state.get("layers.0.weight"), state.get("layers.8.0.layers.0.weight")
    return first is not None and block is not None and np.shape(first) == (32, 3, 3, 3)


def _is_counter(name: str) -> bool:
    return name.rpartition(".")[2] == _COUNTER


def _is_variance(name: str, names: Mapping[str, Any]) -> bool:
    """Tell whether a leaf is torch's running variance, or Flax's, which has a mean beside it."""
    layer, _, last = name.rpartition(".")
    return last == "running_var" or (last == "var" and f"{layer}.mean" in names)


def _is_no_layer(name: str, value: np.ndarray, leaves: Leaves) -> bool:
    """Tell whether an entry that is not of the network is clearly no part of another one."""
    first, _, rest = name.partition(".")
    if _is_counter(name):
        layer = name.removesuffix(_COUNTER)
        return any(f"{layer}{last}" in leaves for last in ("running_mean", "mean", "weight"))
    if rest:
        return first in _OBJECTIVES
    whole = _kind(value.dtype) == "int" and value.size == 1
    return value.size <= 1 and (whole or bool(_BOOKKEEPING & set(name.split("_"))))


def _fit(
    name: str, leaf: Any, state: Mapping[str, np.ndarray], problems: _Problems
) -> np.ndarray | None:
    """Return one leaf's array, or None after noting why there is none."""
    shape, dtype = tuple(leaf.shape), np.dtype(leaf.dtype)
    counter = _is_counter(name)
    if name not in state:
        if counter:
            return _zeros(leaf)
        problems.add(_MISSING, name)
        return None
    array = np.asarray(state[name])
    wanted = _permuted(shape, _axes(name, len(shape), _TO_TORCH))
    if counter and array.size <= 1 and math.prod(shape) == 1:
        # Servers average counters, and lose or add an axis.
        array = np.asarray(array if array.size else 0).reshape(shape)
        if _kind(array.dtype) == "float":
            array = np.rint(array.astype(np.float64))
    if array.shape != wanted:
        problems.add(_MISSHAPED, name, f": file {array.shape}, network {wanted}")
        return None
    if _kind(array.dtype) != _kind(dtype) and not (counter and _kind(array.dtype) == "float"):
        problems.add("of the wrong type", name, f": file {array.dtype}, network {dtype}")
        return None
    if not _fits(array, dtype):
        problems.add(_UNFIT, name, f": as {dtype}")
        return None
    if _is_variance(name, state) and array.size and array.min() < 0:
        problems.add(_NEGATIVE, name)
        return None
    axes = _axes(name, array.ndim, _TO_FLAX)
    return array.transpose(axes).astype(dtype, order="C", copy=True)


def _fits(array: np.ndarray, dtype: np.dtype) -> bool:
    """Tell whether all values are finite and stay so in ``dtype``."""
    if not np.isfinite(array).all():
        return False
    if _kind(dtype) == "int" and array.size:
        limits = np.iinfo(dtype)
        return int(array.min()) >= limits.min and int(array.max()) <= limits.max
    with np.errstate(over="ignore"):
        return bool(np.isfinite(array.astype(dtype)).all())


def _kind(dtype: np.dtype) -> str:
    if dtype.name == "bfloat16" or np.issubdtype(dtype, np.floating):
        return "float"
    return "int" if np.issubdtype(dtype, np.integer) else dtype.name


def _to_torch(name: str, path: Path, array: np.ndarray) -> np.ndarray:
    if path[-1] == _COUNTER:
        return np.rint(array).astype(np.int64, order="C")
    # JAX has no int64 unless asked, NumPy no bfloat16.
    dtype = np.dtype(_WIDENED.get(array.dtype.name, array.dtype))
    return array.transpose(_axes(name, array.ndim, _TO_TORCH)).astype(dtype, order="C")


def _axes(name: str, rank: int, table: Mapping[int, tuple[int, ...]]) -> tuple[int, ...]:
    unchanged = tuple(range(rank))
    return table.get(rank, unchanged) if name.split(".")[-1] in _KERNELS else unchanged


def _permuted(shape: Sequence[int], axes: Sequence[int]) -> tuple[int, ...]:
    return tuple(shape[axis] for axis in axes)


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


def _nested(
    tree: Tree, arrays: Mapping[Path, np.ndarray | None], path: Path = (), *, keep_empty: bool
) -> dict:
    """Copy the tree's nesting with arrays for leaves that have one, and perhaps empty dicts."""
    result: dict[Any, Any] = {}
    for key, child in tree.items():
        here = (*path, key)
        if isinstance(child, Mapping):
            inner = _nested(child, arrays, here, keep_empty=keep_empty)
            if inner or keep_empty:
                result[key] = inner
        elif here in arrays:
            result[key] = arrays[here]
    return result

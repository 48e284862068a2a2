"""What a federated-learning attacker holds, and what only the victim and the scorer know.

`Evidence` is one gradient or weight update with its circumstances; `Secret` the images and labels
behind it. Attacks take `Evidence`, scores take both. `simulate` makes the two from a network and
images; files carry evidence that was captured elsewhere.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import inspect
import json
import math
import numbers
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import weights_convert
from jinv import checks, files, image
from jinv.federated import layers, moments
from jinv.federated.moments import moments_of_update
from jinv.files import write_atomic
from jinv.models import registry
from jinv.net import (
    Moments,
    Net,
    Parameters,
    Variables,
    as_parameters,
    check_net,
    parameters,
    plain,
    with_parameters,
)
from jinv.objective.terms import cross_entropy

__all__ = ["moments_of_update"]
Statistics = Literal["none", "running", "exact", "update"]
_WITH_MOMENTS = ("exact", "update")


@dataclasses.dataclass(frozen=True)
class Local:
    """Several local SGD steps before the client answers (FedAvg).

    Attributes:
      lr: learning rate.
      batches: indices of the images of every step, in order.
    """

    lr: float
    batches: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if not _is_number(self.lr) or not 0 < self.lr < math.inf:
            raise ValueError(f"local training needs a positive lr, not {self.lr!r}")
        object.__setattr__(self, "lr", float(self.lr))
        if not _is_list(self.batches) or not all(map(_is_list, self.batches)):
            raise ValueError(
                f"local batches are lists of image numbers, one a step, not {self.batches!r}"
            )
        batches = tuple(tuple(_whole("an image", i) for i in batch) for batch in self.batches)
        if not batches or not all(batches):
            raise ValueError("local training needs steps of at least one image each")
        object.__setattr__(self, "batches", batches)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim > 0)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _whole(what: str, value: Any) -> int:
    """Return a whole number of Python's, also of NumPy's; ValueError if it is another thing."""
    if not isinstance(value, bool | np.bool_):
        with contextlib.suppress(TypeError):
            return operator.index(value)
    raise ValueError(f"{what} must be a whole number, not {value!r}")


def _truth(what: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{what} is true or false, not {value!r}")
    return bool(value)


@dataclasses.dataclass(frozen=True)
class Circumstances:
    """How evidence came to be: all of `Evidence` but its numbers. An attack's program fits these.

    Attributes:
      images, training, statistics, local, frozen: see `Evidence`.
    """

    images: int
    training: bool
    statistics: Statistics
    local: Local | None
    frozen: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What an attacker holds.

    Attributes:
      values: tree like the network's `parameters`: the gradient of the mean cross-entropy, or with
        `local` the weights after minus before. Layers that are absent were not trained.
      images: K, how many images are behind it.
      training: the victim's BatchNorm layers normalised with the batch's own moments.
      statistics: what is known of the moments at BatchNorm layers: "none"; the network's "running"
        ones, a weak prior; those of the victim's batch, "exact"; or solved from a client's new
        running statistics, "update".
      moments: of every BatchNorm layer in forward order, for "exact" and "update".
      local: circumstances of a weight update, None for a gradient.
      frozen: beginnings of the names of layers that are absent because they were not trained. They
        need no mention where they are whole parts of the network, the first or last of numbered
        layers, or all BatchNorm layers.
    """

    values: Parameters
    images: int
    training: bool = False
    statistics: Statistics = "none"
    moments: tuple[Moments, ...] | None = None
    local: Local | None = None
    frozen: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "images", _whole("images", self.images))
        object.__setattr__(self, "training", _truth("training", self.training))
        checks.fields(self)
        if self.images < 1:
            raise ValueError(f"evidence is of at least one image, not {self.images}")
        if (self.moments is not None) != (self.statistics in _WITH_MOMENTS):
            raise ValueError(
                f"{self.statistics!r} statistics and moments do not go together: give the moments "
                f"of every BatchNorm layer with statistics {' or '.join(_WITH_MOMENTS)}, and only "
                "with these"
            )
        if self.local is not None:
            used = {i for batch in self.local.batches for i in batch}
            if len(used) != self.images or min(used) != 0 or max(used) != self.images - 1:
                raise ValueError(f"local batches must use images 0 to {self.images - 1}, all")
        object.__setattr__(self, "frozen", tuple(self.frozen))

    @property
    def circumstances(self) -> Circumstances:
        """All but the values and moments."""
        return Circumstances(self.images, self.training, self.statistics, self.local, self.frozen)

    def check(self, net: Net) -> None:
        """Raise ValueError naming every layer that does not fit the network."""
        self.fitted(net)

    def fitted(self, net: Net) -> Evidence:
        """Return the same with the keys and element types of the network's parameters.

        Raises:
          ValueError: names the layers that are lost, misshaped or not finite, and moments that are
            none.
        """
        if not jax.tree.leaves(self.values):
            raise ValueError("evidence has no values: not one layer was sent")
        template = parameters(net)
        state = weights_convert.from_flax(as_parameters(net, self.values))
        values = weights_convert.to_flax(state, template, partial=True)
        layers.check(net, template, values, self.frozen)
        if self.moments is not None:
            moments.check(net, self.moments)
        net.mode(self.training)
        return dataclasses.replace(self, values=values)


@dataclasses.dataclass(frozen=True)
class Secret:
    """What the evidence was made of; no attack may see it.

    Attributes:
      images: (K, H, W, C), normalised.
      labels: (K,) classes.
    """

    images: np.ndarray
    labels: np.ndarray


def loss(net: Net, variables: Variables, images: Array, labels: Array, training: bool) -> Array:
    """Compute the mean cross-entropy of a batch.

    Args:
      net: the network.
      variables: its variables.
      images: (K, H, W, C), normalised.
      labels: (K, C) distributions.
      training: BatchNorm layers normalise with the batch's moments.
    """
    return loss_and_moments(net, variables, images, labels, training)[0]


def loss_and_moments(
    net: Net, variables: Variables, images: Array, labels: Array, training: bool
) -> tuple[Array, tuple[Moments, ...]]:
    """Compute `loss`, and the moments that BatchNorm layers saw on the way.

    Args:
      net, variables, images, labels, training: see `loss`.
    """
    outputs = net.mode(training)(variables, images)
    return cross_entropy(outputs.logits, labels), outputs.moments


def observed(
    net: Net,
    variables: Variables,
    images: Array,
    labels: Array,
    *,
    training: bool = False,
    local: Local | None = None,
    at_once: int | None = None,
    trained: Parameters | None = None,
) -> dict[Any, Any]:
    """Compute what a client with these images sends, differentiable in images and labels.

    The gradient g = d loss / d parameters; with `local`, the sum of its SGD steps -lr g_t.

    Args:
      net: the network.
      variables: its variables before.
      images: (K, H, W, C), normalised.
      labels: (K, C) distributions.
      training: see `Evidence`.
      local: see `Evidence`.
      at_once: differentiate so many images at a time, and again when the result is differentiated
        itself: the memory is that of so many. Not with `training` or `local`.
      trained: tree with the paths of the parameters that the client trains and sends; all by
        default. The others stay as they are.

    Raises:
      ValueError: the images are no multiple of `at_once`.
    """
    before = parameters(net, variables)
    if trained is not None:
        before = within(before, trained)

    def gradient(now: Parameters, images: Array, labels: Array) -> dict[Any, Any]:
        return jax.grad(
            lambda p: loss(net, with_parameters(variables, p), images, labels, training)
        )(now)

    if local is None and at_once is not None:
        count = len(images) // at_once
        if count * at_once != len(images):
            raise ValueError(f"{len(images)} images cannot be taken {at_once} at a time evenly")
        parts = [x.reshape(count, at_once, *x.shape[1:]) for x in (images, labels)]
        share = jax.checkpoint(lambda part: gradient(before, *part))

        def add(total: Parameters, part: list[Array]) -> tuple[Parameters, None]:
            return jax.tree.map(lambda t, g: t + g / count, total, share(part)), None

        return lax.scan(add, jax.tree.map(jnp.zeros_like, before), parts)[0]
    if local is None:
        return gradient(before, images, labels)
    now = before
    for batch in local.batches:
        chosen = jnp.asarray(batch)
        # One step's activations at a time are kept for the gradient through all of them.
        step = jax.checkpoint(gradient)(now, images[chosen], labels[chosen])
        now = jax.tree.map(lambda p, g: p - local.lr * g, now, step)
    return jax.tree.map(jnp.subtract, now, before)


def within(tree: Parameters, paths: Parameters) -> dict[Any, Any]:
    """Return the part of a tree that has these paths."""
    return {
        key: within(tree[key], inner) if isinstance(inner, Mapping) else tree[key]
        for key, inner in paths.items()
    }


def as_classes(net: Net, labels: Any) -> np.ndarray:
    """Return labels as an array of the network's classes, of whatever shape they have.

    Raises:
      ValueError: they are no whole numbers; or it names the first one that is no class.
    """
    try:
        found = np.asarray(labels)
    except (TypeError, ValueError):  # lists of several lengths, others' tensors
        found = np.asarray(None)
    if found.size and found.dtype.kind not in "iu":
        raise ValueError(
            f"labels are the numbers of classes, whole numbers, not {checks.shown(labels)}"
        )
    for place in map(tuple, np.argwhere((found < 0) | (found >= net.classes))):
        raise ValueError(
            f"label {', '.join(map(str, place))} is {found[place]}; {net.name} has classes 0 to "
            f"{net.classes - 1}"
        )
    return found


Simulator = Callable[[Array | np.ndarray, Sequence[int]], tuple[Evidence, Secret]]
"""(normalised images (K, H, W, C), their K classes) -> what it sends, and the secret behind it."""


def simulator(
    net: Net,
    *,
    training: bool = False,
    statistics: Statistics = "none",
    local: Local | None = None,
) -> Simulator:
    """Make a client that is compiled once for every shape of images.

    Args:
      net: the network.
      training: see `Evidence`.
      statistics: see `Evidence`. "update" statistics are what a client's new running statistics
        (momentum 0.1) betray, so here the same as "exact".
      local: see `Evidence`.

    Raises:
      ValueError: unknown statistics; when the client is called, labels that do not fit.
    """
    check_net("net", net)
    checks.one_of("statistics", statistics, get_args(Statistics))
    send = jax.jit(lambda v, x, y: observed(net, v, x, y, training=training, local=local))
    see = jax.jit(net.mode(training))

    def client(images: Array | np.ndarray, labels: Sequence[int]) -> tuple[Evidence, Secret]:
        images, chosen = jnp.asarray(images), as_classes(net, labels)
        if chosen.shape != images.shape[:1]:
            raise ValueError(
                f"{len(images)} images need as many labels in 0 to {net.classes - 1}, one class "
                f"each, not labels of shape {chosen.shape}"
            )
        one_hot = jax.nn.one_hot(chosen, net.classes)
        values = jax.device_get(send(net.variables, images, one_hot))
        known = None
        if statistics in _WITH_MOMENTS:
            known = jax.device_get(see(net.variables, images).moments)
        evidence = Evidence(values, len(images), training, statistics, known, local)
        return evidence, Secret(np.asarray(images), chosen)

    return client


def simulate(
    net: Net,
    images: Array | np.ndarray,
    labels: Sequence[int],
    *,
    training: bool = False,
    statistics: Statistics = "none",
    local: Local | None = None,
) -> tuple[Evidence, Secret]:
    """Make evidence of one batch, and the secret behind it; for several, see `simulator`.

    Args:
      net: the network.
      images: (K, H, W, C), normalised.
      labels: K classes.
      training, statistics, local: see `simulator`.
    """
    client = simulator(net, training=training, statistics=statistics, local=local)
    return client(images, labels)


def from_state(
    state: Mapping[str, Any],
    net: Net,
    *,
    images: int,
    training: bool = False,
    statistics: Statistics = "none",
    local: Local | None = None,
    frozen: Sequence[str] = (),
    weights: bool = False,
    momentum: float | None = None,
    size: int | Sequence[int] | None = None,
) -> Evidence:
    """Make evidence of what a client sent under torch's names, in torch's layout.

    The state may be a whole state_dict or some of the layers, with a prefix such as `module.`.
    Layers that are absent, or None, were not trained. Running statistics and counters are used for
    "update" statistics, else dropped; `moments.I.mean` and `moments.I.var` are the moments at
    BatchNorm layer I.

    Args:
      state: name -> array: gradients, or changes of the client's `local` steps.
      net: the network as it was before.
      images, training, statistics, local, frozen: see `Evidence`. "update" statistics are solved
        from the changes of the running statistics where no moments are given: of a client in
        training mode whose one forward pass saw all images. Frozen layers may be there, unchanged.
      weights: what was sent are the new weights (and statistics), not their changes.
      momentum: of the BatchNorm layers in torch's sense, for "update" statistics; the
        layers' own by default.
      size: of the client's images, one side or height and width, for "update" statistics; the
        network's by default.

    Raises:
      ValueError: says what does not fit, and names the layers.
    """
    sent = dict(state)
    known = moments.pop(sent, net)
    if all(name.startswith(_VALUES) for name in sent):
        sent = {name.removeprefix(_VALUES): value for name, value in sent.items()}
    template = parameters(net)
    if template.keys() == {"params"} and not any(name.startswith("params.") for name in sent):
        sent = {f"params.{name}": value for name, value in sent.items()}  # Linen's, alone
    named = weights_convert.match(sent, net.variables, partial=True)
    none = tuple(name for name, value in named.items() if value is None)
    named = {name: np.asarray(value) for name, value in named.items() if value is not None}
    names = layers.names_of(template)
    chosen = {name: value for name, value in named.items() if name in names}
    if not chosen:
        raise ValueError(f"not one of the arrays is a parameter of {net.name}")
    if _is_list(frozen):
        frozen = (*frozen, *(name for name in none if name in names))
    values = weights_convert.to_flax(chosen, template, partial=True)
    moves = _moves(values, within(template, values), _truth("weights", weights), local)
    held = Evidence(moves, images, training, "none", None, local, frozen)  # type: ignore[arg-type]
    moves = layers.without_unchanged(moves, held.frozen)
    held = dataclasses.replace(held, values=moves)
    checks.one_of("statistics", statistics, get_args(Statistics))
    if statistics in _WITH_MOMENTS and not net.statistics:
        known = ()
    elif statistics == "update" and known is None:
        known = _solved(named, net, held, weights, momentum, size)
    elif momentum is not None or size is not None:
        raise ValueError(
            "momentum and size play no part: they are for statistics: update, solved from running "
            "statistics"
        )
    return dataclasses.replace(held, statistics=statistics, moments=known).fitted(net)


def from_arrays(
    arrays: Sequence[Any],
    net: Net,
    *,
    names: Sequence[str] | None = None,
    **circumstances: Any,
) -> Evidence:
    """Make evidence of a list of arrays in torch's layout, as Flower carries it.

    Args:
      arrays: one of every entry of torch's `state_dict()`, in its order; or of every entry but the
        counters `num_batches_tracked`; or of every parameter.
      net: the network as it was before, of the zoo if no names are given.
      names: of the arrays, such as `list(model.state_dict())`.
      **circumstances: as for `from_state`.

    Raises:
      ValueError: names the arrays that do not fit, by index and name.
    """
    named = _order(net, len(arrays)) if names is None else tuple(names)
    if len(named) != len(arrays):
        raise ValueError(f"{len(arrays)} arrays need as many different names, not {len(named)}")
    if twice := [name for name, count in Counter(named).items() if count > 1]:
        more = f" and {len(twice) - 10} more" if len(twice) > 10 else ""
        raise ValueError(
            f"{len(arrays)} arrays need as many different names; more than once there: "
            f"{', '.join(map(str, twice[:10]))}{more}"
        )
    places = {name: np.asarray(i) for i, name in enumerate(named)}
    shapes = weights_convert.shapes(net.variables)
    wrong = []
    for name, place in weights_convert.match(places, net.variables, partial=True).items():
        i = int(place)
        shape = None if arrays[i] is None else np.shape(arrays[i])
        if shape not in (None, shapes[name]) and not _counts(name):
            wrong.append(f"array {i} ({name}) is of shape {shape}, not {shapes[name]}")
    if wrong:
        more = f"; and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise ValueError(f"{'; '.join(wrong[:10])}{more}: are they in the order of the names?")
    return from_state(dict(zip(named, arrays, strict=True)), net, **circumstances)


def _order(net: Net, count: int) -> tuple[str, ...]:
    """Name so many arrays: as many as torch's state_dict, or parts of it, has."""
    whole = registry.state_dict_names(net)
    trained = layers.names_of(parameters(net))
    orders = {
        "in its state_dict": whole,
        "without counters": tuple(name for name in whole if not _counts(name)),
        "of parameters": tuple(name for name in whole if name in trained),
    }
    for order in orders.values():
        if len(order) == count:
            return order
    told = ", ".join(f"{len(order)} {what}" for what, order in orders.items())
    raise ValueError(
        f"{count} arrays: {net.name} has {told}; to give only some of them, give their names too"
    )


def _counts(name: str) -> bool:
    return name.rpartition(".")[2] == "num_batches_tracked"


def _moves(values: Any, before: Any, weights: bool, local: Local | None) -> Any:
    """Return gradients or changes as they are, and new weights as changes."""
    old, sent = ([np.asarray(leaf) for leaf in jax.tree.leaves(tree)] for tree in (before, values))
    changes = [new - was for new, was in zip(sent, old, strict=True)]
    if weights:
        if local is None:
            raise ValueError("new weights come of local steps: say which with `local`")
        if not any(map(np.any, changes)):
            raise ValueError(
                "the new weights are the network's own: it must be the network as it was before"
            )
        return jax.tree.unflatten(jax.tree.structure(values), changes)
    if not any(map(np.any, sent)):
        raise ValueError(
            "every value is 0, there is nothing to invert: take gradients after loss.backward() "
            "and before optimizer.zero_grad()"
        )
    if 0 < _length(changes) < 0.5 * _length(old):  # equal ones are no client's, whatever they are
        raise ValueError(
            "these are the network's weights, changed a little, and no gradient or update: say "
            "`weights: true` for new weights"
        )
    return values


def _length(arrays: Iterable[np.ndarray]) -> float:
    return math.sqrt(sum(float(np.square(a, dtype=np.float64).sum()) for a in arrays))


def _solved(
    sent: Mapping[str, np.ndarray],
    net: Net,
    held: Evidence,
    weights: bool,
    momentum: float | None,
    size: int | Sequence[int] | None,
) -> tuple[Moments, ...]:
    """Solve the running statistics that were sent, if they are those of the client's one batch."""
    once = held.local is None or [sorted(b) for b in held.local.batches] == [[*range(held.images)]]
    if not held.training or not once:
        raise ValueError(
            "statistics: update cannot be solved from running statistics: they are those of one "
            "batch where the client was in training mode and its one step saw all images"
        )
    own = weights_convert.from_flax(net.variables) if weights else {}
    for name, count in sent.items():
        if _counts(name) and count.size == 1 and count.item() - own.get(name, 0) > 1.5:
            raise ValueError(
                f"statistics: update cannot be solved: {name} says that the layer saw more than "
                "one batch"
            )
    momenta = net.momenta if momentum is None else (momentum,) * len(net.statistics)
    if not all(_is_number(m) and 0 < m <= 1 for m in momenta):
        raise ValueError(f"momentum is a share above 0 and up to 1, not {momentum!r}")
    sides = image.sides(net.preprocessing.size if size is None else size)
    return moments.solved(sent, net, held.images, new=weights, momenta=momenta, sides=sides)


_VALUES = "values."
ENDINGS = (".safetensors", ".pth", ".pt", ".npz")
"""Of files that hold the values of evidence."""
_MOST_JSON = 64 * 2**20


def _beside(path: Path, ending: str) -> Path:
    """Return one of the two files of some evidence, whose name may have dots of its own."""
    name = path.name.removesuffix(".safetensors").removesuffix(".json")
    return path.with_name(name + ending)


def save(path: str | Path, evidence: Evidence) -> None:
    """Write FILE.safetensors (torch's names and layouts) and FILE.json beside it."""
    path = files.path(path)
    state = {
        _VALUES + name: value
        for name, value in weights_convert.from_flax(plain(evidence.values)).items()
    }
    for i, (mean, var) in enumerate(evidence.moments or ()):
        state[moments.MEAN.format(i)] = np.asarray(mean)
        state[moments.VAR.format(i)] = np.asarray(var)
    weights_convert.write(_beside(path, ".safetensors"), state)
    circumstances = dataclasses.asdict(evidence.circumstances)
    write_atomic(_beside(path, ".json"), json.dumps(circumstances, indent=2) + "\n")


def load(path: str | Path, net: Net) -> Evidence:
    """Read what `save` wrote, or what was captured in PyTorch.

    FILE.json holds `images` and, where they are not the default, the other arguments of
    `from_state`. Beside it is one of FILE.safetensors, FILE.pth and FILE.pt, with arrays under
    torch's names, or FILE.npz, with names or as `np.savez(FILE, *arrays)` writes a list in the
    order that `from_arrays` takes.

    Args:
      path: FILE, with or without the ending.
      net: the network as it was before.

    Raises:
      ValueError: the files or what is in them do not fit the network; keys and layers are named.
    """
    path = files.path(path)
    try:
        file = _file(path)
        told = file.with_name(file.name.removesuffix(file.suffix) + ".json")
        circumstances = _circumstances(told)
        if file.suffix != ".npz":
            state = weights_convert.read(file)
            named = {name.removeprefix(_VALUES): value for name, value in state.items()}
            return from_state(named, net, **circumstances)
        values = 2 * sum(leaf.size + 1 for leaf in jax.tree.leaves(net.variables))
        state = weights_convert.read_arrays(file, 8 * values)
        if set(state) == {f"arr_{i}" for i in range(len(state))}:
            arrays = [state[f"arr_{i}"] for i in range(len(state))]
            return from_arrays(arrays, net, **circumstances)
        return from_state(state, net, **circumstances)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} holds no evidence for {net.name}: {error}") from None


def _file(path: Path) -> Path:
    """Find the file of the values."""
    if path.suffix in ENDINGS and path.is_file():
        return path
    found = [file for ending in ENDINGS if (file := _beside(path, ending)).is_file()]
    if len(found) > 1:
        names = " and ".join(file.name for file in found)
        raise ValueError(f"there are {names}: say which, with its ending")
    if not found:
        raise ValueError(
            f"there is no file {_beside(path, '')} with one of the endings {', '.join(ENDINGS)}"
        )
    return found[0]


def _circumstances(path: Path) -> dict[str, Any]:
    """Read FILE.json: the keyword arguments of `from_state`."""
    if not path.is_file():
        raise ValueError(f'there is no {path.name}, such as {{"images": 1}}')
    if path.stat().st_size > _MOST_JSON:
        raise ValueError(f"{path.name} is larger than {_MOST_JSON} bytes")
    try:
        found = json.loads(
            path.read_text(encoding="utf-8-sig"),
            parse_constant=_no_number,
            object_pairs_hook=_each_key_once,
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f'{path.name} holds no object, such as {{"images": 1}}')
    known = inspect.signature(from_state).parameters.keys() - {"state", "net"}
    _check_keys(path.name, found, known)
    if "images" not in found:
        raise ValueError(f"{path.name} lacks images: how many images are behind the evidence")
    if (local := found.get("local")) is not None:
        if not isinstance(local, dict):
            raise ValueError(f"local holds lr and batches, it is not {local!r}")
        _check_keys("local", local, {"lr", "batches"})
        if lost := {"lr", "batches"} - local.keys():
            raise ValueError(f"local lacks {' and '.join(sorted(lost))}")
        found["local"] = Local(**local)
    return found


def _check_keys(what: str, found: Mapping[str, Any], known: Iterable[str]) -> None:
    """Refuse keys that mean nothing, with those that may have been meant."""
    known = sorted(known)
    for key in sorted(found.keys() - known):
        near = difflib.get_close_matches(key.lower(), known, 1)
        meant = f"did you mean {near[0]}?" if near else f"there are: {', '.join(known)}"
        raise ValueError(f"{what} has an unknown key {key!r}; {meant}")


def _each_key_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {checks.shown(key)} is there twice: keep one of them")
        found[key] = value
    return found


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number")

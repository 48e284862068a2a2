"""The one door between networks and attacks: `Net(apply, variables)` and its `Outputs`.

An attack sees a pure function of (variables, images) and plain nested dicts. What a BatchNorm
layer saw comes back as a value, never through hooks or globals.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from flax.core import meta
from jax import Array

from jinv import calls
from jinv.calls import NetworkError
from jinv.image import Preprocessing, check_space, sides
from jinv.watch import Moments as Moments
from jinv.watch import (
    Path,
    Record,
    Variables,
    dotted,
    draws,
    drop,
    hand_out,
    intercept,
    reseeded,
    switch,
    watch,
)
from jinv.watch import batch_moments as batch_moments

Parameters = Mapping[Any, Any]
"""A network's variables without BatchNorm statistics and counters: what training changes."""


class Outputs(NamedTuple):
    """What a network says of a batch, and what its BatchNorm layers saw.

    Attributes:
      logits: (B, classes), float32 or wider.
      features: (B, D) input of the linear layer whose output the logits are; where there is no
        such layer, of the last one called; None without one.
      moments: of the *input* of every BatchNorm layer, in forward order, over all axes but the
        layer's own; where the network gives the layer a mask, over what the mask leaves.
    """

    logits: Array
    features: Array | None
    moments: tuple[Moments, ...]


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity: `jax.jit(net)` works
class Net:
    """A trained network, as attacks see it.

    Attributes:
      name: for logs, reports and error messages.
      apply: pure `(variables, images) -> Outputs` in inference mode; images (B, H, W, C)
        normalised, computed in the images' dtype, with moments and logits in float32 at least.
        BatchNorm layers normalise with their running statistics; the batch's moments are only
        measured.
      variables: nested dict of arrays.
      preprocessing: what makes an image normalised, and the usual size.
      classes: number of logits.
      statistics: paths in `variables` of (running mean, running variance) of every BatchNorm
        layer, in forward order; the order of `Outputs.moments`.
      train_apply: `(variables, images, key=None) -> Outputs` as `apply`, but BatchNorm layers
        normalise with the batch's own moments, as in training. Dropout and stochastic depth are on
        if there is a key. None if that is not known.
      counts: shape of images -> n of every BatchNorm layer in forward order: how many values of a
        channel its moments are of, images times pixels. Nothing is computed for it.
      head: path in `variables` of the linear layer whose input the features are, None if there is
        none.
      trained: paths in `variables` of what training changes, or beginnings of such paths; None for
        all floating-point numbers but the statistics.
      class_names: of every class, where they are known.
      weights: which published ones the variables are, as torchvision calls them, such as
        "IMAGENET1K_V2"; None for others.
      momenta: weight of a batch in the running statistics of every BatchNorm layer in training,
        torch's `momentum` (Flax's is 1 minus it), in forward order; 0.1 each by default.
    """

    name: str
    apply: Callable[[Variables, Array], Outputs] = dataclasses.field(repr=False)
    variables: Variables = dataclasses.field(repr=False)
    preprocessing: Preprocessing
    classes: int
    statistics: tuple[tuple[Path, Path], ...]
    train_apply: Callable[..., Outputs] | None = dataclasses.field(default=None, repr=False)
    counts: Callable[[tuple[int, ...]], tuple[int, ...]] | None = dataclasses.field(
        default=None, repr=False
    )
    head: Path | None = None
    trained: frozenset[Path] | None = None
    class_names: tuple[str, ...] | None = dataclasses.field(default=None, repr=False)
    weights: str | None = None
    momenta: tuple[float, ...] = dataclasses.field(default=(), repr=False)

    def __post_init__(self) -> None:
        if not self.momenta:
            object.__setattr__(self, "momenta", (0.1,) * len(self.statistics))
        _check_numbers(self)
        if self.class_names is not None and len(self.class_names) != self.classes:
            raise ValueError(
                f"{self.name} has {self.classes} classes, but {len(self.class_names)} class_names"
            )

    def running_moments(self, variables: Variables | None = None) -> tuple[Moments, ...]:
        """Running mean and variance of every BatchNorm layer, in forward order."""
        tree = self.variables if variables is None else variables
        return tuple(Moments(_get(tree, mean), _get(tree, var)) for mean, var in self.statistics)

    def mode(self, training: bool) -> Callable[..., Outputs]:
        """`train_apply` or `apply`; ValueError if there is no training mode."""
        if not training:
            return self.apply
        if self.train_apply is None:
            raise ValueError(
                f"{self.name} has no training mode: leave the argument that switches it, such as "
                "train=False, to jinv, or give Net.from_linen training={'train': True} or the like"
            )
        return self.train_apply

    def __call__(self, images: Array) -> Outputs:
        """Return `apply` of the network's own variables, compiled once for every shape of images.

        Networks that share `apply`, such as copies with other variables, share the programs.
        """
        return self._compiled(self.variables, jnp.asarray(images))

    @functools.cached_property
    def _compiled(self) -> Callable[[Variables, Array], Outputs]:
        return jax.jit(self.apply)

    @staticmethod
    def from_nnx(
        model: nnx.Module,
        preprocessing: Preprocessing,
        *,
        name: str | None = None,
        output: calls.Output | None = None,
        training: Any = None,
        call: Mapping[str, Any] | None = None,
        **arguments: Any,
    ) -> Net:
        """Return a Flax NNX network as a `Net`.

        Its BatchNorm layers (Flax's, or any module with `running_mean` and `running_var`) are found
        wherever they are. The channels of a layer of your own are its last axis, or those that its
        attribute `axis` or `channel_axis` names.

        Args:
          model: network; put into inference mode (`model.eval()`, and switches like
            `self.training`) on a copy.
          preprocessing: its input size and normalisation.
          name: defaults to the class's name.
          output: where the logits (B, classes) are in what `model(images)` returns: a key, a number
            or a path of them; `()` for the whole, which may then be a single attribute (B, 1).
          training: the arguments that differ in training mode, such as `{"train": True}`. Any other
            value is the call's own argument of this name.
          call: arguments of the call whose names are taken here.
          **arguments: all others. Arguments like `train` and `deterministic` (`calls.INFERENCE`)
            are found; one that you give is the same in both modes.

        Raises:
          ValueError: what cannot be attacked; it says why.
        """
        if not isinstance(model, nnx.Module):
            raise NetworkError(f"Net.from_nnx takes an nnx.Module, not {_kind(model)}")
        check_space("preprocessing", preprocessing)
        name = name or type(model).__name__
        given, differs = _split(training, call, arguments)
        found = calls.arguments(name, "Net.from_nnx", model, given, differs)
        model = nnx.clone(model)
        nnx.pop(model, nnx.Intermediate)
        rates = watch(model)
        model.eval()
        switch(model, training=False)
        # Random keys (dropout's) play no part in inference: no variables that attacks could see.
        graphdef, rngs, state = nnx.split(model, nnx.RngState, ...)  # type: ignore[misc]
        _check_arrays(name, state)
        learned = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        switch(model, training=True)
        train_graphdef = nnx.graphdef(model)

        def forward(
            graphdef: Any,
            call: Mapping,
            variables: Variables,
            images: Array,
            record: Record,
            key: Array | None = None,
        ) -> Any:
            if key is not None:
                drops, streams, arguments = jax.random.split(key, 3)
                fresh = nnx.merge(graphdef, reseeded(rngs, streams), variables)
                hand_out(record, fresh)
                drop(fresh, rates, drops)
                return fresh(images, **{**call, **found.random(arguments)})
            fresh = nnx.merge(graphdef, rngs, variables)
            hand_out(record, fresh)
            before = draws(fresh) if rngs else []
            own = {k: nnx.clone(v) if isinstance(v, nnx.Rngs) else v for k, v in call.items()}
            result = fresh(images, **own)
            if rngs and any(a is not b for a, b in zip(before, draws(fresh), strict=True)):
                raise NetworkError(
                    f"{name} draws random numbers {record.mode}, which attacks cannot follow: "
                    "switch them off there (nnx.Dropout is off by itself)"
                )
            return result

        return _build(
            _Wrapped(name, "Net.from_nnx", output, found.fixed),
            functools.partial(forward, graphdef, found.inference),
            functools.partial(forward, train_graphdef, found.training),
            nnx.to_pure_dict(state),
            preprocessing,
            frozenset(path for path, _ in leaves(learned)),
        )

    @staticmethod
    def from_linen(
        module: linen.Module,
        variables: Variables,
        preprocessing: Preprocessing,
        *,
        name: str | None = None,
        output: calls.Output | None = None,
        training: Any = None,
        call: Mapping[str, Any] | None = None,
        **arguments: Any,
    ) -> Net:
        """Return a Flax Linen network as a `Net`.

        Args:
          module: network. A switch that is its field (`train: bool`) is set for either mode.
          variables: its collections, `params` and `batch_stats` and others; or its `params` alone.
          preprocessing: its input size and normalisation.
          name: defaults to the class's name.
          output: where the logits (B, classes) are in what the call returns: a key, a number or a
            path of them; `()` for the whole, which may then be a single attribute (B, 1).
          training: the arguments that differ where BatchNorm layers use the batch's moments, such
            as `{"train": True}`. Any other value is the call's own argument of this name.
          call: arguments of the call whose names are taken here.
          **arguments: all others. Arguments like `train` and `deterministic` (`calls.INFERENCE`)
            are found; one that you give is the same in both modes.

        Raises:
          ValueError: what cannot be attacked; it says why.
        """
        if not isinstance(module, linen.Module):
            raise NetworkError(f"Net.from_linen takes a linen.Module, not {_kind(module)}")
        if not isinstance(variables, Mapping):
            raise NetworkError(
                "Net.from_linen takes variables as module.init returns them, such as "
                f'{{"params": ..., "batch_stats": ...}}, not {_kind(variables)}'
            )
        check_space("preprocessing", preprocessing)
        name = name or type(module).__name__
        given, differs = _split(training, call, arguments)
        found = calls.arguments(name, "Net.from_linen", module, given, differs)
        inference = _with_fields(module, found.inference_fields)
        shape = (1, preprocessing.height, preprocessing.width, preprocessing.channels)
        tree = _collections(inference, found.inference, plain(variables), shape)

        def forward(
            module: linen.Module,
            call: Mapping,
            variables: Variables,
            images: Array,
            record: Record,
            key: Array | None = None,
        ) -> Any:
            streams: dict[str, Any] = {}
            if key is not None:
                streams = {"rngs": {"dropout": key}}
                module = _with_fields(module, found.dropping_fields)
                call = {**call, **found.random(key)}
            # New running statistics and the like are of no interest.
            changing = [key for key in variables if key != "params"]
            with linen.intercept_methods(functools.partial(intercept, record, variables)):
                returned: Any = module.apply(variables, images, mutable=changing, **streams, **call)
            return returned[0]

        wrapped = _Wrapped(name, "Net.from_linen", output, found.fixed)
        inferring = functools.partial(forward, inference, found.inference)
        trains = functools.partial(
            forward, _with_fields(module, found.training_fields), found.training
        )
        return _build(
            wrapped,
            inferring,
            trains if found.two_modes else None,
            tree,
            preprocessing,
            frozenset({("params",)}),
        )


def _split(
    training: Any, call: Mapping[str, Any] | None, arguments: Mapping[str, Any]
) -> tuple[dict[str, Any], Mapping[str, Any] | None]:
    """The arguments of the call in both modes, and those that differ in training mode."""
    given = {**arguments, **(call or {})}
    if training is None or isinstance(training, Mapping):
        return given, training
    return {"training": training, **given}, None


def _kind(thing: Any) -> str:
    """Say what the user gave instead, with the likely remedy."""
    if isinstance(thing, type):
        return f"the class {thing.__name__}: make an instance of it"
    if isinstance(thing, nnx.Module | linen.Module):
        other = "from_nnx" if isinstance(thing, nnx.Module) else "from_linen"
        return f"{type(thing).__name__}, which Net.{other} takes"
    return f"a {type(thing).__name__}"


def _check_arrays(name: str, state: nnx.State) -> None:
    """Refuse variables of NNX that are no arrays."""
    for path, variable in nnx.to_flat_state(state):
        value = variable.get_value() if isinstance(variable, nnx.Variable) else variable
        if isinstance(value, jax.ShapeDtypeStruct):
            raise NetworkError(
                f"{name} has no weights yet, only shapes, in {dotted(path)}: nnx.update(model, ...)"
                " gives it some"
            )
        if not hasattr(value, "dtype"):
            raise NetworkError(
                f"{name} keeps a {type(value).__name__} in its variable {dotted(path)}: make one "
                "variable of every array"
            )


def _with_fields(module: linen.Module, fields: Mapping[str, Any]) -> linen.Module:
    """A copy of a module with some of its fields replaced."""
    return module.clone(**fields)


def plain(tree: Variables) -> dict[Any, Any]:
    """Return a tree of variables as nested dicts of arrays, also one of Flax's own kinds."""
    if isinstance(tree, nnx.State):
        tree = nnx.to_pure_dict(tree)
    return {
        key: plain(value) if isinstance(value, Mapping) else meta.unbox(value)
        for key, value in tree.items()
    }


def _collections(
    module: linen.Module, call: Mapping[str, Any], variables: dict, shape: tuple[int, ...]
) -> dict[Any, Any]:
    """Linen's collections without what a module notes on the way; of parameters alone, these."""
    variables.pop("intermediates", None)
    if "params" in variables or not variables:
        return variables
    key, images = jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32)
    try:
        fresh = jax.eval_shape(lambda x: module.init(key, x, **call), images)
    except Exception:
        return variables  # its forward pass says what is wrong
    ours = fresh.get("params", {}).keys()
    return {"params": variables} if variables.keys() <= ours else variables


@dataclasses.dataclass(frozen=True)
class _Wrapped:
    """How a user wrapped a network.

    Attributes:
      name: of the network.
      maker: the function that the user called.
      output: where in what it returns the logits are.
      fixed: see `calls.Call`.
    """

    name: str
    maker: str
    output: calls.Output | None
    fixed: tuple[str, ...]


Forward = Callable[..., Any]
"""(variables, images, record, key=None) -> what the network returns."""


def _build(
    wrapped: _Wrapped,
    forward: Forward,
    train_forward: Forward | None,
    variables: Variables,
    preprocessing: Preprocessing,
    trained: frozenset[Path],
) -> Net:
    name = wrapped.name

    def run(
        forward: Forward,
        variables: Variables,
        images: Array,
        record: Record,
        hint: str = "",
        key: Array | None = None,
    ) -> Array:
        calls.check_images(name, images, preprocessing.channels)
        shape = jnp.shape(images)
        with calls.in_words(name, shape, hint):
            result = forward(variables, images, record, key)
        if record.training and wrapped.fixed and record.statistics and not record.of_batch:
            raise NetworkError(
                f"{name} has no training mode: {', '.join(wrapped.fixed)} was given for both "
                f"modes; leave it to {wrapped.maker}, or give what differs, training={{...}}"
            )
        return calls.logits_of(name, wrapped.maker, result, wrapped.output, shape)

    def recorded(
        forward: Forward,
        training: bool,
        variables: Variables,
        images: Array,
        key: Array | None = None,
    ) -> Outputs:
        record = Record(name, training, drops=key is not None)
        logits = run(forward, variables, images, record, key=key)
        head = record.head(logits)
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        return Outputs(logits, None if head is None else head[1], tuple(record.moments))

    def traced(shape: tuple[int, ...], hint: str = "") -> tuple[Any, Record, Path | None]:
        """Logits' shape, the record of paths and counts, and the head's path."""
        record, head = Record(name), None

        def trace(variables: Variables, images: Array) -> Array:
            nonlocal record, head
            record = Record(name)
            logits = run(forward, variables, images, record, hint)
            head = record.head(logits)
            return logits

        logits = jax.eval_shape(trace, variables, jax.ShapeDtypeStruct(shape, jnp.float32))
        return logits, record, None if head is None else head[0]

    def counts(shape: tuple[int, ...]) -> tuple[int, ...]:
        found = traced(shape)[1].counts
        known = tuple(count for count in found if count is not None)
        if len(known) < len(found):
            raise NetworkError(
                f"{name} gives a BatchNorm layer a mask: how many values its moments are of "
                "depends on the images"
            )
        return known

    shape = (1, preprocessing.height, preprocessing.width, preprocessing.channels)
    logits, record, head = traced(
        shape, f" (its Preprocessing says that it takes images {shape[1:]})"
    )
    if train_forward is None and not record.statistics and "batch_stats" not in variables:
        train_forward = forward  # nothing but dropout could differ, and that is off
    return Net(
        name,
        functools.partial(recorded, forward, False),
        variables,
        preprocessing,
        logits.shape[1],
        tuple(record.statistics),
        None if train_forward is None else functools.partial(recorded, train_forward, True),
        counts,
        head,
        trained,
        momenta=tuple(record.momenta),
    )


def check_net(what: str, thing: object) -> None:
    """Refuse what is no `Net`, with what is likely meant.

    Raises:
      NetworkError: it names what was to be one.
    """
    if not isinstance(thing, Net):
        inner = isinstance(getattr(thing, "net", None), Net)
        raise NetworkError(
            f"{what} must be a jinv.Net, not {_kind(thing)}" + (": give its `net`" if inner else "")
        )


def check_size(net: Net, size: int | Sequence[int]) -> None:
    """Refuse a size of images, a side or (height, width), that the network cannot be run on.

    It is traced for it, if it is not the network's own; nothing is computed.

    Raises:
      ValueError: it cannot, as it is with networks whose linear layer takes a fixed number of
        pixels.
    """
    height, width = sides(size)
    own = net.preprocessing
    if (height, width) == (own.height, own.width):
        return
    images = jax.ShapeDtypeStruct((1, height, width, own.channels), jnp.float32)
    try:
        jax.eval_shape(net.apply, net.variables, images)
    except Exception as error:  # what networks make of other sizes has no common kind
        reason = str(error.__cause__ or error).partition("\n")[0]
        raise ValueError(
            f"{net.name} cannot take images of {height} x {width} px (its own size is "
            f"{own.height} x {own.width} px): bring them to that size, or use a network that pools "
            f"over all positions ({reason})"
        ) from error


def parameters(net: Net, variables: Variables | None = None) -> dict[Any, Any]:
    """Return the variables that gradients change in training: no statistics, no constants."""
    statistics = {path for pair in net.statistics for path in pair}

    def chosen(tree: Variables, path: Path, inside: bool) -> dict[Any, Any]:
        kept = {}
        for key, value in tree.items():
            here = (*path, key)
            learned = inside or here in (net.trained or ())
            if isinstance(value, Mapping):
                inner = chosen(value, here, learned)
                if inner:
                    kept[key] = inner
            elif learned and here not in statistics and _is_float(value):
                kept[key] = value
        return kept

    return chosen(net.variables if variables is None else variables, (), net.trained is None)


def as_parameters(net: Net, values: Parameters) -> dict[Any, Any]:
    """Return a gradient, or an update, nested as `parameters(net)`, however Flax gave it.

    That is as dicts, frozen or not, as an `nnx.State`, or as Linen's parameters alone, without the
    name of their collection. Gradients of running statistics, which training does not follow, are
    left out.

    Raises:
      NetworkError: the values are no tree of names.
    """
    if not isinstance(values, Mapping):
        raise NetworkError(
            f"the values are {_kind(values)}: a dict like the network's parameters is needed"
        )
    tree = plain(values)
    of_linen = net.trained == frozenset({("params",)})
    if of_linen and "params" not in tree:
        tree = {"params": tree}
    statistics = {path for pair in net.statistics for path in pair}
    return within(tree, lambda path: path not in statistics)


def within(tree: Variables, chosen: Callable[[Path], bool], path: Path = ()) -> dict[Any, Any]:
    """Return the leaves of a tree whose path is chosen, without what is empty then.

    Args:
      tree: of variables, or a part of them.
      chosen: path of a leaf -> whether it stays.
      path: of the tree in a larger one.
    """
    kept: dict[Any, Any] = {}
    for key, value in tree.items():
        here = (*path, key)
        if isinstance(value, Mapping):
            inner = within(value, chosen, here)
            if inner:
                kept[key] = inner
        elif chosen(here):
            kept[key] = value
    return kept


def with_parameters(variables: Variables, changed: Parameters) -> dict[Any, Any]:
    """Return the variables with some of them replaced."""
    return {
        key: with_parameters(value, changed.get(key, {}))
        if isinstance(value, Mapping)
        else changed.get(key, value)
        for key, value in variables.items()
    }


def _check_numbers(net: Net) -> None:
    """Refuse weights and statistics that no sound training leaves."""
    statistics = {path: _get(net.variables, path) for pair in net.statistics for path in pair}
    for path, leaf in (*leaves(parameters(net)), *statistics.items()):
        if not _is_finite(leaf):
            raise NetworkError(
                f"{net.name} has values in {dotted(path)} that are not finite: the weights are "
                "damaged, or of a training that diverged"
            )
    for _, path in net.statistics:
        values = _values(statistics[path])
        if values is not None and (values < 0).any():
            raise NetworkError(
                f"{net.name} has a running variance below zero in {dotted(path)} "
                f"({values.min():g}): the weights are damaged, or mean and variance are swapped"
            )


def _is_finite(leaf: Any) -> bool:
    values = _values(leaf)
    if values is None:
        return True
    # A sum is finite only if all values are: one pass, and no array of the answers.
    with np.errstate(all="ignore"):
        return bool(np.isfinite(values.sum())) or bool(np.isfinite(values).all())


def _values(leaf: Any) -> np.ndarray | None:
    """The numbers of an array, None where they are not here to be read."""
    if isinstance(leaf, jax.core.Tracer | jax.ShapeDtypeStruct):
        return None
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return None
    return np.asarray(leaf).astype(np.promote_types(leaf.dtype, np.float32), copy=False)


def _is_float(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def leaves(tree: Variables, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield every leaf with its path."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


def _get(tree: Variables, path: Path) -> Any:
    for key in path:
        tree = tree[key]
    return tree

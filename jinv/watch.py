"""What the BatchNorm and linear layers of a network see in one forward pass.

A `Record` lives for one call. Layers of Flax NNX tell it by classes that `watch` gives to a copy of
the model, layers of Linen because `intercept` runs their calls. What they tell are values, never
globals.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jax import Array
from jax.extend.core import get_opaque_trace_state

from jinv import backend
from jinv.calls import INFERENCE, NetworkError

Variables = Mapping[Any, Any]
Path = tuple[Any, ...]


class Moments(NamedTuple):
    """Mean and biased variance per channel, (C,) or as the layer stores them, float32 or wider."""

    mean: Array
    var: Array


class Record:
    """What one forward pass showed: lives for one call of `apply`.

    Attributes:
      name: of the network.
      training: whether it is in training mode.
      drops: whether dropout is on.
      statistics, moments: as in `Net` and `Outputs`.
      counts: as `Net.counts` returns them, None of a layer with a mask.
      momenta: as in `Net`.
      linear: path, input and output of every linear layer called.
      told: path of every layer that told something.
      of_batch: whether a BatchNorm layer normalised with the batch's own moments.
    """

    def __init__(self, name: str, training: bool = False, drops: bool = False) -> None:
        self._trace = get_opaque_trace_state()
        self.name = name
        self.training = training
        self.drops = drops
        self.statistics: list[tuple[Path, Path]] = []
        self.moments: list[Moments] = []
        self.counts: list[int | None] = []
        self.momenta: list[float] = []
        self.linear: list[tuple[Path, Array, Any]] = []
        self.told: list[Path] = []
        self.of_batch = False

    @property
    def mode(self) -> str:
        """In words."""
        return "in training mode" if self.training else "in inference mode"

    def layer(self, told: _Layer, given: inspect.BoundArguments, output: Any) -> None:
        """Note what a layer was given and returned.

        Raises:
          NetworkError: it cannot be known what its statistics are of.
        """
        if get_opaque_trace_state() != self._trace:
            raise NetworkError(
                f"{self.name}: a BatchNorm or linear layer is called inside remat, scan, vmap or "
                "jit, where what it sees cannot be read: build the network without (attacks may "
                "wrap all of it)"
            )
        self.told.append(told.path)
        inputs = given.args[1]
        if told.statistics is None:
            self.linear.append((told.path, inputs, output))
            return
        layer = f"{self.name}: the BatchNorm layer {dotted(told.path)}"
        running = _switched(given, told.module, "use_running_average")
        if running is False and not self.training:
            raise NetworkError(
                f"{layer} normalises with the batch's own moments in inference mode: let the "
                "network's `train` or `use_running_average` argument decide, and leave that to jinv"
            )
        self.of_batch |= running is False
        axes = _channel_axes(told, inputs.ndim)
        mask = given.arguments.get("mask")
        found = batch_moments(inputs, axes, mask, near=told.running)
        if found.mean.size != math.prod(told.shape):
            raise NetworkError(
                f"{layer} has running statistics {told.shape}, but its input {inputs.shape} has "
                f"{found.mean.size} channels along axis {', '.join(map(str, axes))}: a layer of "
                "your own names the axis of its channels by an attribute `channel_axis`"
            )
        self.statistics.append(told.statistics)
        self.moments.append(Moments(*(value.reshape(told.shape) for value in found)))
        self.counts.append(inputs.size // found.mean.size if mask is None else None)
        self.momenta.append(_momentum(told))

    def head(self, logits: Array) -> tuple[Path, Array] | None:
        """Path and input of the linear layer that made the logits, or of the last one."""
        for path, inputs, output in reversed(self.linear):
            if output is logits:
                return path, inputs
        return self.linear[-1][:2] if self.linear else None


@dataclasses.dataclass(frozen=True, eq=False)
class _Layer:
    """A layer that tells what it sees.

    Attributes:
      module: itself.
      path: where its parameters are.
      statistics: paths of its running mean and variance; None of a linear layer.
      running: its running mean.
    """

    module: Any
    path: Path
    statistics: tuple[Path, Path] | None = None
    running: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of its statistics."""
        return jnp.shape(self.running)


def _momentum(layer: _Layer) -> float:
    """A BatchNorm layer's momentum in torch's sense; 0.1 where it has none."""
    found = getattr(layer.module, "momentum", None)
    if not isinstance(found, int | float) or not 0 <= found <= 1:
        return 0.1
    assert layer.statistics is not None
    # Flax's layers, whose mean is `mean`, tell the weight of what was before.
    return float(found) if layer.statistics[0][-1] == "running_mean" else 1 - float(found)


def _switched(given: inspect.BoundArguments, module: Any, name: str) -> Any:
    """A switch as the call gives it, or else the module."""
    value = given.arguments.get(name)
    return getattr(module, name, None) if value is None else value


def _channel_axes(layer: _Layer, rank: int) -> tuple[int, ...]:
    """The axes of a BatchNorm layer's input that its statistics run over, in rising order."""
    for name in ("axis", "channel_axis", "feature_axis"):
        axis = getattr(layer.module, name, None)
        axes = axis if isinstance(axis, tuple | list) else (axis,)
        if axes and all(type(one) is int and -rank <= one < rank for one in axes):
            return tuple(sorted({one % rank for one in axes}))
    if len(layer.shape) == rank and math.prod(layer.shape) > 1:  # such as (1, C, 1, 1)
        return tuple(i for i, length in enumerate(layer.shape) if length > 1)
    return (rank - 1,)


def dotted(path: Path) -> str:
    """Return a path as a person writes it."""
    return ".".join(map(str, path)) or "itself"


def batch_moments(
    x: Array,
    axis: int | tuple[int, ...] = -1,
    mask: Array | None = None,
    near: Any = None,
) -> Moments:
    """Return mean and biased variance of x over all axes but some, in float32 at least.

    Args:
      x: such as (..., C).
      axis: of the channels, or several axes: the moments have their lengths, in rising order.
      mask: broadcastable to x; only where it is true are the values counted.
      near: where the means should be, such as running means, one for each. With it one pass over x
        is enough, where the backend is faster so: then the variance's rounding error is relative
        to var + (mean - near)^2.

    Raises:
      ValueError: x is empty.
    """
    if not x.size:
        raise ValueError(f"a BatchNorm layer sees nothing of images this small: {x.shape}")
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    kept = {one % x.ndim for one in ((axis,) if isinstance(axis, int) else axis)}
    axes = tuple(i for i in range(x.ndim) if i not in kept)
    if mask is not None:
        where = jnp.asarray(mask, bool)
        return Moments(x.mean(axes, where=where), x.var(axes, where=where))
    center = None
    if near is not None and backend.choices().moments == "one_pass":
        shape = [length if i in kept else 1 for i, length in enumerate(x.shape)]
        if np.size(near) == math.prod(shape):
            center = jnp.asarray(near, x.dtype).reshape(shape)
    return Moments(*_moments(x, center, axes))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _moments(x: Array, near: Array | None, axes: tuple[int, ...]) -> tuple[Array, Array]:
    if near is None:
        mean = x.mean(axes, keepdims=True)
        return mean.squeeze(axes), jnp.square(x - mean).mean(axes)
    apart = x - near
    mean = apart.mean(axes)
    var = jnp.square(apart).mean(axes) - jnp.square(mean)
    return near.squeeze(axes) + mean, jnp.maximum(var, 0)


@_moments.defjvp
def _moments_jvp(
    axes: tuple[int, ...], primals: tuple[Array, Array | None], tangents: tuple[Array, Any]
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """`d var = 2 (mean(x dx) - mean(x) mean(dx))`; nothing depends on `near`.

    JAX's own rule keeps x - mean in memory and sums it again in the gradient, where it is 0:
    one write and one pass over every BatchNorm input.
    """
    (x, near), (dx, _) = primals, tangents
    mean, var = _moments(x, near, axes)
    dmean = dx.mean(axes)
    return (mean, var), (dmean, 2 * ((x * dx).mean(axes) - mean * dmean))


# --- Flax NNX: layers whose classes tell ---------------------------------------------------------


def watch(model: nnx.Module) -> dict[Path, float]:
    """Give a model's BatchNorm and linear layers classes that tell a record what they see.

    Dropout is switched off until `drop` switches it on: its rates by path are returned. Means over
    devices are switched off for good.
    """
    rates: dict[Path, float] = {}
    for path, module in list(nnx.iter_modules(model)):
        rate = _rate(module)
        if rate is not None:
            rates[path] = getattr(module, rate)
            setattr(module, rate, 0.0)
        if isinstance(module, nnx.BatchNorm):
            module.axis_name = None
        statistics = _statistics_names(module)
        if statistics is not None or isinstance(module, nnx.Linear):
            kinds = (kind for kind in (nnx.BatchNorm, nnx.Linear) if isinstance(module, kind))
            module.__class__ = _watched(type(module), next(kinds, None))
    return rates


def _rate(module: nnx.Module) -> str | None:
    """Name of a layer's rate of dropout; None if it has none."""
    if isinstance(module, nnx.MultiHeadAttention):
        return "dropout_rate"
    return "rate" if isinstance(module, nnx.Dropout) else None


def drop(fresh: nnx.Module, rates: Mapping[Path, float], key: Array) -> None:
    """Switch dropout on in a model that lives for one call.

    Args:
      fresh: the model.
      rates: see `watch`.
      key: that they draw from, unless they have streams of their own.
    """
    modules = dict(nnx.iter_modules(fresh))
    for i, (path, rate) in enumerate(rates.items()):
        module: Any = modules[path]
        setattr(module, str(_rate(module)), rate)
        module.deterministic = False
        if getattr(module, "rngs", None) is None:
            module.rngs = nnx.RngStream(jax.random.fold_in(key, i), tag="dropout")


def reseeded(streams: nnx.State, key: Array) -> nnx.State:
    """Return a model's random streams begun anew from a key, each from its own part of it."""
    leaves, structure = jax.tree.flatten(streams)
    fresh = [
        jax.random.fold_in(key, i) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, fresh)


def _statistics_names(module: nnx.Module) -> tuple[str, str] | None:
    """Names of a BatchNorm layer's running mean and variance; None of another layer."""
    for names in (("mean", "var"), ("running_mean", "running_var")):
        flax_s_or_own = isinstance(module, nnx.BatchNorm) or names[0] != "mean"
        if flax_s_or_own and all(getattr(module, name, None) is not None for name in names):
            return names
    return None


@functools.cache  # Flax and JAX register every class of modules for the life of the process
def _watched(original: Any, kind: Any) -> Any:
    """The subclass whose instances tell the record that they were given, if any, what they see.

    Where the class adds to one of Flax's, `kind`, calls of that by `super()` tell, too.
    """
    # Between the user's class and Flax's in the order of methods.
    inner = () if kind in (None, original) else (_watched(kind, kind),)
    # `wraps` keeps the signature.
    body = {
        "__call__": functools.wraps(original.__call__)(_telling(original.__call__)),
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        _WATCHED: True,
    }
    # A subclass is a pytree or not as its base is, which Flax would not inherit.
    return type(original)(
        original.__name__, (original, *inner), body, pytree=original._pytree__is_pytree
    )


_WATCHED, _SEEN = "_jinv_watched", "_jinv_seen"


def _telling(method: Callable[..., Any]) -> Callable[..., Any]:
    """A layer's call that tells the record of its module, if that has one."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen: _Seen | None = getattr(self, _SEEN, None)
        if seen is None:
            return method(self, *args, **kwargs)
        layer = _Layer(self, seen.path)
        names = _statistics_names(self)
        if names is not None:
            mean, var = ((*seen.path, name) for name in names)
            layer = _Layer(self, seen.path, (mean, var), getattr(self, names[0])[...])
        return _observed(seen.record, layer, functools.partial(method, self), args, kwargs)

    return call


@dataclasses.dataclass(frozen=True, eq=False)
class _Seen:
    """Where a layer of a fresh model tells what it sees."""

    record: Record
    path: Path


def hand_out(record: Record, fresh: nnx.Module) -> None:
    """Let the watched layers of a model that lives for one call tell this record."""
    for path, module in list(nnx.iter_modules(fresh)):
        if hasattr(module, _WATCHED):
            setattr(module, _SEEN, _Seen(record, path))


def switch(model: nnx.Module, training: bool) -> None:
    """Set the switches that are attributes of a model's layers; dropout stays off."""
    for _, module in nnx.iter_modules(model):
        for name, inference in INFERENCE.items():
            if type(vars(module).get(name)) is bool:
                flips = training and name != "deterministic"
                setattr(module, name, inference != flips)


def draws(model: nnx.Module) -> list[Any]:
    """How often each of a model's random streams was drawn from."""
    return [node.get_value() for _, node in nnx.iter_graph(model) if isinstance(node, nnx.RngCount)]


# --- Flax Linen: calls are intercepted -----------------------------------------------------------

_MEANS = ((linen.BatchNorm, "axis_name", None),)
_DROPOUT = (
    (linen.Dropout, "rate", 0.0),
    (linen.MultiHeadDotProductAttention, "dropout_rate", 0.0),
)
"""Kinds of Linen layers, and what switches off their means over devices, or their dropout."""


def intercept(
    record: Record,
    variables: Variables,
    method: Callable[..., Any],
    args: tuple,
    kwargs: dict[str, Any],
    context: linen.module.InterceptorContext,
) -> Any:
    """Run a method of a Linen module, and tell the record of it if it is a layer to watch.

    Args:
      record: of this pass.
      variables: the network's collections.
      method, args, kwargs, context: as `linen.intercept_methods` gives them.
    """
    module = context.module
    if context.method_name != "__call__":
        return method(*args, **kwargs)
    for kind, field, value in _MEANS if record.drops else _MEANS + _DROPOUT:
        if isinstance(module, kind):
            object.__setattr__(module, field, value)  # of a copy that lives for one `apply`
    layer = _linen_layer(record.name, module, variables)
    if layer is None:
        return method(*args, **kwargs)
    return _observed(record, layer, context.orig_method, args, kwargs, method)


def _linen_layer(name: str, module: linen.Module, variables: Variables) -> _Layer | None:
    """A BatchNorm or linear layer, or one of the user's own that keeps running statistics alone."""
    if isinstance(module, linen.Dense):
        return _Layer(module, ("params", *module.path))
    root = ("batch_stats", *module.path)
    kept = _find(variables, root)
    known = isinstance(module, linen.BatchNorm)
    for names in (("mean", "var"), ("running_mean", "running_var")):
        if all(hasattr(kept.get(key), "shape") for key in names):
            running = kept[names[0]]
            params = _find(variables, ("params", *module.path))
            if known or _stands_alone(params, kept, running.shape):
                mean, var = ((*root, key) for key in names)
                return _Layer(module, root, (mean, var), running)
    if known:
        raise NetworkError(
            f"{name}: the variables hold no running statistics of the BatchNorm layer "
            f"{dotted(root[1:])}: "
            "give all collections that module.init returned, params and batch_stats, as training "
            "left them"
        )
    return None


def _stands_alone(params: Variables, kept: Variables, shape: tuple[int, ...]) -> bool:
    """Whether a module has nothing but running statistics, and scales and shifts as long."""
    size = math.prod(shape)
    return all(
        not isinstance(value, Mapping) and np.size(value) == size for value in params.values()
    ) and not any(isinstance(value, Mapping) for value in kept.values())


def _find(tree: Variables, path: Path) -> Variables:
    """The part of a tree at a path, empty if there is none."""
    for key in path:
        tree = tree.get(key, {})
    return tree


def _observed(
    record: Record,
    layer: _Layer,
    method: Any,
    args: tuple,
    kwargs: Mapping[str, Any],
    run: Callable[..., Any] | None = None,
) -> Any:
    """Run a layer's bound method and note what it saw, unless a call inside has told already.

    Where the user's class adds to Flax's and calls it by `super()`, it is Flax's that tells: what
    its statistics are of may be another array, or in another order, than what the user's is given.
    """
    before = len(record.told)
    output = (run or method)(*args, **kwargs)
    if layer.path not in record.told[before:]:
        given = inspect.signature(method.func).bind(*method.args, *args, **kwargs)
        record.layer(layer, given, output)
    return output

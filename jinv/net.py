"""The one door between networks and attacks: `Net(apply, variables)` and its `Outputs`.

An attack sees a pure function of (variables, images) and plain nested dicts. What a BatchNorm
layer saw comes back as a value, never through hooks or globals.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen, nnx
from jax import Array
from jax.extend.core import get_opaque_trace_state

from jinv.image import Preprocessing, sides

Variables = Mapping[Any, Any]
Parameters = Mapping[Any, Any]
"""A network's variables without BatchNorm statistics and counters: what training changes."""
Path = tuple[Any, ...]


class Moments(NamedTuple):
    """Mean and biased variance per channel (C,), float32 or wider."""

    mean: Array
    var: Array


class Outputs(NamedTuple):
    """What a network says of a batch, and what its BatchNorm layers saw.

    Attributes:
      logits: (B, classes), float32 or wider.
      features: (B, D) input of the last linear layer called, None if there is none.
      moments: of the *input* of every BatchNorm layer, in forward order, over batch and space.
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
      train_apply: as `apply`, but BatchNorm layers normalise with the batch's own moments, as in
        training; dropout stays off. None if that is not known.
      counts: shape of images -> n of every BatchNorm layer in forward order: how many values of a
        channel its moments are of, images times pixels. Nothing is computed for it.
      head: path in `variables` of the last linear layer called, None if there is none.
    """

    name: str
    apply: Callable[[Variables, Array], Outputs]
    variables: Variables
    preprocessing: Preprocessing
    classes: int
    statistics: tuple[tuple[Path, Path], ...]
    train_apply: Callable[[Variables, Array], Outputs] | None = None
    counts: Callable[[tuple[int, ...]], tuple[int, ...]] | None = None
    head: Path | None = None

    def running_moments(self, variables: Variables | None = None) -> tuple[Moments, ...]:
        """Running mean and variance of every BatchNorm layer, in forward order."""
        tree = self.variables if variables is None else variables
        return tuple(Moments(_get(tree, mean), _get(tree, var)) for mean, var in self.statistics)

    def mode(self, training: bool) -> Callable[[Variables, Array], Outputs]:
        """`train_apply` or `apply`; ValueError if there is no training mode."""
        if not training:
            return self.apply
        if self.train_apply is None:
            raise ValueError(
                f"{self.name} has no training mode: give Net.from_linen its `training` arguments"
            )
        return self.train_apply

    def __call__(self, images: Array) -> Outputs:
        """Return `apply` of the network's own variables, compiled once for every shape of images.

        Networks that share `apply`, such as copies with other variables, share the programs.
        """
        return self._compiled(self.variables, images)

    @functools.cached_property
    def _compiled(self) -> Callable[[Variables, Array], Outputs]:
        return jax.jit(self.apply)

    @staticmethod
    def from_nnx(
        model: nnx.Module,
        preprocessing: Preprocessing,
        *,
        name: str | None = None,
        **call: Any,
    ) -> Net:
        """A Flax NNX network as a `Net`.

        `model(images, **call)` must return logits (B, classes). Its BatchNorm layers (Flax's, or
        any module with `running_mean` and `running_var`) are found wherever they are.

        Args:
          model: network; put into inference mode (`model.eval()`) on a copy.
          preprocessing: its input size and normalisation.
          name: defaults to the class's name.
          **call: further keyword arguments of the call.
        """
        model = nnx.clone(model)
        _watch(model)
        model.eval()
        # Random keys (dropout's) play no part in inference: no variables that attacks could see.
        graphdef, rngs, state = nnx.split(model, nnx.RngState, ...)  # type: ignore[misc]
        model.set_attributes(use_running_average=False, raise_if_not_found=False)
        train_graphdef = nnx.graphdef(model)

        def forward(graphdef: Any, variables: Variables, images: Array, record: _Record) -> Array:
            fresh = nnx.merge(graphdef, rngs, variables)
            _hand_out(record, fresh)
            return fresh(images, **call)

        return _build(
            name or type(model).__name__,
            functools.partial(forward, graphdef),
            functools.partial(forward, train_graphdef),
            nnx.to_pure_dict(state),
            preprocessing,
        )

    @staticmethod
    def from_linen(
        module: linen.Module,
        variables: Variables,
        preprocessing: Preprocessing,
        *,
        name: str | None = None,
        training: Mapping[str, Any] | None = None,
        **call: Any,
    ) -> Net:
        """Return a Flax Linen network as a `Net`.

        Args:
          module: network; `module.apply(variables, images, **call)` must return logits
            (B, classes) in inference mode.
          variables: its collections: `params`, `batch_stats`.
          preprocessing: its input size and normalisation.
          name: defaults to the class's name.
          training: the arguments that differ where BatchNorm layers use the batch's moments, such
            as `{"train": True}`; only attacks on gradients of networks in training mode need it.
          **call: what the module needs for inference mode, such as `train=False`.
        """

        def forward(
            call: Mapping[str, Any], variables: Variables, images: Array, record: _Record
        ) -> Array:
            def watch(method: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
                target = context.module
                if context.method_name == "__call__":
                    if isinstance(target, linen.BatchNorm):
                        root = ("batch_stats", *target.path)
                        inputs = _inputs(target, args, kwargs)
                        record.batch_norm((*root, "mean"), (*root, "var"), inputs)
                    elif isinstance(target, linen.Dense):
                        record.linear(("params", *target.path), _inputs(target, args, kwargs))
                return method(*args, **kwargs)

            with linen.intercept_methods(watch):
                # New running statistics are of no interest.
                found: Any = module.apply(variables, images, mutable=["batch_stats"], **call)
                return found[0]

        return _build(
            name or type(module).__name__,
            functools.partial(forward, call),
            None if training is None else functools.partial(forward, {**call, **training}),
            variables,
            preprocessing,
        )


class _Record:
    """What one forward pass showed: lives for one call of `apply`."""

    def __init__(self) -> None:
        self._trace = get_opaque_trace_state()
        self.statistics: list[tuple[Path, Path]] = []
        self.moments: list[Moments] = []
        self.counts: list[int] = []
        self.features: Array | None = None
        self.head: Path | None = None

    def batch_norm(self, mean: Path, var: Path, inputs: Array) -> None:
        self._readable()
        self.statistics.append((mean, var))
        self.moments.append(batch_moments(inputs))
        self.counts.append(inputs.size // inputs.shape[-1])

    def linear(self, path: Path, inputs: Array) -> None:
        self._readable()
        self.head, self.features = path, inputs

    def _readable(self) -> None:
        if get_opaque_trace_state() != self._trace:
            raise ValueError(
                "a BatchNorm or linear layer is called inside remat, scan, vmap or jit, where what "
                "it sees cannot be read: build the network without (attacks may wrap all of it)"
            )


def batch_moments(x: Array) -> Moments:
    """Return mean and biased variance (C,) of x (..., C), in float32 at least.

    Raises:
      ValueError: x is empty.
    """
    if not x.size:
        raise ValueError(f"a BatchNorm layer sees nothing of images this small: {x.shape}")
    return Moments(*_two_pass_moments(x.astype(jnp.promote_types(x.dtype, jnp.float32))))


@jax.custom_jvp
def _two_pass_moments(x: Array) -> tuple[Array, Array]:
    axes = tuple(range(x.ndim - 1))
    mean = x.mean(axes)
    return mean, jnp.square(x - mean).mean(axes)


@_two_pass_moments.defjvp
def _moments_jvp(
    primals: tuple[Array], tangents: tuple[Array]
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """`d var = 2 (mean(x dx) - mean(x) mean(dx))`.

    JAX's own rule keeps x - mean in memory and sums it again in the gradient, where it is 0:
    one write and one pass over every BatchNorm input.
    """
    (x,), (dx,) = primals, tangents
    axes = tuple(range(x.ndim - 1))
    mean, var = _two_pass_moments(x)
    dmean = dx.mean(axes)
    return (mean, var), (dmean, 2 * ((x * dx).mean(axes) - mean * dmean))


def _watch(model: nnx.Module) -> None:
    """Give a model's BatchNorm and linear layers classes that tell a record what they see."""
    for _, module in list(nnx.iter_modules(model)):
        statistics = _statistics_names(module)
        if statistics is not None or isinstance(module, nnx.Linear):
            module.__class__ = _watched(type(module), statistics)


def _statistics_names(module: nnx.Module) -> tuple[str, str] | None:
    """Names of a BatchNorm layer's running mean and variance; None of another layer."""
    if isinstance(module, nnx.BatchNorm):
        return "mean", "var"
    if hasattr(module, "running_mean") and hasattr(module, "running_var"):
        return "running_mean", "running_var"
    return None


@functools.cache  # Flax and JAX register every class of modules for the life of the process
def _watched(original: Any, statistics: tuple[str, str] | None) -> Any:
    """The subclass whose instances tell the record that they were given, if any, their input."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Array:
        seen: _Seen | None = getattr(self, _SEEN, None)
        if seen is not None:
            inputs = _inputs(self, args, kwargs)
            if statistics is None:
                seen.record.linear(seen.path, inputs)
            else:
                mean, var = statistics
                seen.record.batch_norm((*seen.path, mean), (*seen.path, var), inputs)
        return original.__call__(self, *args, **kwargs)

    # `wraps` keeps the signature, which `_inputs` reads.
    body = {
        "__call__": functools.wraps(original.__call__)(call),
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        _WATCHED: True,
    }
    # A subclass is a pytree or not as its base is, which Flax would not inherit.
    return type(original)(original.__name__, (original,), body, pytree=original._pytree__is_pytree)


_WATCHED, _SEEN = "_jinv_watched", "_jinv_seen"


@dataclasses.dataclass(frozen=True, eq=False)
class _Seen:
    """Where a layer of a fresh model tells what it sees."""

    record: _Record
    path: Path


def _hand_out(record: _Record, fresh: nnx.Module) -> None:
    """Let the watched layers of a model that lives for one call tell this record."""
    for path, module in list(nnx.iter_modules(fresh)):
        if hasattr(module, _WATCHED):
            setattr(module, _SEEN, _Seen(record, path))


def _inputs(module: Any, args: tuple, kwargs: Mapping[str, Any]) -> Array:
    """A layer's input, also when the network passes it by name."""
    return inspect.signature(type(module).__call__).bind(module, *args, **kwargs).args[1]


Forward = Callable[[Variables, Array, _Record], Array]


def _build(
    name: str,
    forward: Forward,
    train_forward: Forward | None,
    variables: Variables,
    preprocessing: Preprocessing,
) -> Net:
    def recorded(forward: Forward, variables: Variables, images: Array) -> Outputs:
        record = _Record()
        logits = forward(variables, images, record)
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        return Outputs(logits, record.features, tuple(record.moments))

    def traced(shape: tuple[int, ...]) -> tuple[Any, _Record]:
        """Logits' shape, and the record of paths and counts."""
        record = _Record()

        def trace(variables: Variables, images: Array) -> Array:
            nonlocal record
            record = _Record()
            return forward(variables, images, record)

        logits = jax.eval_shape(trace, variables, jax.ShapeDtypeStruct(shape, jnp.float32))
        return logits, record

    shape = (1, preprocessing.height, preprocessing.width, preprocessing.channels)
    logits, record = traced(shape)
    if not hasattr(logits, "shape") or logits.ndim != 2 or logits.shape[0] != 1:
        raise ValueError(
            f"{name} must return logits (batch, classes) for images {shape}; "
            f"it returned {jax.tree.map(lambda leaf: leaf.shape, logits)}"
        )
    for mean, _ in record.statistics:
        _get(variables, mean)
    return Net(
        name,
        functools.partial(recorded, forward),
        variables,
        preprocessing,
        logits.shape[1],
        tuple(record.statistics),
        None if train_forward is None else functools.partial(recorded, train_forward),
        lambda shape: tuple(traced(shape)[1].counts),
        record.head,
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
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{net.name} cannot take images of {height} x {width} px (its own size is "
            f"{own.height} x {own.width} px): {reason}"
        ) from error


def parameters(net: Net, variables: Variables | None = None) -> dict[Any, Any]:
    """Return the variables that gradients change in training: neither statistics nor counters."""
    statistics = {path for pair in net.statistics for path in pair}

    def chosen(tree: Variables, path: tuple[Any, ...]) -> dict[Any, Any]:
        kept = {}
        for key, value in tree.items():
            here = (*path, key)
            if isinstance(value, Mapping):
                inner = chosen(value, here)
                if inner:
                    kept[key] = inner
            elif here not in statistics and jnp.issubdtype(value.dtype, jnp.floating):
                kept[key] = value
        return kept

    return chosen(net.variables if variables is None else variables, ())


def with_parameters(variables: Variables, changed: Parameters) -> dict[Any, Any]:
    """Return the variables with some of them replaced."""
    return {
        key: with_parameters(value, changed.get(key, {}))
        if isinstance(value, Mapping)
        else changed.get(key, value)
        for key, value in variables.items()
    }


def _get(tree: Variables, path: Path) -> Any:
    for key in path:
        tree = tree[key]
    return tree

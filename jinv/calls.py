"""How a user's network is called, which of its outputs counts, and what it cannot take."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import errors, nnx
from jax import Array

INFERENCE: Mapping[str, bool] = {
    **dict.fromkeys(("train", "training", "is_train", "is_training", "train_mode"), False),
    **dict.fromkeys(("training_mode", "update_stats"), False),
    **dict.fromkeys(("deterministic", "use_running_average", "inference", "inference_mode"), True),
    **dict.fromkeys(("is_inference", "eval", "is_eval", "eval_mode", "test", "is_test"), True),
}
"""Usual names of what switches BatchNorm and dropout -> the value in inference mode."""

_RANDOM = ("rngs", "rng", "key")
"""Names of arguments that nothing needs where dropout is off."""

Output = str | int | Sequence[str | int]
"""A key, field or number of what a network returns, or a path of them."""


class NetworkError(ValueError):
    """What a network cannot do, in a sentence that names it."""


@contextlib.contextmanager
def in_words(name: str, shape: tuple[int, ...], hint: str = "") -> Iterator[None]:
    """Make a sentence of whatever a network raises when it is called.

    Args:
      name: of the network.
      shape: of the images (B, H, W, C) that it is given.
      hint: ends the sentence.
    """
    try:
        yield
    except (NetworkError, MemoryError, FloatingPointError, jax.errors.JaxRuntimeError):
        raise  # a sentence already, or nothing that the network's code could help
    except Exception as error:
        height, width = shape[1:3]
        message = f"{name} cannot take {height} x {width} px images: {_reason(error)}{hint}"
        raise NetworkError(message) from error


def _reason(error: Exception) -> str:
    said = str(error).partition(" (https://flax")[0].strip().split("\n\n")[0] or "it fails"
    if isinstance(error, NameError) and "unbound axis" in said:
        return (
            f"it averages over devices ({said}), but jinv computes a batch as a whole: "
            "make it without axis_name"
        )
    if isinstance(error, errors.InvalidRngError):
        return f"it draws random numbers, which attacks cannot follow: {said}"
    if isinstance(error, ValueError | TypeError | errors.FlaxError | ZeroDivisionError):
        return said
    return f"{type(error).__name__}: {said}"


def check_images(name: str, images: Any, channels: int) -> None:
    """Refuse what is no batch of normalised images for the network.

    Args:
      name: of the network.
      images: to be given to it.
      channels: of the images that it takes.

    Raises:
      NetworkError: another rank or number of channels, or no floating-point numbers.
    """
    shape, dtype = jnp.shape(images), jnp.result_type(images)
    if len(shape) != 4 or shape[-1] != channels:
        raise NetworkError(
            f"{name} takes images (batch, height, width, {channels}), not {shape}"
            + (": one image is a batch of one, image[None]" if len(shape) == 3 else "")
        )
    if not jnp.issubdtype(dtype, jnp.floating):
        raise NetworkError(
            f"{name} takes normalised images, floating-point numbers, not {dtype}: of bytes, "
            "jinv.image.from_bytes(images, net.preprocessing) makes such"
        )


class Call(NamedTuple):
    """How a network is called.

    Attributes:
      inference: keyword arguments in inference mode.
      training: the same in training mode.
      inference_fields, training_fields: of the module itself, where the mode is a field of it.
      dropping: keyword arguments that switch dropout on in training.
      dropping_fields: the same as fields.
      streams: names of arguments that random keys come from.
      fixed: the user's own arguments that would tell the modes apart, but are the same in both.
      two_modes: whether anything differs between the modes.
    """

    inference: dict[str, Any]
    training: dict[str, Any]
    inference_fields: dict[str, bool]
    training_fields: dict[str, bool]
    dropping: dict[str, bool]
    dropping_fields: dict[str, bool]
    streams: tuple[str, ...]
    fixed: tuple[str, ...]
    two_modes: bool

    def random(self, key: Array) -> dict[str, Any]:
        """Return the arguments that differ where dropout is on, given a key to draw from."""
        keys = {name: nnx.Rngs(key) if name == "rngs" else key for name in self.streams}
        return {**self.dropping, **keys}


def arguments(
    name: str,
    maker: str,
    module: Any,
    given: Mapping[str, Any],
    training: Mapping[str, Any] | None,
) -> Call:
    """Find what a network's call needs in inference mode and in training mode.

    Arguments that are called as in `INFERENCE` get their value by themselves. `deterministic` says
    False in training mode only if nothing else tells the modes apart: dropout stays off.

    Args:
      name: of the network.
      maker: what the user called, for messages.
      module: the network.
      given: the user's arguments, which win.
      training: those that differ in training mode.

    Raises:
      NetworkError: an argument without a default is not given and its name says nothing.
    """
    inference, found, missing, streams = dict(given), [], [], []
    for parameter in _after_images(module, given):
        key = parameter.name
        if key in given:
            continue
        if key in INFERENCE and _takes_flag(parameter, module):
            inference[key] = INFERENCE[key]
            found.append(key)
        elif parameter.default is parameter.empty:
            if key in _RANDOM:
                inference[key] = None
                streams.append(key)
            elif key not in (training or {}):
                missing.append(key)
    if missing:
        wanted = ", ".join(f"{key}=..." for key in missing)
        raise NetworkError(
            f"the call of {name} needs {' and '.join(missing)}, which jinv cannot know: "
            f"give {maker}(..., {wanted}) what inference mode needs"
        )
    fields = [key for key in _fields(module) if type(getattr(module, key)) is bool]
    switches = {*found, *(key for key in fields if key in INFERENCE)}
    if len(switches) > 1:
        switches -= {"deterministic"}
    opposite = {key: not INFERENCE[key] for key in switches}
    still = {key: INFERENCE[key] for key in fields if key in INFERENCE}
    return Call(
        inference,
        {**inference, **{k: v for k, v in opposite.items() if k in found}, **(training or {})},
        still,
        {**still, **{k: v for k, v in opposite.items() if k in still}},
        {key: False for key in found if key == "deterministic"},
        {key: False for key in still if key == "deterministic"},
        tuple(streams),
        tuple(key for key in given if key in INFERENCE and key not in (training or {})),
        bool(switches) or training is not None,
    )


def _after_images(module: Any, given: Mapping[str, Any]) -> list[inspect.Parameter]:
    """The parameters of a network's call after the images."""
    method = given.get("method") or "__call__"  # Linen may call another
    function = getattr(type(module), method) if isinstance(method, str) else method
    try:
        parameters = list(inspect.signature(function).parameters.values())[1:]
    except (TypeError, ValueError):
        return []
    collected = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    if parameters and parameters[0].kind is not collected[0]:
        parameters = parameters[1:]
    return [parameter for parameter in parameters if parameter.kind not in collected]


def _takes_flag(parameter: inspect.Parameter, module: Any) -> bool:
    """Whether the parameter is a switch that the module has not set already."""
    if parameter.default is None:  # where both are given, Linen's merge_param refuses
        return getattr(module, parameter.name, None) is None
    return parameter.default is parameter.empty or isinstance(parameter.default, bool)


def _fields(module: Any) -> list[str]:
    """Names of a Linen module's fields."""
    if not dataclasses.is_dataclass(module):
        return []
    return [field.name for field in dataclasses.fields(module) if field.init]


def logits_of(
    name: str, maker: str, result: Any, output: Output | None, shape: tuple[int, ...]
) -> Array:
    """Return the logits (B, classes) among what a network returned.

    Args:
      name: of the network.
      maker: what the user called, for messages.
      result: an array, or tuples, dicts and dataclasses of arrays.
      output: where in it the logits are; None if it is they.
      shape: of the images.

    Raises:
      NetworkError: there are none; it says what there is.
    """
    path: tuple[str | int, ...] = ()
    if output is not None:
        path = (output,) if isinstance(output, str | int) else tuple(output)
    found = result
    for key in path:
        parts = _parts(found)
        if isinstance(key, int) and isinstance(found, tuple | list) and -len(parts) <= key:
            parts = dict(enumerate(found)) | {i - len(found): v for i, v in enumerate(found)}
        if key not in parts:
            raise NetworkError(f"{name} returns no output={output!r}; it returned {_told(result)}")
        found = parts[key]
    if _are_logits(found, shape[0]) and (found.shape[1] > 1 or output is not None):
        return found
    raise NetworkError(
        f"{name} must return logits (batch, classes) for images {shape}; it returned "
        f"{_told(result)}{_advice(found, maker, shape[0])}"
    )


def _are_logits(found: Any, batch: int) -> bool:
    return getattr(found, "ndim", None) == 2 and found.shape[0] == batch


def _parts(result: Any) -> dict[Any, Any]:
    """What a container holds, by key, field or number; nothing of an array."""
    if isinstance(result, Mapping):
        return dict(result)
    if isinstance(result, tuple) and hasattr(result, "_fields"):
        return dict(zip(result._fields, result, strict=True))
    if isinstance(result, tuple | list):
        return dict(enumerate(result))
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        return {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    return {}


def _leaves(result: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    parts = _parts(result)
    if not parts:
        yield path, result
    for key, value in parts.items():
        yield from _leaves(value, (*path, key))


def _told(result: Any) -> str:
    """Say what a network returned."""
    leaves = list(_leaves(result))
    shapes = [str(getattr(leaf, "shape", type(leaf).__name__)) for _, leaf in leaves]
    if len(leaves) == 1 and not leaves[0][0]:
        return shapes[0]
    named = (f"{_shown(path)}: {shape}" for (path, _), shape in zip(leaves, shapes, strict=True))
    return f"a {type(result).__name__} of {', '.join(named)}"


def _shown(path: tuple[Any, ...]) -> str:
    return repr(path[0] if len(path) == 1 else path)


def _advice(found: Any, maker: str, batch: int) -> str:
    leaves = list(_leaves(found))
    if leaves[0][0]:
        fitting = [path for path, leaf in leaves if _are_logits(leaf, batch)]
        chosen = _shown(fitting[0]) if fitting else "..."
        return f": say which of them the logits are, such as {maker}(..., output={chosen})"
    shape = getattr(found, "shape", ())
    if shape == (batch,) or shape == (batch, 1):
        joined = "stack" if len(shape) == 1 else "concatenate"
        attribute = "; of one attribute, say output=()" if len(shape) == 2 else ""
        return (
            ", one number z an image: two classes have two logits, such as "
            f"jnp.{joined}([jnp.zeros_like(z), z], -1){attribute}"
        )
    if len(shape) == 4:
        return ": take the mean over height and width, .mean((1, 2))"
    return ""

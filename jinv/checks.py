"""Checks that config dataclasses make of themselves when they are built."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

T = TypeVar("T", bound=Callable)


CHANGED = {
    "optimiser": "is now called `optimizer`, as in optax",
    "checkpoint_every": "is now `checkpoint_seconds`, a time: every so many seconds",
    "stack": "is gone: networks of one architecture are computed like any others, which is faster",
}
"""What has become of keys that configs and command lines once had."""


def todays_keywords(called: T) -> T:
    """Let calls with a keyword of an older version fail with what has become of it.

    A decorator for functions, and for dataclasses as they are once they are made.
    """
    inner: Any = vars(called)["__init__"] if isinstance(called, type) else called
    gone = CHANGED.keys() - inspect.signature(inner).parameters

    @functools.wraps(inner)
    def checked(*args: Any, **kwargs: Any) -> Any:
        for key in gone & kwargs.keys():
            raise TypeError(f"{getattr(called, '__name__', called)}: `{key}` {CHANGED[key]}")
        return inner(*args, **kwargs)

    if not isinstance(called, type):
        return cast("T", checked)
    called.__init__ = checked  # type: ignore[misc]
    return called


def one_of(what: str, value: Any, choices: Iterable[Any]) -> None:
    """Refuse a value that is not among the choices.

    Raises:
      ValueError: it names what the value is of, the value and the choices.
    """
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{what} is one of {', '.join(map(str, choices))}, not {value!r}")


def words(config: object) -> None:
    """Refuse a dataclass with a field annotated `Literal` that holds none of its words.

    A field annotated `Literal[...] | None` may be None too. Other fields are left alone.

    Raises:
      ValueError: it names the field, its value and the words.
    """
    cls: Any = type(config)
    for name, choices in _literals(cls):
        one_of(name, getattr(config, name), choices)


@functools.cache
def _literals(cls: Any) -> tuple[tuple[str, tuple[Any, ...]], ...]:
    """The class's fields that take only words, with these."""
    hints = get_type_hints(cls)
    found = [(field.name, _words_of(hints[field.name])) for field in dataclasses.fields(cls)]
    return tuple((name, choices) for name, choices in found if choices is not None)


def _words_of(hint: Any) -> tuple[Any, ...] | None:
    if get_origin(hint) is Literal:
        return get_args(hint)
    if get_origin(hint) not in (Union, types.UnionType):
        return None
    literal, *others = (part for part in get_args(hint) if part is not type(None))
    return (*get_args(literal), None) if get_origin(literal) is Literal and not others else None


def unused(config: Any, reason: str, *names: str) -> None:
    """Refuse options that were set although they play no part.

    An option is set where its value is not the dataclass's default.

    Args:
      config: a dataclass instance.
      reason: why these fields play no part, such as "schedule is 'constant'".
      names: fields with defaults.

    Raises:
      ValueError: it names the field, its value, the reason and the default to leave it at.
    """
    fields = {field.name: field for field in dataclasses.fields(config)}
    for name in names:
        field, value = fields[name], getattr(config, name)
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        if value != default:
            raise ValueError(
                f"{name}: {value!r} plays no part: {reason}; leave {name} at {default!r}"
            )


def free(what: str, name: str, table: Iterable[str]) -> None:
    """Refuse a name that the table has already.

    Raises:
      ValueError: it names the table's entries.
    """
    if not name or name in table:
        raise ValueError(f"a new {what} cannot be called {name!r}: taken are {', '.join(table)}")

"""Checks that config dataclasses make of themselves when they are built."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
import numbers
import os
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import (
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

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


class FieldError(ValueError):
    """An option that cannot be.

    Attributes:
      field: its name.
      told: what is wrong with it, so that `field + told` is a sentence.
    """

    def __init__(self, field: str, told: str) -> None:
        super().__init__(field + told)
        self.field = field
        self.told = told


@dataclasses.dataclass(frozen=True)
class Range:
    """Which numbers an option takes, as in `Annotated[int, Range(1)]`.

    Attributes:
      least, most: the smallest and the largest.
      above, below: the smallest, or the largest, is itself not taken.
      finite: infinity is not taken.
    """

    least: float = -math.inf
    most: float = math.inf
    above: bool = False
    below: bool = False
    finite: bool = True

    def __contains__(self, value: Any) -> bool:
        low = value > self.least if self.above else value >= self.least
        high = value < self.most if self.below else value <= self.most
        return bool(low and high and (abs(value) < math.inf or not self.finite))

    def __str__(self) -> str:
        ends = []
        if self.least > -math.inf:
            ends.append(f"{'above' if self.above else 'of at least'} {self.least:.15g}")
        if self.most < math.inf:
            ends.append(f"{'below' if self.below else 'at most'} {self.most:.15g}")
        return " and ".join(ends)


@dataclasses.dataclass(frozen=True)
class File:
    """What the text of an option is, as in `Annotated[str, File()]`: the path of a file or folder.

    Attributes:
      words: texts that are none.
      endings: of the files that belong to the path, which is not a file by itself.
    """

    words: tuple[str, ...] = ()
    endings: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Code:
    """That the text of an option may be `package.module:function`, whose file counts as named."""


@dataclasses.dataclass(frozen=True, eq=False)
class Word:
    """Which texts an option takes, as in `Annotated[str, Word(lambda: TABLE)]`: its keys.

    Attributes:
      table: gives the names when a config is checked, so that those registered meanwhile count.
      also: says of other texts whether they are taken.
      told: what these are.
    """

    table: Callable[[], Iterable[str]]
    also: Callable[[str], bool] = lambda text: False
    told: str = ""

    def __contains__(self, value: Any) -> bool:
        return isinstance(value, str) and (value in self.table() or self.also(value))

    def __str__(self) -> str:
        return ", ".join(filter(None, (*self.table(), self.told)))


@dataclasses.dataclass(frozen=True)
class Some:
    """That a list needs an entry, as in `Annotated[tuple[int, ...], Some()]`."""


Count = Annotated[int, Range(1)]
Natural = Annotated[int, Range(0)]
Class = Annotated[int, Range(0, 2**31 - 1)]
Seed = Annotated[int, Range(0, 2**32 - 1)]
Positive = Annotated[float, Range(0, above=True)]
NotNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
PositiveShare = Annotated[float, Range(0, 1, above=True)]
ShareBelowOne = Annotated[float, Range(0, 1, below=True)]


def fields(config: object) -> None:
    """Refuse a dataclass with a value that its annotations do not allow.

    Heeded are types, `Literal`, `Word`, `Range` and `Some`.

    Raises:
      FieldError: it names the field, what it has to be, and its value.
    """
    for name, hint in hints(type(config)).items():
        value = getattr(config, name)
        if not fits(hint, value):
            raise FieldError(name, refusal(hint, value))


def hints(cls: Any) -> dict[str, Any]:
    """Return the annotations of a dataclass's fields by name."""
    return _hints(cls)


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    found = get_type_hints(cls, include_extras=True)
    return {field.name: found[field.name] for field in dataclasses.fields(cls)}


def options(hint: Any) -> tuple[Any, ...]:
    """Return the alternatives of an annotation `A | B`, or the one that it is."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def bare(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """Return an annotation's type, and what it is annotated with."""
    return (hint.__origin__, hint.__metadata__) if get_origin(hint) is Annotated else (hint, ())


def fits(hint: Any, value: Any) -> bool:
    """Whether an annotation allows a value."""
    return any(_fits(*bare(option), value) for option in options(hint))


def _fits(kind: Any, notes: tuple[Any, ...], value: Any) -> bool:
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin is Literal:
        return isinstance(value, str | None) and value in inner
    if kind is type(None):
        return value is None
    if kind in (int, float):
        return _number(kind, value) and all(value in note for note in notes)
    if kind is str:
        words = [note for note in notes if isinstance(note, Word)]
        return isinstance(value, str | os.PathLike) and all(value in word for word in words)
    if origin is tuple:
        return _sequence(inner, value) and bool(len(value) or Some() not in notes)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping) and all(
            fits(inner[0], k) and fits(inner[1], v) for k, v in value.items()
        )
    return isinstance(value, kind)


def _number(kind: type, value: Any) -> bool:
    """Whether a value is a number of this kind, Python's or an array of one."""
    if getattr(value, "shape", None) == () and value.dtype.kind in ("iu" if kind is int else "iuf"):
        return True
    kinds: Any = numbers.Integral if kind is int else numbers.Real
    return isinstance(value, kinds) and not isinstance(value, bool)


def _sequence(inner: tuple[Any, ...], value: Any) -> bool:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        return False
    if inner[1:] == (...,):
        return all(fits(inner[0], entry) for entry in value)
    return len(value) == len(inner) and all(map(fits, inner, value))


def wanted(hint: Any) -> str:
    """Say in the words of a config file what an annotation allows."""
    *others, last = [_wanted(*bare(option)) for option in options(hint)]
    return f"{', '.join(others)} or {last}" if others else last


def _wanted(kind: Any, notes: tuple[Any, ...], plural: bool = False) -> str:
    inner = get_args(kind)
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, inner))}" if inner[1:] else repr(inner[0])
    if get_origin(kind) is tuple:
        count = "a list of one or more" if Some() in notes else "a list of"
        count = count if inner[1:] == (...,) else str(len(inner))
        return f"{count} {_wanted(*bare(inner[0]), plural=True)}"
    if get_origin(kind) in (dict, Mapping):
        return f"a mapping of names to {_wanted(*bare(inner[1]), plural=True)}"
    if dataclasses.is_dataclass(kind):
        keys = ", ".join(field.name for field in dataclasses.fields(kind))
        return f"{'mappings' if plural else 'a mapping'} with the keys {keys}"
    for note in notes:
        if isinstance(note, Word):
            return f"one of {note}"
    one, many = _NAMED.get(kind, (kind.__name__,) * 2)
    if any(isinstance(note, File) for note in notes):
        one, many = "a path", "paths"
    limits = "".join(f" {note}" for note in notes if isinstance(note, Range))
    return f"{many if plural else one}{limits}"


_NAMED: dict[Any, tuple[str, str]] = {
    bool: ("true or false", "true or false"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("text", "texts"),
    type(None): ("nothing (null)", "nothing"),
    Any: ("anything", "values"),
}


def refusal(hint: Any, value: Any) -> str:
    """Say, after the name of an option, what it must be, what it is, and what may be meant."""
    words: list[str] = []
    for option in options(hint):
        kind, notes = bare(option)
        words += map(str, get_args(kind) if get_origin(kind) is Literal else ())
        words += (name for note in notes if isinstance(note, Word) for name in note.table())
    near = difflib.get_close_matches(str(value).lower(), words, 1)
    meant = f": did you mean {near[0]}?" if near and isinstance(value, str) else ""
    return f" must be {wanted(hint)}, not {shown(value)}{meant}"


def shown(value: Any) -> str:
    """Return a value as config files write it, cut where it is long."""
    words = {True: "true", False: "false", None: "nothing (null)"}
    if isinstance(value, bool | None):
        return words[value]
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."


def one_of(what: str, value: Any, choices: Iterable[Any]) -> None:
    """Refuse a value that is not among the choices.

    Raises:
      FieldError: it names what the value is of, the choices and the value.
    """
    choices = tuple(choices)
    if value not in choices:
        raise FieldError(
            what, f" must be one of {', '.join(map(str, choices))}, not {shown(value)}"
        )


def unused(config: Any, reason: str, *names: str) -> None:
    """Refuse options that were set although they play no part.

    An option is set where its value is not the dataclass's default.

    Args:
      config: a dataclass instance.
      reason: why these fields play no part, such as "schedule is 'constant'".
      names: fields with defaults.

    Raises:
      FieldError: it names the field, its value, the reason and the default to leave it at.
    """
    fields = {field.name: field for field in dataclasses.fields(config)}
    for name in names:
        field, value = fields[name], getattr(config, name)
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        if value != default:
            raise FieldError(
                name,
                f": {shown(value)} plays no part: {reason}; leave {name} at {shown(default)}",
            )


def free(what: str, name: str, table: Iterable[str]) -> None:
    """Refuse a name that the table has already.

    Raises:
      ValueError: it names the table's entries.
    """
    if not name or name in table:
        raise ValueError(f"a new {what} cannot be called {name!r}: taken are {', '.join(table)}")

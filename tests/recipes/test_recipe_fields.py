"""Every key of every recipe refuses what it does not take, before anything is loaded.

The keys are found by walking the commands' dataclasses: a new key is swept as soon as it is there.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin

import pytest
import yaml

from jinv import checks, data, recipes
from jinv.models.network import Network
from jinv.runs import command_line
from jinv.shadow import features


class Key(NamedTuple):
    """A key of a recipe: where it stands in the tree of which command, and its annotation."""

    command: str
    path: tuple[str | int, ...]
    hint: Any

    @property
    def name(self) -> str:
        return ".".join(map(str, self.path))


def bare(hint: Any) -> Any:
    return checks.bare(hint)[0]


def entry(option: Any) -> Any:
    """What a list holds; of others, what they are."""
    return bare(get_args(option)[0]) if get_origin(option) is tuple else option


def keys(command: str, cls: Any, path: tuple[str | int, ...] = ()) -> Iterator[Key]:
    for name, hint in checks.hints(cls).items():
        here = (*path, name)
        yield Key(command, here, hint)
        for option in map(bare, checks.options(hint)):
            if dataclasses.is_dataclass(entry(option)):
                place = here if entry(option) is option else (*here, 0)
                yield from keys(command, entry(option), place)


COMMANDS = {name: recipes.find(name) for name in recipes.RECIPES}
KEYS = [key for name, command in COMMANDS.items() for key in keys(name, command.config)]  # type: ignore[union-attr]


def wrong(hint: Any) -> Iterator[Any]:
    """Values that a key of this annotation cannot mean."""
    options = checks.options(hint)
    kinds = list(map(bare, options))
    origins = [get_origin(kind) for kind in kinds]
    nested = any(map(dataclasses.is_dataclass, kinds))
    if Any in kinds:  # there is nothing that it cannot mean
        return
    if str not in kinds and not nested:
        yield "no such word"
    if tuple not in origins:
        yield from ([], [1])
    if not {dict, Mapping} & {*origins} and not nested:
        yield {"key": 1}
    if bool not in kinds:
        yield True
    if type(None) not in kinds:
        yield None
    yield from (math.nan, -math.inf, -1, -0.5)
    ranges = [n for option in options for n in checks.bare(option)[1] if hasattr(n, "finite")]
    if all(n.finite for n in ranges):
        yield math.inf
    if not {int, float} & {*kinds}:
        yield from (0, 3, 2.5)
    elif float not in kinds:
        yield from (2.5, 1.0)
    for option in options:
        kind, notes = checks.bare(option)
        inner = get_args(kind)
        for note in notes:
            if isinstance(note, checks.Range):
                yield note.least if note.above else note.least - 1
                if note.most < math.inf:
                    yield note.most if note.below else note.most + 1
            if note == checks.Some():
                yield []
            if isinstance(note, checks.Word):
                yield from ("no such word", "")
        if get_origin(kind) is tuple and not dataclasses.is_dataclass(entry(kind)):
            yield from ([value] for value in wrong(inner[0]))
        if get_origin(kind) in (dict, Mapping) and inner[1] is not Any:
            yield from ({"key": value} for value in wrong(inner[1]))


def with_value(command: str, path: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    """The smallest tree of a command in which the key at this path has this value."""
    cls: Any = COMMANDS[command].config  # type: ignore[union-attr]
    return _with_value(cls, path, value)


def _with_value(cls: Any, path: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    name, *rest = path
    hints = checks.hints(cls)
    needed = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory]
    tree = {needs: usual(hints[needs]) for needs in needed}
    if rest:
        options = map(bare, checks.options(hints[str(name)]))
        inner = next(c for c in map(entry, options) if dataclasses.is_dataclass(c))
        many = rest[0] == 0
        below = _with_value(inner, tuple(rest[many:]), value)
        value = [below] if many else below
    return {**tree, str(name): value}


def usual(hint: Any) -> Any:
    """A value that a key without a default can have."""
    kind, notes = checks.bare(checks.options(hint)[0])
    words = [note for note in notes if isinstance(note, checks.Word) and "lenet" not in note]
    if words:
        return next(iter(words[0].table()))
    if get_origin(kind) is tuple:
        return [usual(get_args(kind)[0])]
    if dataclasses.is_dataclass(kind):
        (name,) = (f.name for f in dataclasses.fields(kind) if f.default is f.default_factory)
        return {name: usual(checks.hints(kind)[name])}
    return {str: "lenet", int: 1, float: 1.0}[kind]


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("something is loaded")

    monkeypatch.setattr(Network, "load", load)
    monkeypatch.setattr(data.Source, "load", load)
    monkeypatch.setattr(features, "load", load)


@pytest.mark.parametrize("key", KEYS, ids=lambda key: f"{key.command}:{key.name}")
def test_what_a_key_cannot_mean_is_refused(
    key: Key, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = COMMANDS[key.command]
    assert command is not None
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    values = list(wrong(key.hint))
    assert values
    for value in values:
        recipe.write_text(yaml.safe_dump(with_value(key.command, key.path, value)))
        code = command_line.main(command, ["--config", str(recipe), "--out", str(out)])
        told = capsys.readouterr().err
        assert code == 2, f"{key.name}: {value!r} passes"
        assert told.startswith(f"error: {key.name}"), f"{value!r}: {told}"
        assert len(told.splitlines()) == 1
        assert not out.exists()


@pytest.mark.parametrize("key", KEYS, ids=lambda key: f"{key.command}:{key.name}")
def test_every_number_has_a_range(key: Key) -> None:
    for option in checks.options(key.hint):
        kind = bare(option)
        inner = [*get_args(kind)] if get_origin(kind) in (tuple, dict, Mapping) else []
        for part in (option, *inner):
            number, said = checks.bare(part)
            if number in (int, float):
                assert any(isinstance(note, checks.Range) for note in said), key.name


@pytest.mark.parametrize("name", COMMANDS)
def test_help_lists_the_keys_without_a_config(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = COMMANDS[name]
    assert command is not None
    with pytest.raises(SystemExit) as left:
        command_line.main(command, ["--help"])
    assert left.value.code == 0
    told = capsys.readouterr().out
    above = told[: told.index("summary.json holds\n\n    ")]
    listed = dict(re.findall(r"^    ([a-z]\S*?)(\*| |$)", above, re.MULTILINE))
    starts = tuple(key for key, star in listed.items() if star == "*")
    for key in KEYS:
        if key.command == name:
            assert key.name in listed or key.name.startswith(starts), key.name
    assert max(map(len, told.splitlines())) <= 100


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("out", ["", " "])
def test_a_folder_without_a_name_is_none(
    name: str, out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = COMMANDS[name]
    assert command is not None
    with pytest.raises(SystemExit) as left:
        command_line.main(command, ["--config", str(tmp_path / "r.yaml"), "--out", out])
    assert left.value.code == 2
    assert "needs the name of a folder" in capsys.readouterr().err

"""YAML recipe + command line -> frozen dataclass. Unknown keys and wrong types are errors."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.resources
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import dacite
import yaml

from jinv.checks import CHANGED

T = TypeVar("T")

_RENAMED, _GONE = {"optimiser": "optimizer"}, ("checkpoint_every", "stack")


class ConfigError(ValueError):
    """A recipe that cannot be read, with the file and the key to blame."""


def find(name: str | Path) -> Path:
    """Return the file of this name, or the shipped recipe: `demo`, `demo.yaml`.

    Raises:
      ConfigError: there is neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = shipped_recipes()
    stem = path.name.removesuffix(".yaml")
    if path.parent in (Path(), Path("configs")) and stem in shipped:
        return shipped[stem]
    near = difflib.get_close_matches(stem, shipped, 3)
    advice = f"; did you mean {' or '.join(near)}?" if near else "; `jinv configs` lists those"
    raise ConfigError(f"there is no file {name}, nor a recipe of that name{advice}")


def shipped_recipes() -> dict[str, Path]:
    """Return the recipes that come with jinv by name."""
    return {path.stem: path for path in sorted(_recipes_folder().glob("*.yaml"))}


def _recipes_folder() -> Path:
    """Return `configs/`: beside the package in a checkout, inside it in an installed wheel."""
    package = Path(str(importlib.resources.files("jinv")))
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def first_line(path: Path) -> str:
    """Return a recipe's first comment, which says what it is."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and line.strip("# "):
            return line.strip("# ")
    return ""


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return the file's mapping; YAML is loaded safely, so it cannot make Python objects.

    Raises:
      ConfigError: there is no such file, or it holds something else.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the config {path}: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping of keys to values")
    return tree


def build(cls: type[T], tree: Mapping[str, Any]) -> T:
    """Return a (nested) dataclass made of plain values, checked against the annotations.

    Raises:
      ConfigError: an unknown key, a wrong type, or a value that the dataclass refuses.
    """
    settings = dacite.Config(strict=True, cast=[tuple], type_hooks={float: _number})
    try:
        return dacite.from_dict(cls, tree, settings)
    except dacite.UnexpectedDataError as error:
        raise ConfigError(_unknown(sorted(map(str, error.keys)), cls)) from None
    except dacite.DaciteError as error:
        raise ConfigError(str(error)) from None
    except RecursionError:
        raise ConfigError("the config refers to itself") from None


def check_flags(flags: Iterable[str]) -> None:
    """Refuse flags of the command line that are called otherwise now.

    Raises:
      ConfigError: says what they are called.
    """
    for flag in flags:
        if flag.startswith("--"):
            name = flag.partition("=")[0]
            key = name[2:].rpartition(".")[2].replace("-", "_")
            if key in CHANGED:
                raise ConfigError(f"{name} {CHANGED[key]}")


def modern(tree: Any) -> Any:
    """Return a plain tree of an older version with the keys that it would have now."""
    if isinstance(tree, Mapping):
        renamed = {_RENAMED.get(key, key): modern(value) for key, value in tree.items()}
        return {key: value for key, value in renamed.items() if key not in _GONE}
    return [modern(value) for value in tree] if isinstance(tree, list) else tree


def _unknown(keys: Sequence[str], cls: type) -> str:
    told = []
    for key in keys:
        near = difflib.get_close_matches(key, set(_fields(cls)), 1)
        advice = f": did you mean {near[0]!r}?" if near else ""
        told.append(
            f"`{key}` {CHANGED[key]}" if key in CHANGED else f"there is no key {key!r}{advice}"
        )
    return "; ".join(told)


def _fields(cls: type) -> Iterator[str]:
    """Yield the names of all fields of a dataclass and of those inside it."""
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        yield field.name
        for inner in (hints[field.name], *get_args(hints[field.name])):
            if isinstance(inner, type) and dataclasses.is_dataclass(inner):
                yield from _fields(inner)


def with_preset(tree: Mapping[str, Any], presets: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tree in which `attack: {preset: NAME, ...}` is that preset with its own keys on top.

    Args:
      tree: of a recipe.
      presets: name -> config of the attack.

    Raises:
      ConfigError: no preset has that name.
    """
    attack = tree.get("attack")
    if not isinstance(attack, dict) or "preset" not in attack:
        return dict(tree)
    attack = dict(attack)
    preset = attack.pop("preset")
    if preset not in presets:
        raise ConfigError(f"no preset is called {preset!r}; there are: {', '.join(presets)}")
    return {**tree, "attack": {**plain(presets[preset]), **attack}}


def _number(value: Any) -> Any:
    """YAML reads 1e-4 as text and 1 as an integer: both are meant as floats."""
    if isinstance(value, bool):
        raise ConfigError(f"a number is wanted, not {value}")
    if not isinstance(value, int | float | str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def plain(config: Any) -> Any:
    """Return the config as plain lists, dicts and values; `build` reads it back."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {key: plain(value) for key, value in config.items()}
    if isinstance(config, Sequence) and not isinstance(config, str):
        return [plain(value) for value in config]
    return config


def to_yaml(config: Any) -> str:
    """Return the config as YAML text."""
    return yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True)


def differences(left: Mapping[str, Any], right: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the dotted keys whose values differ between two plain trees, with both values."""
    found: list[str] = []
    for key in sorted({*left, *right}):
        a, b = left.get(key), right.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key} ({a!r} against {b!r})")
    return found

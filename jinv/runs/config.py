"""YAML recipe + command line -> frozen dataclass. Unknown keys and wrong types are errors."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.resources
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml

from jinv import checks, files
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
    path = files.path(name)
    if path.exists() and not path.is_dir():
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
        tree = yaml.load(files.path(path).read_text(encoding="utf-8"), _Loader)
        _values(tree, {})
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the config {path}: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping of keys to values")
    return tree


class _Loader(yaml.SafeLoader):
    """The safe loader; it reads 1e-4 as a number, and refuses a key that is given twice."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = {key for key in keys if keys.count(key) > 1 and key != "<<"}
        if twice:
            raise ValueError(f"line {node.start_mark.line + 1}: {', '.join(twice)} is given twice")
        return node


_Loader.add_implicit_resolver(  # which YAML 1.1 lacks
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"), list("-+0123456789")
)

_MOST_VALUES = 100_000


def _values(tree: Any, counted: dict[int, int]) -> int:
    """Count the values of a tree: a few lines of YAML can stand for billions, or for themselves."""
    if not isinstance(tree, list | dict):
        return 1
    if id(tree) not in counted:
        counted[id(tree)] = _MOST_VALUES
        inner = tree.values() if isinstance(tree, dict) else tree
        counted[id(tree)] = sum(_values(value, counted) for value in inner)
    if counted[id(tree)] >= _MOST_VALUES:
        raise ValueError("it refers to itself, or stands for too many values")
    return counted[id(tree)]


def build(cls: type[T], tree: Any, path: str = "") -> T:
    """Return a (nested) dataclass made of plain values, checked against the annotations.

    Lists become tuples, and numbers that YAML reads as text (1e-4) numbers, where these are wanted.

    Args:
      cls: the dataclass.
      tree: of its fields' values.
      path: where the tree lies in a larger one, for messages: "attack.phases.0".

    Raises:
      ConfigError: an unknown key, a wrong type, or a value that the dataclass refuses.
    """
    hints = checks.hints(cls)
    required = [f.name for f in dataclasses.fields(cls) if not _has_default(f)]  # type: ignore[arg-type]
    if not isinstance(tree, Mapping):
        told = f"{path or 'the config'} must be {checks.wanted(cls)}, not {checks.shown(tree)}"
        if isinstance(tree, str) and len(required) == 1:
            told += f": write {{{required[0]}: {tree}}}"
        raise ConfigError(told)
    if unknown := [key for key in tree if key not in hints]:
        raise ConfigError("; ".join(_unknown(key, path, cls) for key in unknown))
    for name in required:
        if name not in tree:
            raise ConfigError(
                f"{_joined(path, name)} is missing: it must be {checks.wanted(hints[name])}"
            )
    values = {key: _value(hints[key], value, _joined(path, key)) for key, value in tree.items()}
    try:
        return cls(**values)
    except ConfigError:
        raise
    except checks.FieldError as error:
        raise ConfigError(_joined(path, error.field) + error.told) from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}" if path else str(error)) from None


def _value(hint: Any, value: Any, path: str) -> Any:
    """Return a plain value as what its annotation wants."""
    options = [checks.bare(option)[0] for option in checks.options(hint)]
    inner: Any = next((option for option in options if _holds(option, value)), None)
    if isinstance(value, list) and inner is not None:
        kinds = get_args(inner)
        if kinds[1:] == (...,):
            kinds = kinds[:1] * len(value)
        if len(kinds) == len(value):
            value = tuple(
                _value(kind, entry, f"{path}.{i}")
                for i, (kind, entry) in enumerate(zip(kinds, value, strict=True))
            )
    elif isinstance(value, Mapping) and dataclasses.is_dataclass(inner):
        return build(inner, value, path)  # type: ignore[arg-type]
    elif isinstance(value, Mapping) and inner is not None:
        kind = get_args(inner)[1]
        value = {str(k): _value(kind, v, f"{path}.{k}") for k, v in value.items()}
    elif float in options and not (int in options and isinstance(value, int)):
        value = _number(value)
    single = [option for option in options if dataclasses.is_dataclass(option)]
    if isinstance(value, str) and single:
        return build(single[0], value, path)  # type: ignore[arg-type]
    if not checks.fits(hint, value):
        raise ConfigError(path + checks.refusal(hint, value))
    return value


def _holds(option: Any, value: Any) -> bool:
    """Whether values of a type are written as this one is: as a list, or as a mapping."""
    if isinstance(value, list):
        return get_origin(option) is tuple
    mapping = get_origin(option) in (dict, Mapping) or dataclasses.is_dataclass(option)
    return isinstance(value, Mapping) and mapping


def _has_default(field: dataclasses.Field) -> bool:
    missing = dataclasses.MISSING
    return field.default is not missing or field.default_factory is not missing


def _joined(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


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


def _unknown(key: Any, path: str, cls: type) -> str:
    """Say of a key that the dataclass does not have what was probably meant."""
    told = _joined(path, key)
    if key in CHANGED:
        return f"`{told}` {CHANGED[key]}"
    near = difflib.get_close_matches(str(key), checks.hints(cls), 1)
    place = f"{path} has" if path else "there is"
    advice = f"did you mean {near[0]!r}?" if near else f"keys are {', '.join(checks.hints(cls))}"
    return f"{place} no key {str(key)!r}: {advice}"


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
    if not isinstance(preset, str) or preset not in presets:
        raise ConfigError(
            f"attack.preset must be one of {', '.join(presets)}, not {checks.shown(preset)}"
        )
    return {**tree, "attack": {**plain(presets[preset]), **attack}}


def _number(value: Any) -> Any:
    """Return 1e-4, which YAML reads as text, and 1, an integer, as floats; others as they are."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return value
    try:
        return float(value)
    except (ValueError, OverflowError):
        return value


def plain(config: Any) -> Any:
    """Return the config as plain lists, dicts and values; `build` reads it back."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {key: plain(value) for key, value in config.items()}
    if isinstance(config, Sequence) and not isinstance(config, str):
        return [plain(value) for value in config]
    return str(config) if isinstance(config, os.PathLike) else config


def to_yaml(config: Any) -> str:
    """Return the config as YAML text."""
    return yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True)


def _alike(left: list, right: list) -> bool:
    """Whether two lists are best compared entry by entry, which lists of numbers are not."""
    numbers = any(isinstance(value, int | float) for value in left + right)
    return len(left) == len(right) and not numbers


def differences(left: Mapping[Any, Any], right: Mapping[Any, Any], prefix: str = "") -> list[str]:
    """Return the dotted keys whose values differ between two plain trees, with both values."""
    found: list[str] = []
    for key in sorted({*left, *right}):
        a, b = left.get(key), right.get(key)
        if isinstance(a, list) and isinstance(b, list) and _alike(a, b):
            a, b = (dict(enumerate(entries)) for entries in (a, b))
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key} ({a!r} against {b!r})")
    return found

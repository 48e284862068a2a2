"""YAML recipe + command line -> frozen dataclass. Unknown keys and wrong types are errors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

T = TypeVar("T")


class ConfigError(ValueError):
    """A recipe that cannot be read, with the file and the key to blame."""


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The file's mapping; YAML is loaded safely, so it cannot make Python objects."""
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the config {path}: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping of keys to values")
    return tree


def build(cls: type[T], tree: Mapping[str, Any]) -> T:
    """A (nested) dataclass from a tree of plain values, checked against the annotations."""
    import dacite  # in the `scripts` extra

    settings = dacite.Config(strict=True, cast=[tuple], type_hooks={float: _number})
    try:
        return dacite.from_dict(cls, tree, settings)
    except dacite.DaciteError as error:
        raise ConfigError(str(error)) from None
    except RecursionError:
        raise ConfigError("the config refers to itself") from None


def with_preset(tree: Mapping[str, Any], presets: Mapping[str, Any]) -> dict[str, Any]:
    """A tree whose `attack: {preset: NAME, ...}` has all keys of that preset, its own on top."""
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
    """The config as plain lists, dicts and values; `build` reads it back."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {key: plain(value) for key, value in config.items()}
    if isinstance(config, Sequence) and not isinstance(config, str):
        return [plain(value) for value in config]
    return config


def to_yaml(config: Any) -> str:
    """The config as YAML text."""
    return yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True)


def differences(left: Mapping[str, Any], right: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ between two plain trees."""
    found: list[str] = []
    for key in sorted({*left, *right}):
        a, b = left.get(key), right.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key} ({a!r} against {b!r})")
    return found

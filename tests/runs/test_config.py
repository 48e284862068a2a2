"""Recipes: what YAML can say, and what it must not."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import pytest

from conftest import ROOT
from jinv.recipes import (
    attack_heads,
    distill,
    evaluate,
    extract_features,
    invert,
    invert_gradients,
    pretrain,
    relabel,
    search,
    synthesise,
    train_reconstructor,
    train_shadow_models,
    train_student,
)
from jinv.runs import config, study


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 0.1
    kind: Literal["a", "b"] = "a"


@dataclasses.dataclass(frozen=True)
class Outer:
    count: int
    inner: Inner = dataclasses.field(default_factory=Inner)
    many: tuple[Inner, ...] = ()
    limit: float | None = None
    names: Literal["all"] | tuple[int, ...] = "all"


def test_plain_is_the_inverse_of_build() -> None:
    outer = Outer(3, Inner(0.5, "b"), (Inner(), Inner(2.0)), None, (1, 2))
    assert config.build(Outer, config.plain(outer)) == outer


def test_numbers_as_people_write_them(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("count: 2\nlimit: 1e-4\ninner: {rate: 3}\nnames: [4, 5]\n")
    outer = config.build(Outer, config.read_yaml(path))
    assert outer == Outer(2, Inner(3.0), (), 1e-4, (4, 5))
    assert isinstance(outer.inner.rate, float)


@dataclasses.dataclass(frozen=True)
class Either:
    number: int | float


@pytest.mark.parametrize("value", [3, 3.0, 0.5])
def test_whole_numbers_stay_whole_where_both_are_taken(value: float) -> None:
    found = config.build(Either, {"number": value}).number
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("-2E+3", -2000.0), ("1_0e2", 1000.0), ("'1e-4'", "1e-4"), ("e4", "e4")],
)
def test_exponents_need_no_point(tmp_path: Path, text: str, value: Any) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"any: {{key: {text}}}\n")
    assert config.read_yaml(path) == {"any": {"key": value}}


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\nb: 2\na: 3\n",
        "a: {b: 1, b: 2}",
        "a: &a [*a]",
        "a: &a [1,1,1,1,1,1,1,1,1,1]\n"
        + "".join(
            f"{x}: &{x} [{','.join([f'*{y}'] * 10)}]\n"
            for x, y in zip("bcdef", "abcde", strict=True)
        ),
    ],
    ids=["twice", "twice below", "itself", "billions"],
)
def test_trees_that_cannot_be_meant(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(config.ConfigError, match=r"bad\.yaml: .*(twice|itself)"):
        config.read_yaml(path)


@pytest.mark.parametrize(
    ("tree", "blamed"),
    [
        ({"count": 1, "cuont": 2}, "cuont"),
        ({"count": 1, "inner": {"rte": 2}}, "rte"),
        ({}, "count"),
        ({"count": "one"}, "count"),
        ({"count": 1.5}, "count"),
        ({"count": 1, "inner": {"rate": "fast"}}, "rate"),
        ({"count": 1, "inner": {"kind": "c"}}, "kind"),
        ({"count": 1, "many": [{"rate": 1, "oops": 2}]}, "oops"),
        ({"count": 1, "limit": True}, r"limit must be a number or nothing \(null\), not true"),
    ],
)
def test_mistakes_are_named(tree: dict, blamed: str) -> None:
    with pytest.raises(config.ConfigError, match=blamed):
        config.build(Outer, tree)


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "", "!!python/name:os.system", "\x00"])
def test_files_that_are_no_config(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(config.ConfigError, match=r"bad\.yaml"):
        config.read_yaml(path)


def test_anchors_may_be_merged_and_overridden(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "one: &one {x: 1, y: 1}\ntwo: &two {<<: *one, x: 2}\nthree: {<<: *two, x: 3, z: 1e1}\n"
    )
    tree = config.read_yaml(path)
    assert tree["two"] == {"x": 2, "y": 1}
    assert tree["three"] == {"x": 3, "y": 1, "z": 10.0}


def test_nesting_without_end_is_told(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("a: " + "[" * 100_000)
    with pytest.raises(config.ConfigError, match=r"bad\.yaml"):
        config.read_yaml(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(config.ConfigError, match=r"gone\.yaml"):
        config.read_yaml(tmp_path / "gone.yaml")


def test_differences_name_nested_keys() -> None:
    left = config.plain(Outer(1, Inner(0.5)))
    right = config.plain(Outer(2, Inner(0.5, "b")))
    assert config.differences(left, right) == [
        "count (1 against 2)",
        "inner.kind ('a' against 'b')",
    ]
    assert config.differences(left, left) == []


COMMANDS = {
    "pretrain": pretrain.COMMAND,
    "synthesise": synthesise.COMMAND,
    "relabel": relabel.COMMAND,
    "distill": distill.COMMAND,
    "student": train_student.COMMAND,
    "features": extract_features.COMMAND,
    "shadow": train_shadow_models.COMMAND,
    "reconstructor": train_reconstructor.COMMAND,
    "decoder": train_reconstructor.COMMAND,
    "attack": attack_heads.COMMAND,
    "study": attack_heads.COMMAND,
    "gradients": invert_gradients.COMMAND,
    "evaluate": evaluate.COMMAND,
    "search": search.COMMAND,
}


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_config_reads_and_says_what_it_reproduces(path: Path) -> None:
    tree = config.read_yaml(path)
    variants = tree.pop("variants", {})
    command = COMMANDS.get(path.stem.split("_")[0], invert.COMMAND)
    assert study.runs(command, command.recipe_from(tree), variants)
    header = path.read_text().split("\n#\n")[1]
    for word in ("# Paper:  ", "\n# Command: ", "\n# Hardware: ", "\n# Expected: "):
        assert word in header
    assert "MINUTES" not in header
    assert "EXPECTED" not in header


@dataclasses.dataclass(frozen=True)
class Once:
    """As configs were before some of their keys got other names."""

    optimizer: str = "adam"
    inner: Inner = dataclasses.field(default_factory=Inner)


@pytest.mark.parametrize("key", config.CHANGED)
def test_keys_of_yesterday_say_what_has_become_of_them(key: str) -> None:
    told = f"`{key}` {config.CHANGED[key]}"
    with pytest.raises(config.ConfigError) as caught:
        config.build(Once, {key: "adam"})
    assert told in str(caught.value)
    with pytest.raises(config.ConfigError) as caught:
        config.build(Once, {"inner": {key: 1}})
    assert str(caught.value) == f"`inner.{key}` {config.CHANGED[key]}"
    flag = f"--attack.{key.replace('_', '-')}"
    for flags in ([flag, "3"], ["--seed", "1", f"{flag}=3"]):
        with pytest.raises(config.ConfigError) as caught:
            config.check_flags(flags)
        assert str(caught.value) == f"{flag} {config.CHANGED[key]}"
    config.check_flags(["--attack.optimizer", "sgd", "value", "--run.chunk=3"])


def test_a_misspelt_key_is_told_the_nearest() -> None:
    with pytest.raises(config.ConfigError, match=r"no key 'optimzer': did you mean 'optimizer'\?"):
        config.build(Once, {"optimzer": "adam"})
    with pytest.raises(
        config.ConfigError, match=r"^inner has no key 'knid': did you mean 'kind'\?"
    ):
        config.build(Once, {"inner": {"knid": "a"}})


def test_recipes_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = ROOT / "configs" / "demo.yaml"
    for name in ("demo", "demo.yaml", "configs/demo.yaml"):
        assert config.find(name).read_bytes() == shipped.read_bytes()
    (tmp_path / "demo.yaml").write_text("mine: 1\n")
    assert config.find("demo.yaml").read_text() == "mine: 1\n"
    with pytest.raises(config.ConfigError, match="did you mean demo"):
        config.find("dmeo")
    with pytest.raises(config.ConfigError, match="no file /nowhere/demo"):
        config.find("/nowhere/demo")
    assert set(config.shipped_recipes()) == {p.stem for p in (ROOT / "configs").glob("*.yaml")}


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_first_line_says_what_a_recipe_is(path: Path) -> None:
    assert 20 < len(config.first_line(path)) <= 98

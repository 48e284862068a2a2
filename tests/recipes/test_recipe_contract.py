"""What every command promises, checked for each that is listed in `jinv.recipes`."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import io
import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import jax
import pytest
import yaml

from jinv import recipes
from jinv.runs import command as contract
from jinv.runs import command_line, config, study
from jinv.runs.progress import Progress
from recipe_examples import EXAMPLES

TIMED = ("report.html", "summary.json", "config.yaml", "search.csv")
"""Files that say how long a run took, or where its data lay."""

every = pytest.mark.parametrize("name", recipes.RECIPES)
studies = pytest.mark.parametrize(
    "name", [n for n in recipes.RECIPES if recipes.find(n).compare is not None]
)


def command(name: str) -> contract.Command:
    found = recipes.find(name)
    assert found is not None
    return found


def tree(name: str, folder: Path) -> dict[str, Any]:
    assert name in EXAMPLES, f"give `jinv {name}` a tiny config in tests/recipe_examples.py"
    folder.mkdir(exist_ok=True)
    return EXAMPLES[name](folder)


def run(name: str, recipe: dict[str, Any], out: Path, *flags: str) -> int:
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe))
    return command_line.main(command(name), ["--config", str(path), "--out", str(out), *flags])


def files(out: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name not in TIMED
    }


def summary(out: Path) -> dict[str, Any]:
    return json.loads((out / "summary.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`finished(name)`: (config, output folder) of a whole run, made once."""
    made: dict[str, tuple[dict[str, Any], Path]] = {}

    def make(name: str) -> tuple[dict[str, Any], Path]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            recipe = tree(name, folder / "data")
            assert run(name, recipe, folder / "out") == 0
            made[name] = recipe, folder / "out"
        return made[name]

    return make


@every
def test_the_summary_has_the_keys_of_its_dataclass(name: str, finished: Any) -> None:
    keys = [field.name for field in dataclasses.fields(command(name).summary)]
    assert list(summary(finished(name)[1])) == keys


@every
def test_every_key_of_the_summaries_is_documented(name: str) -> None:
    for told in filter(None, (command(name).summary, command(name).study)):
        keys = {field.name for field in dataclasses.fields(told)}
        assert keys == set(contract.documented(told))


@every
def test_a_run_writes_what_is_declared_and_nothing_else(name: str, finished: Any) -> None:
    declared = (*command(name).files, "config.yaml", "summary.json")
    out = finished(name)[1]
    for path in (p for p in out.rglob("*") if p.is_file()):
        inside = str(path.relative_to(out))
        assert any(inside.startswith(d) if d.endswith("/") else inside == d for d in declared), (
            inside
        )


@every
def test_overwriting_leaves_what_it_did_not_write(name: str, finished: Any, tmp_path: Path) -> None:
    recipe, first = finished(name)
    out = shutil.copytree(first, tmp_path / "out")
    (out / "notes.txt").write_text("mine")
    before = files(out)
    assert run(name, recipe, out) == 2
    assert files(out) == before
    assert run(name, recipe, out, "--overwrite") == 0
    assert (out / "summary.json").stat().st_mtime_ns > (first / "summary.json").stat().st_mtime_ns
    assert files(out) == files(first) | {"notes.txt": b"mine"}


@every
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_run_that_was_cut_ends_like_one_that_was_not(
    name: str,
    number: signal.Signals,
    finished: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe, out = finished(name)
    cut, seen = tmp_path / "cut", []
    update = Progress.update

    def stop(self: Progress, *args: Any) -> None:
        update(self, *args)
        seen.append(1)
        if len(seen) == 2:
            signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "update", stop)
        assert run(name, recipe, cut) == 128 + number
    assert "--resume" in capsys.readouterr().err
    assert not (cut / "summary.json").exists()
    assert run(name, recipe, cut) == 2
    assert run(name, recipe, cut, "--resume") == 0
    assert files(cut) == files(out)


@every
def test_unknown_keys_are_refused_by_name(
    name: str, finished: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = finished(name)[0], tmp_path / "out"
    key = next(k for k in recipe if len(k) > 3)
    wrong = key[:-2] + key[-1] + key[-2]
    assert run(name, recipe | {wrong: recipe[key]}, out) == 2
    error = capsys.readouterr().err
    assert f"there is no key {wrong!r}: did you mean {key!r}?" in error
    assert not out.exists()


@every
def test_another_commands_folder_is_left_alone(
    name: str, finished: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = finished(name)[0], tmp_path / "out"
    out.mkdir()
    (out / "config.yaml").write_text("# jinv something-else\nseed: 0\n")
    (out / "summary.json").write_text("{}")
    for flags in ((), ("--resume",), ("--overwrite",)):
        assert run(name, recipe, out, *flags) == 2
        assert "holds a run of `jinv something-else`" in capsys.readouterr().err
    assert (out / "summary.json").read_text() == "{}"


@every
def test_help_fits_and_names_every_key(name: str) -> None:
    told = io.StringIO()
    with contextlib.redirect_stdout(told), pytest.raises(SystemExit) as stop:
        command_line.main(command(name), ["--help"])
    assert stop.value.code == 0
    text = told.getvalue()
    assert max(map(len, text.splitlines())) <= 100
    for field in dataclasses.fields(command(name).summary):
        assert f"\n    {field.name} " in text
    assert len(command(name).about.strip().splitlines()[0]) <= 100


_JAXS_OWN = r"Compiling jit\((_\w+|broadcast_in_dim)\)"
"""What JAX compiles to draw or to fill arrays, whose shapes it does not tell."""


@every
def test_a_second_run_gives_the_same_files_and_compiles_no_program_twice(
    name: str, finished: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """JAX says what it compiles, and for which shapes."""
    recipe, out = finished(name)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        assert run(name, recipe, tmp_path / "out") == 0
    assert files(tmp_path / "out") == files(out)
    told = collections.Counter(
        record.getMessage().partition(". Argument mapping")[0]
        for record in caplog.records
        if record.getMessage().startswith("Compiling ")
    )
    # Its programs are kept as long as the process lives.
    assert told or name == "reconstruct", "JAX has another way to say it now"
    own = {program for program in told if not re.match(_JAXS_OWN, program)}
    assert [program for program in own if told[program] > 1] == []


@studies
def test_a_second_trial_compiles_nothing(name: str, finished: Any, tmp_path: Path) -> None:
    recipe, out = finished(name)[0] | {"trials": 2}, tmp_path / "out"
    assert run(name, recipe, out) == 0
    first, second = (summary(out / f"trial_{i}") for i in range(2))
    assert first["compile_seconds"] > 0
    assert second["compile_seconds"] == 0
    assert first["files"] != second["files"]
    assert second["files"].keys() == summary(out)["runs"]["trial_1"]["files"].keys()


@studies
def test_a_trial_is_the_run_of_its_seed(name: str, finished: Any, tmp_path: Path) -> None:
    """An experiment is a function of config and key, in whatever study it stands."""
    recipe = finished(name)[0]
    assert run(name, recipe | {"trials": 2}, tmp_path / "study") == 0
    assert run(name, recipe | {"seed": 1}, tmp_path / "alone") == 0
    assert files(tmp_path / "study" / "trial_1") == files(tmp_path / "alone")


@studies
def test_the_summary_of_a_study_has_the_keys_of_its_dataclass(
    name: str, finished: Any, tmp_path: Path
) -> None:
    recipe = finished(name)[0] | {"variants": {"a": {}, "b": {"seed": 3}}}
    assert run(name, recipe, tmp_path / "out") == 0
    told = command(name).study
    assert told is not None
    assert set(summary(tmp_path / "out")) == {field.name for field in dataclasses.fields(told)}


@every
def test_a_config_comes_back_from_the_folder(name: str, finished: Any) -> None:
    recipe, out = finished(name)
    told = config.read_yaml(out / "config.yaml")
    assert command(name).recipe_from(told) == command(name).recipe_from(recipe)
    assert study.runs(command(name), command(name).recipe_from(told))

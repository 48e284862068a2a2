"""Searches: which trials are run, what is kept when one is stopped or fails, what is told."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

import tiny_command
from conftest import ROOT
from jinv import recipes
from jinv.recipes import search
from jinv.runs import command_line, points, processes
from jinv.runs import config as configs

GRID = {"x": [1, 2, 3, 4], "y": [0, 1]}
SCORES = [4, 5, 1, 2, 0, 1, 1, 2]
"""Of the grid, point by point."""


def recipe(**keys: Any) -> dict[str, Any]:
    tree = {"command": tiny_command.NAME, "base": {}, "score": "score.a.b", "goal": "min"}
    return tree | ({} if "space" in keys else {"grid": GRID}) | keys


@pytest.fixture(autouse=True)
def site(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny command is installed, also for other processes."""
    folder = tmp_path_factory.mktemp("site")
    tiny_command.install(folder)
    monkeypatch.syspath_prepend(folder)
    paths = [folder, ROOT / "tests", ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, paths)))
    tiny_command.LOADED.clear()


def arguments(tree: dict[str, Any], out: Path, *flags: str) -> list[str]:
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return ["--config", str(path), "--out", str(out), *flags]


def run(tree: dict[str, Any], out: Path, *flags: str) -> int:
    return command_line.main(search.COMMAND, arguments(tree, out, *flags))


def in_a_process(tree: dict[str, Any], out: Path, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "jinv", "search", *arguments(tree, out, *flags)],
        capture_output=True,
        text=True,
    )


def summary(out: Path) -> dict[str, Any]:
    return json.loads((out / "summary.json").read_text())


def table(out: Path) -> list[dict[str, str]]:
    with (out / "search.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def times(out: Path) -> dict[str, int]:
    """When the files of finished trials were written."""
    finished = [path.parent for path in (out / "trials").glob("*/summary.json")]
    return {
        str(file.relative_to(out)): file.stat().st_mtime_ns
        for folder in finished
        for file in folder.iterdir()
    }


# --- what is run and told ------------------------------------------------------------------------


def test_a_grid_is_run_as_a_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run(recipe(), out) == 0
    told = summary(out)
    assert [trial["score"] for trial in told["trials"]] == SCORES
    assert [trial["values"] for trial in told["trials"]] == points.grid(GRID)
    assert {trial["status"] for trial in told["trials"]} == {"done"}
    assert told["best"] == told["trials"][4]
    assert told["best"]["folder"] == "trials/004"
    rows = table(out)
    assert list(rows[0]) == ["trial", "x", "y", "score", "seconds", "folder", "status", "reason"]
    assert [(row["x"], row["y"], float(row["score"])) for row in rows] == [
        (str(p["x"]), str(p["y"]), score)
        for p, score in zip(points.grid(GRID), SCORES, strict=True)
    ]
    for row in rows:
        one = summary(out / row["folder"])
        assert float(row["seconds"]) == one["seconds"]
    said = capsys.readouterr().out
    assert "trials/004: 0 (best 0, trials/004)" in said
    assert "trials/007: 2 (best 0, trials/004)" in said
    assert "best of 8 trials: trials/004: score.a.b 0, x 3, y 0" in said


def test_the_largest_score_is_the_best_by_default(tmp_path: Path) -> None:
    assert run(recipe(goal="max"), tmp_path / "out") == 0
    assert summary(tmp_path / "out")["best"]["score"] == max(SCORES)


def test_the_best_recipe_can_be_run(tmp_path: Path) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    assert run(recipe(base={"x": 7, "missing": None, "seed": 5}), out) == 0
    best = out / "best.yaml"
    assert best.read_text().startswith("# jinv tiny-command: score.a.b 5, trials/004 of 8\n")
    assert configs.read_yaml(best) == configs.read_yaml(out / "trials/004/config.yaml")
    told = ["--config", str(best), "--out", str(again)]
    assert command_line.main(tiny_command.COMMAND, told) == 0
    assert summary(again)["score"] == summary(out / "trials/004")["score"]


def test_the_page_has_the_best_first(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(recipe(), out) == 0
    page = (out / "report.html").read_text()
    assert "trials/004 has the smallest score.a.b of 8 trials: 0." in page
    rows = page.split("All trials</h2>")[1].split("<tr>")[2:]
    found = [int(row.split("trials/")[1][:3]) for row in rows if "trials/" in row]
    assert found == sorted(range(8), key=lambda i: SCORES[i])
    assert "Its images" not in page
    (out / "summary.json").unlink()
    from PIL import Image

    Image.new("RGB", (8, 8)).save(out / "trials/004/grid.png")
    assert run(recipe(), out, "--resume") == 0
    assert "grid of the images of trials/004" in (out / "report.html").read_text()


def test_trials_that_differ_in_their_seed_are_loaded_once(tmp_path: Path) -> None:
    grid = {"x": [1, 2], "seed": [0, 1, 2]}
    assert run(recipe(grid=grid), tmp_path / "out") == 0
    assert [trial["score"] for trial in summary(tmp_path / "out")["trials"]] == [4, 5, 6, 1, 2, 3]
    assert [config.x for config in tiny_command.LOADED] == [1, 2]


def test_a_trial_may_be_a_study(tmp_path: Path) -> None:
    tree = recipe(base={"trials": 3, "variants": {"a": {}, "b": {"y": 10}}}, score="mean")
    out = tmp_path / "out"
    assert run(tree | {"grid": {"x": [1, 3]}}, out) == 0
    assert [trial["score"] for trial in summary(out)["trials"]] == [10, 6]
    assert (out / "trials/001/b/trial_2/summary.json").exists()
    assert set(configs.read_yaml(out / "best.yaml")["variants"]) == {"a", "b"}


def test_the_base_may_be_a_file_and_its_keys_be_overridden(tmp_path: Path) -> None:
    base, out = tmp_path / "base.yaml", tmp_path / "out"
    base.write_text("y: 100\nseed: 1\n")
    assert run(recipe(base=str(base), grid={"x": [1, 2]}), out, "--base.y", "50") == 0
    assert [trial["score"] for trial in summary(out)["trials"]] == [55, 52]
    assert configs.read_yaml(out / "config.yaml")["base"] == {"y": 50, "seed": 1}


@pytest.mark.parametrize("value", ["a", "1", "1e-4", "", "null", None, 3, 0.5, True, [1, {"a": 2}]])
def test_cells_of_the_table_are_read_back(value: Any) -> None:
    assert search._value(search._cell(value)) == value
    assert type(search._value(search._cell(value))) is type(value)


# --- mistakes that are told before the first trial -----------------------------------------------


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (
            {"grid": {"x": [1, 11, 12]}},
            r"2 of 3 points make no run of `jinv tiny-command`:\n"
            r"  x 11: x must be a number of at least 0 and at most 10, not 11\.0\n  x 12",
        ),
        ({"grid": {"z": [1]}, "base": {"x": 1}}, "there is no key 'z'"),
        ({"grid": {}}, "either as grid or as space"),
        ({"space": {"x": [1]}, "grid": GRID, "trials": 3}, "either as grid or as space"),
        ({"trials": 3}, "trials: 3 plays no part: a grid is tried as a whole"),
        ({"space": {"x": [1]}}, "trials is missing"),
        ({"command": "search"}, "command: a trial is a run of another command"),
        ({"command": "invrt"}, "command must be one of .*: did you mean invert"),
        ({"base": "no_such_recipe"}, "there is no file no_such_recipe"),
        ({"score": "scores.a.b"}, "the first word of score must be one of .*score"),
        ({"grid": {"x": 3}}, r"grid\.x must be a list of one or more values, not 3"),
        ({"grid": {"x": []}}, r"grid\.x must be a list of one or more values"),
        ({"goal": "low"}, "goal must be one of max, min"),
        ({"base": {"variants": 3}}, "variants must map"),
    ],
)
def test_mistakes_are_told_before_the_first_trial(
    keys: dict[str, Any], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    assert run(recipe(**keys), tmp_path / "out") == 2
    assert re.search(told, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("search_*.yaml")))
def test_shipped_searches_have_points_that_make_runs(path: Path) -> None:
    found = search.Search(search.COMMAND.recipe_from(configs.read_yaml(path)))
    assert found.points is not None
    assert len(found.points) == 12


def test_a_space_whose_points_make_no_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("optuna")
    tree = recipe(space={"x": {"low": 11, "high": 12}}, trials=3)
    assert run(tree, tmp_path / "out") == 2
    assert "20 of 20 points make no run" in capsys.readouterr().err


# --- trials that fail ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fails", "status", "told"),
    [("nan", "not finite", "the loss is not finite at step 3"), ("memory", "failed", "16 TB. Try")],
)
def test_a_trial_that_fails_is_recorded_and_the_others_go_on(
    fails: str, status: str, told: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run(recipe(base={"inner": {"fails": fails}}), out) == 0
    found = summary(out)
    assert [trial["status"] for trial in found["trials"]] == ["done"] * 4 + [status] * 2 + [
        "done"
    ] * 2
    assert told in found["trials"][4]["reason"]
    assert found["trials"][4]["score"] is None
    assert found["best"]["score"] == 1
    assert told in table(out)[5]["reason"]
    assert told in (out / "report.html").read_text()


def test_a_score_that_is_no_number_is_a_failure(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(recipe(grid={"x": [1, 2], "y": [7, 1]}), out) == 0
    first = summary(out)["trials"][0]
    assert first["status"] == "failed"
    assert "score score.a.b: it must be a number, not nothing (null)" in first["reason"]


def test_a_wrong_score_stops_after_one_trial_which_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(recipe(score="score.c"), out) == 2
    assert "score score.c: there is no c, only a.b; choose another" in capsys.readouterr().err
    before = times(out)
    assert len(list((out / "trials").iterdir())) == 1
    assert run(recipe(score="score.a.b"), out, "--resume") == 0
    assert before.items() <= times(out).items()
    assert summary(out)["best"]["score"] == 0


def test_without_any_score_there_is_no_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what was missing can be brought: --resume tries again."""
    out, missing = tmp_path / "out", tmp_path / "weights"
    tree = recipe(base={"missing": str(missing)})
    assert run(tree, out) == 2
    told = capsys.readouterr().err
    assert "none of 8 trials gave a score; trials/000: [Errno 2] No such file" in told
    assert "mend it and --resume, which tries it again" in told
    assert not (out / "summary.json").exists()
    missing.touch()
    assert run(tree, out, "--resume") == 0
    assert [trial["score"] for trial in summary(out)["trials"]] == SCORES


# --- going on ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fails", "code"), [("kill", -signal.SIGKILL), ("stop", 143)])
def test_a_search_that_ended_goes_on_and_repeats_no_finished_trial(
    fails: str, code: int, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    tree = recipe(base={"inner": {"fails": fails, "once": str(tmp_path / "once")}})
    done = in_a_process(tree, out)
    assert done.returncode == code
    if fails == "stop":
        assert f"{out}: stopped after 4 of 8 trials; go on with --resume" in done.stderr
    before = times(out)
    assert {name[:10] for name in before} == {f"trials/00{i}" for i in range(4)}
    assert [row["status"] for row in table(out)] == ["done"] * 4 + ["waiting"] * 4
    assert run(tree, out) == 2
    assert run(tree | {"goal": "max"}, out, "--resume") == 0
    assert before.items() <= times(out).items()
    assert [config.x for config in tiny_command.LOADED] == [3, 3, 4, 4]
    assert [trial["score"] for trial in summary(out)["trials"]] == SCORES
    assert run(tree, out, "--resume") == 0
    assert len(tiny_command.LOADED) == 4


def test_a_loss_that_was_not_finite_is_not_tried_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    tree = recipe(base={"inner": {"fails": "nan"}})
    assert run(tree, out) == 0
    (out / "summary.json").unlink()
    tiny_command.LOADED.clear()
    assert run(tree, out, "--resume") == 0
    assert not tiny_command.LOADED
    assert summary(out)["trials"][4]["status"] == "not finite"


def test_another_grid_or_a_changed_table_is_not_gone_on_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(recipe(), out) == 0
    (out / "summary.json").unlink()
    assert run(recipe(grid={"x": [1, 2, 3, 4], "y": [0, 2]}), out, "--resume") == 2
    assert "begun with another config" in capsys.readouterr().err
    (out / "search.csv").write_text("nonsense\n")
    assert run(recipe(), out, "--resume") == 2
    assert "search.csv has been changed" in capsys.readouterr().err


# --- Optuna --------------------------------------------------------------------------------------

SPACE = {"x": {"low": 0.0, "high": 10.0}, "y": [0, 1, 11]}


def test_a_space_is_searched_and_more_trials_go_on_with_it(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert run(recipe(space=SPACE, trials=4), out) == 0
    before = times(out)
    assert len(summary(out)["trials"]) == 4
    assert run(recipe(space=SPACE, trials=4), out, "--resume") == 0
    assert run(recipe(space=SPACE, trials=14), out, "--resume") == 0
    assert before.items() <= times(out).items()
    assert len(summary(out)["trials"]) == 14
    assert run(recipe(space=SPACE, trials=14), whole) == 0
    values = [[trial["values"] for trial in summary(o)["trials"]] for o in (out, whole)]
    assert values[0] == values[1]


def test_the_point_of_a_killed_trial_is_kept(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    out = tmp_path / "out"
    base = {"inner": {"fails": "kill", "once": str(tmp_path / "once")}}
    tree = recipe(space={"x": [3], "y": {"low": 0, "high": 1000}}, trials=2, base=base)
    assert in_a_process(tree, out).returncode == -signal.SIGKILL
    (row,) = table(out)
    assert row["status"] == "waiting"
    assert run(tree, out, "--resume") == 0
    assert summary(out)["trials"][0]["values"] == {"x": 3, "y": int(row["y"])}


def test_points_of_a_space_that_are_refused_are_failures(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    space = {"x": {"low": 5.0, "high": 15.0}}
    assert run(recipe(space=space, trials=8), tmp_path / "out") == 0
    found = summary(tmp_path / "out")["trials"]
    failed = [trial for trial in found if trial["status"] == "failed"]
    assert 0 < len(failed) < 8
    assert all("x must be a number" in trial["reason"] for trial in failed)
    assert all((trial["values"]["x"] > 10) == (trial in failed) for trial in found)


def test_without_optuna_a_space_is_refused_and_a_grid_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert run(recipe(space=SPACE, trials=12), tmp_path / "out") == 2
    assert "pip install optuna" in capsys.readouterr().err
    assert run(recipe(grid={"x": [1]}), tmp_path / "out") == 0


# --- side by side --------------------------------------------------------------------------------


def test_trials_side_by_side_give_what_one_after_the_other_gives(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In processes of their own: one is refused, one is killed, one has no finite loss."""
    alone, out = tmp_path / "alone", tmp_path / "out"
    tree = recipe(grid={"x": [1, 3], "inner.fails": ["", "nan", "crash"]})
    assert run(tree | {"grid": {"x": [1], "inner.fails": ["", "nan", "crash"]}}, alone) == 0
    assert run(tree, out, "--parallel", "3") == 0
    told = summary(out)
    assert [trial["score"] for trial in told["trials"]] == [4, 4, 4, 0, None, None]
    assert [trial["status"] for trial in told["trials"][3:]] == ["done", "not finite", "failed"]
    assert told["trials"][4]["reason"].startswith("the loss is not finite at step 3")
    assert told["trials"][5]["reason"].startswith("its process ended with the exit code 9: see ")
    assert told["device"] == "1 x nothing a trial, 3 at once"
    for number in range(3):
        name = f"trials/{number:03d}"
        assert summary(out / name)["score"] == summary(alone / name)["score"]
        assert (out / f"{name}.log").read_text()
    assert not tiny_command.LOADED[3:]
    assert not list(out.rglob(".lock"))


def test_every_trial_has_a_gpu_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[str, dict[str, str]]] = []

    class Done:
        returncode = 0

        def __init__(self, folder: Path) -> None:
            self.folder = folder

        stdin = None

        def poll(self) -> int:
            tiny = tiny_command.COMMAND
            own = tiny.folder(self.folder, CONFIGS[self.folder.name], resume=True)
            tiny_command.Run(CONFIGS[self.folder.name]).run(own)
            return 0

        def terminate(self) -> None:
            raise AssertionError

    def start(arguments: list[str], log: Path, environment: dict[str, str]) -> Any:
        started.append((log.name, environment))
        folder = Path(arguments[arguments.index("--out") + 1])
        CONFIGS[folder.name] = tiny_command.COMMAND.recipe_from(
            configs.read_yaml(folder / "config.yaml")
        )
        return Done(folder)

    CONFIGS: dict[str, Any] = {}
    monkeypatch.setattr(processes, "has_gpus", lambda: True)
    monkeypatch.setattr(processes, "devices", lambda: ("gpu", 2))
    monkeypatch.setattr(processes, "start", start)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-7")
    assert run(recipe(), tmp_path / "out") == 0
    assert [trial["score"] for trial in summary(tmp_path / "out")["trials"]] == SCORES
    assert [name for name, _ in started] == [f"{i:03d}.log" for i in range(8)]
    places = [environment["CUDA_VISIBLE_DEVICES"] for _, environment in started]
    assert places[:2] == ["5", "GPU-7"]
    assert set(places) == {"5", "GPU-7"}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert processes.on_gpu(1) == {"CUDA_VISIBLE_DEVICES": "1"}


@pytest.mark.parametrize(
    ("found", "asked", "expected"),
    [
        (("gpu", 4), None, (True, 4)),
        (("gpu", 4), 2, (True, 2)),
        (("gpu", 4), 1, (False, 1)),
        (("gpu", 1), None, (False, 1)),
        (("cpu", 1), None, (False, 1)),
        (("cpu", 1), 3, (False, 3)),
        (("tpu", 8), None, (False, 1)),
    ],
)
def test_how_many_trials_run_at_once(
    found: tuple[str, int],
    asked: int | None,
    expected: tuple[bool, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(processes, "has_gpus", lambda: True)
    monkeypatch.setattr(processes, "devices", lambda: found)
    assert search._slots(asked) == expected


@pytest.mark.parametrize(
    ("found", "told"), [(("gpu", 4), "at most 4, the number of GPUs"), (("tpu", 8), "leave")]
)
def test_more_trials_at_once_than_there_are_places_are_refused(
    found: tuple[str, int], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "devices", lambda: found)
    with pytest.raises(ValueError, match=told):
        search._slots(5)


def test_devices_are_counted_by_another_process() -> None:
    assert processes.devices() == ("cpu", 1)


def test_a_trial_ends_with_its_search(tmp_path: Path) -> None:
    """The search is killed while a trial runs in a process of its own, which gets one SIGTERM."""
    log = tmp_path / "log"
    child = (
        "import signal, time; from jinv.runs import processes\n"
        "signal.signal(signal.SIGTERM, lambda *_: print('stop', flush=True))\n"
        "processes.end_with_parent(); print('up', flush=True)\n"
        "signal.pause(); time.sleep(0.5); print('end', flush=True)"
    )
    search = (
        "import threading, time; from pathlib import Path; from jinv.runs import processes\n"
        f"processes._RUN = {child!r}\n"
        f"child = processes.start([], Path({str(log)!r}), {{}})\n"
        "for _ in range(5): threading.Thread(target=time.sleep, args=(99,), daemon=True).start()\n"
        "time.sleep(99)"
    )
    process = subprocess.Popen([sys.executable, "-c", search])
    wait(lambda: log.exists() and log.read_text() == "up\n")
    process.kill()
    process.wait()
    wait(lambda: log.read_text() == "up\nstop\nend\n")


def wait(until: Any) -> None:
    for _ in range(600):
        if until():
            return
        time.sleep(0.1)
    raise AssertionError("it did not come")


def test_commands_of_others_can_be_searched() -> None:
    assert tiny_command.NAME in recipes.names()


def test_a_search_on_gpus_takes_none_of_their_memory(run_python: Any) -> None:
    """Nothing has started JAX's backends when they are limited to the CPU."""
    code = (
        "import json, jax\n"
        "from jax._src import xla_bridge\n"
        "from jinv.recipes import search\n"
        "from jinv.runs import processes\n"
        "processes.has_gpus, processes.devices = lambda: True, lambda: ('gpu', 2)\n"
        "tree = {'command': 'invert', 'base': 'demo', 'score': 'top1.mobilenet_v2'}\n"
        "made = search.COMMAND.recipe_from(tree | {'grid': {'attack.lr': [0.1, 0.2]}})\n"
        "jax.config.update('jax_platforms', None)\n"
        "found = search.Search(made)\n"
        "print(json.dumps([xla_bridge.backends_are_initialized(), jax.config.jax_platforms]))"
    )
    assert run_python(code) == [False, "cpu"]

"""`scripts/invert.py` as its user meets it: files, refusals, kill and resume."""

from __future__ import annotations

import cProfile
import csv
import json
import os
import pstats
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from conftest import CACHE, ROOT
from jinv.recipes import invert
from jinv.runs import command_line, signals

SUMMARY_KEYS = {
    *("model", "device", "placement", "steps", "images", "targets", "seconds", "seconds_per_step"),
    *("compile_seconds", "loss", "terms", "top1", "mean_probability", "files", "versions"),
    *("confidence", "agreement", "diversity"),
}

SMALL = {"model": "tiny:network", "classes": 10, "name": "small"}
RECIPE: dict[str, Any] = {
    "networks": [SMALL],
    "judges": [SMALL | {"name": "judge"}],
    "images": 4,
    "labels": [3, 5],
    "size": 16,
    "attack": {
        "warmup": 2,
        "phases": [
            {"steps": 6, "downscale": 2, "jitter": 1},
            {"steps": 7, "jitter": 2, "tv_l2": 1e-3},
        ],
    },
    "run": {"chunk": 2, "pictures_every": 4, "scores_every": 5, "checkpoint_seconds": 0},
}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write(tmp_path, RECIPE)


def write(folder: Path, tree: dict[str, Any], name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(tree))
    return path


def run(*args: Any) -> int:
    return command_line.main(invert.COMMAND, [str(arg) for arg in args])


def images(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((out / "images").iterdir())}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    out = folder / "out"
    assert run("--config", write(folder, RECIPE), "--out", out) == 0
    return out


def test_writes_what_it_promises(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert set(summary) == SUMMARY_KEYS
    assert summary["targets"] == [3, 5, 3, 5]
    assert summary["steps"] == 13
    assert set(summary["top1"]) == {"small", "judge"}
    assert set(summary["terms"]) == {"label", "batch_norm", "tv_l2", "l2"}
    assert list(images(finished)) == [
        "000_class003_class-3.png",
        "001_class005_class-5.png",
        "002_class003_class-3.png",
        "003_class005_class-5.png",
    ]
    for name in images(finished):
        assert Image.open(finished / "images" / name).size == (16, 16)
    assert Image.open(finished / "grid.png").size == (2 + 2 * 18, 2 + 2 * 18)
    rows = list(csv.DictReader((finished / "metrics.csv").open()))
    assert [int(row["step"]) for row in rows] == list(range(13))
    assert [int(row["phase"]) for row in rows] == [0] * 6 + [1] * 7
    loss = sum(
        weight * float(rows[-1][name])
        for name, weight in {"label": 1, "batch_norm": 0.01, "tv_l2": 1e-3, "l2": 1e-5}.items()
    )
    assert loss == pytest.approx(float(rows[-1]["loss"]), rel=1e-5)
    scores = list(csv.DictReader((finished / "scores.csv").open()))
    assert [int(row["step"]) for row in scores] == [5, 10, 13]
    grids = sorted(path.name for path in (finished / "progress").iterdir())
    assert grids == ["step_000004.png", "step_000008.png", "step_000012.png"]
    page = (finished / "report.html").read_text()
    assert page.count("data:image/png") == 4
    assert "judge" in page
    assert not (finished / "checkpoints").exists()


def test_best_loss_is_the_lowest_of_the_last_phase(finished: Path) -> None:
    rows = list(csv.DictReader((finished / "metrics.csv").open()))
    lowest = min(float(row["loss"]) for row in rows if row["phase"] == "1")
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["loss"] == pytest.approx(lowest, rel=1e-6)


def test_a_finished_run_is_not_replaced_silently(
    finished: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "summary.json").read_bytes()
    assert run("--config", recipe, "--out", finished) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run("--config", recipe, "--out", finished, "--resume") == 0
    assert (finished / "summary.json").read_bytes() == before


def test_overwrite_gives_the_same_images_and_spares_other_files(
    finished: Path, recipe: Path
) -> None:
    before = images(finished)
    (finished / "images" / "009_old.png").write_bytes(b"left over")
    (finished / "notes.txt").write_text("mine")
    assert run("--config", recipe, "--out", finished, "--overwrite") == 0
    assert images(finished) == before
    assert (finished / "notes.txt").read_text() == "mine"


def test_overrides_reach_the_run(tmp_path: Path, recipe: Path) -> None:
    out = tmp_path / "out"
    flags = ["--attack.phases.1.steps", 3, "--seed", 7, "--gray", "--labels", 1, 2, 3, 4]
    assert run("--config", recipe, "--out", out, *flags) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 9
    assert summary["targets"] == [1, 2, 3, 4]
    assert Image.open(out / "images" / "000_class001_class-1.png").mode == "L"
    assert yaml.safe_load((out / "config.yaml").read_text())["seed"] == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"networks": [{"model": "resnet51"}]}, "resnet51"),
        ({"networks": [{"model": "resnet20_cifar", "weights": "gone.pth"}]}, "gone.pth"),
        ({"networks": []}, "network"),
        ({"imagse": 4}, "imagse"),
        ({"images": "many"}, "images"),
        ({"images": 0}, "image"),
        ({"labels": [3, 10]}, "classes 0 to 9"),
        ({"labels": "hand-picked"}, "hand-picked"),
        ({"attack": {"preset": "setting9"}}, "setting9"),
        ({"attack": {"optimizer": "sgdm"}}, "sgdm"),
        ({"attack": {"phases": [{"steps": 1, "downscale": 3}]}}, "downscaled by 3"),
        ({"attack": {"adaptive": 0.2}}, "competitor"),
        ({"execution": {"devices": 99}}, "99 devices"),
        (
            {"judges": [SMALL | {"classes": 4, "name": "j"}]},
            "j knows classes 0 to 3",
        ),
        (
            {"judges": [SMALL | {"classes": 12}]},
            "two networks have one name",
        ),
    ],
)
def test_mistakes_are_named_before_anything_is_written(
    tmp_path: Path, change: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run("--config", write(tmp_path, RECIPE | change), "--out", out) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not out.exists()


def test_yaml_cannot_make_objects(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    marker = tmp_path / "made"
    hostile = tmp_path / "hostile.yaml"
    hostile.write_text(f"networks: !!python/object/apply:os.mkdir ['{marker}']\n")
    assert run("--config", hostile, "--out", tmp_path / "out") == 2
    assert not marker.exists()
    assert "hostile.yaml" in capsys.readouterr().err


def test_a_loss_that_explodes_keeps_the_last_good_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    attack = {**RECIPE["attack"], "lr": 1e30, "clip": False, "warmup": 0}
    out = tmp_path / "out"
    assert run("--config", write(tmp_path, RECIPE | {"attack": attack}), "--out", out) == 3
    assert "not finite at step 1" in capsys.readouterr().err
    assert not (out / "summary.json").exists()
    for path in (out / "images").iterdir():
        assert np.asarray(Image.open(path)).std() > 10
    rows = list(csv.DictReader((out / "metrics.csv").open()))
    assert len(rows) == 1


def start(recipe: Path, out: Path, *flags: str) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(CACHE),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
        "PYTHONPATH": f"{ROOT / 'tests'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    script = str(ROOT / "scripts" / "invert.py")
    command = [sys.executable, script, "--config", str(recipe), "--out", str(out), *flags]
    return subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"{path} never appeared"
        time.sleep(0.005)


@pytest.mark.parametrize(
    "moment", ["config.yaml", "progress/step_000004.png", "progress/step_000012.png"]
)
def test_killed_and_resumed_equals_uninterrupted(
    tmp_path: Path, recipe: Path, finished: Path, moment: str
) -> None:
    out = tmp_path / "out"
    process = start(recipe, out)
    wait_for(out / moment, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.communicate()
    assert not (out / "summary.json").exists()
    assert run("--config", recipe, "--out", out) == 2
    assert run("--config", recipe, "--out", out, "--resume") == 0
    assert images(out) == images(finished)
    for log in ("metrics.csv", "scores.csv"):
        assert (out / log).read_text() == (finished / log).read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_a_checkpoint(
    tmp_path: Path, finished: Path, number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = {**RECIPE, "run": {**RECIPE["run"], "checkpoint_seconds": 1000}}
    recipe = write(tmp_path, slow)
    out = tmp_path / "out"
    process = start(recipe, out)
    wait_for(out / "progress" / "step_000004.png", process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 128 + number, errors
    assert "--resume" in errors
    assert any((out / "checkpoints").iterdir())
    assert run("--config", recipe, "--out", out, "--resume", "--seed", 5) == 2
    assert "seed (0 against 5)" in capsys.readouterr().err
    assert run("--config", recipe, "--out", out, "--resume", "--run.chunk", 3) == 0
    assert images(out) == images(finished)


def test_only_a_runs_own_files_are_replaced(
    tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--overwrite of a folder that never held a run removes nothing."""
    out = tmp_path / "project"
    (out / "images").mkdir(parents=True)
    (out / "images" / "holiday.png").write_bytes(b"mine")
    assert run("--config", recipe, "--out", out, "--overwrite") == 0
    assert (out / "images" / "holiday.png").read_bytes() == b"mine"
    other = tmp_path / "other"
    (other / "checkpoints").mkdir(parents=True)
    assert run("--config", recipe, "--out", other, "--overwrite") == 2
    assert "no run known here has written (checkpoints/)" in capsys.readouterr().err


def test_a_signal_right_after_a_chunk_loses_nothing(
    tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The callback has not heard of it yet, the loop has."""
    out, asked = tmp_path / "out", []

    def heard(self: signals.Signals) -> bool:
        asked.append(True)
        return len(asked) >= 2

    with monkeypatch.context() as patch:
        patch.setattr(signals.Signals, "__call__", heard)
        args = ("--run.loop", "scan", "--run.checkpoint-seconds", 1000)
        assert run("--config", recipe, "--out", out, *args) == 143
    assert (out / "checkpoints" / "2").is_dir()
    assert run("--config", recipe, "--out", out, "--resume") == 0
    assert len((out / "metrics.csv").read_text().splitlines()) == 1 + 13


def test_the_host_adds_little_to_a_step(tmp_path: Path) -> None:
    """In calls of functions, some 300 at default options; seconds would depend on the machine."""

    def calls(steps: int) -> int:
        tree = {"networks": [SMALL], "images": 1, "labels": "random", "size": 16}
        tree["attack"] = {"phases": [{"steps": steps, "jitter": 1}]}
        profile, out = cProfile.Profile(), tmp_path / str(steps)
        recipe = write(tmp_path, tree)
        assert profile.runcall(run, "--config", recipe, "--out", out, "--overwrite") == 0
        return pstats.Stats(profile).total_calls

    calls(100)  # What is imported and traced once.
    assert (calls(600) - calls(100)) / 500 < 400

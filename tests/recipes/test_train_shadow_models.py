"""The command: what it makes, that it goes on to the same models, and what it refuses."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

import test_parallel
from conftest import CACHE, ROOT
from jinv.recipes import train_shadow_models
from jinv.recipes.train_shadow_models import Part
from jinv.runs import command_line
from jinv.shadow import (
    Config,
    Privacy,
    features,
    generation,
    make_train,
    privacy,
    sampling,
    statistics,
    store,
)
from jinv.shadow.generation import Factory, Made
from jinv.shadow.store import Store

CLASSES = 3


def save_features(folder: Path, people: int = CLASSES, images: int = 60) -> None:
    for split, seed in (("train", 0), ("test", 1)):
        rng = np.random.default_rng(seed)
        labels = (np.arange(images) % people).astype(np.int32)
        found = np.maximum(rng.normal(size=(images, 16)) + 2 * np.eye(people, 16)[labels], 0)
        names = tuple(map(str, range(people)))
        features.Features(found.astype(np.float32), labels, names, None, "").save(folder / split)


RECIPE: dict[str, Any] = {
    "sampling": {"class_size": 1, "sets": 20},
    "training": {"classes": CLASSES, "lr": 0.5, "epochs": 10, "init_std": 0.1},
    "seeds": 3,
    "execution": {"chunk": 8},
}


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    save_features(tmp_path / "features")
    return RECIPE | {"features": str(tmp_path / "features")}


def run(tmp_path: Path, recipe: dict[str, Any], *flags: str, out: str = "out") -> int:
    config = tmp_path / "recipe.yaml"
    config.write_text(yaml.safe_dump(recipe))
    target = out if out == "none" else str(tmp_path / out)
    arguments = ["--config", str(config), "--out", target, *flags]
    return command_line.main(train_shadow_models.COMMAND, arguments)


def summary(tmp_path: Path, out: str = "out") -> dict[str, Any]:
    return json.loads((tmp_path / out / "summary.json").read_text())


@pytest.mark.parametrize("out", ["out", "none"])
@pytest.mark.parametrize("sets", [3, 20])
def test_models_that_all_diverge_are_a_failure(
    tmp_path: Path,
    recipe: dict[str, Any],
    sets: int,
    out: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe["sampling"] = {"sets": sets}
    recipe["training"] = recipe["training"] | {"lr": 1e30}
    assert run(tmp_path, recipe, out=out) == 3
    told = capsys.readouterr().err
    assert f"error: all {20 if sets == 20 else 9} models diverged" in told
    assert "training.lr" in told
    assert not (tmp_path / "out/summary.json").exists()
    recipe["training"]["lr"] = 0.5
    assert run(tmp_path, recipe, "--overwrite", out=out) == 0


def test_the_store_holds_what_the_library_trains(tmp_path: Path, recipe: dict[str, Any]) -> None:
    assert run(tmp_path, recipe) == 0
    found = Store(tmp_path / "out")
    data = features.load(tmp_path / "features/train")
    train = make_train(Config(**recipe["training"]))
    for seed, position in ((0, 0), (2, 19)):
        sets = sampling.balanced(data.labels, seed, 1, 20)
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), seed), position)
        chosen = sets.indices[position]
        expected = train(key, jnp.asarray(data.features[chosen]), sets.labels[position])
        parameters = found.parameters(seed)
        for name, value in expected.parameters.items():
            np.testing.assert_allclose(parameters[name][position], value, atol=1e-6)
        np.testing.assert_allclose(found.read(seed, name="loss")[position], expected.loss, 1e-4)


def test_the_summary_says_what_was_made(tmp_path: Path, recipe: dict[str, Any]) -> None:
    assert run(tmp_path, recipe | {"statistics": "covariance", "validate": None}) == 0
    told = summary(tmp_path)
    found = Store(tmp_path / "out")
    weights = np.concatenate([found.read(seed) for seed in range(3)])
    assert (told["models"], told["parameters"], told["examples"]) == (60, 51, 3)
    assert (told["path"], told["path_reason"], told["privacy"]) == ("row_space", None, None)
    with np.load(tmp_path / "out/statistics.npz") as saved:
        np.testing.assert_allclose(saved["mean"], weights.mean(0, np.float64), rtol=1e-12)
        np.testing.assert_allclose(saved["covariance"], np.cov(weights.T.astype(np.float64)), 1e-9)
    test = features.load(tmp_path / "features/test")
    parameters = found.metadata.layout.split(weights)
    outputs = np.einsum("nd,mhd->mnh", test.features, parameters["weight"])
    right = (outputs + parameters["bias"][:, None]).argmax(-1) == test.labels
    accuracy = right.mean(1)
    assert told["validation"]["models"] == 60
    np.testing.assert_allclose(told["validation"]["mean"], accuracy.mean(), rtol=1e-6)
    np.testing.assert_allclose(told["validation"]["std"], accuracy.std(), rtol=1e-5)
    assert accuracy.mean() > 0.7
    assert told["bytes"] == weights.nbytes


def stopped_after(tmp_path: Path, config: Path, out: Path, seeds: int, number: int) -> int:
    """Start the command, kill it once there are so many seeds; its exit code."""
    script = str(ROOT / "scripts/train_shadow_models.py")
    process = subprocess.Popen(
        [sys.executable, script, "--config", str(config), "--out", str(out), "--resume"],
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(CACHE)},
    )
    end = time.monotonic() + 300
    while len(list((out / "weights/c").glob("*/0/0"))) < seeds and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(number)
    return process.wait(60)


def test_a_run_killed_twice_ends_like_one_that_was_not(
    tmp_path: Path, recipe: dict[str, Any]
) -> None:
    recipe = recipe | {"seeds": 24, "training": recipe["training"] | {"epochs": 3000}}
    assert run(tmp_path, recipe, out="whole") == 0
    config, out = tmp_path / "recipe.yaml", tmp_path / "cut"
    assert stopped_after(tmp_path, config, out, 3, signal.SIGTERM) == 143
    first = len(Store(out).missing())
    assert stopped_after(tmp_path, config, out, 29 - first, signal.SIGKILL) == -9
    second = len(Store(out).missing())
    assert 24 > first > second > 0
    assert run(tmp_path, recipe, "--resume", out="cut") == 0
    whole, cut = Store(tmp_path / "whole"), Store(out)
    for seed in range(24):
        for name in store.ARRAYS:
            np.testing.assert_array_equal(cut.read(seed, name=name), whole.read(seed, name=name))
    assert {k: v for k, v in summary(tmp_path, "cut").items() if k != "session"} == {
        k: v for k, v in summary(tmp_path, "whole").items() if k != "session"
    }
    with np.load(out / "statistics.npz") as a, np.load(tmp_path / "whole/statistics.npz") as b:
        for name in b:
            np.testing.assert_array_equal(a[name], b[name])


def test_parts_make_the_same_store_and_the_last_one_finishes(
    tmp_path: Path, recipe: dict[str, Any]
) -> None:
    assert run(tmp_path, recipe, out="whole") == 0
    assert run(tmp_path, recipe, "--part", "1/2") == 0
    assert Store(tmp_path / "out").missing() == [0, 2]
    assert not (tmp_path / "out/summary.json").exists()
    assert run(tmp_path, recipe, "--part", "0/2") == 0
    assert summary(tmp_path)["models"] == 60
    for seed in range(3):
        np.testing.assert_array_equal(
            Store(tmp_path / "out").read(seed), Store(tmp_path / "whole").read(seed)
        )


def test_processes_of_one_program_share_the_seeds(tmp_path: Path, recipe: dict[str, Any]) -> None:
    assert run(tmp_path, recipe, out="whole") == 0
    out = tmp_path / "out"
    told = test_parallel.together(tmp_path / "recipe.yaml", out, script="train_shadow_models")
    assert [code for code, _ in told] == [0, 0], told
    assert "40 models of 51 parameters" in told[0][1]
    made = summary(tmp_path)
    assert made["models"] == 60
    assert made["session"]["models"] in (20, 40)  # seeds 0 and 2, or 1
    for seed in range(3):
        np.testing.assert_array_equal(Store(out).read(seed), Store(tmp_path / "whole").read(seed))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Part(0, 1)),
        ({"SLURM_ARRAY_TASK_ID": "7"} | dict.fromkeys(["SLURM_ARRAY_TASK_MIN"], "3"), Part(4, 8)),
        ({"SLURM_ARRAY_TASK_ID": "6", "SLURM_ARRAY_TASK_STEP": "3"}, Part(2, 4)),
    ],
)
def test_tasks_of_a_slurm_array_are_parts(environment: dict[str, str], expected: Part) -> None:
    if environment:
        environment = {"SLURM_ARRAY_TASK_MIN": "0"} | environment
        environment["SLURM_ARRAY_TASK_MAX"] = (
            "10" if "SLURM_ARRAY_TASK_STEP" not in environment else "9"
        )
    assert Part.read(None, environment) == expected


def test_more_seeds_are_added_to_a_finished_store(tmp_path: Path, recipe: dict[str, Any]) -> None:
    assert run(tmp_path, recipe) == 0
    before = Store(tmp_path / "out").read(2)
    assert run(tmp_path, recipe, "--resume", "--seeds", "5") == 0
    assert summary(tmp_path)["models"] == 100
    assert summary(tmp_path)["session"]["models"] == 40
    np.testing.assert_array_equal(Store(tmp_path / "out").read(2), before)


def test_a_damaged_shard_is_found_and_made_again(
    tmp_path: Path, recipe: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, recipe) == 0
    shard = tmp_path / "out/weights/c/1/0/0"
    content = shard.read_bytes()
    shard.write_bytes(content[:9] + b"?" + content[10:])
    assert run(tmp_path, recipe, "--verify") == 2
    assert f"{shard} is damaged: `--regenerate 1`" in capsys.readouterr().err
    assert run(tmp_path, recipe, "--regenerate", "7") == 2
    assert "seeds 0 to 2, no 7" in capsys.readouterr().err
    assert run(tmp_path, recipe, "--regenerate", "1", "--seeds", "1") == 0
    assert summary(tmp_path)["models"] == 60  # of the store, not of the flag
    assert shard.read_bytes() == content
    assert run(tmp_path, recipe, "--verify") == 0


def test_streamed_models_leave_the_same_summary(tmp_path: Path, recipe: dict[str, Any]) -> None:
    assert run(tmp_path, recipe) == 0
    assert run(tmp_path, recipe | {"store": False}, out="passed") == 0
    assert not (tmp_path / "passed/weights/c").exists()
    kept, passed = summary(tmp_path), summary(tmp_path, "passed")
    for name in ("loss", "validation", "models", "statistics"):
        assert passed[name] == kept[name]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert run(tmp_path, recipe, out="none") == 0
    text = printed.getvalue()
    assert json.loads(text[text.index("{") :])["loss"] == kept["loss"]
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("kind", ["moments", "covariance"])
def test_models_that_are_not_kept_never_leave_a_gpu(
    tmp_path: Path, recipe: dict[str, Any], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe | {"statistics": kind, "validate": None}
    assert run(tmp_path, recipe) == 0
    init = Factory.__init__

    def elsewhere(self: Factory, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        self._on_cpu = False

    monkeypatch.setattr(Factory, "__init__", elsewhere)
    monkeypatch.setattr(statistics.jax, "default_backend", lambda: "gpu")
    monkeypatch.delattr(generation._OnDevice, "on_host")
    monkeypatch.delattr(statistics, "_on_host")
    assert run(tmp_path, recipe | {"store": False}, out="passed") == 0
    kept, passed = summary(tmp_path), summary(tmp_path, "passed")
    for name in ("loss", "validation", "models", "statistics"):
        assert passed[name] == kept[name]
    with (
        np.load(tmp_path / "out/statistics.npz") as a,
        np.load(tmp_path / "passed/statistics.npz") as b,
    ):
        assert set(a) == set(b)
        for name in a:
            np.testing.assert_allclose(b[name], a[name], rtol=1e-12, atol=1e-15)


def test_sets_are_drawn_while_the_seed_before_is_made(
    tmp_path: Path, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = [threading.Event() for _ in range(3)]
    draw, make = sampling.Sampling.draw, Factory.seed
    waited = []

    def told(self: sampling.Sampling, labels: np.ndarray, seed: int) -> sampling.Sets:
        drawn[seed].set()
        return draw(self, labels, seed)

    def late(self: Factory, seed: int, *args: Any) -> Made[Any]:
        if args[1:] and seed < 2:  # no trial
            waited.append(drawn[seed + 1].wait(20))
        return make(self, seed, *args)

    monkeypatch.setattr(sampling.Sampling, "draw", told)
    monkeypatch.setattr(Factory, "seed", late)
    assert run(tmp_path, recipe) == 0
    assert waited == [True, True]


def test_the_summary_says_how_long_the_disk_was_waited_for(
    tmp_path: Path,
    recipe: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write = Store.write

    def slowly(*args: Any) -> Any:
        wait = write(*args)

        def sleepy() -> None:
            time.sleep(0.3)
            wait()

        return sleepy

    monkeypatch.setattr(Store, "write", slowly)
    assert run(tmp_path, recipe) == 0
    told = summary(tmp_path)["session"]
    assert 0.9 <= told["waited_for_disk"] < told["seconds"]
    assert told["bytes_per_second"] == pytest.approx(60 * 51 * 4 / told["seconds"], rel=0.01)
    assert (
        f", {told['waited_for_disk']:.1f} s of it waiting for the disk" in capsys.readouterr().out
    )
    assert run(tmp_path, recipe | {"store": False}, out="passed") == 0
    told = summary(tmp_path, "passed")["session"]
    assert (told["waited_for_disk"], told["bytes_per_second"]) == (None, None)
    assert "disk" not in capsys.readouterr().out.splitlines()[-1]


def test_only_what_failed_is_trained_again(tmp_path: Path) -> None:
    """One person against others, until the loss is low enough: CelebA's heads."""
    save_features(tmp_path / "features", people=6)
    recipe = {
        "features": str(tmp_path / "features"),
        "sampling": {"kind": "one_against_many", "class_size": 2, "sets": 24},
        "training": {"head": "binary", "hidden": 2, "pos_weight": 10.0, "lr": 0.2, "epochs": 60}
        | {"init_std": 0.5},
        "restarts": {"loss": 0.2, "most": 30},
        "execution": {"chunk": 8},
    }
    assert run(tmp_path, recipe) == 0
    assert run(tmp_path, recipe | {"restarts": None}, out="once") == 0
    again, once = Store(tmp_path / "out"), Store(tmp_path / "once")
    loss, attempts = again.read(0, name="loss"), again.read(0, name="attempts")
    first = once.read(0, name="loss")
    kept = first < 0.2
    assert 0 < kept.sum() < 24
    np.testing.assert_array_equal(attempts[kept], 1)
    assert attempts[~kept].min() > 1
    np.testing.assert_array_equal(again.read(0)[kept], once.read(0)[kept])
    assert (loss < 0.2).all()
    told = summary(tmp_path)["restarts"]
    assert (told["failed"], told["most"]) == (0, attempts.max())
    assert "no labels that other images share" in summary(tmp_path)["validation"]["not_available"]


def test_private_models_come_with_their_epsilon(tmp_path: Path, recipe: dict[str, Any]) -> None:
    pytest.importorskip("dp_accounting")
    private = recipe["training"] | {"privacy": {"noise_multiplier": 2.0, "l2_norm_clip": 1.0}}
    assert run(tmp_path, recipe | {"training": private}) == 0
    told = summary(tmp_path)["privacy"]
    assert told["sampling"] == pytest.approx(2 / 3)
    assert told["delta"] == pytest.approx(3**-1.1)
    assert told["epsilon"] == pytest.approx(privacy.epsilon(Privacy(2.0, 1.0), 3, 10))
    target = {"noise_multiplier": None, "target_epsilon": told["epsilon"], "l2_norm_clip": 1.0}
    asked = recipe["training"] | {"privacy": target}
    assert run(tmp_path, recipe | {"training": asked}, out="asked") == 0
    assert summary(tmp_path, "asked")["privacy"]["noise_multiplier"] == pytest.approx(2.0, rel=1e-3)


def test_the_plan_makes_nothing(
    tmp_path: Path, recipe: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, recipe, "--plan") == 0
    said = capsys.readouterr().out
    assert "60 models of 51 parameters, 3 examples each, row_space path, 8 at once" in said
    assert not (tmp_path / "out").exists()


def test_a_disk_that_is_too_small_is_noticed_before(
    tmp_path: Path,
    recipe: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: argparse.Namespace(free=10_000))
    assert run(tmp_path, recipe) == 2
    assert "0.0 GB are to be written, 0.0 GB are free" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [("--resume",), ("--overwrite",), ("--part", "0/2"), ()])
def test_other_runs_folders_are_left_alone(
    tmp_path: Path,
    recipe: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
) -> None:
    (tmp_path / "out/weights").mkdir(parents=True)
    (tmp_path / "out/weights/best.pt").write_text("mine")
    (tmp_path / "out/config.yaml").write_text("mine")
    assert run(tmp_path, recipe, *flags) == 2
    assert "holds something else than a run" in capsys.readouterr().err
    assert (tmp_path / "out/weights/best.pt").read_text() == "mine"
    assert (tmp_path / "out/config.yaml").read_text() == "mine"


def test_models_that_diverge_are_counted_and_left_out(
    tmp_path: Path, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Factory.seed

    def some_diverge(*args: Any) -> Made:
        found = made(*args)
        loss, weights = found.loss.copy(), found.weights.copy()
        loss[:5] = weights[:5] = np.nan
        return found._replace(loss=loss, weights=weights)

    monkeypatch.setattr(Factory, "seed", some_diverge)
    assert run(tmp_path, recipe) == 0
    told = summary(tmp_path)
    assert (told["models"], told["diverged"]) == (60, 15)
    losses = np.concatenate([Store(tmp_path / "out").read(s, name="loss")[5:] for s in range(3)])
    assert told["loss"]["mean"] == pytest.approx(losses.astype(float).mean())
    with np.load(tmp_path / "out/statistics.npz") as found:
        assert found["count"] == 45


def test_splits_that_do_not_belong_together_are_refused(
    tmp_path: Path, recipe: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    save_features(tmp_path / "other", people=2)
    shutil.rmtree(tmp_path / "features/test")
    (tmp_path / "other/test").rename(tmp_path / "features/test")
    assert run(tmp_path, recipe) == 2
    assert "the splits have other classes" in capsys.readouterr().err


def test_finished_and_unfinished_runs_are_not_replaced_silently(
    tmp_path: Path, recipe: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, recipe, "--part", "0/2") == 0
    assert run(tmp_path, recipe) == 2
    assert "holds an unfinished run" in capsys.readouterr().err
    assert run(tmp_path, recipe, "--resume") == 0
    assert run(tmp_path, recipe) == 2
    assert "holds a finished run" in capsys.readouterr().err
    assert run(tmp_path, recipe, "--resume") == 0
    assert "nothing to do" in capsys.readouterr().out
    assert run(tmp_path, recipe, "--resume", "--seed", "7") == 2
    assert "seed (0 against 7)" in capsys.readouterr().err
    assert run(tmp_path, recipe, "--overwrite", "--seed", "7") == 0


def test_a_refused_extension_loses_nothing(
    tmp_path: Path,
    recipe: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert run(tmp_path, recipe) == 0
    kept = {n: (tmp_path / "out" / n).read_bytes() for n in ("summary.json", "config.yaml")}
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: argparse.Namespace(free=10))
        assert run(tmp_path, recipe, "--resume", "--seeds", "5") == 2
    assert "GB are to be written" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "features")
    save_features(tmp_path / "features", images=90)
    assert run(tmp_path, recipe, "--resume", "--seeds", "5") == 2
    assert "Different: features (its files hold something else" in capsys.readouterr().err
    for name, content in kept.items():
        assert (tmp_path / "out" / name).read_bytes() == content


def test_models_that_are_not_kept_are_made_for_more_seeds(
    tmp_path: Path, recipe: dict[str, Any]
) -> None:
    recipe = recipe | {"store": False}
    assert run(tmp_path, recipe) == 0
    assert run(tmp_path, recipe, "--resume", "--seeds", "5") == 0
    assert summary(tmp_path)["models"] == 100
    assert run(tmp_path, recipe, "--resume", "--seeds", "5", "--store") == 0
    assert Store(tmp_path / "out").missing() == []
    assert summary(tmp_path)["stored"]


def test_a_part_does_not_touch_a_seed_of_another(tmp_path: Path, recipe: dict[str, Any]) -> None:
    assert run(tmp_path, recipe) == 0
    before = (tmp_path / "out/summary.json").read_bytes()
    assert run(tmp_path, recipe, "--regenerate", "1", "--part", "0/2") == 0
    assert (tmp_path / "out/summary.json").read_bytes() == before
    assert run(tmp_path, recipe, "--regenerate", "1", "--part", "1/2") == 0
    assert summary(tmp_path)["session"]["models"] == 20


def test_a_store_of_an_older_version_is_gone_on_with(
    tmp_path: Path, recipe: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its optimizer had another spelling, and its config named no command."""
    assert run(tmp_path, recipe) == 0
    for name in ("config.yaml", "shadows.json"):
        path = tmp_path / "out" / name
        text = path.read_text().replace("optimizer", "optimiser")
        path.write_text(text.removeprefix("# jinv train-shadow-models\n"))
    assert run(tmp_path, recipe, "--resume") == 0
    assert "nothing to do" in capsys.readouterr().out
    assert run(tmp_path, recipe, "--resume", "--seeds", "4") == 0
    assert summary(tmp_path)["models"] == 80
    assert yaml.safe_load((tmp_path / "out/config.yaml").read_text())["seeds"] == 4


@pytest.mark.parametrize(
    ("changes", "flags", "words"),
    [
        ({"sampling": {"sets": 21}}, (), "at most 20 sets"),
        ({"training": {"classes": 2}}, (), "labels are 0 to 2, the linear head knows 2 classes"),
        ({"training": {"head": "binary"}}, (), "give sampling.positive"),
        ({"features": "/nowhere"}, (), "/nowhere/train/features.json"),
        ({"seeds": 0}, (), "seeds must be a whole number of at least 1"),
        ({}, ("--part", "2/2"), "a part is I/N"),
        ({}, ("--part", "0/2", "--overwrite"), "none may overwrite"),
        ({"execution": {"devices": 9}}, (), "9 devices asked for"),
        ({"training": {"path": "row_space", "optimizer": "adam"}}, (), "Adam divides"),
    ],
)
def test_mistakes_are_told_before_anything_is_made(
    tmp_path: Path,
    recipe: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    flags: tuple[str, ...],
    words: str,
) -> None:
    assert run(tmp_path, recipe | changes, *flags) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

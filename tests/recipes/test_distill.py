"""`jinv distill` as its user meets it: pools, competitors, mistakes."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from jinv import data
from jinv.recipes import distill
from jinv.runs import command_line
from jinv.runs.signals import Signals
from recipe_examples import EXAMPLES

ATTACK = {"phases": [{"steps": 4, "jitter": 1}], "warmup": 1}


def run(recipe: dict[str, Any], out: Path, *flags: str) -> int:
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe))
    given = ["--config", str(path), "--out", str(out), *flags]
    return command_line.main(distill.COMMAND, given)


def summary(out: Path) -> dict[str, Any]:
    return json.loads((out / "summary.json").read_text())


@pytest.fixture
def inversion(tmp_path: Path) -> dict[str, Any]:
    recipe = EXAMPLES["distill"](tmp_path)
    recipe.pop("generator")
    return recipe | {"warmup": 0, "gray": True, "inversion": {"batch": 8, "attack": ATTACK}}


def test_the_pool_is_a_data_set(tmp_path: Path) -> None:
    """Of every round as many images, and every class as often."""
    assert run(EXAMPLES["distill"](tmp_path), tmp_path / "out") == 0
    pool = data.Source("arrays", str(tmp_path / "out")).load("train", 28)
    assert len(pool) == 4 * 8
    assert np.bincount(pool.labels).tolist() == [16, 16]
    assert len({image.tobytes() for image in pool.images}) == 32
    told = summary(tmp_path / "out")
    assert (told["method"], told["images"], told["steps"], told["epochs"]) == (
        "generator",
        32,
        6,
        3,
    )
    assert told["synthesis_seconds"] > 0


def test_the_student_competes_as_it_is_now(tmp_path: Path, inversion: dict[str, Any]) -> None:
    """The first batch sees the first student; a later one another than that."""
    assert run(inversion, tmp_path / "plain") == 0
    inversion["inversion"]["attack"] = ATTACK | {"adaptive": 50.0}
    assert run(inversion, tmp_path / "adaptive") == 0
    faster = inversion | {"training": inversion["training"] | {"lr": 0.5}}
    assert run(faster, tmp_path / "faster") == 0
    pools = {
        name: np.load(tmp_path / name / "train.npz")["images"]
        for name in ("plain", "adaptive", "faster")
    }
    assert summary(tmp_path / "plain")["method"] == "inversion"
    assert summary(tmp_path / "adaptive")["method"] == "adaptive"
    assert not np.array_equal(pools["plain"][:8], pools["adaptive"][:8])
    # The students differ after the first round only.
    np.testing.assert_array_equal(pools["adaptive"][:8], pools["faster"][:8])
    assert not np.array_equal(pools["adaptive"][8:16], pools["faster"][8:16])


def test_a_generator_that_is_stopped_in_its_steps_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    recipe = EXAMPLES["distill"](tmp_path / "data")
    recipe["run"] = {"checkpoint_seconds": 1000}
    assert run(recipe, tmp_path / "whole") == 0
    make, rounds, asked = distill._Generated.make, [], []

    def stopped(*arguments: Any, should_stop: Signals, **how: Any) -> distill.Made:
        rounds.append(1)

        def stop() -> bool:
            asked.append(len(rounds))
            if asked.count(3) == 4:  # after the steps
                os.kill(os.getpid(), signal.SIGTERM)
            return should_stop()

        return make(*arguments, should_stop=stop, **how)

    with monkeypatch.context() as patch:
        patch.setattr(distill._Generated, "make", stopped)
        assert run(recipe, tmp_path / "cut") == 128 + signal.SIGTERM
    assert run(recipe, tmp_path / "cut", "--resume") == 0
    for name in ("train.npz", "weights.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_plain_inversion_does_not_look_at_the_student(
    tmp_path: Path, inversion: dict[str, Any]
) -> None:
    assert run(inversion, tmp_path / "one") == 0
    hard = inversion | {"distillation": {"soft": 0.0, "hard": 1.0}}
    assert run(hard, tmp_path / "other") == 0
    one, other = (np.load(tmp_path / name / "train.npz") for name in ("one", "other"))
    np.testing.assert_array_equal(one["images"], other["images"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inversion": {"batch": 8}}, "give one of the two"),
        ({"generator": None}, "give one of the two"),
        (
            {
                "generator": {"batch": 8},
                "teacher": {"model": "lenet", "weights": "random", "classes": 2},
            },
            "lenet has no BatchNorm layers",
        ),
    ],
)
def test_mistakes_are_told(
    changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(EXAMPLES["distill"](tmp_path) | changes, tmp_path / "out") == 2
    assert message in capsys.readouterr().err

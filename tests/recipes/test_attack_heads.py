"""`jinv attack-heads` as its user meets it: attackers, settings that are compared, refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import recipe_examples
from jinv.recipes import attack_heads, train_reconstructor
from jinv.runs import command_line
from jinv.runs import config as configs


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return recipe_examples.attack_heads(tmp_path_factory.mktemp("features"))


def run(command: Any, tree: dict[str, Any], out: Path, *flags: Any) -> dict[str, Any]:
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    arguments = ["--config", str(path), "--out", str(out), *map(str, flags)]
    assert command_line.main(command, arguments) == 0
    return json.loads((out / "summary.json").read_text())


@pytest.fixture(scope="module")
def reconstructors(tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("reconstructors")
    training = {"width": 2, "reconstructor": {"steps": 2, "batch": 4}, "run": {"scores_every": 0}}
    for name in ("weights", "features"):
        own = tree | training | {"input": name}
        run(train_reconstructor.COMMAND, own, folder / f"of_{name}")
    return [str(folder / "of_weights"), str(folder / "of_features")]


def test_all_attackers_meet_the_same_victims(
    tree: dict[str, Any], reconstructors: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    told = run(attack_heads.COMMAND, tree | {"reconstructors": reconstructors}, out)
    names = ["ridge", "recovery", "of_weights", "of_features"]
    assert list(told["attackers"]) == names
    assert told["not_available"] == {}
    for attacker in told["attackers"].values():
        assert attacker["samples"] == {"true": 90, "random": 90}
    with np.load(out / "samples.npz") as samples:
        assert set(samples) == {f"{n}.{kind}" for n in names for kind in ("true", "random")}
        median = told["attackers"]["ridge"]["median_mse"]["true"]
        assert np.median(samples["ridge.true"]) == pytest.approx(median)
    pictures = {path.name for path in (out / "pictures").iterdir()}
    assert pictures == {f"{n}_{kind}.png" for n in names for kind in ("best", "median", "worst")}


def test_recovery_knows_what_heads_have_seen(tree: dict[str, Any], tmp_path: Path) -> None:
    """Features of three classes in 16 dimensions, and heads that learn much: nothing is hidden."""
    training = tree["training"] | {"lr": 0.05, "init_std": 1e-3}
    told = run(attack_heads.COMMAND, tree | {"training": training}, tmp_path / "out")["recovery"]
    assert told["believed"] == 1
    assert told["random_believed"] < 0.5
    assert told["error"] == pytest.approx(told["predicted"], rel=0.35)
    assert told["identified"]["candidates"] == 60
    assert told["identified"]["first"] > 0.6  # of 60
    assert told["identified"]["membership"]["tpr_at_fpr"]["0.1"] > 0.8


def test_what_does_not_apply_is_told(
    tree: dict[str, Any], reconstructors: list[str], tmp_path: Path
) -> None:
    training = {"classes": 3, "optimizer": "adam", "lr": 0.01, "epochs": 10}
    changes = {"training": training, "reconstructors": reconstructors}
    told = run(attack_heads.COMMAND, tree | changes, tmp_path / "out")
    assert list(told["attackers"]) == ["ridge", "of_weights"]
    assert "Adam" in told["not_available"]["recovery"]
    assert "Adam" in told["not_available"]["of_features"]
    assert told["recovery"] is None


def test_settings_are_compared(tree: dict[str, Any], tmp_path: Path) -> None:
    variants = {
        "epochs 2": {"training": {"epochs": 2}},
        "epochs 20": {"training": {"epochs": 20}},
        "adam": {"training": {"optimizer": "adam"}},
    }
    out = tmp_path / "out"
    told = run(attack_heads.COMMAND, tree | {"variants": variants, "identified": 0}, out)
    assert list(told["variants"]) == list(variants)
    assert told["runs"]["adam"]["seconds"] < told["runs"]["epochs-2"]["seconds"]  # no recovery
    assert set(told["variants"]["epochs 2"]["attackers"]) == {"ridge", "recovery"}
    assert set(told["variants"]["adam"]["attackers"]) == {"ridge"}
    report = (out / "report.html").read_text()
    assert "TPR against the settings" in report
    assert "Adam divides every coordinate" in report
    assert (out / "curves.svg").exists()


@pytest.mark.parametrize("kind", ["balanced", "random_labels"])
def test_an_attacker_may_know_other_images(tree: dict[str, Any], tmp_path: Path, kind: str) -> None:
    other = recipe_examples.attack_heads(tmp_path)["features"]
    sampling: dict[str, Any] = {"kind": kind, "class_size": 1, "sets": 20}
    if kind == "random_labels":
        sampling["classes"] = 3
    knowledge = {"features": other, "sampling": sampling}
    told = run(attack_heads.COMMAND, tree | {"knowledge": knowledge}, tmp_path / "out")
    assert list(told["attackers"]) == ["ridge", "recovery"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reconstructors": ["/nowhere"]}, "/nowhere"),
        (
            {
                "sampling": {"class_size": 1, "sets": 20, "positive": [1]},
                "training": {"head": "binary", "lr": 0.5, "epochs": 5},
            },
            "no attacker is left",
        ),
        (
            {"knowledge": {"sampling": {"class_size": 2, "sets": 10}}},
            "shadow models are trained on 6 examples, victims on 3",
        ),
    ],
)
def test_mistakes_are_told_first(
    tree: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, OSError), match=re.escape(message)):
        attack_heads.Attack(configs.build(attack_heads.Config, tree | change))

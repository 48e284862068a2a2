"""Points of searches: keys that are replaced, grids, and what Optuna suggests."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import pytest

from jinv.recipes import invert, pretrain
from jinv.runs import config as configs
from jinv.runs import points
from jinv.runs.points import Span, Told


def test_a_grid_has_all_combinations_and_the_last_key_changes_fastest() -> None:
    found = points.grid({"a": [1, 2], "b.c": ["x", "y", "z"]})
    assert found == [{"a": a, "b.c": c} for a in (1, 2) for c in ("x", "y", "z")]


def test_a_grid_without_end_is_refused() -> None:
    with pytest.raises(configs.ConfigError, match=r"the grid has 100000 points.*10000"):
        points.grid({str(i): range(10) for i in range(5)})


BASE: dict[str, Any] = {
    "networks": [{"model": "lenet"}, {"model": "vgg_small", "weights": "a.pth"}],
    "attack": {"preset": "setting0", "tv_l2": 0.5},
}


def changed(values: dict[str, Any], base: dict[str, Any] = BASE) -> Any:
    return points.recipe(invert.COMMAND, base, values)


def test_keys_are_replaced_where_they_stand() -> None:
    config = changed({"networks.1.weights": "b.pth", "images": 3, "networks.0.terms.label": 0.5})
    assert [network.weights for network in config.networks] == ["package", "b.pth"]
    assert config.networks[0].terms.label == 0.5
    assert config.images == 3
    expected = invert.PRESETS["setting0"]
    assert config.attack.lr == expected.lr
    assert config.attack.tv_l2 == 0.5
    assert BASE["networks"][1]["weights"] == "a.pth"


def test_keys_that_a_preset_sets_are_replaced() -> None:
    config = changed({"attack.phases.1.steps": 7, "attack.lr": 0.125})
    expected = invert.PRESETS["setting0"]
    assert [phase.steps for phase in config.attack.phases] == [expected.phases[0].steps, 7]
    assert config.attack.lr == 0.125
    assert config.attack.tv_l2 == 0.5


def test_the_preset_itself_may_be_searched() -> None:
    config = changed({"attack.preset": "cifar10", "attack.phases.0.steps": 9})
    assert config.attack.lr == invert.PRESETS["cifar10"].lr
    assert config.attack.phases[0].steps == 9
    assert config.attack.tv_l2 == 0.5


def test_keys_below_what_is_absent_or_null_make_it() -> None:
    base = {"model": "lenet", "weights": "a.pth", "head": None}
    config = points.recipe(pretrain.COMMAND, base, {"head.lr": 0.5, "training.epochs": 9})
    assert (config.head.lr, config.training.epochs) == (0.5, 9)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"attack.lrr": 1}, "attack has no key 'lrr': did you mean 'lr'"),
        ({"atack.lr": 1}, "there is no key 'atack': did you mean 'attack'"),
        ({"networks.2.weights": "x"}, r"networks\.2\.weights: a list of 2 has no entry 2"),
        ({"networks.x": {}}, r"networks\.x: a list of 2 has no entry x"),
        ({"images.0": 1}, r"images\.0: 8 has no key 0"),
        ({"attack.phases.0.steps": 0}, r"attack\.phases\.0\.steps must be a whole number"),
    ],
)
def test_keys_that_are_none_are_named(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        changed(values)


def test_scores_are_found_by_dotted_keys_whose_names_may_hold_dots() -> None:
    summary = {"top1": {"resnet18": 0.5, "mine.v2": 0.25}, "list": [{"x": 3}]}
    assert points.lookup(summary, "top1.resnet18") == 0.5
    assert points.lookup(summary, "top1.mine.v2") == 0.25
    assert points.lookup(summary, "list.0.x") == 3
    with pytest.raises(KeyError, match=r"no resnet19, only resnet18, mine\.v2"):
        points.lookup(summary, "top1.resnet19")
    with pytest.raises(KeyError, match=r"0\.5 has no deeper"):
        points.lookup(summary, "top1.resnet18.deeper")


@pytest.mark.parametrize(
    ("span", "told"),
    [
        ({"low": 1, "high": 1}, "low must be below high: 1 is not 1"),
        ({"low": 0, "high": 1, "log": True}, "low must be above 0 where log is true, not 0"),
        ({"low": 1, "high": 9, "log": True, "step": 2}, "log and step exclude each other"),
        ({"low": 1, "high": 2, "step": 3}, "step must be above 0 and at most high - low, not 3"),
        ({"low": "a", "high": 2}, "low must be a whole number.* or a number.*, not 'a'"),
        ({"low": 1, "high": float("inf")}, "high must be .*, not inf"),
    ],
)
def test_spans_without_numbers_are_refused(span: dict[str, Any], told: str) -> None:
    with pytest.raises(configs.ConfigError, match=told):
        configs.build(Span, span)


def test_whole_numbers_of_a_file_stay_whole() -> None:
    assert configs.build(Span, {"low": 1, "high": 9}).whole
    assert not configs.build(Span, {"low": 1, "high": 9.0}).whole
    assert not configs.build(Span, {"low": 1, "high": 9, "step": 0.5}).whole


# --- Optuna --------------------------------------------------------------------------------------

SPACE: dict[str, points.Choice] = {
    "lr": Span(1e-4, 1.0, log=True),
    "steps": Span(100, 1000, step=300),
    "share": Span(0.0, 1.0, step=0.1),
    "n": Span(1, 3),
    "kind": (None, [1, 2], "a"),
}


def test_what_is_suggested_lies_in_the_space() -> None:
    pytest.importorskip("optuna")
    drawn = [points.suggest(SPACE, "max", seed, []) for seed in range(60)]
    assert {value["steps"] for value in drawn} == {100, 400, 700, 1000}
    assert {value["share"] for value in drawn} == {i / 10 for i in range(11)}
    assert {value["n"] for value in drawn} == {1, 2, 3}
    assert {str(value["kind"]) for value in drawn} == {"None", "[1, 2]", "a"}
    assert all(1e-4 <= value["lr"] <= 1 for value in drawn)
    assert 0.3 < sum(value["lr"] < 1e-2 for value in drawn) / 60 < 0.7
    assert isinstance(drawn[0]["n"], int)


@pytest.mark.parametrize("goal", ["min", "max"])
def test_suggestions_approach_the_best_point(goal: str) -> None:
    """(log10 lr + 2)^2 of learning rates; the first ten points are random."""
    pytest.importorskip("optuna")
    sign = 1 if goal == "min" else -1
    space = {"lr": SPACE["lr"]}
    told: list[Told] = []
    for _ in range(40):
        values = points.suggest(space, goal, 0, told)
        told.append(Told(values, sign * (math.log10(values["lr"]) + 2) ** 2))
    scores = [sign * (point.score or 0) for point in told]
    assert min(scores) < 1e-3
    assert np.median(scores[20:]) < 0.2  # of random ones it is 1
    assert points.suggest(space, goal, 0, told) == points.suggest(space, goal, 0, told)
    assert points.suggest(space, goal, 1, told) != points.suggest(space, goal, 0, told)


def test_points_that_failed_or_are_running_are_no_scores() -> None:
    pytest.importorskip("optuna")
    told = [Told(points.suggest(SPACE, "max", 0, []), None, running) for running in (True, False)]
    assert points.suggest(SPACE, "max", 0, told).keys() == SPACE.keys()


def test_without_optuna_it_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r"pip install optuna; a `grid` needs nothing"):
        points.suggest(SPACE, "max", 0, [])

"""`jinv train-reconstructor` as its user meets it: files, scores, sources, refusals."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
import yaml

import recipe_examples
from jinv.recipes import attack_heads, train_reconstructor, train_shadow_models
from jinv.reconstruct import network, trained
from jinv.runs import command_line
from jinv.runs import config as configs
from jinv.shadow import features


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return recipe_examples.train_reconstructor(tmp_path_factory.mktemp("features"))


def run(command: Any, tree: dict[str, Any], out: Path, *flags: Any) -> int:
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(tree))
    return command_line.main(command, ["--config", str(path), "--out", str(out), *map(str, flags)])


@pytest.fixture(scope="module")
def finished(tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    assert run(train_reconstructor.COMMAND, tree, out) == 0
    return out


def summary(out: Path) -> dict[str, Any]:
    return json.loads((out / "summary.json").read_text())


def test_it_writes_what_it_promises(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = summary(finished)
    assert set(told) == {field.name for field in dataclasses.fields(train_reconstructor.Summary)}
    assert (told["input"], told["examples"]) == ("weights", 6 * 4)
    assert told["source"] == "made"
    assert told["victims"] == 30
    assert list(told["attackers"]) == ["network", "ridge"]
    for attacker in told["attackers"].values():
        assert list(attacker["tpr_at_fpr"]) == ["0.001", "0.01", "0.1"]
        # Every victim is asked for the image of each of three classes.
        assert attacker["samples"] == {"true": 90, "random": 90}
        assert attacker["at_threshold"]["mse"] == told["threshold"]
        assert 0 <= attacker["top1"] <= 1
    pictures = {path.name for path in (finished / "pictures").iterdir()}
    kinds = ("best", "median", "worst")
    assert pictures == {f"{who}_{kind}.png" for who in ("network", "ridge") for kind in kinds}
    assert len(list((finished / "progress").iterdir())) == 3
    assert "ROC curves" in (finished / "report.html").read_text()


def test_ridge_knows_the_heads(tree: dict[str, Any], finished: Path) -> None:
    """Images of classes that look alike within: it finds them closer than random weights do."""
    found = summary(finished)["attackers"]["ridge"]
    assert found["median_mse"]["true"] < found["median_mse"]["random"]


def test_its_weights_make_the_reconstructor_again(tree: dict[str, Any], finished: Path) -> None:
    told = summary(finished)
    own = trained.load(finished)
    assert own.origin.network == network.Config(told["inputs"], tree["width"], classes=3)
    images = own.of_weights(np.zeros((2, told["heads"]), np.float32))
    assert images.shape == (2, 3, 32, 32, 1)
    assert np.abs(images).max() <= 1
    with np.load(finished / "statistics.npz") as kept:
        assert int(kept["count"]) == 4 * 20
        assert kept["covariance"].shape == (told["heads"], told["heads"])


def test_stored_shadow_models_train_the_same(
    tree: dict[str, Any], finished: Path, tmp_path: Path
) -> None:
    """Those of the same seeds; `jinv train-shadow-models` makes them."""
    shadows = {k: tree[k] for k in ("features", "sampling", "training", "execution")}
    folder = tmp_path / "shadows"
    assert run(train_shadow_models.COMMAND, shadows | {"seeds": 2}, folder) == 0
    out = tmp_path / "out"
    assert run(train_reconstructor.COMMAND, tree | {"shadows": str(folder)}, out) == 0
    name = trained.WEIGHTS
    assert (out / name).read_bytes() == (finished / name).read_bytes()
    assert (out / "metrics.csv").read_bytes() == (finished / "metrics.csv").read_bytes()
    assert summary(out)["source"] == "stored"


def test_from_recovered_features(tree: dict[str, Any], tmp_path: Path) -> None:
    """It learns from single images' features, and attacks with those that recovery finds."""
    out = tmp_path / "decoder"
    assert run(train_reconstructor.COMMAND, tree | {"input": "features"}, out) == 0
    told = summary(out)
    assert (told["input"], told["inputs"], told["examples"]) == ("features", 16, 6 * 4)
    assert list(told["attackers"]) == ["network", "ridge", "recovery"]
    images = trained.load(out).of_features(np.zeros((2, 3, 16), np.float32))
    assert images.shape == (2, 3, 32, 32, 1)


def test_images_of_no_class(tree: dict[str, Any], tmp_path: Path) -> None:
    """There is one reconstruction a head, and none by ridge, which reads a class's weights."""
    out = tmp_path / "out"
    assert run(train_reconstructor.COMMAND, tree | {"conditional": False}, out) == 0
    assert list(summary(out)["attackers"]) == ["network"]
    assert summary(out)["attackers"]["network"]["samples"] == {"true": 30, "random": 30}


def test_heads_that_are_not_linear(tree: dict[str, Any], tmp_path: Path) -> None:
    """Ridge needs a class's own weights."""
    changed = tree | {
        "sampling": tree["sampling"] | {"positive": [1]},
        "training": {"head": "binary", "hidden": 2, "lr": 0.5, "epochs": 5, "init_std": 0.1},
    }
    assert run(train_reconstructor.COMMAND, changed, tmp_path / "out") == 0
    told = summary(tmp_path / "out")
    assert list(told["attackers"]) == ["network"]
    assert told["attackers"]["network"]["samples"] == {"true": 90, "random": 90}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reconstructor": {"batch": 21}}, "20 shadow models fill no batch of 21"),
        (
            {"sampling": {"class_size": 21, "sets": 1}},
            "20 images, fewer than sampling.class_size",
        ),
        ({"sampling": {"kind": "random_labels", "classes": 3, "sets": 4}}, "victims learn what"),
        (
            {
                "sampling": {"kind": "one_against_many", "others": 2, "sets": 4},
                "training": {"head": "binary", "lr": 0.5, "epochs": 5},
            },
            "set conditional: false",
        ),
        ({"training": {"classes": 2}}, "labels are 0 to 2, the linear head knows 2 classes"),
        ({"features": "/nowhere"}, "/nowhere"),
        ({"shadows": "/nowhere"}, "/nowhere"),
        ({"victims": 0}, "victims"),
        ({"input": "features", "shadows": "x"}, "shadows"),
        ({"lpips_vgg16": "/nowhere.pth"}, "/nowhere.pth"),
        ({"error": 0.1}, "error"),
        (
            {"input": "features", "training": {"classes": 3, "optimizer": "adam"}},
            "features cannot be had from these heads: Adam",
        ),
        (
            {"knowledge": {"sampling": {"kind": "random_labels", "classes": 3, "sets": 4}}},
            "set conditional: false",
        ),
        ({"width": 0}, "width"),
    ],
)
def test_mistakes_are_told_before_the_first_step(
    tree: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, OSError), match=re.escape(message)):
        train_reconstructor.Reconstruction(configs.build(train_reconstructor.Config, tree | change))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (None, "holds no images: extract the features with images_size: 32 or 64"),
        (np.zeros((60, 28, 28, 1), np.uint8), "makes those of 32 or 64 px"),
    ],
)
def test_features_without_images_to_make_are_refused(
    tree: dict[str, Any], tmp_path: Path, images: Any, message: str
) -> None:
    labels = (np.arange(60) % 3).astype(np.int32)
    found = np.zeros((60, 16), np.float32)
    for split in ("train", "test"):
        features.Features(found, labels, ("a", "b", "c"), images, "").save(tmp_path / split)
    with pytest.raises(ValueError, match=re.escape(message)):
        train_reconstructor.Reconstruction(
            configs.build(train_reconstructor.Config, tree | {"features": str(tmp_path)})
        )


def test_heads_that_know_one_person(tree: dict[str, Any], tmp_path: Path) -> None:
    """Of a set, the person's image is to be found; the loss is against it alone."""
    changed = tree | {
        "sampling": {"kind": "one_against_many", "others": 2, "sets": 20},
        "training": {"head": "binary", "hidden": 2, "lr": 0.5, "epochs": 5, "init_std": 0.1},
        "conditional": False,
    }
    assert run(train_reconstructor.COMMAND, changed, tmp_path / "out") == 0
    told = summary(tmp_path / "out")
    assert told["attackers"]["network"]["samples"] == {"true": 30, "random": 30}
    attack = {key: changed[key] for key in ("features", "sampling", "training", "victims")}
    attack |= {"reconstructors": [str(tmp_path / "out")], "statistics": 2}
    out = tmp_path / "attack"
    assert run(attack_heads.COMMAND, attack, out) == 0
    told = summary(out)
    assert list(told["attackers"]) == ["out"]
    assert told["accuracy"] is None


@pytest.mark.slow
def test_lpips_adds_to_the_loss(tree: dict[str, Any], finished: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = torchvision.models.vgg16().features.state_dict()
    torch.save({f"features.{name}": value for name, value in state.items()}, tmp_path / "vgg.pth")
    changed = tree | {"lpips_vgg16": str(tmp_path / "vgg.pth")}
    changed |= {"reconstructor": {"steps": 1, "batch": 4}, "victims": 4, "run": {"scores_every": 0}}
    assert run(train_reconstructor.COMMAND, changed, tmp_path / "out") == 0
    with (finished / "metrics.csv").open() as rows:
        first = float(next(csv.DictReader(rows))["loss"])
    assert summary(tmp_path / "out")["loss"] > first + 1e-3

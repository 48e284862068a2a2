"""`jinv synthesise` as its user meets it: whole data sets, filters, devices, mistakes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml

from jinv import data, image, optimise
from jinv.recipes import synthesise
from jinv.reports import page
from jinv.runs import command_line
from recipe_examples import EXAMPLES


def run(out: Path, *flags: str, **keys: Any) -> int:
    recipe = out.with_suffix(".yaml")
    recipe.write_text(yaml.safe_dump(EXAMPLES["synthesise"](out) | keys))
    given = ["--config", str(recipe), "--out", str(out), *flags]
    return command_line.main(synthesise.COMMAND, given)


def summary(out: Path) -> dict[str, Any]:
    return json.loads((out / "summary.json").read_text())


def pictures(out: Path) -> dict[str, np.ndarray]:
    return {p.relative_to(out).as_posix(): page.read_png(p) for p in out.glob("train/*/*.png")}


def test_a_folder_of_every_class_that_the_reader_of_folders_reads(tmp_path: Path) -> None:
    assert run(tmp_path / "out", array_record=True) == 0
    out = tmp_path / "out"
    assert sorted(pictures(out)) == [
        *("train/000/000000_000.png", "train/000/000000_003.png"),
        *("train/004/000000_001.png", "train/004/000001_000.png"),
        *("train/005/000000_002.png", "train/005/000001_001.png"),
    ]
    read = data.Source("images", str(out)).load("train", 16)
    assert read.classes == ("000", "004", "005")
    assert read.labels.tolist() == [0, 0, 1, 1, 2, 2]
    np.testing.assert_array_equal(read.images, [v for _, v in sorted(pictures(out).items())])
    told = summary(out)
    assert (told["images"], told["per_class"]) == (6, {"0": 2, "4": 2, "5": 2})
    rows = list(csv.DictReader((out / "images.csv").open()))
    right = np.mean([row["tiny:network"] == row["class"] for row in rows])
    assert told["top1"] == {"tiny:network": pytest.approx(right)}

    pytest.importorskip("tensorflow_datasets")
    kept = data.Source("tfds", str(out / "tfds"), "synthetic").load("train", 16)
    assert kept.classes == tuple(f"class {i}" for i in range(7))
    order = np.argsort(kept.images.reshape(6, -1)[:, :8].tolist(), axis=0)[:, 0]
    expected = np.argsort(read.images.reshape(6, -1)[:, :8].tolist(), axis=0)[:, 0]
    np.testing.assert_array_equal(kept.images[order], read.images[expected])
    names = np.array([0, 4, 5])[read.labels]
    np.testing.assert_array_equal(kept.labels[order], names[expected])


def test_a_batch_is_the_attack_of_its_own_key(tmp_path: Path) -> None:
    """Batch 1 by hand: its number folded into the seed's key, its classes, the best images."""
    assert run(tmp_path / "out", seed=5) == 0
    config = synthesise.COMMAND.recipe_from(EXAMPLES["synthesise"](tmp_path) | {"seed": 5})
    attack = config.build(config.members(), [4, 5, 4, 5], None)
    run_key, noise_key = jax.random.split(jax.random.fold_in(jax.random.key(5), 1))
    state = optimise.run(attack.phases, run_key, attack.initial(noise_key), attack.data)
    by_hand = image.to_bytes(image.denormalise(state.best_images, attack.space))
    found = pictures(tmp_path / "out")
    np.testing.assert_array_equal(found["train/004/000001_000.png"], by_hand[0])
    np.testing.assert_array_equal(found["train/005/000001_001.png"], by_hand[1])


def test_several_devices_share_the_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same pictures, whoever makes a batch."""
    if jax.local_device_count() < 3:
        pytest.skip("needs three devices")
    counts = {"images_per_class": 4}
    assert run(tmp_path / "one", **counts, execution={"devices": 1}) == 0
    assert run(tmp_path / "three", **counts, execution={"devices": 3}) == 0
    one, three = pictures(tmp_path / "one"), pictures(tmp_path / "three")
    assert one.keys() == three.keys()
    for name, pixels in one.items():
        np.testing.assert_array_equal(three[name], pixels)


def test_the_filter_drops_what_its_judge_does_not_know(tmp_path: Path) -> None:
    """Classes that the judge gives are kept; the others are tried again, and reported missing."""
    judge = {"model": "tiny:network", "name": "judge"}
    wanted = {"images_per_class": 3, "filter": {"judge": judge, "rounds": 3, "confidence": 0.2}}
    assert run(tmp_path / "out", **wanted) == 0
    told = summary(tmp_path / "out")
    found = pictures(tmp_path / "out")
    rows = list(csv.DictReader((tmp_path / "out" / "images.csv").open()))
    kept = [row for row in rows if row["kept"] == "True"]
    assert 0 < len(kept) == len(found) == told["images"]
    for row in rows:
        sure = float(row["judge_probability"]) >= 0.2
        assert (row["judge"] == row["class"] and sure) == (row["kept"] == "True")
    assert told["missing"] == 9 - len(kept)
    assert told["dropped"] == {"judge": len(rows) - len(kept)}
    assert told["batches"] > 3
    assert told["top1"]["judge"] == 1


def test_duplicates_are_dropped_and_replaced(tmp_path: Path) -> None:
    """Every kept image is as far from the earlier ones of its class as was asked for."""
    assert run(tmp_path / "plain", images_per_class=3) == 0
    far = {}
    for folder in (tmp_path / "plain" / "train").iterdir():
        images = [page.read_png(p) / 255 for p in sorted(folder.iterdir())]
        far[folder.name] = [
            float(np.sqrt(np.square(a - b).mean()))
            for i, a in enumerate(images)
            for b in images[:i]
        ]
    distance = float(np.median([d for some in far.values() for d in some]))
    wanted = {"images_per_class": 3, "filter": {"distance": distance, "rounds": 2}}
    assert run(tmp_path / "out", **wanted) == 0
    told = summary(tmp_path / "out")
    assert told["dropped"]["duplicate"] > 0
    for folder in (tmp_path / "out" / "train").iterdir():
        images = [page.read_png(p) / 255 for p in sorted(folder.iterdir())]
        nearest = [
            np.sqrt(np.square(a - b).mean()) for i, a in enumerate(images) for b in images[:i]
        ]
        assert all(value >= distance for value in nearest)


def test_statistics_of_classes_are_measured_on_real_images(tmp_path: Path) -> None:
    """The first step's BatchNorm term compares a batch to its class's real moments."""
    rng = np.random.default_rng(0)
    real = rng.integers(0, 256, (14, 16, 16, 3)).astype(np.uint8)
    labels = np.arange(14) % 7
    names = [f"{i}" for i in range(7)]
    np.savez(tmp_path / "train.npz", images=real, labels=labels, classes=names)
    source = {"format": "arrays", "folder": str(tmp_path)}
    keys = {"order": "classes", "class_statistics": source, "batch": 2}
    assert run(tmp_path / "out", **keys) == 0
    assert run(tmp_path / "without", order="classes", batch=2) == 0
    assert pictures(tmp_path / "out").keys() == pictures(tmp_path / "without").keys()
    assert summary(tmp_path / "out")["loss"] != summary(tmp_path / "without")["loss"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"classes": [0, 0]}, "classes names a class twice"),
        ({"classes": [9]}, "tiny:network knows classes 0 to 6; it cannot judge images of class 9"),
        ({"filter": {}}, "filter drops nothing: give it a judge or a distance"),
        ({"filter": {"distance": 0.1, "confidence": 0.5}}, "there is no judge"),
        ({"class_statistics": {"format": "fashion_mnist"}}, "they need order: classes"),
        ({"execution": {"devices": 99}}, "99 devices asked for"),
        (
            {"filter": {"judge": {"model": "tiny:network", "classes": None}, "confidence": 1.0}},
            "all",
        ),
    ],
)
def test_mistakes_are_told(
    keys: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "out", **keys) == 2
    assert message in capsys.readouterr().err

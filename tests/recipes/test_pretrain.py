"""`scripts/pretrain.py` as its user meets it: files, refusals, interruption and resuming."""

from __future__ import annotations

import csv
import dataclasses
import functools
import hashlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml
from PIL import Image

import weights_convert
from conftest import CACHE, ROOT
from jinv import data, image, models
from jinv.data import Dataset
from jinv.models import registry, resnet_cifar
from jinv.recipes import pretrain
from jinv.runs import command_line, signals
from jinv.runs import config as configs
from recipe_examples import arrays

SUMMARY_KEYS = {
    *(
        "model",
        "weights",
        "head_epochs",
        "data",
        "subnetwork",
        "classes",
        "preprocessing",
        "device",
        "epochs",
        "steps",
        "images",
    ),
    *("test_images", "test_accuracy", "train_accuracy", "train_loss", "seconds"),
    *("seconds_per_step", "compile_seconds", "files", "versions"),
}


@pytest.fixture(scope="module", autouse=True)
def small() -> Any:
    """A network of the zoo that compiles in a second."""
    build = functools.partial(resnet_cifar.ResNet, (1, 1), widths=(4, 8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry._REGISTRY, "small", registry.Entry(build, registry.CIFAR10, 10))
        yield


def write_idx(folder: Path, split: str, count: int) -> None:
    """Gray 8 px images whose brightness tells one of three classes."""
    rng = np.random.default_rng(count)
    labels = (np.arange(count) % 3).astype(np.uint8)
    images = (rng.integers(0, 60, (count, 8, 8)) + 80 * labels[:, None, None]).astype(np.uint8)
    for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
        header = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
        (folder / f"{split}-{kind}-ubyte").write_bytes(header + array.tobytes())


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    write_idx(folder, "train", 50)
    write_idx(folder, "t10k", 20)
    return write(folder, {})


def write(folder: Path, change: dict[str, Any]) -> Path:
    """A recipe of three epochs of six steps, on the images in this folder."""
    tree: dict[str, Any] = {
        "model": "small",
        "data": {"format": "idx", "folder": str(folder)},
        "training": {"epochs": 3, "batch": 8, "warmup": 3, "lr": 0.05, "flip": True},
    }
    path = folder / f"recipe{len(list(folder.glob('*.yaml')))}.yaml"
    path.write_text(yaml.safe_dump(tree | change))
    return path


def run(*args: Any) -> int:
    return command_line.main(pretrain.COMMAND, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def finished(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    assert run("--config", recipe, "--out", out) == 0
    return out


def test_writes_what_it_promises(finished: Path, recipe: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert set(summary) == SUMMARY_KEYS
    for name, told in summary["files"].items():
        assert hashlib.sha256((finished / name).read_bytes()).hexdigest() == told
    assert (finished / "classes.txt").read_text() == "0\n1\n2\n"
    assert [summary[key] for key in ("epochs", "steps", "images", "test_images")] == [3, 18, 50, 20]
    rows = list(csv.DictReader((finished / "metrics.csv").open()))
    assert [int(row["step"]) for row in rows] == list(range(18))
    last = [float(row["loss"]) for row in rows[-6:]]
    assert summary["train_loss"] == pytest.approx(np.mean(last), rel=1e-6)
    scores = list(csv.DictReader((finished / "scores.csv").open()))
    assert [int(row["step"]) for row in scores] == [6, 12, 18]
    assert float(scores[-1]["test_accuracy"]) == summary["test_accuracy"]
    assert b"<svg" in (finished / "curves.svg").read_bytes()
    assert not (finished / "checkpoints").exists()


def test_the_network_comes_back(finished: Path, recipe: Path) -> None:
    """From torch's names, with the preprocessing measured; as accurate as the summary says."""
    state = weights_convert.read(finished / "weights.safetensors")
    assert state["layer2.0.shortcut.1.running_var"].shape == (8,)
    assert state["bn1.num_batches_tracked"] == 18
    net = models.load_trained(finished)
    images = data.idx(recipe.parent, "train").images / 255
    assert net.preprocessing.size == 8
    np.testing.assert_allclose(net.preprocessing.mean, [images.mean()] * 3, atol=5.1e-5)
    np.testing.assert_allclose(net.preprocessing.std, [images.std()] * 3, atol=5.1e-5)
    test = data.idx(recipe.parent, "test")
    logits = net(image.from_bytes(test.images, net.preprocessing)).logits
    right = np.mean(np.asarray(logits).argmax(-1) == test.labels)
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["test_accuracy"] == pytest.approx(right)
    assert right > 0.5  # a third by chance
    with pytest.raises(ValueError, match="no trained network"):
        models.load_trained(recipe.parent)


def test_preprocessing_is_measured_channel_by_channel() -> None:
    images = np.random.default_rng(0).integers(0, [50, 150, 256], (1030, 6, 6, 3), np.uint8)
    found = pretrain.measured(images, 3)
    pixels = images / 255
    np.testing.assert_allclose(found.mean, pixels.mean((0, 1, 2)), atol=5.1e-5)
    np.testing.assert_allclose(found.std, pixels.std((0, 1, 2)), atol=5.1e-5)
    assert found.size == 6
    with pytest.raises(ValueError, match="std is 0 in a channel, all but one brightness"):
        pretrain.measured(np.full((2, 4, 4, 1), 7, np.uint8), 3)
    luma = np.stack([np.asarray(Image.fromarray(one).convert("L")) for one in images]) / 255
    found = pretrain.measured(images, 1)
    np.testing.assert_allclose([*found.mean, *found.std], [luma.mean(), luma.std()], atol=5.1e-5)


def test_images_need_not_be_square(tmp_path: Path) -> None:
    """The network learns their height and width, and comes back with these."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 8, 12, 3), np.uint8)
    for split in ("train", "test"):
        np.savez(tmp_path / f"{split}.npz", images=images, labels=np.arange(40) % 3)
    tree = {
        "data": {"format": "arrays", "folder": str(tmp_path)},
        "training": {"epochs": 1, "batch": 8, "warmup": 1},
    }
    assert run("--config", write(tmp_path, tree), "--out", tmp_path / "out") == 0
    net = models.load_trained(tmp_path / "out")
    assert net.preprocessing.size == (8, 12)
    np.testing.assert_allclose(net.preprocessing.mean, images.mean((0, 1, 2)) / 255, atol=5.1e-5)
    assert net(image.from_bytes(images[:2], net.preprocessing)).logits.shape == (2, 3)


def test_weights_do_not_see_distorted_images(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "test"):
        images = np.random.default_rng(0).integers(0, 256, (40, 8, 12, 1), np.uint8)
        np.savez(tmp_path / f"{split}.npz", images=images, labels=np.arange(40) % 3)
    tree = {"weights": str(finished), "data": {"format": "arrays", "folder": str(tmp_path)}}
    assert run("--config", write(tmp_path, tree), "--out", tmp_path / "out") == 2
    assert "images of 8 x 12 px would be distorted to the 8 x 8 px" in capsys.readouterr().err


def test_a_finished_run_is_not_replaced_silently(
    finished: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "weights.safetensors").read_bytes()
    assert run("--config", recipe, "--out", finished) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run("--config", recipe, "--out", finished, "--resume") == 0
    assert "nothing to do" in capsys.readouterr().out
    assert run("--config", recipe, "--out", finished, "--overwrite") == 0
    assert (finished / "weights.safetensors").read_bytes() == before


@pytest.mark.parametrize("asked", [2, 6, 13])
def test_stopped_and_resumed_equals_uninterrupted(
    tmp_path: Path, recipe: Path, finished: Path, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal in the first epoch, at the end of it, in the third; the very same weights."""
    out, answers = tmp_path / "out", []

    def heard(self: signals.Signals) -> bool:
        answers.append(True)
        return len(answers) >= asked  # after every step

    with monkeypatch.context() as patch:
        patch.setattr(signals.Signals, "__call__", heard)
        assert run("--config", recipe, "--out", out) == 143
    assert (out / "checkpoints" / str(asked)).is_dir()
    assert not (out / "summary.json").exists()
    assert run("--config", recipe, "--out", out) == 2
    assert run("--config", recipe, "--out", out, "--resume", "--seed", 1) == 2
    assert run("--config", recipe, "--out", out, "--resume") == 0
    for file in ("weights.safetensors", "metrics.csv", "scores.csv"):
        assert (out / file).read_bytes() == (finished / file).read_bytes(), file


@pytest.mark.slow
def test_sigterm_saves_a_checkpoint(tmp_path: Path, recipe: Path) -> None:
    """A real signal to a real process."""
    long = {"model": "resnet20_cifar", "training": {"epochs": 10_000, "batch": 8}}
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(CACHE)}
    out = tmp_path / "out"
    script = ROOT / "scripts" / "pretrain.py"
    process = subprocess.Popen(
        [sys.executable, script, "--config", write(recipe.parent, long), "--out", out],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 300
    while not list(out.glob("checkpoints/*/_CHECKPOINT_METADATA")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 143, errors
    assert "go on with --resume" in errors
    assert list(out.glob("checkpoints/*/state"))


def test_a_subset_that_the_seed_decides(recipe: Path) -> None:
    def images(**change: Any) -> Dataset:
        tree = configs.read_yaml(recipe)
        return pretrain.Pretraining(configs.build(pretrain.Config, tree | change)).train

    whole = {one.tobytes() for one in images().images}
    first, again, other = (images(train_images=20, seed=seed) for seed in (3, 3, 4))
    assert len(first) == 20
    assert {one.tobytes() for one in first.images} <= whole
    assert len({one.tobytes() for one in first.images}) == 20
    np.testing.assert_array_equal(first.images, again.images)
    assert not np.array_equal(first.images, other.images)
    for one, label in zip(first.images, first.labels, strict=True):
        assert one.mean() // 80 == label


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "resnet51"}, "resnet51"),
        ({"modle": "small"}, "modle"),
        ({"data": {"format": "idx", "folder": "/nowhere"}}, "/nowhere"),
        ({"data": {"format": "mnist"}}, "mnist"),
        ({"size": 16}, "size"),
        ({"train_images": 51}, "train_images must be 1 to 50"),
        ({"training": {"batch": 51}}, "50 images fill no batch of 51"),
        ({"training": {"lr": -1}}, "lr"),
        ({"training": {"optimizer": "lion"}}, "optimizer"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(
    tmp_path: Path,
    recipe: Path,
    change: dict[str, Any],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert run("--config", write(recipe.parent, change), "--out", out) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not out.exists()


def test_splits_must_go_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    for split, classes in (("train", "ab"), ("test", "ac")):
        for name in classes:
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (40, 40), "red").save(tmp_path / split / name / "0.png")
    path = write(tmp_path, {"data": {"format": "images", "folder": str(tmp_path)}, "size": 8})
    assert run("--config", path, "--out", tmp_path / "out") == 2
    assert "a, c are not those of the training images: a, b" in capsys.readouterr().err


def test_attributes_are_learned(tmp_path: Path) -> None:
    """Whether an image is bright, and dark: labels (N, 2)."""
    rng = np.random.default_rng(0)
    bright = rng.integers(0, 2, 48)
    images = (rng.integers(0, 60, (48, 8, 8)) + 150 * bright[:, None, None]).astype(np.uint8)
    for split in ("train", "test"):
        labels = np.stack([bright, 1 - bright], 1)
        np.savez(tmp_path / f"{split}.npz", images=images, labels=labels, classes=["on", "off"])
    change = {"data": {"format": "arrays", "folder": str(tmp_path)}}
    assert run("--config", write(tmp_path, change), "--out", tmp_path / "out") == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["classes"] == ["on", "off"]
    assert summary["train_loss"] < np.log(2)
    assert summary["test_accuracy"] > 0.8


# --- transfer ------------------------------------------------------------------------------------

TRANSFER = {
    "head": {"epochs": 2, "batch": 6, "warmup": 0, "lr": 0.05},
    "training": {"epochs": 1, "batch": 8, "lr": 0.01, "learns": "all_but_batch_norm"},
}


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gray 8 px images of two classes: two epochs of five batches and one of four."""
    folder = tmp_path_factory.mktemp("other")
    arrays(folder, 34, 8, seed=5)
    return folder


def transfer(folder: Path, weights: Path | None, **change: Any) -> Path:
    data = {"format": "arrays", "folder": str(folder)}
    told = None if weights is None else str(weights)
    return write(folder, {"weights": told, "data": data, **TRANSFER, **change})


@pytest.fixture(scope="module")
def transferred(other: Path, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("transferred") / "out"
    assert run("--config", transfer(other, finished), "--out", out) == 0
    return out


def test_transfer_keeps_norms_and_preprocessing(finished: Path, transferred: Path) -> None:
    before, after = (
        weights_convert.read(folder / "weights.safetensors") for folder in (finished, transferred)
    )
    assert before.keys() == after.keys()
    assert after["linear.weight"].shape == (2, 8)
    for name, value in before.items():
        if not name.startswith("linear"):
            norm = ".bn" in f".{name}" or "shortcut.1." in name
            assert np.array_equal(value, after[name]) == norm, name
    told, old = (json.loads((f / "summary.json").read_text()) for f in (transferred, finished))
    assert set(told) == SUMMARY_KEYS
    assert told["preprocessing"] == old["preprocessing"]
    assert told["classes"] == ["dark", "bright"]
    assert told["weights"] == str(finished)
    assert [told[key] for key in ("head_epochs", "epochs", "steps")] == [2, 1, 14]
    rows = list(csv.DictReader((transferred / "metrics.csv").open()))
    assert [int(row["step"]) for row in rows] == list(range(14))
    scores = list(csv.DictReader((transferred / "scores.csv").open()))
    assert [int(row["step"]) for row in scores] == [5, 10, 14]
    assert models.load_trained(transferred).classes == 2


def test_the_new_head_is_random_and_the_rest_is_not(other: Path, finished: Path) -> None:
    recipe = configs.build(pretrain.Config, configs.read_yaml(transfer(other, finished)))
    source = models.load_trained(finished)
    found = [
        pretrain.Pretraining(dataclasses.replace(recipe, seed=seed)).net.variables
        for seed in (0, 0, 1)
    ]
    heads = [np.asarray(variables["linear"]["weight"]) for variables in found]
    np.testing.assert_array_equal(heads[0], heads[1])
    assert not np.array_equal(heads[0], heads[2])
    for name in set(source.variables) - {"linear"}:
        jax.tree.map(np.testing.assert_array_equal, found[0][name], source.variables[name])


def test_a_transferred_network_wants_pictures_as_it_was_shown_them(
    other: Path, finished: Path, tmp_path: Path
) -> None:
    """Not as the weights that it began with: `data` brings all pictures to a size in one way."""
    shutil.copytree(finished, tmp_path / "run")
    summary = json.loads((finished / "summary.json").read_text())
    was = summary["preprocessing"]
    assert (was["resize"], was["interpolation"]) == (None, "bicubic")
    summary["preprocessing"] = was | {"resize": 40, "interpolation": "bilinear"}
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    source = models.load_trained(tmp_path / "run").preprocessing
    assert (source.resize, source.interpolation) == (40, "bilinear")
    path = transfer(other, tmp_path / "run")
    prepared = pretrain.Pretraining(configs.build(pretrain.Config, configs.read_yaml(path)))
    found = prepared.net.preprocessing
    assert (found.resize, found.interpolation) == (None, "bicubic")
    assert (found.size, found.mean) == (source.size, source.mean)


def test_a_file_of_any_number_of_classes(other: Path, finished: Path) -> None:
    """Normalised and sized as the zoo says: images of 8 px are brought to 32."""
    path = transfer(other, finished / "weights.safetensors")
    prepared = pretrain.Pretraining(configs.build(pretrain.Config, configs.read_yaml(path)))
    assert prepared.net.preprocessing == registry.CIFAR10
    assert prepared.net.classes == 2
    assert prepared.train.images.shape[1:] == (8, 8, 1)


@pytest.mark.parametrize(("asked", "step"), [(4, 4), (5, 5), (10, 10), (12, 10), (13, 11)])
def test_transfer_stopped_and_resumed_equals_uninterrupted(
    tmp_path: Path,
    other: Path,
    finished: Path,
    transferred: Path,
    asked: int,
    step: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the head's training, at the end of an epoch and of the phase, between, in the next."""
    out, told, path = tmp_path / "out", [], transfer(other, finished)

    def heard(self: signals.Signals) -> bool:
        told.append(True)
        return len(told) >= asked

    with monkeypatch.context() as patch:
        patch.setattr(signals.Signals, "__call__", heard)
        assert run("--config", path, "--out", out) == 143
    assert (out / "checkpoints" / str(step)).is_dir()
    assert run("--config", path, "--out", out, "--resume") == 0
    for file in ("weights.safetensors", "metrics.csv", "scores.csv"):
        assert (out / file).read_bytes() == (transferred / file).read_bytes(), file


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": None}, "head trains the last layer of a network with weights"),
        ({"model": "resnet20_cifar"}, "holds a small, not a resnet20_cifar"),
        ({"weights": Path("/nowhere.pth")}, "/nowhere.pth"),
        ({"weights": Path("package")}, "no package holds weights of small"),
        ({"head": {"batch": 35}}, "34 images fill no batch of 35"),
    ],
)
def test_transfers_that_cannot_be(
    tmp_path: Path,
    other: Path,
    finished: Path,
    change: dict[str, Any],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = transfer(other, **{"weights": finished, **change})
    assert run("--config", path, "--out", tmp_path / "out") == 2
    assert message in capsys.readouterr().err


def test_a_loss_that_explodes_ends_the_run(
    tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    flags = ("--training.lr", 1e25, "--training.warmup", 0)
    assert run("--config", recipe, "--out", out, *flags) == 3
    assert "not finite" in capsys.readouterr().err
    assert not (out / "weights.safetensors").exists()
    assert (out / "metrics.csv").exists()


def test_images_of_one_class_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = np.zeros((40, 8, 8, 1), np.uint8)
    images[::2] = 255
    for split in ("train", "test"):
        np.savez(tmp_path / f"{split}.npz", images=images, labels=np.zeros(40, int))
    tree = {"model": "resnet20_cifar", "data": {"format": "arrays", "folder": str(tmp_path)}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree))
    flags = ["--config", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "out")]
    assert command_line.main(pretrain.COMMAND, flags) == 2
    assert "all 40 training images are of the class '0'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

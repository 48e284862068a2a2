"""`jinv train-student` and `jinv relabel` as their users meet them."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import weights_convert
from jinv import data, models, training
from jinv.distill import lessons
from jinv.recipes import relabel, train_student
from jinv.runs import command_line
from jinv.runs.command import Command
from recipe_examples import EXAMPLES

VIEWS = {"flip": True, "resized_crop": [0.5, 1.0], "mix": "cutmix"}


def run(command: Command, recipe: dict[str, Any], out: Path, *flags: str) -> int:
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe))
    return command_line.main(command, ["--config", str(path), "--out", str(out), *flags])


def summary(out: Path) -> dict[str, Any]:
    return json.loads((out / "summary.json").read_text())


@pytest.fixture
def student(tmp_path: Path) -> dict[str, Any]:
    recipe = EXAMPLES["train-student"](tmp_path)
    return recipe | {"training": recipe["training"] | VIEWS}


@pytest.fixture
def store(tmp_path: Path, student: dict[str, Any]) -> Path:
    """Labels for what `student` sees."""
    keys = ("teacher", "data", "training")
    assert run(relabel.COMMAND, {k: student[k] for k in keys}, tmp_path / "labels") == 0
    return tmp_path / "labels"


def test_stored_labels_teach_as_recomputed_ones(
    tmp_path: Path, student: dict[str, Any], store: Path
) -> None:
    """Up to half precision; the store is of logits alone."""
    assert run(train_student.COMMAND, student, tmp_path / "recomputed") == 0
    stored = {k: v for k, v in student.items() if k != "teacher"} | {"labels": str(store)}
    assert run(train_student.COMMAND, stored, tmp_path / "stored") == 0
    one, other = (
        weights_convert.read(tmp_path / name / "weights.safetensors")
        for name in ("recomputed", "stored")
    )
    for name, values in one.items():
        np.testing.assert_allclose(other[name], values, rtol=2e-2, atol=2e-3)
    told = summary(tmp_path / "recomputed")
    assert told["preprocessing"] == summary(tmp_path / "stored")["preprocessing"]
    assert (told["teacher"], summary(tmp_path / "stored")["teacher"]) == ("tiny:two_classes", None)
    assert told["teacher_accuracy"] is not None
    logits = np.load(store / "logits.npy")
    assert (logits.dtype, logits.shape) == (np.float16, (6 * 3, 8, 2))
    assert summary(store)["bytes_per_image"] == pytest.approx(6 * 24 / 26 * 2 * 2 + 128 / 26, abs=1)


def test_labels_are_the_teachers_for_the_views(store: Path, student: dict[str, Any]) -> None:
    """Step 5 by hand: its images, its view, the teacher's logits."""
    import tiny

    teacher = tiny.two_classes()
    images = data.Source("arrays", student["data"]["folder"]).load("train", 28)
    config = training.Config(epochs=6, batch=8, flip=True, resized_crop=(0.5, 1.0), mix="cutmix")
    plan = lessons.Plan.of(images, 0, teacher.preprocessing, config)
    chosen = [*zip(range(6), plan.batches(26), strict=False)][5][1]
    view = plan.view(np.int32(5), images.images[chosen], images.labels[chosen], 2)
    logits = teacher.apply(teacher.variables, training.shown(teacher, view.pixels)).logits
    np.testing.assert_allclose(np.load(store / "logits.npy")[5], logits, atol=5e-3)


def test_labels_reproduce_in_another_process(
    tmp_path: Path, student: dict[str, Any], store: Path
) -> None:
    """Bit for bit."""
    keys = ("teacher", "data", "training")
    recipe = tmp_path / "again.yaml"
    recipe.write_text(yaml.safe_dump({k: student[k] for k in keys}))
    given = ["--config", str(recipe), "--out", str(tmp_path / "again")]
    tests = Path(__file__).resolve().parents[1]
    path = os.pathsep.join([str(tests), str(tests.parent)])
    subprocess.run(
        [sys.executable, "-m", "jinv", "relabel", *given],
        env=os.environ | {"PYTHONPATH": path},
        check=True,
        capture_output=True,
    )
    files = [(folder / "logits.npy").read_bytes() for folder in (store, tmp_path / "again")]
    assert hashlib.sha256(files[0]).digest() == hashlib.sha256(files[1]).digest()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed (0 against 1)"),
        ({"size": 24}, "size"),
        ({"images_per_class": 8}, "images ("),
        ({"training": {"epochs": 6, "batch": 8, "lr": 0.01, "warmup": 2}}, "views.mix"),
    ],
)
def test_labels_of_other_views_are_refused(
    changes: dict[str, Any],
    message: str,
    tmp_path: Path,
    student: dict[str, Any],
    store: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stored = {k: v for k, v in student.items() if k != "teacher"} | {"labels": str(store)}
    recipe = stored | {"model": "resnet20_cifar"} | changes
    assert run(train_student.COMMAND, recipe, tmp_path / "out") == 2
    told = capsys.readouterr().err
    assert "the labels were made for other views" in told
    assert message in told


def test_an_exported_student_is_the_same_in_torch(tmp_path: Path, student: dict[str, Any]) -> None:
    """The same class for every test image, from the .safetensors and from a .pth file."""
    torch = pytest.importorskip("torch")
    import torch_peers

    recipe = student | {"model": "resnet20_cifar"}
    assert run(train_student.COMMAND, recipe, tmp_path / "out") == 0
    net = models.load_trained(tmp_path / "out")
    test = data.Source("arrays", student["test"]["folder"]).load("test", 28)
    seen = np.asarray(training.normalised(net, test.images))
    ours = np.asarray(net.apply(net.variables, seen).logits).argmax(1)
    accuracy = float((ours == test.labels).mean())
    assert summary(tmp_path / "out")["test_accuracy"] == pytest.approx(accuracy)

    weights_convert.write(
        tmp_path / "student.pth", weights_convert.read(tmp_path / "out" / "weights.safetensors")
    )
    model = torch_peers.build("resnet20_cifar")
    model.linear = torch.nn.Linear(model.linear.in_features, 2)
    state = torch.load(tmp_path / "student.pth", weights_only=True)
    model.load_state_dict(state, assign=True)
    with torch.no_grad():
        channels = torch.tensor(seen.transpose(0, 3, 1, 2).copy())
        theirs = model.eval()(channels).argmax(1).numpy()
    np.testing.assert_array_equal(theirs, ours)


def test_hard_labels_need_no_teacher(tmp_path: Path, student: dict[str, Any]) -> None:
    recipe = {k: v for k, v in student.items() if k != "teacher"}
    assert run(train_student.COMMAND, recipe, tmp_path / "soft") == 2
    hard = recipe | {"distillation": {"soft": 0.0, "hard": 1.0}, "images_per_class": 8}
    assert run(train_student.COMMAND, hard, tmp_path / "out") == 0
    told = summary(tmp_path / "out")
    assert (told["images"], told["teacher"], told["teacher_accuracy"]) == (16, None, None)
    assert told["classes"] == ["dark", "bright"]


def test_as_many_of_every_class_at_random() -> None:
    images = np.arange(30, dtype=np.uint8).reshape(30, 1, 1, 1).repeat(3, 3)
    found = data.Dataset(images, np.arange(30, dtype=np.int32) % 3, ("a", "b", "c"))
    import jax

    some = lessons.lesson(found, 3, None, each=4, key=jax.random.key(1))
    assert sorted(some.labels.tolist()) == [0] * 4 + [1] * 4 + [2] * 4
    np.testing.assert_array_equal(some.images[:, 0, 0, 0] % 3, some.labels)
    with pytest.raises(ValueError, match="a has 10 images, fewer than 11"):
        lessons.lesson(found, 3, None, each=11, key=jax.random.key(1))


def test_folders_are_numbers_of_the_teachers_classes() -> None:
    images = np.zeros((2, 4, 4, 3), np.uint8)
    found = data.Dataset(images, np.array([0, 1], np.int32), ("003", "005"))
    named = lessons.lesson(found, 6, tuple("abcdef"))
    assert named.labels.tolist() == [3, 5]
    assert named.classes == tuple("abcdef")

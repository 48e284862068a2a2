"""The reference for condensation recovers images and trains a student, without jinv."""

from __future__ import annotations

import dataclasses
import gzip
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from conftest import ROOT
from jinv import data, image, optimise, training
from jinv.attacks import deepinversion
from jinv.models import trained
from jinv.objective.terms import Member

sys.path.insert(0, str(ROOT / "scripts"))

import torch_condensation  # found through the path above
from benchmarks import torch_cifar, torch_distillation


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A teacher as `jinv pretrain` leaves it, and FashionMNIST's files, of noise."""
    teacher, files = tmp_path_factory.mktemp("teacher"), tmp_path_factory.mktemp("data")
    net = torch_distillation.teacher("resnet20_cifar", 28)
    save_file(net.state_dict(), teacher / "weights.safetensors")
    space = {"size": 28, "mean": [0.3] * 3, "std": [0.35] * 3, "pixel_range": [0.0, 1.0]}
    summary = {
        "model": "resnet20_cifar",
        "classes": [f"class {i}" for i in range(10)],
        "preprocessing": space,
    }
    (teacher / "summary.json").write_text(json.dumps(summary))
    rng = np.random.default_rng(0)
    for name, count in (("train", 10), ("t10k", 600)):
        images = rng.integers(0, 256, (count, 28, 28), np.uint8)
        header = np.array([2051, count, 28, 28], ">i4").tobytes()
        with gzip.open(files / f"{name}-images-idx3-ubyte.gz", "wb") as file:
            file.write(header + images.tobytes())
        labels = rng.integers(0, 10, count).astype(np.uint8)
        with gzip.open(files / f"{name}-labels-idx1-ubyte.gz", "wb") as file:
            file.write(np.array([2049, count], ">i4").tobytes() + labels.tobytes())
    return teacher, files


def test_it_recovers_trains_and_scores(folders: tuple[Path, Path], tmp_path: Path) -> None:
    teacher, files = folders
    given = [str(teacher), "--data", str(files), "--epochs", "2"]
    first = [*given, "--per-class", "1", "--steps", "3", "--batch", "5"]
    torch_condensation.main([*first, "--out", str(tmp_path / "a")])
    summary = json.loads((tmp_path / "a/summary.json").read_text())
    assert summary["images"] == 10
    read = data.image_folder(tmp_path / "a/train", 28)
    assert sorted(read.labels.tolist()) == list(range(10))
    # What jinv says of the same teacher.
    net = trained.load_trained(teacher)
    accuracy = training.make_accuracy(net, training.batch_mesh(100), 100)
    right = accuracy(net.variables, data.fashion_mnist("test", files))
    assert summary["teacher_accuracy"] == pytest.approx(right, abs=0.002)
    # A student of images that are there.
    again = [*given, "--images", str(tmp_path / "a/train"), "--batch", "10"]
    torch_condensation.main([*again, "--out", str(tmp_path / "b")])
    assert json.loads((tmp_path / "b/summary.json").read_text())["images"] == 10
    with pytest.raises(SystemExit, match="10 images fill no batch of 11"):
        torch_condensation.main([*again[:-1], "11", "--out", str(tmp_path / "c")])


def test_images_are_those_of_the_preset(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the same noise, where nothing else is drawn."""
    monkeypatch.setattr(torch_condensation, "SHIFT", 0)
    teacher, net = torch_condensation.Teacher(folders[0]), trained.load_trained(folders[0])
    teacher.size = 12
    torch.manual_seed(0)
    noise = torch.randn(10, 3, 12, 12)
    torch.manual_seed(0)
    images, targets = torch_condensation.recover(teacher, 1, 4, 0.0)
    config = dataclasses.replace(
        deepinversion.PRESETS["sre2l_cifar100"],
        phases=(deepinversion.Phase(4, jitter=0),),
        flip=0.0,
    )
    attack = deepinversion.build(config, [Member(net)], targets.tolist(), size=12)
    start = jax.numpy.asarray(noise.permute(0, 2, 3, 1).numpy())
    state = optimise.run(attack.phases, jax.random.key(0), start, attack.data)
    ours = image.to_bytes(image.denormalise(state.best_images, attack.space))
    apart = np.abs(images.permute(0, 2, 3, 1).numpy().astype(int) - ours)
    moved = (teacher.normalised(images / 255) - noise).abs().mean().item()
    assert moved > 0.2
    assert np.quantile(apart, 0.99) <= 1  # Adam's first steps follow the sign of what is rounded


def test_a_student_comes_near_its_teacher(folders: tuple[Path, Path]) -> None:
    torch.manual_seed(0)
    teacher = torch_condensation.Teacher(folders[0])
    student = torch_cifar.network("resnet20_cifar")
    images = torch.randint(0, 256, (20, 3, 28, 28), dtype=torch.uint8)

    def apart() -> float:
        seen = teacher.normalised(images / 255)
        with torch.no_grad():
            return torch_cifar.divergence(teacher.net(seen), student(seen), 20.0).item()

    student.eval()
    before = apart()
    torch_condensation.train(teacher, student, images, 10, 12)
    assert not student.training
    assert apart() < 0.7 * before

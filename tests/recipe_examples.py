"""A tiny config for every command: what the contract test runs. A new command needs one here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import weights_convert
from jinv.shadow import features


def arrays(folder: Path, count: int = 26, size: int = 28, seed: int = 0) -> dict[str, Any]:
    """Gray images of two classes, as `data:` of a config."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    images = (rng.integers(0, 60, (count, size, size)) + 150 * labels[:, None, None]).astype(
        np.uint8
    )
    for split in ("train", "test"):
        np.savez(folder / f"{split}.npz", images=images, labels=labels, classes=["dark", "bright"])
    return {"format": "arrays", "folder": str(folder)}


def invert(folder: Path) -> dict[str, Any]:
    del folder
    return {
        "networks": [{"model": "tiny:network"}],
        "images": 2,
        "labels": "random",
        "size": 16,
        "attack": {"warmup": 2, "phases": [{"steps": 6, "jitter": 1}]},
        "run": {"chunk": 2, "pictures_every": 2, "scores_every": 4, "checkpoint_seconds": 0},
    }


def synthesise(folder: Path) -> dict[str, Any]:
    del folder
    return {
        "networks": [{"model": "tiny:network"}],
        "images_per_class": 2,
        "classes": [0, 4, 5],
        "batch": 4,
        "attack": {"warmup": 2, "phases": [{"steps": 6, "jitter": 1}]},
    }


def relabel(folder: Path) -> dict[str, Any]:
    views = {"flip": True, "resized_crop": [0.5, 1.0], "mix": "cutmix"}
    return {
        "teacher": {"model": "tiny:two_classes"},
        "data": arrays(folder),
        "training": {"epochs": 6, "batch": 8, **views},
    }


def train_student(folder: Path) -> dict[str, Any]:
    return {
        "model": "lenet",
        "data": arrays(folder),
        "teacher": {"model": "tiny:two_classes"},
        "test": arrays(folder),
        "training": {"epochs": 6, "batch": 8, "lr": 0.01, "warmup": 2, "mix": "mixup"},
        "run": {"test_every": 2},
    }


def distill(folder: Path) -> dict[str, Any]:
    test = arrays(folder)
    return {
        "teacher": {"model": "tiny:two_classes"},
        "model": "lenet",
        "generator": {"batch": 8, "steps": 3, "width": 8},
        "warmup": 1,
        "steps": 2,
        "test": test,
        "training": {"epochs": 3, "batch": 8, "lr": 0.01, "warmup": 2},
        "run": {"test_every": 2, "checkpoint_seconds": 0},
    }


def invert_gradients(folder: Path) -> dict[str, Any]:
    Image.fromarray(np.full((30, 30), 90, np.uint8)).save(folder / "gray.png")
    return {
        "network": {"model": "lenet", "weights": "random"},
        "client": {"files": [str(folder / "gray.png")], "classes": [4], "statistics": "none"},
        "attack": {"steps": 6, "seeds": 1, "group": 0.0},
        "run": {"chunk": 2, "pictures_every": 2, "checkpoint_seconds": 0},
    }


def pretrain(folder: Path) -> dict[str, Any]:
    return {
        "model": "lenet",
        "data": arrays(folder),
        "training": {"epochs": 6, "batch": 8, "lr": 0.01, "warmup": 2},
    }


def extract_features(folder: Path) -> dict[str, Any]:
    return {
        "network": {"model": "lenet", "weights": "random"},
        "data": arrays(folder),
        "batch": 8,
    }


def train_shadow_models(folder: Path) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    labels = (np.arange(60) % 3).astype(np.int32)
    for split in ("train", "test"):
        found = rng.normal(size=(60, 16)).astype(np.float32)
        features.Features(found, labels, ("a", "b", "c"), None, "").save(folder / split)
    return {
        "features": str(folder),
        "sampling": {"class_size": 1, "sets": 20},
        "training": {"classes": 3, "lr": 0.5, "epochs": 10, "init_std": 0.1},
        "seeds": 3,
        "execution": {"chunk": 8},
    }


def train_reconstructor(folder: Path) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    labels = (np.arange(60) % 3).astype(np.int32)
    pattern = rng.integers(40, 200, (3, 4, 4, 1)).repeat(8, 1).repeat(8, 2)
    for split in ("train", "test"):
        found = (rng.normal(size=(60, 16)) + 2 * labels[:, None]).astype(np.float32)
        images = (pattern[labels] + rng.integers(-20, 20, (60, 32, 32, 1))).astype(np.uint8)
        features.Features(found, labels, ("a", "b", "c"), images, "").save(folder / split)
    return {
        "features": str(folder),
        "sampling": {"class_size": 1, "sets": 20},
        "training": {"classes": 3, "lr": 0.5, "epochs": 10, "init_std": 0.1},
        "execution": {"chunk": 10},
        "statistics": 4,
        "width": 2,
        "reconstructor": {"steps": 6, "batch": 4},
        "victims": 30,
        "run": {"scores_every": 2, "checkpoint_seconds": 0},
    }


def attack_heads(folder: Path) -> dict[str, Any]:
    shared = train_reconstructor(folder)
    keys = ("features", "sampling", "training", "execution", "statistics", "victims")
    return {key: shared[key] for key in keys}


def reconstruct(folder: Path) -> dict[str, Any]:
    shared = train_reconstructor(folder)
    rng = np.random.default_rng(0)
    own = features.load(folder / "train")
    for i in range(3):
        chosen = own.features[[3 * i, 3 * i + 1, 3 * i + 2]]
        weight, bias = linear_head(rng, chosen, np.arange(3), shared["training"] | SMALL)
        state = {"weight": weight.astype(np.float32), "bias": bias.astype(np.float32)}
        weights_convert.write(folder / f"head_{i}.safetensors", state)
    return {
        "heads": [str(folder / f"head_{i}.safetensors") for i in range(3)],
        "features": shared["features"],
        "candidates": str(folder / "train"),
        "lr": [0.05],
        "epochs": [10],
        "weight_decay": [0.0],
        "init_std": 1e-3,
    }


def classify(folder: Path) -> dict[str, Any]:
    for i in range(3):
        Image.fromarray(np.full((30, 40, 3), 60 * i, np.uint8)).save(folder / f"{i}.png")
    return {"pictures": [str(folder)], "model": "lenet", "weights": "random", "batch": 1}


def evaluate(folder: Path) -> dict[str, Any]:
    shared = arrays(folder)
    return {
        "networks": [{"model": "lenet", "weights": "random", "classes": 2}],
        "data": shared,
        "real": {**shared, "split": "train"},
        "batch": 10,
    }


def search(folder: Path) -> dict[str, Any]:
    return {
        "command": "invert",
        "base": invert(folder),
        "score": "top1.tiny:network",
        "grid": {"seed": [0, 1]},
    }


SMALL = {"lr": 0.05, "init_std": 1e-3}


def linear_head(
    rng: np.random.Generator, x: np.ndarray, labels: np.ndarray, training: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Train a linear head by plain NumPy, full batch, without weight decay."""
    wanted = np.eye(labels.max() + 1)[labels]
    weight = training["init_std"] * rng.standard_normal((wanted.shape[1], x.shape[1]))
    bias = np.zeros(len(weight))
    for _ in range(training["epochs"]):
        logits = x @ weight.T + bias
        likely = np.exp(logits - logits.max(1, keepdims=True))
        error = (likely / likely.sum(1, keepdims=True) - wanted) / len(x)
        weight -= training["lr"] * error.T @ x
        bias -= training["lr"] * error.sum(0)
    return weight, bias


EXAMPLES = {
    "invert": invert,
    "synthesise": synthesise,
    "relabel": relabel,
    "train-student": train_student,
    "distill": distill,
    "invert-gradients": invert_gradients,
    "pretrain": pretrain,
    "extract-features": extract_features,
    "train-shadow-models": train_shadow_models,
    "train-reconstructor": train_reconstructor,
    "attack-heads": attack_heads,
    "reconstruct": reconstruct,
    "classify": classify,
    "evaluate": evaluate,
    "search": search,
}

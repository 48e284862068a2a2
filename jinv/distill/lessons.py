"""What a student learns from: images with a teacher's classes, and their soft labels in a store."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from jinv import data, files, training
from jinv.data import Dataset
from jinv.files import write_atomic
from jinv.image import Preprocessing
from jinv.net import Net
from jinv.runs import config as configs

INDEX, LOGITS = "labels.json", "logits.npy"


def lesson(
    found: Dataset,
    classes: int,
    names: Sequence[str] | None,
    *,
    each: int | None = None,
    key: Array | None = None,
    network: str = "the teacher",
) -> Dataset:
    """Return images with labels that are a network's classes, and the names of all these.

    Args:
      found: the images, with classes of their own, see `data.class_indices`.
      classes: how many the network has.
      names: of the network's classes, where they are known.
      each: take so many images of every class, at random; all by default.
      key: of this choice.
      network: its name, for messages.

    Raises:
      ValueError: the classes are not the network's, or one has too few images.
    """
    if found.has_attributes:
        raise ValueError("a student learns classes; these images have attributes")
    numbers, how = data.class_indices(found.classes, classes, names, network)
    usual = names or (found.classes if how == "order" else None)
    told = tuple(data.class_names(classes, None, usual))
    dataset = Dataset(found.images, numbers[found.labels], told)
    if each is None:
        return dataset
    assert key is not None
    order = np.asarray(jax.random.permutation(key, len(dataset)))
    chosen = []
    for c in np.unique(dataset.labels):
        own = order[dataset.labels[order] == c][:each]
        if len(own) < each:
            raise ValueError(f"{told[c]} has {len(own)} images, fewer than {each}")
        chosen.append(own)
    return dataset.take(np.concatenate(chosen))


def space_of_student(teacher: Preprocessing, channels: int) -> Preprocessing:
    """Return a teacher's preprocessing for a student of so many channels."""
    if channels == teacher.channels:
        return teacher
    if channels == 1:
        return teacher.gray()
    mean, std = teacher.gray().mean, teacher.gray().std
    return dataclasses.replace(teacher, mean=mean * channels, std=std * channels)


def accuracy(teacher: Net | None, test: Dataset | None, mesh: Mesh, batch: int) -> float | None:
    """Return a teacher's share of right test images; None where either is missing.

    Args:
      teacher: the network.
      test: real images.
      mesh: the devices that share a batch; all processes must ask.
      batch: images at once.
    """
    if teacher is None or test is None:
        return None
    share = training.make_accuracy(teacher, mesh, batch)
    return share(teacher.variables, test)


def said(summary: Mapping[str, Any]) -> str:
    """Say how good a student is, beside its teacher."""
    if summary["test_accuracy"] is None:
        return f"{summary['model']} has learned {summary['images']} images"
    told = f"test accuracy {summary['test_accuracy']:.4f}"
    if summary["teacher_accuracy"] is None:
        return told
    return f"{told}; its teacher's {summary['teacher_accuracy']:.4f}"


def keys(seed: int) -> tuple[Array, Array]:
    """Return the key of a run's training and that of the choice of images, of its seed."""
    run_key, choice_key = jax.random.split(jax.random.key(seed))
    return run_key, choice_key


def fingerprint(dataset: Dataset) -> str:
    """Return the sha256 of all images and labels."""
    digest = hashlib.sha256(str(dataset.images.shape).encode())
    for array in (dataset.images, dataset.labels):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which views a student sees in which order; they decide what their labels are.

    Attributes:
      images: `fingerprint` of them.
      seed: of order and views.
      size: height and width of a view.
      batch: images a step.
      epochs: passes over the images.
      views: how they are seen.
    """

    images: str
    seed: int
    size: tuple[int, int]
    batch: int
    epochs: int
    views: training.Views

    @classmethod
    def of(cls, dataset: Dataset, seed: int, size: Preprocessing, config: training.Config) -> Plan:
        """Return the plan of a training on these images.

        Args:
          dataset: the images.
          seed: of the run.
          size: of a view is that of this preprocessing.
          config: of the training.
        """
        views = {f.name: getattr(config, f.name) for f in dataclasses.fields(training.Views)}
        return cls(
            fingerprint(dataset),
            seed,
            (size.height, size.width),
            config.batch,
            config.epochs,
            training.Views(**views),
        )

    @property
    def key(self) -> Array:
        """The key of the run, for `training.run`."""
        return keys(self.seed)[0]

    def steps(self, images: int) -> int:
        """Return how many steps so many images make."""
        return self.epochs * (images // self.batch)

    def batches(self, images: int, start: int = 0) -> Iterator[np.ndarray]:
        """Yield the indices of every step's images, as `training.run` takes them.

        Args:
          images: how many there are.
          start: number of the first step.
        """
        return training.batches(training.keys(self.key)[0], images, self.batch, start)

    def view(self, step: Array, images: Array, labels: Array, classes: int) -> training.View:
        """Return what a student sees in a step.

        Args:
          step: its number.
          images: bytes (B, H, W, C).
          labels: (B,).
          classes: how many there are.
        """
        key = jax.random.fold_in(training.keys(self.key)[1], step)
        return training.make_view(key, images, labels, self.views, self.size, classes)


class Labels:
    """A teacher's logits for every view of a `Plan`, as `jinv relabel` writes them.

    Attributes:
      plan: of the views, as a plain tree.
      classes: names.
      preprocessing: of the teacher, whose normalisation a student takes over.
      logits: (steps, B, C) float16, mapped from the file.

    Raises:
      ValueError: the folder holds no finished store, or a damaged one.
    """

    def __init__(self, folder: str | Path) -> None:
        place = files.path(folder)
        try:
            told = json.loads((place / INDEX).read_text(encoding="utf-8"))
            self.plan: dict[str, Any] = told["plan"]
            self.classes = tuple(map(str, told["classes"]))
            self.preprocessing = configs.build(Preprocessing, told["preprocessing"])
            self.logits = np.load(place / LOGITS, mmap_mode="r", allow_pickle=False)
            shape = tuple(told["shape"])
            if self.logits.dtype != np.float16 or self.logits.shape != shape:
                raise ValueError(f"{LOGITS} is {self.logits.dtype} {self.logits.shape}")
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{folder} holds no labels that `jinv relabel` has finished: {error}"
            ) from None

    def check(self, plan: Plan) -> None:
        """Raise ValueError if the labels are of other views than a training would see."""
        wanted = json.loads(json.dumps(configs.plain(plan)))
        if different := configs.differences(self.plan, wanted):
            raise ValueError(
                "the labels were made for other views than this training sees (labels against "
                f"training): {'; '.join(different)}"
            )


def write_index(
    folder: Path,
    plan: Plan,
    classes: Sequence[str],
    preprocessing: Preprocessing,
    shape: Sequence[int],
) -> None:
    """Write what tells of a store's logits; it makes the store a finished one.

    Args:
      folder: of the store.
      plan: of the views.
      classes: names.
      preprocessing: of the teacher.
      shape: of the logits.
    """
    told: Mapping[str, Any] = {
        "plan": configs.plain(plan),
        "classes": list(classes),
        "preprocessing": configs.plain(preprocessing),
        "shape": list(shape),
    }
    write_atomic(folder / INDEX, json.dumps(told, indent=2) + "\n")

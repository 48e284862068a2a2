"""A training recipe, its run in a folder, and the network that comes out of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

import weights_convert
from jinv import config as configs
from jinv import curves, data, hardware, models, parallel, session, training
from jinv.files import write_atomic
from jinv.image import Preprocessing
from jinv.net import Net
from jinv.progress import Progress

WEIGHTS, CLASSES = "weights.safetensors", "classes.txt"
VERSIONS = ("python", "jax", "jaxlib", "flax", "jinv")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a config file holds.

    Attributes:
      model: a network of the zoo, with random weights; gray images reach it as equal channels.
      data: what it learns and is tested on.
      size: side of the images of a folder of pictures or of tfds; None for the network's usual
        one. Others have their own.
      train_images: take so many of the training images, chosen at random; all by default.
      seed: of everything random.
      training: the mathematics.
    """

    model: str
    data: data.Source = dataclasses.field(default_factory=data.Source)
    size: int | None = None
    train_images: int | None = None
    seed: int = 0
    training: training.Config = dataclasses.field(default_factory=training.Config)

    def __post_init__(self) -> None:
        check_size(self.size, self.data)


class Pretraining:
    """A recipe with its data read: everything that can be wrong with it has been found.

    Attributes:
      train, test: the images.
      net: with its first weights. Its preprocessing normalises by mean and standard deviation of
        the training images, see `measured`.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        usual = models.entry(recipe.model).preprocessing
        size = recipe.size or usual.size
        self.train, self.test = splits(recipe.data, size)
        if self.train.has_attributes:
            raise ValueError("labels are attributes: a network is trained on classes")
        self.key, chosen_key = jax.random.split(jax.random.key(recipe.seed))
        if recipe.train_images is not None:
            if not 1 <= recipe.train_images <= len(self.train):
                raise ValueError(
                    f"train_images must be 1 to {len(self.train)}, not {recipe.train_images}"
                )
            order = np.asarray(jax.random.permutation(chosen_key, len(self.train)))
            self.train = self.train.take(order[: recipe.train_images])
        _, height, width, channels = self.train.images.shape
        if height != width or self.test.images.shape[1:] != (height, width, channels):
            raise ValueError(
                "images must be square and of one size: training images are "
                f"{width} x {height} px, test images {self.test.images.shape[2]} x "
                f"{self.test.images.shape[1]} px"
            )
        if len(self.train) < recipe.training.batch:
            raise ValueError(f"{len(self.train)} images fill no batch of {recipe.training.batch}")
        self.net = models.load(
            recipe.model,
            None,
            classes=len(self.train.classes),
            preprocessing=measured(self.train.images, usual.channels),
            seed=recipe.seed,
        )
        self.mesh = training.batch_mesh(recipe.training.batch)

    def run(self, run: session.Session) -> dict[str, Any]:
        """Train and write the results; returns the summary (of the main process)."""
        config = self.recipe.training
        per_epoch = len(self.train) // config.batch
        total = config.epochs * per_epoch
        accuracy = training.make_accuracy(self.net, self.mesh, config.batch)
        stage = _Training("training", total)
        with run.checkpoints() as manager, session.Signals() as stopping, Progress([stage]) as bar:

            def callback(
                start: int, metrics: Mapping[str, np.ndarray], state: training.State | None
            ) -> None:
                bar.update(0, start, metrics)
                done = start
                for loss, share in zip(metrics["loss"], metrics["accuracy"], strict=True):
                    run.metrics.add(step=done, loss=float(loss), accuracy=float(share))
                    done += 1
                if state is not None and done % per_epoch == 0:
                    found = {"test_accuracy": accuracy(state.variables, self.test)}
                    run.scores.add(step=done, **found)
                    bar.say(done, found)
                    run.save(manager, done, state)

            restored = run.restore(
                manager, lambda meta: training.abstract_state(self.net, config, self.mesh)
            )
            try:
                state = training.run(
                    self.net,
                    config,
                    self.key,
                    self.train,
                    mesh=self.mesh,
                    state=None if restored is None else training.State(*restored[1]),
                    callback=callback,
                    should_stop=stopping,
                    clock=run.clock,
                )
            finally:
                run.save_logs()
            done = int(parallel.fetch(state.step))
            if done < total:
                run.save(manager, done, state)
                raise run.stopped(stopping.number or signal.SIGTERM, done, total)
        variables = jax.tree.map(parallel.fetch, state.variables)
        summary: dict[str, Any] = {}
        parallel.on_main(
            lambda: summary.update(self._write(run, variables, per_epoch)), session.SessionError
        )
        return summary

    def _write(
        self, run: session.Session, variables: Mapping[Any, Any], per_epoch: int
    ) -> dict[str, Any]:
        """Weights, names of classes, curves; the summary last."""
        weights_convert.write(run.folder / WEIGHTS, weights_convert.from_flax(variables))
        write_atomic(run.folder / CLASSES, "\n".join(self.train.classes) + "\n")
        steps = [row["step"] for row in run.metrics.rows]
        test_accuracy = run.scores.column("test_accuracy")[-1]
        svg = curves.plot(
            {name: run.metrics.column(name) for name in ("loss", "accuracy")},
            steps,
            title=f"{self.recipe.model}: test accuracy {test_accuracy:.4f}",
            boundaries=steps[per_epoch::per_epoch],
        )
        write_atomic(run.folder / "curves.svg", svg)
        machine = hardware.describe()
        summary = {
            "model": self.recipe.model,
            "data": configs.plain(self.recipe.data),
            "classes": list(self.train.classes),
            "preprocessing": configs.plain(self.net.preprocessing),
            "device": f"{self.mesh.size} x {self.mesh.devices.flat[0].device_kind}",
            "epochs": self.recipe.training.epochs,
            "steps": len(steps),
            "images": len(self.train),
            "test_images": len(self.test),
            "test_accuracy": test_accuracy,
            "train_accuracy": float(np.mean(run.metrics.column("accuracy")[-per_epoch:])),
            "train_loss": float(np.mean(run.metrics.column("loss")[-per_epoch:])),
            "seconds": round(run.seconds, 3),
            "seconds_per_step": round(run.clock.stepping / max(run.clock.steps, 1), 6),
            "compile_seconds": round(run.clock.compiling, 3),
            "files": {
                name: hashlib.sha256((run.folder / name).read_bytes()).hexdigest()
                for name in (WEIGHTS, CLASSES)
            },
            "versions": {name: machine[name] for name in VERSIONS},
        }
        run.finish(summary)
        return summary


@dataclasses.dataclass(frozen=True)
class _Training:
    """What the progress bar shows."""

    name: str
    steps: int
    cost: float = 1.0


def check_size(size: int | None, source: data.Source) -> None:
    """ValueError if a side of images is asked for where they have their own."""
    if size is not None and not source.takes_size:
        raise ValueError(
            "size belongs to data of the formats 'images' and 'tfds': others have their own"
        )


def splits(source: data.Source, size: int) -> tuple[data.Dataset, data.Dataset]:
    """Images to train on and to test on; ValueError if their classes are not the same."""
    train, test = source.load("train", size), source.load("test", size)
    if test.classes != train.classes[: len(test.classes)]:
        raise ValueError(
            f"the test images' classes {', '.join(test.classes)} are not those of the "
            f"training images: {', '.join(train.classes)}"
        )
    return train, dataclasses.replace(test, classes=train.classes)


def measured(images: np.ndarray, channels: int) -> Preprocessing:
    """Normalisation to mean 0 and deviation 1 a channel, measured on bytes (N, H, H, C).

    Rounded to four digits. Gray images (C = 1) get as many equal `channels`.
    """
    count = images.size // images.shape[-1]
    sums, squares = np.zeros((2, images.shape[-1]), np.int64)
    for start in range(0, len(images), 1024):  # no copy of all images in wider numbers
        part = images[start : start + 1024].astype(np.int64)
        sums += part.sum((0, 1, 2))
        squares += np.square(part).sum((0, 1, 2))
    mean = sums / count / 255
    std = np.sqrt(squares / count / 255**2 - mean**2)
    repeat = channels if len(mean) == 1 else 1
    return Preprocessing(
        images.shape[1],
        tuple(np.round(mean, 4).tolist()) * repeat,
        tuple(np.round(std, 4).tolist()) * repeat,
    )


def load(folder: str | Path) -> Net:
    """The network that a finished run left in its folder, with its preprocessing.

    Raises:
      ValueError: the folder holds no finished run.
    """
    folder = Path(folder)
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        told: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in summary["preprocessing"].items()
        }
        return models.load(
            summary["model"],
            folder / WEIGHTS,
            classes=len(summary["classes"]),
            preprocessing=Preprocessing(**told),
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{folder} holds no trained network: {error}") from None


def prepare(recipe: Recipe) -> Pretraining:
    """The recipe with its data read, in every process or in none.

    Raises:
      ValueError: the mistake, in every process if one process has it.
    """
    return parallel.everywhere(lambda: Pretraining(recipe))

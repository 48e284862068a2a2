"""Write a teacher's soft labels for every view that a student will see of a data set.

    jinv relabel --config relabel_fashion_mnist --out out/labels --teacher.weights out/teacher
    jinv train-student --config student_fashion_mnist --labels out/labels --out out/student

The views (random parts, mirrored, mixed) and their order are functions of the seed, the epoch and
the place in it, so that only logits are kept, in half precision: 2 bytes x classes for every image
and epoch. `jinv train-student` with a `teacher` instead computes the same labels in its steps and
needs no store.

A run that was stopped goes on with --resume.

The output folder holds logits.npy (steps, batch, classes), labels.json (what views they are of)
and, last of all, summary.json.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

from jinv import checks, data, parallel, training
from jinv.checks import Count, Seed
from jinv.distill import lessons, soft_labels
from jinv.files import sha256
from jinv.models.network import Network
from jinv.net import Variables
from jinv.runs import command, hardware
from jinv.runs.progress import Progress, Stretch
from jinv.runs.run_folder import FolderError, RunFolder
from jinv.runs.signals import Signals

CHECKPOINT_SECONDS = 60.0
"""Time between checkpoints."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What a config file holds.

    Attributes:
      teacher: whose labels.
      data: the images, its split "train".
      images_per_class: take so many of every class, at random; all by default.
      size: of a view, one side or height and width; the teacher's by default.
      seed: of the choice of images, their order and the views; that of the student.
      training: of the student: its batch, epochs and views count.
    """

    teacher: Network
    data: data.Source = dataclasses.field(default_factory=data.Source)
    images_per_class: Count | None = None
    size: Count | tuple[Count, Count] | None = None
    seed: Seed = 0
    training: training.Config = dataclasses.field(default_factory=training.Config)

    def __post_init__(self) -> None:
        checks.fields(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary(command.Summary):
    """What summary.json holds; a step is a batch.

    Attributes:
      teacher: its name.
      images: how many.
      epochs: of views.
      classes: names.
      bytes_per_image: of the store, over all epochs.
      top1: share of views whose most probable class is that of the label; low where they are mixed.
      fingerprint: sha256 of logits.npy.
    """

    teacher: str
    images: int
    epochs: int
    classes: list[str]
    bytes_per_image: float
    top1: float
    fingerprint: str


class Relabelling(command.Loaded):
    """A config with teacher and images loaded.

    Attributes:
      teacher: the network.
      images: with its classes.
      plan: of the views.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.teacher = config.teacher.load()
        usual = self.teacher.preprocessing
        size = dataclasses.replace(usual, size=config.size or usual.size, resize=None)
        self.images = lessons.lesson(
            config.data.load("train", size.size),
            self.teacher.classes,
            self.teacher.class_names,
            each=config.images_per_class,
            key=lessons.keys(config.seed)[1],
            network=self.teacher.name,
        )
        self.plan = lessons.Plan.of(self.images, config.seed, size, config.training)
        self.steps = self.plan.steps(len(self.images))
        if not self.steps:
            raise ValueError(f"{len(self.images)} images fill no batch of {self.plan.batch}")
        self.mesh = training.batch_mesh(self.plan.batch)

    def run(self, folder: RunFolder) -> dict[str, Any]:
        """Label and write the store; return the summary (of the main process).

        Raises:
          Interrupted: SIGTERM or Ctrl-C came; a checkpoint was saved.
        """
        with folder.checkpoints() as manager, Signals() as stopping:
            nothing = parallel.put(self.mesh, PartitionSpec(), {"right": np.int32(0)})
            restored = folder.restore(manager, lambda meta: nothing)
            done, right = 0, 0
            if restored is not None:
                done, right = restored[0]["done"], restored[0]["right"]
            logits = self._file(folder, done)
            with Progress([Stretch("labels", self.steps)]) as bar:
                for step, (found, share) in self._labels(done, folder):
                    if logits is not None:
                        logits[step] = found
                    right += share
                    done = step + 1
                    bar.update(0, step, {"top1": np.array([right / done / self.plan.batch])})
                    stop = stopping()
                    if stop or folder.due(CHECKPOINT_SECONDS):
                        if logits is not None:
                            logits.flush()
                        folder.save(manager, done, nothing, done=done, right=right)
                    if stop:
                        raise folder.stopped(stopping.number, done, self.steps)
                if logits is not None:
                    logits.flush()
        summary: dict[str, Any] = {}
        parallel.on_main(lambda: summary.update(self._write(folder, right)), FolderError)
        return summary

    def _file(self, folder: RunFolder, done: int) -> np.memmap | None:
        """Return the store's array in the main process; what was done before is in it."""
        if not parallel.is_main():
            return None
        shape = (self.steps, self.plan.batch, self.teacher.classes)
        mode = "r+" if done else "w+"
        path = folder.path / lessons.LOGITS
        return np.lib.format.open_memmap(path, mode, np.float16, None if done else shape)

    def _labels(self, done: int, folder: RunFolder) -> Iterator[tuple[int, tuple[np.ndarray, int]]]:
        """Yield every step's number, its logits, and how many are right, one step behind."""
        classes, clock = self.teacher.classes, folder.clock

        @jax.jit
        def label(
            variables: Variables, step: Array, images: Array, labels: Array
        ) -> tuple[Array, Array]:
            view = self.plan.view(step, images, labels, classes)
            logits = soft_labels.says(self.teacher, variables, view.pixels)
            return logits.astype(jnp.float16), (logits.argmax(-1) == labels).sum()

        variables = parallel.put(self.mesh, PartitionSpec(), self.teacher.variables)
        order = self.plan.batches(len(self.images), done)
        running: tuple[int, tuple[Array, Array]] | None = None
        for step in (*range(done, self.steps), None):
            began, before = time.perf_counter(), running
            if step is not None:
                chosen = next(order)
                batch = (self.images.images[chosen], self.images.labels[chosen])
                laid = parallel.put(self.mesh, PartitionSpec(parallel.BATCH), batch)
                running = step, label(variables, jnp.int32(step), *laid)
            if step == done:
                clock.compiling += time.perf_counter() - began
            if before is not None:
                logits, right = parallel.fetch(before[1])
                clock.stepping += time.perf_counter() - began
                clock.steps += 1
                yield before[0], (logits, int(right))

    def _write(self, folder: RunFolder, right: int) -> dict[str, Any]:
        """Write what the logits are of; the summary last."""
        teacher, path = self.teacher, folder.path / lessons.LOGITS
        shape = (self.steps, self.plan.batch, teacher.classes)
        names = self.images.classes
        space = teacher.preprocessing
        lessons.write_index(folder.path, self.plan, names, space, shape)
        summary = Summary(
            **command.shared(folder, hardware.of_mesh(self.mesh)),
            teacher=teacher.name,
            images=len(self.images),
            epochs=self.plan.epochs,
            classes=list(names),
            bytes_per_image=round(path.stat().st_size / len(self.images), 1),
            top1=right / (self.steps * self.plan.batch),
            fingerprint=sha256(path),
        )
        return command.finish(folder, summary)


def _say(summary: dict[str, Any]) -> str:
    """Say how large the store is."""
    return f"{summary['bytes_per_image']:.0f} bytes an image for {summary['epochs']} epochs"


COMMAND = command.Command(
    name="relabel",
    about=str(__doc__),
    config=Config,
    load=Relabelling,
    summary=Summary,
    files=(lessons.LOGITS, lessons.INDEX),
    say=_say,
    less="--training.batch with fewer images",
)

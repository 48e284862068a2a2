"""A training recipe, its run in a folder, and the network that comes out of it."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax import Array
from jax.sharding import Mesh

import weights_convert
from jinv import data, models, parallel, training
from jinv.files import sha256, write_atomic
from jinv.image import Preprocessing
from jinv.models.trained import CLASSES, WEIGHTS
from jinv.net import Net, with_parameters
from jinv.reports import curves
from jinv.runs import config as configs
from jinv.runs import hardware, run_folder
from jinv.runs.progress import Progress

VERSIONS = ("python", "jax", "jaxlib", "flax", "jinv")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a config file holds.

    Attributes:
      model: a network of the zoo; gray images reach it as equal channels.
      weights: what it begins with: a .pth or .safetensors file, "package" for weights inside an
        installed package, or a folder that scripts/pretrain.py wrote. Its last linear layer is
        replaced by one with random weights for the classes of the data; its normalisation and size
        are kept, and images are brought to that size on the device. None for random weights.
      data: what it learns and is tested on.
      size: side of the images of a folder of pictures or of tfds; None for the network's one.
        Others have their own.
      train_images: take so many of the training images, chosen at random; all by default.
      seed: of everything random.
      head: a training of the last layer alone, before `training`; it needs `weights`.
      training: the mathematics.
    """

    model: str
    weights: str | None = None
    data: data.Source = dataclasses.field(default_factory=data.Source)
    size: int | None = None
    train_images: int | None = None
    seed: int = 0
    head: training.Config | None = None
    training: training.Config = dataclasses.field(default_factory=training.Config)

    def __post_init__(self) -> None:
        if self.head is not None and self.weights is None:
            raise ValueError("head trains the last layer of a network with weights: give some")
        check_size(self.size, self.data)


class _Phase(NamedTuple):
    """A training, as the progress bar shows it.

    Attributes:
      name: "head" or "training".
      steps: of all its epochs.
      config: the mathematics.
      key: of its randomness.
      mesh: of the devices that share a batch.
      per_epoch: steps.
      first: steps of the phases before it.
    """

    name: str
    steps: int
    config: training.Config
    key: Array
    mesh: Mesh
    per_epoch: int
    first: int
    cost: float = 1.0

    @property
    def end(self) -> int:
        return self.first + self.steps


class Pretraining:
    """A recipe with its data read: everything that can be wrong with it has been found.

    Attributes:
      train, test: the images.
      phases: what is done with them.
      net: with its first weights. If these are random, its preprocessing normalises by mean and
        standard deviation of the training images, see `measured`.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        usual = models.entry(recipe.model).preprocessing
        source = None if recipe.weights is None else _source(recipe.model, recipe.weights)
        space = usual if source is None else source.preprocessing
        self.train, self.test = splits(recipe.data, recipe.size or space.size)
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
        if channels not in (1, space.channels):
            raise ValueError(
                f"images of {channels} channels cannot be shown to {recipe.model}, which takes "
                f"{space.channels}"
            )
        self.phases = _phases(recipe, len(self.train), self.key)
        net = models.load(
            recipe.model,
            None,
            classes=len(self.train.classes),
            preprocessing=measured(self.train.images, usual.channels) if source is None else space,
            seed=recipe.seed,
        )
        self.net = net if source is None else _with_body(net, source)

    def run(self, run: run_folder.Session) -> dict[str, Any]:
        """Train and write the results; returns the summary (of the main process)."""
        phases, net = self.phases, self.net
        total = phases[-1].end
        with (
            run.checkpoints() as manager,
            run_folder.Signals() as stopping,
            Progress(phases) as bar,
        ):

            def template(meta: Mapping[str, Any]) -> training.State:
                phase = phases[meta.get("phase", 0)]
                return training.abstract_state(net, phase.config, phase.mesh)

            restored = run.restore(manager, template)
            begun, state = 0, None
            if restored is not None:
                begun, state = restored[0].get("phase", 0), training.State(*restored[1])
            try:
                for index, phase in list(enumerate(phases))[begun:]:
                    state = training.run(
                        net,
                        phase.config,
                        phase.key,
                        self.train,
                        mesh=phase.mesh,
                        state=state,
                        callback=self._callback(run, manager, bar, index, phase),
                        should_stop=stopping,
                        clock=run.clock,
                    )
                    done = phase.first + int(parallel.fetch(state.step))
                    if done < phase.end or (phase is not phases[-1] and stopping()):
                        run.save(manager, done, state, phase=index)
                        raise run.stopped(stopping.number or signal.SIGTERM, done, total)
                    variables = jax.tree.map(parallel.fetch, state.variables)
                    net, state = dataclasses.replace(net, variables=variables), None
            finally:
                run.save_logs()
        summary: dict[str, Any] = {}
        parallel.on_main(
            lambda: summary.update(self._write(run, variables)), run_folder.SessionError
        )
        return summary

    def _callback(
        self,
        run: run_folder.Session,
        manager: ocp.CheckpointManager,
        bar: Progress,
        index: int,
        phase: _Phase,
    ) -> training.Callback:
        """Logs every step; looks at the test images and saves a checkpoint after every epoch."""
        accuracy = training.make_accuracy(self.net, phase.mesh, phase.config.batch)

        def callback(
            start: int, metrics: Mapping[str, np.ndarray], state: training.State | None
        ) -> None:
            done = phase.first + start
            bar.update(index, done, metrics)
            for loss, share in zip(metrics["loss"], metrics["accuracy"], strict=True):
                run.metrics.add(step=done, loss=float(loss), accuracy=float(share))
                done += 1
            if state is not None and (done - phase.first) % phase.per_epoch == 0:
                found = {"test_accuracy": accuracy(state.variables, self.test)}
                run.scores.add(step=done, **found)
                bar.say(done, found)
                run.save(manager, done, state, phase=index)

        return callback

    def _write(self, run: run_folder.Session, variables: Mapping[Any, Any]) -> dict[str, Any]:
        """Weights, names of classes, curves; the summary last."""
        weights_convert.write(run.folder / WEIGHTS, weights_convert.from_flax(variables))
        write_atomic(run.folder / CLASSES, "\n".join(self.train.classes) + "\n")
        steps = [row["step"] for row in run.metrics.rows]
        epochs = [
            step for phase in self.phases for step in range(phase.first, phase.end, phase.per_epoch)
        ]
        per_epoch = self.phases[-1].per_epoch
        test_accuracy = run.scores.column("test_accuracy")[-1]
        svg = curves.plot(
            {name: run.metrics.column(name) for name in ("loss", "accuracy")},
            steps,
            title=f"{self.recipe.model}: test accuracy {test_accuracy:.4f}",
            boundaries=epochs[1:],
        )
        write_atomic(run.folder / "curves.svg", svg)
        machine, mesh = hardware.describe(), self.phases[-1].mesh
        transfer: dict[str, Any] = {}
        if self.recipe.weights is not None:
            head = 0 if self.recipe.head is None else self.recipe.head.epochs
            transfer = {"weights": self.recipe.weights, "head_epochs": head}
        summary = {
            "model": self.recipe.model,
            **transfer,
            "data": configs.plain(self.recipe.data),
            "classes": list(self.train.classes),
            "preprocessing": configs.plain(self.net.preprocessing),
            "device": f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
            "epochs": self.recipe.training.epochs,
            "steps": self.phases[-1].end,
            "images": len(self.train),
            "test_images": len(self.test),
            "test_accuracy": test_accuracy,
            "train_accuracy": float(np.mean(run.metrics.column("accuracy")[-per_epoch:])),
            "train_loss": float(np.mean(run.metrics.column("loss")[-per_epoch:])),
            "seconds": round(run.seconds, 3),
            "seconds_per_step": round(run.clock.stepping / max(run.clock.steps, 1), 6),
            "compile_seconds": round(run.clock.compiling, 3),
            "files": {name: sha256(run.folder / name) for name in (WEIGHTS, CLASSES)},
            "versions": {name: machine[name] for name in VERSIONS},
        }
        run.finish(summary)
        return summary


def _phases(recipe: Recipe, images: int, key: Array) -> list[_Phase]:
    """The recipe's trainings; `key` is that of the last."""
    # Not one of the two keys that the seed's is split into.
    head_key = jax.random.fold_in(jax.random.key(recipe.seed), 2)
    wanted = [("training", recipe.training, key)]
    if recipe.head is not None:
        alone = dataclasses.replace(recipe.head, learns="head")
        wanted.insert(0, ("head", alone, head_key))
    phases: list[_Phase] = []
    first = 0
    for name, config, key in wanted:
        per_epoch = images // config.batch
        if not per_epoch:
            raise ValueError(f"{images} images fill no batch of {config.batch}")
        mesh = training.batch_mesh(config.batch)
        steps = config.epochs * per_epoch
        phases.append(_Phase(name, steps, config, key, mesh, per_epoch, first))
        first += steps
    return phases


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


def _source(model: str, weights: str) -> Net:
    """The network that is begun with, of as many classes as it has.

    Raises:
      ValueError: there is none, or it is another.
      FileNotFoundError: the package that holds the weights is not installed.
    """
    if Path(weights).is_dir():
        net = models.load_trained(weights)
        if net.name != model:
            raise ValueError(f"{weights} holds a {net.name}, not a {model}")
        return net
    path = models.packaged_weights(model) if weights == "package" else Path(weights)
    layer = ".".join(map(str, models.load(model, None).head or ()))
    weight = weights_convert.read(path).get(f"{layer}.weight")
    classes = None if weight is None or weight.ndim != 2 else len(weight)
    return models.load(model, path, classes=classes)


def _with_body(net: Net, source: Net) -> Net:
    """The network with the weights of another but for the last layer, where the classes differ."""
    head = training.learned(net, net.variables, "head")
    return dataclasses.replace(net, variables=with_parameters(source.variables, head))


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


def prepare(recipe: Recipe) -> Pretraining:
    """The recipe with its data read, in every process or in none.

    Raises:
      ValueError: the mistake, in every process if one process has it.
    """
    return parallel.everywhere(lambda: Pretraining(recipe))

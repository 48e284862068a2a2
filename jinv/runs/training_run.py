"""`training.run` of a network with everything a long run needs: logs, tests, checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax import Array
from jax.sharding import Mesh

import weights_convert
from jinv import checks, optimise, parallel, training
from jinv.checks import Count
from jinv.data import Dataset
from jinv.files import sha256, write_atomic
from jinv.models.trained import CLASSES, WEIGHTS
from jinv.net import Net, Variables
from jinv.reports import curves
from jinv.runs import command
from jinv.runs import config as configs
from jinv.runs.progress import Progress
from jinv.runs.run_folder import RunFolder
from jinv.runs.signals import Signals

CHECKPOINT_SECONDS = 60.0
"""Time between checkpoints."""

FILES = (WEIGHTS, CLASSES, "curves.svg", "metrics.csv", "scores.csv")
"""What every run of a training writes besides its config and summary."""


@checks.todays_keywords
@dataclasses.dataclass(frozen=True)
class Options:
    """How a run goes; nothing here changes its result.

    Attributes:
      test_every: epochs between two tests.
    """

    test_every: Count = 1

    def __post_init__(self) -> None:
        checks.fields(self)


class Phase(NamedTuple):
    """A training, as the progress bar shows it.

    Attributes:
      name: for logs.
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
        """Number of steps at its end."""
        return self.first + self.steps


def phases(wanted: Sequence[tuple[str, training.Config, Array]], images: int) -> list[Phase]:
    """Return trainings on so many images, given by name, config and key, one after the other.

    Raises:
      ValueError: the images fill no batch.
    """
    found: list[Phase] = []
    first = 0
    for name, config, key in wanted:
        per_epoch = images // config.batch
        if not per_epoch:
            raise ValueError(f"{images} images fill no batch of {config.batch}")
        mesh = training.batch_mesh(config.batch)
        steps = config.epochs * per_epoch
        found.append(Phase(name, steps, config, key, mesh, per_epoch, first))
        first += steps
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary(command.Summary):
    """What the summary.json of every trained network holds.

    Attributes:
      model: name of the network in the zoo.
      classes: names.
      preprocessing: size, mean, std, pixel_range: what makes an image normalised; resize,
        interpolation: what makes an image of a picture, as of those that it was trained on.
      epochs: done, without those of a head alone.
      steps: done.
      images: number of training images.
      test_images: number of test images.
      test_accuracy: share of the test images that are given their class; where labels are
        attributes, share of these that is right; null without test images.
      train_accuracy: the same of the training images, as they are seen, during the last epoch.
      train_loss: mean during the last epoch.
      files: sha256 of weights.safetensors and classes.txt.
    """

    model: str
    classes: list[str]
    preprocessing: dict[str, Any]
    epochs: int
    steps: int
    images: int
    test_images: int
    test_accuracy: float | None
    train_accuracy: float
    train_loss: float
    files: dict[str, str]


def run(
    net: Net,
    phases: Sequence[Phase],
    folder: RunFolder,
    train: Dataset,
    test: Dataset | None,
    *,
    test_every: int = 1,
    criterion: training.Criterion | None = None,
    told: Callable[[int], tuple[Any, ...]] = lambda step: (),
) -> Variables:
    """Train in a folder; return the last weights, on the host. A run that was cut goes on.

    Args:
      net: the network, with its first weights.
      phases: what is done, see `phases`.
      folder: where.
      train: images to learn.
      test: images to test on; None for no tests.
      test_every: epochs between two tests; the last epoch always ends with one.
      criterion: the loss, see `training.make_step`.
      told: what it is told, see `training.run`.

    Raises:
      Interrupted: SIGTERM or Ctrl-C came; a checkpoint was saved.
    """
    with folder.checkpoints() as manager, Signals() as stopping, Progress(phases) as bar:

        def template(meta: Mapping[str, Any]) -> training.State:
            phase = phases[meta.get("phase", 0)]
            return training.abstract_state(net, phase.config, phase.mesh)

        restored = folder.restore(manager, template)
        begun, state = 0, None
        if restored is not None:
            begun, state = restored[0].get("phase", 0), training.State(*restored[1])
        try:
            for index, phase in list(enumerate(phases))[begun:]:
                every = test_every * phase.per_epoch
                look = _Look(net, phases, test, every, folder, manager, bar, index)
                state = training.run(
                    net,
                    phase.config,
                    phase.key,
                    train,
                    mesh=phase.mesh,
                    state=state,
                    callback=look,
                    should_stop=stopping,
                    wanted=look.wanted,
                    mark=every,
                    clock=folder.clock,
                    criterion=criterion,
                    told=told,
                )
                done = phase.first + int(parallel.fetch(state.step))
                if done < phase.end or (phase is not phases[-1] and stopping()):
                    folder.save(manager, done, state, phase=index)
                    raise folder.stopped(stopping.number, done, phases[-1].end)
                variables = jax.tree.map(parallel.fetch, state.variables)
                net, state = dataclasses.replace(net, variables=variables), None
        finally:
            folder.save_logs()
    return net.variables


class _Look:
    """Logs every step; tests after every so many; saves a checkpoint where one is due."""

    def __init__(
        self,
        net: Net,
        phases: Sequence[Phase],
        test: Dataset | None,
        every: int,
        folder: RunFolder,
        manager: ocp.CheckpointManager,
        bar: Progress,
        index: int,
    ) -> None:
        self._phase = phases[index]
        self._test = test
        self._every = every
        self._folder = folder
        self._manager = manager
        self._bar = bar
        self._index = index
        self._saves = False
        self._accuracy = training.make_accuracy(net, self._phase.mesh, self._phase.config.batch)

    def _tests(self, done: int) -> bool:
        last = done == self._phase.steps
        return self._test is not None and (last or done % self._every == 0)

    def wanted(self, done: int) -> bool:
        """Return whether the state after so many steps of the phase is tested, or saved."""
        self._saves = self._folder.due(CHECKPOINT_SECONDS)
        return self._saves or self._tests(done)

    def __call__(self, chunk: optimise.Chunk) -> None:
        folder, phase, metrics = self._folder, self._phase, chunk.metrics
        done = phase.first + chunk.start
        self._bar.update(self._index, done, metrics)
        for loss, share in zip(metrics["loss"], metrics["accuracy"], strict=True):
            folder.metrics.add(step=done, loss=float(loss), accuracy=float(share))
            done += 1
        if not chunk.finite:
            return
        if self._test is not None and self._tests(done - phase.first):
            found = {"test_accuracy": self._accuracy(chunk.state.variables, self._test)}
            folder.scores.add(step=done, **found)
            self._bar.say(done, found)
        if self._saves:
            folder.save(self._manager, done, chunk.state, phase=self._index)


def write(
    folder: RunFolder,
    net: Net,
    variables: Variables,
    phases: Sequence[Phase],
    train: Dataset,
    test: Dataset | None,
) -> dict[str, Any]:
    """Write weights, names of classes and curves; return the values of `Summary`.

    Args:
      folder: of the run.
      net: the network.
      variables: its last weights.
      phases: what was done.
      train: what it has learned.
      test: what it was tested on.
    """
    log, last = folder.metrics, phases[-1]
    weights_convert.write(folder.path / WEIGHTS, weights_convert.from_flax(variables))
    write_atomic(folder.path / CLASSES, "\n".join(train.classes) + "\n")
    accuracy = None if test is None else folder.scores.last["test_accuracy"]
    title = net.name if accuracy is None else f"{net.name}: test accuracy {accuracy:.4f}"
    epochs = [step for phase in phases for step in range(phase.first, phase.end, phase.per_epoch)]
    terms = log.terms()
    boundaries = epochs[1:] if len(epochs) <= _MARKED else ()
    svg = curves.plot(terms, log.steps(), title=title, boundaries=boundaries)
    write_atomic(folder.path / "curves.svg", svg)
    return {
        "model": net.name,
        "classes": list(train.classes),
        "preprocessing": configs.plain(net.preprocessing),
        "epochs": last.config.epochs,
        "steps": last.end,
        "images": len(train),
        "test_images": 0 if test is None else len(test),
        "test_accuracy": accuracy,
        "train_accuracy": float(np.mean(terms["accuracy"][-last.per_epoch :])),
        "train_loss": float(np.mean(terms["loss"][-last.per_epoch :])),
        "files": {name: sha256(folder.path / name) for name in (WEIGHTS, CLASSES)},
    }


_MARKED = 50
"""Epochs that are marked in the curves; more would hide them."""

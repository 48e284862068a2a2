"""Train a reconstructor: from a head's weights back to the images that it was trained on.

    jinv train-reconstructor --config reconstructor_fashion_mnist --out out/reconstructor
    jinv train-reconstructor --config ... --out ... --reconstructor.steps 20000 --width 64
    jinv train-reconstructor --config ... --out ... --resume

The config names a folder of features (`jinv extract-features`, with `images_size`) and how shadow
models are trained on them; every key can be overridden on the command line (`--config F --help`
lists them). Shadow models of the training images are made while the reconstructor learns from them,
or read from a folder of `jinv train-shadow-models`. Then victims, heads of test images that no part
of the attack has seen, are attacked by the reconstructor. Where heads are linear and classes are
told, so they are by ridge regression from a class's own weights, which knows as many shadow models
as the statistics do.

A checkpoint is saved every minute, and on Ctrl-C or SIGTERM; --resume goes on to the very same
reconstructor. A finished run is replaced only with --overwrite.

The output folder holds reconstructor.safetensors, normalisation.npz (count, mean, std, covariance
of heads' weights), report.html, pictures/ATTACKER_KIND.png (best, median and worst
reconstructions), progress/step_*.png, curves.svg, metrics.csv (loss and least MSE of every batch),
scores.csv (of some victims on the way) and, last of all, summary.json.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import orbax.checkpoint as ocp

import weights_convert
from jinv import checks, optimise, parallel
from jinv import training as supervised
from jinv.checks import Count, File, Natural, NotNegative, Seed
from jinv.files import sha256, write_atomic
from jinv.net import Variables
from jinv.recipes import train_shadow_models as shadows
from jinv.reconstruct import network, ridge
from jinv.reconstruct import training as learning
from jinv.reconstruct.evaluation import Evaluation, mse, nearest_neighbours, ranks, top
from jinv.reconstruct.normalisation import Normalisation
from jinv.reports import curves, page, reconstruction
from jinv.runs import command, hardware
from jinv.runs import config as configs
from jinv.runs.progress import Progress, Stretch
from jinv.runs.run_folder import FolderError, RunFolder
from jinv.runs.signals import Signals
from jinv.shadow import features, statistics
from jinv.shadow.config import Config as Training
from jinv.shadow.generation import Execution, Factory, Restarts
from jinv.shadow.sampling import Sampling, Sets
from jinv.shadow.store import Store

WEIGHTS, NORMALISATION = "reconstructor.safetensors", "normalisation.npz"
_STATISTICS, _VICTIMS = 2**20, 2**21
"""First seeds of the shadow models that statistics and ridge see, and of victims; training begins
with seed 0."""
_ON_THE_WAY = 100
"""Victims that are attacked on the way."""


@dataclasses.dataclass(frozen=True)
class Options:
    """How a run goes; nothing here changes its result.

    Attributes:
      scores_every: steps between attacks on some victims, with a picture; 0 for none.
      checkpoint_seconds: time between checkpoints.
      loop: see `optimise.run`.
    """

    scores_every: Natural = 2000
    checkpoint_seconds: NotNegative = 60.0
    loop: optimise.Loop = "auto"

    def __post_init__(self) -> None:
        checks.fields(self)


@dataclasses.dataclass(frozen=True)
class Config:
    """What a config file holds.

    Attributes:
      features: folder that `jinv extract-features` wrote, with images.
      sampling: which examples a head is trained on.
      training: how.
      restarts: None to keep every first training.
      shadows: folder of stored shadow models of the same sampling and training, which are taken
        over and over; by default they are made as they are needed, and never twice.
      statistics: seeds of shadow models that normalise the weights, and that ridge is fitted to.
      conditional: tell the reconstructor the class of the image.
      width: G of the reconstructor.
      reconstructor: the mathematics of its training.
      victims: heads of the test split that are attacked in the end.
      seed: of everything random.
      network: how the reconstructor is computed.
      execution: how shadow models are trained.
      run: how the run goes.
    """

    features: Annotated[str, File()]
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    training: Training = dataclasses.field(default_factory=Training)
    restarts: Restarts | None = None
    shadows: Annotated[str, File()] | None = None
    statistics: Count = 2
    conditional: bool = True
    width: Count = 256
    reconstructor: learning.Config = dataclasses.field(default_factory=learning.Config)
    victims: Count = 1000
    seed: Seed = 0
    network: network.Execution = dataclasses.field(default_factory=network.Execution)
    execution: Execution = dataclasses.field(default_factory=Execution)
    run: Options = dataclasses.field(default_factory=Options)

    def __post_init__(self) -> None:
        checks.fields(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary(command.Summary):
    """What summary.json holds.

    Attributes:
      steps: of the reconstructor's training.
      shadow_models: that it has seen.
      source: "made", and never twice, or "stored".
      inputs, parameters: numbers that it takes; of its own.
      heads: parameters of a head.
      loss, mse: mean of the last hundred steps.
      victims: heads that were attacked.
      threshold: mean MSE, in [-1, 1], of a test image and the nearest other of its class.
      attackers: name -> samples, median_mse, tpr_at_fpr ("0.001", "0.01", "0.1"), intervals (95 %),
        at_threshold (mse, tpr, fpr), top1: share of reconstructions whose true image is the
        nearest of all test images of its class (of all, if no class is told).
      seconds_making: of all seconds, those that were waited for shadow models.
      fingerprint: of the features.
      files: sha256 of the reconstructor and of the normalisation.
    """

    steps: int
    shadow_models: int
    source: str
    inputs: int
    parameters: int
    heads: int
    loss: float
    mse: float
    victims: int
    threshold: float
    attackers: dict[str, Any]
    seconds_making: float
    fingerprint: str
    files: dict[str, str]


class Victims:
    """Heads of images that no part of the attack has seen.

    Attributes:
      images: (M, size, size, channels) of the test split, in [-1, 1].
      labels: (M,) their classes.
      indices: (S, N) which of them each head was trained on.
      weights: (S, P).
      random: (S, P') normalised weights that betray nothing.
      neighbours: of every image, among the others of its class.
    """

    def __init__(
        self, test: features.Features, weights: np.ndarray, indices: np.ndarray, random: np.ndarray
    ) -> None:
        assert test.images is not None
        self.images = ridge.unit(np.asarray(test.images)).astype(np.float32)
        self.labels = np.asarray(test.labels)
        self.indices = indices
        self.weights = weights
        self.random = random

    @functools.cached_property
    def neighbours(self) -> Any:
        """Return the nearest other image of every image's class."""
        return nearest_neighbours(self.images, self.labels)

    def asked(self, count: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return (which victim, which class) of every reconstruction of the first victims."""
        chosen = self.labels[self.indices[:count]]
        pairs = [np.unique(row) for row in chosen]
        victims = np.repeat(np.arange(len(pairs)), [len(row) for row in pairs])
        return victims, np.concatenate(pairs)


class Reconstruction(command.Loaded):
    """A config with its features read.

    Attributes:
      config: the config.
      factory: makes shadow models of the training images.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.train, self.test = (_features(config, split) for split in ("train", "test"))
        own = (self.train.network, self.train.classes, self.train.features.shape[1])
        other = (self.test.network, self.test.classes, self.test.features.shape[1])
        if own != other:
            raise ValueError(f"{config.features}: the splits are of other networks or classes")
        self._of_train = self._production("train", config.sampling)
        self._of_test = self._production("test", self._victim_sampling())
        # One for both splits: one program. The test images come after those that are trained on.
        self.factory = Factory(
            self._of_train.config.training,
            np.concatenate([self.train.features, self.test.features]),
            self._of_train.examples,
            self._of_train.factory.key,
            restarts=config.restarts,
            execution=config.execution,
        )
        self.source = self._source()
        each = self.source.sets // config.reconstructor.batch
        if not each:
            raise ValueError(
                f"seeds of {self.source.sets} shadow models fill no batch of "
                f"{config.reconstructor.batch}: lower reconstructor.batch"
            )
        self.mesh = supervised.batch_mesh(config.reconstructor.batch)

    def _production(self, split: Any, sampling: Sampling) -> shadows.Production:
        """Return what makes heads of a split's images."""
        config = self.config
        return shadows.Production(
            shadows.Config(
                config.features,
                split,
                sampling,
                config.training,
                config.restarts,
                seed=config.seed,
                store=False,
                validate=0,
                execution=config.execution,
            )
        )

    def _victim_sampling(self) -> Sampling:
        """Return the sampling of the test split: as many sets a seed as its classes allow."""
        own = self.config.sampling
        if own.kind != "balanced":
            raise ValueError(
                f"sampling.kind is {own.kind!r}: victims are drawn from balanced sets alone"
            )
        _, counts = np.unique(self.test.labels, return_counts=True)
        most = int(counts.min()) // own.class_size
        if not most:
            raise ValueError(
                f"a class of the test split has {counts.min()} images, fewer than "
                f"sampling.class_size {own.class_size}"
            )
        return dataclasses.replace(own, sets=min(own.sets, most, self.config.victims))

    def _source(self) -> learning.Made | learning.Stored:
        """Return where shadow models come from; ValueError if a store is of others."""
        draw = self._of_train.sets
        if self.config.shadows is None:
            return learning.Made(self.factory, draw, self.config.sampling.sets)
        found = Store(self.config.shadows)
        wanted, there = self._of_train.metadata.plain(), found.metadata.plain()
        changed = configs.differences(there, wanted | {k: there[k] for k in ("seeds", "dtype")})
        if changed:
            raise ValueError(
                f"shadows: {self.config.shadows} holds other models: {', '.join(changed)}"
            )
        if missing := found.missing():
            raise ValueError(
                f"shadows: {self.config.shadows} lacks seeds, such as {missing[0]}: finish it with "
                "`jinv train-shadow-models --resume`"
            )
        return learning.Stored(found, draw)

    # --- the run ----------------------------------------------------------------------------------

    def run(self, folder: RunFolder) -> dict[str, Any]:
        """Train, attack the victims and write the results; return the summary.

        Raises:
          Interrupted: SIGTERM or Ctrl-C came; a checkpoint was saved.
        """
        config = self.config
        told, fitting = self._learned_of_heads()
        normalisation = Normalisation.of(told)
        net = network.make(
            network.Config(
                len(normalisation.varying),
                config.width,
                self.train.images.shape[1],  # type: ignore[union-attr]
                self.train.images.shape[3],  # type: ignore[union-attr]
                len(self.train.classes) if config.conditional else None,
            ),
            config.network,
        )
        train_key, random_key = jax.random.split(jax.random.key(config.seed))
        random = np.asarray(normalisation.random(random_key, config.victims))
        victims = Victims(self.test, *self._victims(), random)
        people = learning.population(
            np.asarray(self.train.images), np.asarray(self.train.labels), self.mesh
        )
        stage = Stretch("training", config.reconstructor.steps)
        with folder.checkpoints() as manager, Signals() as stopping, Progress([stage]) as bar:
            restored = folder.restore(
                manager,
                lambda meta: learning.abstract_state(net, config.reconstructor, self.mesh),
            )
            look = _Look(self, folder, manager, bar, net, normalisation, victims)
            try:
                state = learning.run(
                    net,
                    config.reconstructor,
                    normalisation,
                    train_key,
                    people,
                    self.source,
                    mesh=self.mesh,
                    state=None if restored is None else learning.State(*restored[1]),
                    callback=look,
                    marks=look.marks,
                    should_stop=stopping,
                    wanted=look.wanted,
                    clock=folder.clock,
                    loop=config.run.loop,
                )
                done = int(parallel.fetch(state.step))
                if done < config.reconstructor.steps:
                    folder.save(manager, done, state)
                    number = stopping.number or signal.SIGTERM
                    raise folder.stopped(number, done, config.reconstructor.steps)
            finally:
                folder.save_logs()
        variables = parallel.fetch(learning.averaged(state))
        summary: dict[str, Any] = {}

        def write() -> None:
            attackers = {
                "network": lambda x, labels: learning.reconstruct(net, variables, x, labels)
            }
            if fitting is not None:
                like = np.asarray(told.mean, np.float32)
                attackers["ridge"] = self._ridge(fitting, normalisation, like)
            told.save(folder.path / NORMALISATION)
            weights_convert.write(folder.path / WEIGHTS, weights_convert.from_flax(variables))
            summary.update(self._write(folder, net, victims, normalisation, attackers))

        parallel.on_main(write, FolderError)
        return summary

    def _learned_of_heads(self) -> tuple[statistics.Statistics, ridge.Fitting | None]:
        """Return statistics of heads' weights, and ridge's sums where it applies."""
        found: statistics.Statistics | None = None
        fitting = None
        if self.config.training.head == "linear" and self.config.conditional:
            fitting = ridge.Fitting(self.factory.layout, np.asarray(self.train.images))
        for seed in range(_STATISTICS, _STATISTICS + self.config.statistics):
            sets = self._of_train.sets(seed)
            made = self.factory.on_device(seed, sets)
            sound = np.isfinite(np.asarray(made.loss))
            if not sound.any():
                raise shadows.DivergedError(len(sound))
            new = statistics.of(made.weights, kept=sound)
            found = new if found is None else statistics.merged(found, new)
            if fitting is not None:
                kept = Sets(sets.indices[sound], sets.labels[sound])
                fitting.add(np.asarray(made.weights)[sound], kept)
        assert found is not None
        return found, fitting

    def _victims(self) -> tuple[np.ndarray, np.ndarray]:
        """Make the heads of test images that are attacked: their weights, and which images."""
        count, made = self.config.victims, []
        each = self._of_test.config.sampling.sets
        for seed in range(_VICTIMS, _VICTIMS + math.ceil(count / each)):
            sets = self._of_test.sets(seed)
            there = sets._replace(indices=sets.indices + np.int32(len(self.train)))
            made.append((np.array(self.factory.seed(seed, there).weights), sets.indices))
        weights, indices = (np.concatenate(parts)[:count] for parts in zip(*made, strict=True))
        return weights, indices

    def _ridge(self, fitting: ridge.Fitting, normalisation: Normalisation, like: np.ndarray) -> Any:
        """Return the control attack, of normalised weights and classes.

        Args:
          fitting: with all heads that it learns from.
          normalisation: of what it is given.
          like: a head, for the coordinates that are the same in all.
        """
        attack = fitting.fit()

        def reconstruct(x: np.ndarray, labels: np.ndarray) -> np.ndarray:
            weights = normalisation.weights(x, like)
            return attack.of(weights, labels)

        return reconstruct

    # --- results ----------------------------------------------------------------------------------

    def attack(
        self, victims: Victims, x: np.ndarray, attacker: Any, count: int | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return reconstructions of the first victims, their least MSE, and which image it is of.

        Args:
          victims: whose training images count.
          x: (S, P') normalised weights, of the victims or random ones.
          attacker: (x, labels) -> images.
          count: how many victims; all by default.
        """
        if self.config.conditional:
            which, labels = victims.asked(count)
            found = attacker(x[which], labels)
            members = victims.labels[victims.indices[which]] == labels[:, None]
        else:
            which, members = np.arange(len(x[:count])), None
            found = attacker(x[which], None)
        errors = mse(found, victims.images[victims.indices[which]])
        errors = errors if members is None else np.where(members, errors, np.inf)
        return found, errors.min(1), victims.indices[which, errors.argmin(1)]

    def _write(
        self,
        folder: RunFolder,
        net: network.Reconstructor,
        victims: Victims,
        normalisation: Normalisation,
        attackers: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Attack the victims; write pictures, curves and report, and the summary last."""
        config, log = self.config, folder.metrics
        threshold = float(victims.neighbours.mse.mean())
        told, shown, sheets = {}, [], {}
        for name, attacker in attackers.items():
            evaluation, found, truth = self._evaluated(victims, normalisation, attacker)
            labels = victims.labels[truth] if config.conditional else None
            places = ranks(
                found,
                victims.images,
                truth,
                labels,
                None if labels is None else victims.labels,
            )
            told[name] = evaluation.summary(threshold) | {"top1": top(places, 1)}
            shown.append(
                reconstruction.Attacker(
                    name,
                    evaluation.true,
                    evaluation.random,
                    evaluation.cumulative(),
                    {
                        float(at): (rate, *told[name]["intervals"][at])
                        for at, rate in told[name]["tpr_at_fpr"].items()
                    },
                    evaluation.rates(threshold),
                    told[name]["top1"],
                )
            )
            sheets[name] = self._sheets(victims, evaluation.true, found, truth)
        pictures = folder.path / "pictures"
        pictures.mkdir(exist_ok=True)
        for name, kinds in sheets.items():
            for kind, png in kinds.items():
                write_atomic(pictures / f"{name}_{kind}.png", png)
        terms = log.terms()
        svg = curves.plot(terms, log.steps())
        write_atomic(folder.path / "curves.svg", svg)
        summary = Summary(
            **command.shared(folder, hardware.of_mesh(self.mesh)),
            steps=config.reconstructor.steps,
            shadow_models=self._seen(),
            source="made" if config.shadows is None else "stored",
            inputs=net.config.inputs,
            parameters=network.count(net.config),
            heads=self.factory.layout.size,
            loss=float(np.mean(terms["loss"][-100:])),
            mse=float(np.mean(terms["mse"][-100:])),
            victims=len(victims.weights),
            threshold=threshold,
            attackers=told,
            seconds_making=round(self.source.seconds, 3),
            fingerprint=self.train.fingerprint,
            files={name: sha256(folder.path / name) for name in (WEIGHTS, NORMALISATION)},
        )
        report = page.Page(
            "Images out of heads' weights",
            [
                *reconstruction.sections(shown, threshold, sheets),
                page.Section("Training", page.Figure(svg, "Loss and least MSE of every batch")),
            ],
            f"{len(victims.weights)} heads of images that no part of the attack has seen.",
        )
        ending = page.ending(vars(summary), hardware.describe(), configs.to_yaml(config))
        report.write(folder.path / "report.html", ending)
        return command.finish(folder, summary)

    def _evaluated(
        self, victims: Victims, normalisation: Normalisation, attacker: Any
    ) -> tuple[Evaluation, np.ndarray, np.ndarray]:
        """Return samples under true and random weights; reconstructions and whose they are."""
        true = normalisation.normalised(victims.weights)
        found, samples, truth = self.attack(victims, true, attacker)
        _, random, _ = self.attack(victims, victims.random, attacker)
        groups = victims.asked()[0] if self.config.conditional else None
        return Evaluation(samples, random, groups, groups), found, truth

    def _sheets(
        self, victims: Victims, samples: np.ndarray, found: np.ndarray, truth: np.ndarray
    ) -> dict[str, bytes]:
        """Return pictures of the best, median and worst reconstructions."""
        near = victims.neighbours.nearest
        return {
            kind: reconstruction.sheet(
                found[some], victims.images[truth[some]], victims.images[near[truth[some]]]
            )
            for kind, some in reconstruction.chosen(samples, 10).items()
        }

    def _seen(self) -> int:
        """Count the shadow models that training has seen, each once."""
        config = self.config.reconstructor
        each = self.source.sets // config.batch
        seeds, rest = divmod(config.steps, each)
        if isinstance(self.source, learning.Stored):
            known = self.source.store.metadata.seeds
            seeds, rest = (known, 0) if seeds >= known else (seeds, rest)
        return (seeds * each + rest) * config.batch


class _Look:
    """Logs every step; attacks some victims at marks; saves a checkpoint where one is due."""

    def __init__(
        self,
        work: Reconstruction,
        folder: RunFolder,
        manager: ocp.CheckpointManager,
        bar: Progress,
        net: network.Reconstructor,
        normalisation: Normalisation,
        victims: Victims,
    ) -> None:
        self._work = work
        self._folder = folder
        self._manager = manager
        self._bar = bar
        self._net = net
        self._x = normalisation.normalised(victims.weights[:_ON_THE_WAY])
        self._victims = victims
        self._saves = False
        self._options = work.config.run

    @property
    def marks(self) -> tuple[int, ...]:
        """Return the numbers of steps at whose multiples victims are attacked."""
        return (self._options.scores_every,) if self._options.scores_every else ()

    def wanted(self, done: int) -> bool:
        """Return whether the state after so many steps is looked at, or saved."""
        self._saves = self._folder.due(self._options.checkpoint_seconds)
        return self._saves or any(done % mark == 0 for mark in self.marks)

    def __call__(self, chunk: optimise.Chunk) -> None:
        self._bar.update(0, chunk.start, chunk.metrics)
        done = chunk.start
        for loss, least in zip(chunk.metrics["loss"], chunk.metrics["mse"], strict=True):
            self._folder.metrics.add(step=done, loss=float(loss), mse=float(least))
            done += 1
        if not chunk.finite:
            return
        if any(done % mark == 0 for mark in self.marks):
            self._attack(done, parallel.fetch(learning.averaged(chunk.state)))
        if self._saves:
            self._folder.save(self._manager, done, chunk.state)

    def _attack(self, done: int, variables: Variables) -> None:
        def attack() -> None:
            found, samples, truth = self._work.attack(
                self._victims,
                self._x,
                lambda x, labels: learning.reconstruct(self._net, variables, x, labels),
                _ON_THE_WAY,
            )
            near = self._victims.neighbours
            below = float(np.mean(samples <= near.mse.mean()))
            scores = {"median_mse": float(np.median(samples)), "tpr_at_threshold": below}
            self._folder.scores.add(step=done, **scores)
            self._bar.say(done, scores)
            images, truth = self._victims.images, truth[:10]
            png = reconstruction.sheet(found[:10], images[truth], images[near.nearest[truth]])
            picture = self._folder.path / "progress" / f"step_{done:06d}.png"
            picture.parent.mkdir(exist_ok=True)
            write_atomic(picture, png)

        parallel.on_main(attack, FolderError)


def _features(config: Config, split: str) -> features.Features:
    """Return the features of a split, with the images that are to be reconstructed."""
    found = features.load(Path(config.features) / split)
    if found.images is None:
        raise ValueError(
            f"{config.features} holds no images: extract the features with images_size: 32 or 64"
        )
    if found.images.shape[1:] not in [(s, s, c) for s in (32, 64) for c in (1, 3)]:
        raise ValueError(
            f"{config.features} holds images {found.images.shape[1:]}: a reconstructor makes those "
            "of 32 or 64 px; extract the features with images_size: 32"
        )
    if found.labels.ndim > 1:
        raise ValueError(f"{config.features}: labels are attributes; classes are needed")
    return found


def _say(summary: dict[str, Any]) -> str:
    """Say how many images come back."""
    return "\n".join(
        f"{name}: TPR {told['tpr_at_fpr']['0.01']:.2f} at FPR 1%, the true image first for "
        f"{100 * told['top1']:.0f}%"
        for name, told in summary["attackers"].items()
    )


COMMAND = command.Command(
    name="train-reconstructor",
    about=str(__doc__),
    config=Config,
    load=Reconstruction,
    summary=Summary,
    files=(
        *(WEIGHTS, NORMALISATION, "pictures/", "progress/", "curves.svg", "report.html"),
        *("metrics.csv", "scores.csv"),
    ),
    say=_say,
    free=(*command.FREE, "network."),
    less="--reconstructor.batch with fewer shadow models, or a smaller --width",
)

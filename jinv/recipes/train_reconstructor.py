"""Train a reconstructor: from a head's weights back to the images that it was trained on.

    jinv train-reconstructor --config reconstructor_fashion_mnist --out out/reconstructor
    jinv train-reconstructor --config ... --out ... --reconstructor.steps 20000 --width 64
    jinv train-reconstructor --config ... --out ... --resume

The config names a folder of features (`jinv extract-features`, with `images_size`) and how heads
are trained on them; every key can be overridden on the command line (`--config F --help` lists
them). There are two kinds of reconstructors:

input: weights    takes all weights of a head, as published. Shadow models of the training images
                  are made while it learns from them, or read from a folder of
                  `jinv train-shadow-models`.
input: features   takes the feature that exact recovery finds for an image. It learns from the
                  training images' features alone, and serves for all heads of the network.

Then victims, heads of test images that no part of the attack has seen, are attacked by it, by ridge
regression from a class's own weights, and by exact recovery with linear maps, where these apply.
`jinv attack-heads` compares several reconstructors.

A checkpoint is saved every minute, and on Ctrl-C or SIGTERM; --resume goes on to the very same
reconstructor. A finished run is replaced only with --overwrite.

The output folder holds reconstructor.json and reconstructor.safetensors, statistics.npz (count,
mean, std, covariance of heads' weights), report.html, pictures/ATTACKER_KIND.png (best, median and
worst reconstructions), progress/step_*.png, curves.svg, metrics.csv (loss and least MSE of every
batch), scores.csv (of some victims on the way) and, last of all, summary.json.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Annotated, Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jinv import checks, optimise, parallel
from jinv import training as supervised
from jinv.checks import Count, File, Natural, NotNegative, Share
from jinv.files import sha256, write_atomic
from jinv.recipes import attack_heads
from jinv.recipes import train_shadow_models as shadows
from jinv.reconstruct import network, ridge, trained
from jinv.reconstruct import training as learning
from jinv.reconstruct.decoding import Noisy
from jinv.reconstruct.losses import Perceptual
from jinv.reconstruct.normalisation import Normalisation
from jinv.reconstruct.setting import Heads, Setting
from jinv.reconstruct.trained import Input, Origin, Trained
from jinv.reconstruct.victims import Victims, attacked
from jinv.reports import curves, page, reconstruction
from jinv.runs import command, hardware
from jinv.runs import config as configs
from jinv.runs.progress import Progress, Stretch
from jinv.runs.run_folder import FolderError, RunFolder
from jinv.runs.signals import Signals
from jinv.scores import lpips
from jinv.shadow import statistics
from jinv.shadow.store import STATISTICS, Store

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
class Config(Heads):
    """What a config file holds.

    Attributes:
      input: "weights" or "features".
      error: of features, the largest that it learns with, relative to that of the class mean: what
        is recovered from the heads to be attacked is about so good.
      shadows: of weights: folder of stored shadow models of the same sampling and training, which
        are taken over and over; by default they are made as they are needed, and never twice.
      conditional: tell the reconstructor the class of the image.
      width: G of the reconstructor.
      lpips_vgg16: torchvision's vgg16-397923af.pth: LPIPS then adds to the loss, as published for
        colour images.
      reconstructor: the mathematics of its training.
      network: how the reconstructor is computed.
      run: how the run goes.
    """

    input: Input = "weights"
    error: Share = 0.3
    shadows: Annotated[str, File()] | None = None
    conditional: bool = True
    width: Count = 256
    lpips_vgg16: Annotated[str, File()] | None = None
    reconstructor: learning.Config = dataclasses.field(default_factory=learning.Config)
    network: network.Execution = dataclasses.field(default_factory=network.Execution)
    run: Options = dataclasses.field(default_factory=Options)

    def __post_init__(self) -> None:
        checks.fields(self)
        if self.input == "features":
            checks.unused(self, "the input is a feature", "shadows")
        else:
            checks.unused(self, "the input is weights", "error")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary(command.Summary):
    """What summary.json holds.

    Attributes:
      steps: of the reconstructor's training.
      input: "weights" or "features".
      examples: that it has seen: shadow models, or features of single images.
      source: "made", and never twice, or "stored".
      inputs, parameters: numbers that it takes; of its own.
      heads: parameters of a head.
      loss, mse: mean of the last hundred steps.
      victims: heads that were attacked.
      threshold: mean MSE, in [-1, 1], of a test image and the nearest other of its class.
      attackers: name -> samples, median_mse, tpr_at_fpr ("0.001", "0.01", "0.1"), intervals (95 %),
        at_threshold (mse, tpr, fpr), top1: share of reconstructions whose true image is the
        nearest of all test images of its class (of all, if no class is told).
      seconds_making: of all seconds, those that were waited for what it learns from.
      fingerprint: of the features that it has learned from.
      files: sha256 of the reconstructor and of the statistics.
    """

    steps: int
    input: str
    examples: int
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


class Reconstruction(command.Loaded):
    """A config with its features read.

    Attributes:
      config: the config.
      setting: heads and the attacker's data.
      source: what the reconstructor learns from.
      mesh: of the devices that share a batch.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.setting = Setting(config)
        if config.input == "features" and self.setting.unrecoverable:
            raise ValueError(
                f"input: features cannot be had from these heads: {self.setting.unrecoverable}"
            )
        told = config.conditional and config.input == "weights"
        if told and self.setting.sampling.kind != "balanced":
            raise ValueError(
                f"sets of the kind {self.setting.sampling.kind!r} have no class that could be "
                "told: set conditional: false"
            )
        self.source = self._source()
        learning.batches(self.source, config.reconstructor)
        self.mesh = supervised.batch_mesh(config.reconstructor.batch)
        self._perceptual: Perceptual | None = None
        if config.lpips_vgg16 is not None:
            variables, distance = lpips.differentiable(config.lpips_vgg16)
            self._perceptual = functools.partial(distance, variables)

    def _source(self) -> learning.Source:
        """Return what is learned from; ValueError if a store is of other shadow models."""
        config, setting = self.config, self.setting
        sets = setting.sampling.sets
        if config.input == "features":
            own = np.asarray(setting.train.features)
            pairs = min(sets, len(own))
            relu = bool(own.min() >= 0)
            return Noisy(own, setting.prior_labels, config.error, pairs, relu)
        if config.shadows is None:
            return learning.Made(setting.factory, setting.draw, sets, setting.shown)
        found = Store(config.shadows)
        of = shadows.Config(
            config.features,
            sampling=setting.sampling,
            training=setting.training,
            restarts=config.restarts,
            seed=config.seed,
        )
        layout, fingerprint = setting.factory.layout, setting.train.fingerprint
        wanted, there = shadows.metadata(of, layout, fingerprint).plain(), found.metadata.plain()
        changed = configs.differences(there, wanted | {k: there[k] for k in ("seeds", "dtype")})
        if changed:
            raise ValueError(f"shadows: {config.shadows} holds other models: {', '.join(changed)}")
        if missing := found.missing():
            raise ValueError(
                f"shadows: {config.shadows} lacks seeds, such as {missing[0]}: finish it with "
                "`jinv train-shadow-models --resume`"
            )
        return learning.Stored(found, setting.draw, setting.shown)

    # --- the run ----------------------------------------------------------------------------------

    def run(self, folder: RunFolder) -> dict[str, Any]:
        """Train, attack the victims and write the results; return the summary.

        Raises:
          Interrupted: SIGTERM or Ctrl-C came; a checkpoint was saved.
        """
        config, setting = self.config, self.setting
        stage = Stretch("training", config.reconstructor.steps)
        with folder.checkpoints() as manager, Signals() as stopping, Progress([stage]) as bar:
            fitting = setting.fitting() if config.conditional else None
            told = setting.learned(fitting)
            victims = setting.victims(told)
            normalisation = self._normalisation(told)
            net = network.make(
                network.Config(
                    len(normalisation.varying),
                    config.width,
                    setting.images(setting.train).shape[1],
                    setting.images(setting.train).shape[3],
                    len(setting.train.classes) if config.conditional else None,
                ),
                config.network,
            )
            key, _ = jax.random.split(jax.random.key(config.seed))
            people = learning.population(
                setting.images(setting.train), setting.prior_labels, self.mesh
            )
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
                    key,
                    people,
                    self.source,
                    mesh=self.mesh,
                    perceptual=self._perceptual,
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
                    raise folder.stopped(stopping.number, done, config.reconstructor.steps)
            finally:
                folder.save_logs()
        own = self._trained(net, normalisation, state)
        summary: dict[str, Any] = {}
        parallel.on_main(
            lambda: summary.update(self._write(folder, own, victims, told, fitting)), FolderError
        )
        return summary

    def _normalisation(self, heads: statistics.Statistics) -> Normalisation:
        """Return the normalisation of what the reconstructor is given."""
        if self.config.input == "weights":
            return Normalisation.of(heads)
        features, _ = self.source(0)
        return Normalisation.of(statistics.of(features, covariance=False))

    def _trained(
        self, net: network.Reconstructor, normalisation: Normalisation, state: learning.State
    ) -> Trained:
        setting = self.setting
        origin = Origin(
            self.config.input,
            net.config,
            normalisation.size,
            setting.training,
            setting.sampling.class_size,
            setting.train.fingerprint,
        )
        return Trained(origin, net, parallel.fetch(learning.averaged(state)), normalisation)

    def attack(self, own: Trained, given: Any) -> np.ndarray:
        """Return the images that a reconstructor makes of what `given` says of heads."""
        return own.of_weights(given) if self.config.input == "weights" else own.of_features(given)

    def given(self, weights: np.ndarray) -> np.ndarray:
        """Return what a reconstructor is given of heads: their weights, or recovered features."""
        return weights if self.config.input == "weights" else self.setting.read(weights).means

    # --- results ----------------------------------------------------------------------------------

    def _write(
        self,
        folder: RunFolder,
        own: Trained,
        victims: Victims,
        told: statistics.Statistics,
        fitting: ridge.Fitting | None,
    ) -> dict[str, Any]:
        """Attack the victims; write pictures, curves and report, and the summary last."""
        config, log, setting = self.config, folder.metrics, self.setting
        told.save(folder.path / STATISTICS)
        own.save(folder.path)
        given = [self.given(weights) for weights in (victims.weights, victims.random)]
        made = {"network": [self.attack(own, one) for one in given]}
        if fitting is not None:
            ridge_attack = fitting.fit()
            pair = (victims.weights, victims.random)
            made["ridge"] = [ridge_attack.reconstruct(weights) for weights in pair]
        if config.input == "features":
            made["recovery"] = [setting.linear(one) for one in given]
        outcomes = {name: attacked(victims, *pair) for name, pair in made.items()}
        attackers = {
            name: attack_heads.told_of(outcome, victims.threshold)
            for name, outcome in outcomes.items()
        }
        body = attack_heads.sections(victims, outcomes, attackers, folder.path)
        terms = log.terms()
        svg = curves.plot(terms, log.steps())
        write_atomic(folder.path / "curves.svg", svg)
        summary = Summary(
            **command.shared(folder, hardware.of_mesh(self.mesh)),
            steps=config.reconstructor.steps,
            input=config.input,
            examples=self._seen(),
            source="made" if config.shadows is None else "stored",
            inputs=own.net.config.inputs,
            parameters=network.count(own.net.config),
            heads=setting.factory.layout.size,
            loss=float(np.mean(terms["loss"][-100:])),
            mse=float(np.mean(terms["mse"][-100:])),
            victims=len(victims.weights),
            threshold=victims.threshold,
            attackers=attackers,
            seconds_making=round(self.source.seconds, 3),
            fingerprint=setting.train.fingerprint,
            files={name: sha256(folder.path / name) for name in (trained.WEIGHTS, STATISTICS)},
        )
        body.append(page.Section("Training", page.Figure(svg, "Loss and least MSE of every batch")))
        report = page.Page(
            "Images out of heads' weights",
            body,
            f"{len(victims.weights)} heads of images that no part of the attack has seen.",
        )
        ending = page.ending(vars(summary), hardware.describe(), configs.to_yaml(config))
        report.write(folder.path / "report.html", ending)
        return command.finish(folder, summary)

    def _seen(self) -> int:
        """Count the shadow models, or features, that training has seen, each once if stored."""
        config = self.config.reconstructor
        each = learning.batches(self.source, config)
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
        self._normalisation = normalisation
        self._saves = False
        self._options = work.config.run
        if self._options.scores_every:
            self._victims = victims.first(_ON_THE_WAY)
            self._given = work.given(self._victims.weights)

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
            self._attack(done, self._work._trained(self._net, self._normalisation, chunk.state))
        if self._saves:
            self._folder.save(self._manager, done, chunk.state)

    def _attack(self, done: int, own: Trained) -> None:
        def attack() -> None:
            victims = self._victims
            found = self._work.attack(own, self._given)
            samples, truth = victims.samples(found)
            scores = {
                "median_mse": float(np.median(samples)),
                "tpr_at_threshold": float(np.mean(samples <= victims.threshold)),
            }
            self._folder.scores.add(step=done, **scores)
            self._bar.say(done, scores)
            shown, truth = victims.asked(found)[:10], truth[:10]
            near = victims.images[victims.neighbours.nearest[truth]]
            png = reconstruction.sheet(shown, victims.images[truth], near)
            picture = self._folder.path / "progress" / f"step_{done:06d}.png"
            picture.parent.mkdir(exist_ok=True)
            write_atomic(picture, png)

        parallel.on_main(attack, FolderError)


def _say(summary: dict[str, Any]) -> str:
    """Say how many images come back."""
    return "\n".join(attack_heads.say_attackers(summary["attackers"]))


COMMAND = command.Command(
    name="train-reconstructor",
    about=str(__doc__),
    config=Config,
    load=Reconstruction,
    summary=Summary,
    files=(
        *(trained.INDEX, trained.WEIGHTS, STATISTICS, "pictures/", "progress/", "curves.svg"),
        *("report.html", "metrics.csv", "scores.csv"),
    ),
    say=_say,
    free=(*command.FREE, "network."),
    less="--reconstructor.batch with fewer shadow models, or a smaller --width",
)

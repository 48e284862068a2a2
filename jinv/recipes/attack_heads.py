"""Attack heads: how well do attackers find the images that heads were trained on?

    jinv attack-heads --config attack_fashion_mnist --out out/attack
    jinv attack-heads --config ... --out ... --reconstructors out/decoder out/reconstructor
    jinv attack-heads --config ... --out ... --training.epochs 100

The config names a folder of features (`jinv extract-features`, with `images_size`) and how heads
are trained on them; every key can be overridden on the command line (`--config F --help` lists
them). Victims are heads of test images, which no attacker has seen. These attack them:

ridge     ridge regression from a class's own weights, which knows some shadow models: the control
recovery  exact recovery of the features, which needs no shadow model, and linear maps from
          features to images
others    reconstructors that `jinv train-reconstructor` trained, by the names of their folders:
          from all weights, or from recovered features

Where one of them does not apply, the summary says why. Exact recovery also tells which of many
images a head has seen (identification, membership). A config with `variants` compares settings,
such as class sizes, epochs, optimisers or privacy, in one table and plot.

A run takes minutes. Ctrl-C and SIGTERM stop it; --resume begins it anew, but keeps the variants
that are finished. A finished run is replaced only with --overwrite.

The output folder holds report.html, pictures/ATTACKER_KIND.png (best, median and worst
reconstructions), samples.npz (ATTACKER.true and ATTACKER.random: least MSE of every
reconstruction) and, last of all, summary.json.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
import math
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import jax
import numpy as np

from jinv import checks, parallel
from jinv.checks import Count, File, Natural, Seed
from jinv.files import sha256, write_atomic
from jinv.recipes import train_shadow_models as shadows
from jinv.reconstruct import identification, recovery, ridge, trained
from jinv.reconstruct.decoding import Linear
from jinv.reconstruct.evaluation import Evaluation
from jinv.reconstruct.normalisation import Normalisation
from jinv.reconstruct.recovery import Prior, Recovered
from jinv.reconstruct.trained import Trained
from jinv.reconstruct.victims import Attacked, Victims, attacked
from jinv.reports import page, reconstruction
from jinv.runs import command, compilation, hardware, study
from jinv.runs import config as configs
from jinv.runs.progress import Progress, Stretch
from jinv.runs.run_folder import FolderError, RunFolder
from jinv.runs.signals import Signals
from jinv.shadow import features, privacy, statistics
from jinv.shadow.config import Config as Training
from jinv.shadow.config import make_head
from jinv.shadow.features import Features
from jinv.shadow.generation import DivergedError, Execution, Factory, Restarts
from jinv.shadow.sampling import Sampling, Sets, permutation, relabelled

_STATISTICS, _VICTIMS = 2**20, 2**21
"""First seeds of the shadow models that statistics and ridge see, and of victims; a reconstructor's
training begins with seed 0."""
_BLOCK = 4 * recovery.CHUNK
"""Heads that are read between two looks at the clock."""
_CHECKED = 2000
"""Images on which the victims' accuracy is measured."""
_BINS = 10


@dataclasses.dataclass(frozen=True)
class Knowledge:
    """What an attacker has, where it is not what victims are like.

    Attributes:
      features: folder of features by the same network, with images: its training images are the
        attacker's. Those of `features` by default.
      sampling: of shadow models. `{kind: random_labels, ...}` for images of other classes.
    """

    features: Annotated[str, File()] | None = None
    sampling: Sampling | None = None

    def __post_init__(self) -> None:
        checks.fields(self)


@dataclasses.dataclass(frozen=True)
class Heads:
    """Heads under attack, and what an attacker has.

    Attributes:
      features: folder that `jinv extract-features` wrote, with images.
      sampling: which examples a head is trained on.
      training: how.
      restarts: None to keep every first training.
      knowledge: what the attacker has, if it is not the training images and the same sampling.
      statistics: seeds of shadow models that normalise the weights, and that ridge is fitted to.
      victims: heads of the test split that are attacked in the end; fewer where some diverge.
      seed: of everything random.
      execution: how shadow models are trained.
    """

    features: Annotated[str, File()]
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    training: Training = dataclasses.field(default_factory=Training)
    restarts: Restarts | None = None
    knowledge: Knowledge | None = None
    statistics: Count = 2
    victims: Count = 1000
    seed: Seed = 0
    execution: Execution = dataclasses.field(default_factory=Execution)

    def __post_init__(self) -> None:
        checks.fields(self)


@dataclasses.dataclass(frozen=True)
class Config(Heads):
    """What a config file holds.

    Attributes:
      reconstructors: folders of `jinv train-reconstructor`, which attack, too.
      identified: victims whose images are looked for among all test images by exact recovery; 0
        for none.
      trials: runs with seeds `seed`, `seed + 1`, ...
    """

    reconstructors: tuple[Annotated[str, File()], ...] = ()
    identified: Natural = 100
    trials: Count = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary(command.Summary):
    """What summary.json holds; a step is a head that was read exactly.

    Attributes:
      victims: heads that were attacked.
      examples: N, of a training set.
      heads: P, parameters of a head.
      shadow_models: that ridge has learned from.
      accuracy: mean of the victims' accuracy on other images; null for heads of one person.
      privacy: noise_multiplier, l2_norm_clip, sampling, steps, delta, epsilon; bound: the most
        that any attack's TPR can be at each FPR; or null.
      threshold: mean MSE, in [-1, 1], of a test image and the nearest other of its class.
      attackers: name -> samples, median_mse, tpr_at_fpr ("0.001", "0.01", "0.1"), intervals (95 %),
        at_threshold (mse, tpr, fpr), top1: share of reconstructions whose true image is the
        nearest of all test images of its class (of all, if no class is told).
      not_available: attacker -> why it does not apply.
      recovery: error (of features, relative to that of the class mean, root mean square),
        predicted (the same, as expected from the weights), believed and random_believed (share of
        victims, and of random weights, that are believed to be such heads), misfit (median),
        calibration (bins of examples: predicted, measured), identified: victims, candidates, first
        (share of examples whose score is the highest of all candidates'), first_of_class (among as
        many as the class has examples), membership (tpr_at_fpr, intervals: images of the class that
        a head was not trained on are the negatives); or null.
      fingerprint: of the victims' features.
      files: sha256 of samples.npz.
    """

    victims: int
    examples: int
    heads: int
    shadow_models: int
    accuracy: float | None
    privacy: dict[str, Any] | None
    threshold: float
    attackers: dict[str, Any]
    not_available: dict[str, str]
    recovery: dict[str, Any] | None
    fingerprint: str
    files: dict[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudySummary:
    """What the summary.json of a study holds.

    Attributes:
      runs: folder -> that run's summary.
      variants: name -> attackers (name -> TPR at FPR 1 %, mean over trials), accuracy, epsilon.
      seconds: of all runs.
    """

    runs: dict[str, Any]
    variants: dict[str, Any]
    seconds: float


class Setting:
    """Heads under attack and the attacker's data, read.

    Attributes:
      train: the attacker's features, with images.
      test: the victims'.
      training: how heads are trained, with the noise that their privacy needs.
      examples: N.
      factory: makes shadow models of the attacker's images, and victims: test images come after
        those that the attacker has, so that there is one program.
      sampling: of shadow models.
    """

    def __init__(self, config: Heads) -> None:
        self.config = config
        told = config.knowledge or Knowledge()
        self.test = with_images(config.features, "test")
        self.train = with_images(told.features or config.features, "train")
        ours, theirs = self.train, self.test
        if told.features is None and ours.classes != theirs.classes:
            raise ValueError(f"{config.features}: the splits are of other classes")
        if ours.network != theirs.network or ours.features.shape[1] != theirs.features.shape[1]:
            raise ValueError(
                f"the attacker's features are of {ours.network} ({ours.features.shape[1]}), "
                f"the victims' of {theirs.network} ({theirs.features.shape[1]})"
            )
        self.sampling = told.sampling or config.sampling
        self._of_victims = self._victim_sampling()
        drawn = self.sampling.draw(self.train.labels, 0)
        shadows.check_labels(config.training, drawn)
        self.examples = drawn.indices.shape[1]
        own = self._of_victims.draw(self.test.labels, 0)
        shadows.check_labels(config.training, own)
        if own.indices.shape[1] != self.examples:
            raise ValueError(
                f"shadow models are trained on {self.examples} examples, victims on "
                f"{own.indices.shape[1]}: give knowledge.sampling the same number"
            )
        self.labels = own.labels[0]
        self.training = privacy.resolved(config.training, self.examples)
        self.factory = Factory(
            self.training,
            np.concatenate([self.train.features, self.test.features]),
            self.examples,
            self._key(config.seed),
            restarts=config.restarts,
            execution=config.execution,
        )

    @staticmethod
    def _key(seed: int) -> jax.Array:
        return jax.random.key(seed, impl="threefry2x32")

    def with_seed(self, seed: int) -> Self:
        """Return the same with another seed, and the same compiled programs."""
        other = copy.copy(self)
        other.config = dataclasses.replace(self.config, seed=seed)
        other.factory = copy.copy(self.factory)
        other.factory.key = self._key(seed)
        return other

    def _victim_sampling(self) -> Sampling:
        """Return the sampling of the test split: as many sets a seed as its classes allow."""
        own = self.config.sampling
        if own.kind == "random_labels":
            raise ValueError(
                "sampling.kind is 'random_labels': victims learn what images show; give it as "
                "knowledge.sampling, to the attacker"
            )
        if own.kind == "one_against_many":
            return dataclasses.replace(own, sets=min(own.sets, self.config.victims))
        _, counts = np.unique(self.test.labels, return_counts=True)
        most = int(counts.min()) // own.class_size
        if not most:
            raise ValueError(
                f"a class of the test split has {counts.min()} images, fewer than "
                f"sampling.class_size {own.class_size}"
            )
        return dataclasses.replace(own, sets=min(own.sets, most, self.config.victims))

    @property
    def shown(self) -> int | None:
        """How many of a set's first examples are to be found: all, or those of the person."""
        own = self.sampling
        return own.class_size if own.kind == "one_against_many" else None

    def draw(self, seed: int) -> Sets:
        """Return the training sets of a seed of shadow models."""
        return self.sampling.draw(self.train.labels, seed)

    def images(self, chosen: Features) -> np.ndarray:
        """Return the images (M, H, W, C) of features that were checked to have some."""
        assert chosen.images is not None
        return np.asarray(chosen.images)

    @property
    def shadow_models(self) -> int:
        """How many statistics and ridge see."""
        return self.config.statistics * self.sampling.sets

    def learned(
        self, fitting: ridge.Fitting | None, see: Callable[[], None] = lambda: None
    ) -> statistics.Statistics:
        """Return statistics of shadow models' weights, which ridge is shown too.

        Args:
          fitting: takes them in.
          see: is called after every seed.

        Raises:
          DivergedError: no shadow model of a seed has a finite loss.
        """
        found: statistics.Statistics | None = None
        for seed in range(_STATISTICS, _STATISTICS + self.config.statistics):
            sets = self.draw(seed)
            made = self.factory.on_device(seed, sets)
            sound = np.isfinite(np.asarray(made.loss))
            if not sound.any():
                raise DivergedError(len(sound))
            new = statistics.of(made.weights, kept=sound)
            found = new if found is None else statistics.merged(found, new)
            if fitting is not None:
                kept = Sets(sets.indices[sound], sets.labels[sound])
                fitting.add(np.asarray(made.weights)[sound], kept)
            see()
        assert found is not None
        return found

    def fitting(self) -> ridge.Fitting | None:
        """Return what ridge learns with, None where heads are not linear."""
        if self.training.head != "linear":
            return None
        return ridge.Fitting(self.factory.layout, self.images(self.train))

    def victims(self, told: statistics.Statistics) -> Victims:
        """Make heads of test images; random weights are like shadow models' of these statistics.

        Raises:
          DivergedError: no head of a seed has a finite loss.
        """
        count, made = self.config.victims, []
        each = self._of_victims.sets
        for seed in range(_VICTIMS, _VICTIMS + math.ceil(count / each)):
            sets = self._of_victims.draw(self.test.labels, seed)
            there = sets._replace(indices=sets.indices + np.int32(len(self.train)))
            found = self.factory.seed(seed, there)
            sound = np.isfinite(found.loss)  # a head that diverged tells nothing
            if not sound.any():
                raise DivergedError(len(sound))
            made.append((np.array(found.weights[sound]), sets.indices[sound]))
        weights, indices = (np.concatenate(parts)[:count] for parts in zip(*made, strict=True))
        normalisation = Normalisation.of(told)
        _, key = jax.random.split(jax.random.key(self.config.seed))
        drawn = normalisation.random(key, len(weights))
        random = normalisation.weights(drawn, np.asarray(told.mean, np.float32))
        images = ridge.unit(self.images(self.test)).astype(np.float32)
        labels = np.asarray(self.test.labels)
        if self._of_victims.kind == "one_against_many":
            labels = np.zeros_like(labels)  # of some people there is but one image
        return Victims(images, labels, indices, weights, random, self.shown)

    # --- exact recovery ---------------------------------------------------------------------------

    @property
    def unrecoverable(self) -> str:
        """Why heads cannot be read exactly, "" if they can."""
        return recovery.unrecoverable(self.training, self.examples)

    @functools.cached_property
    def prior_labels(self) -> np.ndarray:
        """Labels of the attacker's images: random ones, if its shadow models' are."""
        labels = np.asarray(self.train.labels)
        if self.sampling.kind == "balanced":
            return labels
        order = permutation(len(labels), 0)
        return (order % self.training.classes).astype(np.int32)

    @functools.cached_property
    def prior(self) -> Prior:
        """Return what the attacker knows of features."""
        return Prior.of(self.train.features, self.prior_labels, self.training.classes)

    @functools.cached_property
    def linear(self) -> Linear:
        """Return linear maps from the attacker's features to its images."""
        own = self.train
        return Linear.fit(np.asarray(own.features), self.prior_labels, self.images(own))

    def read(
        self, weights: np.ndarray, see: Callable[[int, Recovered], None] = lambda count, found: None
    ) -> Recovered:
        """Return the features that heads (S, P) were trained on.

        Args:
          weights: of heads.
          see: is told how many were read, and what of them.
        """
        parts = self.factory.layout.split(np.asarray(weights, np.float32))
        found = []
        starts = range(0, max(1, len(weights) - recovery.CHUNK + 1), _BLOCK)
        for start, end in zip(starts, (*starts[1:], len(weights)), strict=True):
            read = recovery.recover(
                parts["weight"][start:end],
                parts["bias"][start:end],
                self.training,
                self.labels,
                self.prior,
            )
            found.append(read)
            see(end - start, read)
        return Recovered(*map(np.concatenate, zip(*found, strict=True)))

    def accuracy(self, weights: np.ndarray) -> float | None:
        """Return the mean accuracy of heads of test images on images that they have not seen.

        None where a head knows one person, of whom there are no others.
        """
        if self.config.sampling.kind == "one_against_many":
            return None
        own = self.train if self.config.knowledge is None else None
        if own is None or own.labels.ndim > 1:
            own = with_images(self.config.features, "train")
        chosen = np.sort(permutation(len(own), 0)[:_CHECKED])
        x, labels = np.asarray(own.features)[chosen], np.asarray(own.labels)[chosen]
        told = relabelled(labels, self.config.sampling.positive)
        return float(np.mean(_accuracies(self.training, self.factory.layout, weights, x, told)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _accuracies(training: Training, layout: Any, weights: Any, x: Any, labels: Any) -> Any:
    head = make_head(training)

    def accuracy(one: Any) -> Any:
        return head.correct(head.apply(one, x), labels).mean()

    return jax.lax.map(accuracy, layout.split(weights), batch_size=8)


def with_images(folder: str, split: str) -> Features:
    """Return the features of a split, with classes, and with the images that are to be found.

    Raises:
      ValueError: they have none, or of another size than reconstructors make.
    """
    found = features.load(Path(folder) / split)
    if found.images is None:
        raise ValueError(
            f"{folder} holds no images: extract the features with images_size: 32 or 64"
        )
    if found.images.shape[1:] not in [(s, s, c) for s in (32, 64) for c in (1, 3)]:
        raise ValueError(
            f"{folder} holds images {found.images.shape[1:]}: a reconstructor makes those of 32 or "
            "64 px; extract the features with images_size: 32"
        )
    if found.labels.ndim > 1:
        raise ValueError(f"{folder}: labels are attributes; classes are needed")
    return found


# --- results --------------------------------------------------------------------------------------


def told_of(outcome: Attacked, threshold: float) -> dict[str, Any]:
    """Return what a summary says of an attacker."""
    return outcome.evaluation.summary(threshold) | {"top1": outcome.top1}


def sections(
    victims: Victims, outcomes: Mapping[str, Attacked], told: Mapping[str, Any], folder: Path
) -> list[page.Section]:
    """Write pictures of all attackers into a folder; return the sections of the report.

    Args:
      victims: the heads.
      outcomes: of the attackers.
      told: what the summary says of them.
      folder: of the run.
    """
    shown, sheets = [], {}
    near = victims.neighbours.nearest
    for name, outcome in outcomes.items():
        own = told[name]
        shown.append(
            reconstruction.Attacker(
                name,
                outcome.evaluation.true,
                outcome.evaluation.random,
                outcome.evaluation.cumulative(),
                {
                    float(at): (rate, *own["intervals"][at])
                    for at, rate in own["tpr_at_fpr"].items()
                },
                outcome.evaluation.rates(victims.threshold),
                outcome.top1,
            )
        )
        truth = outcome.truth
        sheets[name] = {
            kind: reconstruction.sheet(
                outcome.found[some], victims.images[truth[some]], victims.images[near[truth[some]]]
            )
            for kind, some in reconstruction.chosen(outcome.samples, 10).items()
        }
    pictures = folder / "pictures"
    pictures.mkdir(exist_ok=True)
    for name, kinds in sheets.items():
        for kind, png in kinds.items():
            write_atomic(pictures / f"{name}_{kind}.png", png)
    return reconstruction.sections(shown, victims.threshold, sheets)


class Attack(command.Loaded):
    """A config with its features and reconstructors read.

    Attributes:
      config: the config.
      setting: heads and the attacker's data.
      reconstructors: name -> a trained one.
      not_available: attacker -> why it does not apply.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.setting = Setting(config)
        self.not_available: dict[str, str] = {}
        self.reconstructors = self._reconstructors()
        reason = self.setting.unrecoverable
        if reason:
            self.not_available["recovery"] = reason
        if self.setting.training.head != "linear":
            self.not_available["ridge"] = "a class has weights of its own in linear heads alone"
        if reason and not self.reconstructors and self.setting.training.head != "linear":
            raise ValueError(f"no attacker is left: {reason}; name reconstructors")

    def with_seed(self, seed: int) -> Self:
        """Return the same with other initial weights and random weights."""
        other = copy.copy(self)
        other.config = dataclasses.replace(self.config, seed=seed, trials=1)
        other.setting = self.setting.with_seed(seed)
        return other

    def _reconstructors(self) -> dict[str, Trained]:
        found: dict[str, Trained] = {}
        for folder in self.config.reconstructors:
            name = Path(folder).name
            if name in found or name in ("ridge", "recovery"):
                raise ValueError(f"reconstructors: {name!r} is the name of another attacker")
            own = trained.load(folder)
            reason = unfit(own, self.setting)
            if reason:
                self.not_available[name] = reason
            else:
                found[name] = own
        return found

    def run(self, folder: RunFolder) -> dict[str, Any]:
        """Make the heads, attack them and write the results; return the summary.

        Raises:
          Interrupted: SIGTERM or Ctrl-C came.
        """
        setting, config = self.setting, self.config
        folder.begin()
        reads = "recovery" not in self.not_available
        stages = [Stretch("shadow models", config.statistics)]
        if reads:
            stages.append(Stretch("exact recovery", 2 * config.victims, 0.02))
        total, done = sum(stage.steps for stage in stages), 0
        compiled = compilation.seconds()
        with Signals() as stopping, Progress(stages) as bar:

            def see(stage: int, count: int, **values: Any) -> None:
                nonlocal done
                shown = {name: np.full(count, value) for name, value in values.items()}
                bar.update(stage, done, shown or {"seeds": np.arange(count)})
                done += count
                if stopping() and done < total:
                    number = stopping.number or signal.SIGTERM
                    raise folder.stopped(number, done, total)

            fitting = setting.fitting()
            statistics_ = setting.learned(fitting, lambda: see(0, 1, seeds=done + 1))
            victims = setting.victims(statistics_)
            read: dict[str, Recovered] = {}
            if reads:
                began, before = time.perf_counter(), compilation.seconds()

                def told(count: int, found: Recovered) -> None:
                    see(1, count, misfit=float(np.median(found.misfit)))

                read["weights"] = setting.read(victims.weights, told)
                taken = time.perf_counter() - began - (compilation.seconds() - before)
                folder.clock.stepping, folder.clock.steps = taken, len(victims.weights)
                read["random"] = setting.read(victims.random, told)
        outcomes = {
            name: attacked(victims, *pair)
            for name, pair in self._reconstructions(victims, fitting, read).items()
        }
        identified = self._identified(victims, read.get("weights"))
        folder.clock.compiling = compilation.seconds() - compiled
        summary: dict[str, Any] = {}
        parallel.on_main(
            lambda: summary.update(self._write(folder, victims, outcomes, read, identified)),
            FolderError,
        )
        return summary

    def _reconstructions(
        self, victims: Victims, fitting: ridge.Fitting | None, read: Mapping[str, Recovered]
    ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return what every attacker makes of the victims' weights, and of random ones."""
        found: dict[str, Callable[[str], np.ndarray]] = {}

        def of_weights(attack: Any) -> Callable[[str], np.ndarray]:
            return lambda kind: attack(getattr(victims, kind))

        def of_features(decode: Any) -> Callable[[str], np.ndarray]:
            return lambda kind: decode(read[kind].means)

        if fitting is not None:
            found["ridge"] = of_weights(fitting.fit().reconstruct)
        if read:
            found["recovery"] = of_features(self.setting.linear)
        for name, own in self.reconstructors.items():
            weights = own.origin.input == "weights"
            found[name] = of_weights(own.of_weights) if weights else of_features(own.of_features)
        return {name: (attack("weights"), attack("random")) for name, attack in found.items()}

    def _identified(self, victims: Victims, read: Recovered | None) -> dict[str, Any] | None:
        """Return how well exact recovery tells which images heads were trained on."""
        count = min(self.config.identified, len(victims.weights))
        if read is None or not count:
            return None
        setting = self.setting
        some = Recovered(*(array[:count] for array in read))
        candidates = np.asarray(setting.test.features)
        first, first_of_class, members, others = [], [], [], []
        labels = victims.labels
        for head in range(count):
            one = Recovered(*(array[head : head + 1] for array in some))
            scores = identification.scores(one, setting.labels, candidates, setting.prior)[0]
            true = victims.indices[head]
            own = scores[labels[true], true]
            places = (scores[labels[true]] > own[:, None]).sum(1)
            first.append(places == 0)
            each = np.bincount(labels[true])[labels[true]]
            first_of_class.append(places < each)
            members.append(own)
            rest = np.setdiff1d(np.arange(len(labels)), true)
            rest = rest[permutation(len(rest), head)[: 10 * len(true)]]
            others.append(scores[labels[rest], rest])
        groups = np.repeat(np.arange(count), [len(x) for x in members])
        other_groups = np.repeat(np.arange(count), [len(x) for x in others])
        evaluation = Evaluation(
            -np.concatenate(members), -np.concatenate(others), groups, other_groups
        )
        intervals = evaluation.intervals()
        return {
            "victims": count,
            "candidates": len(candidates),
            "first": float(np.mean(np.concatenate(first))),
            "first_of_class": float(np.mean(np.concatenate(first_of_class))),
            "membership": {
                "tpr_at_fpr": {f"{at:g}": i.value for at, i in intervals.items()},
                "intervals": {f"{at:g}": [i.low, i.high] for at, i in intervals.items()},
            },
        }

    def _write(
        self,
        folder: RunFolder,
        victims: Victims,
        outcomes: Mapping[str, Attacked],
        read: Mapping[str, Recovered],
        identified: dict[str, Any] | None,
    ) -> dict[str, Any]:
        setting, config = self.setting, self.config
        told = {name: told_of(outcome, victims.threshold) for name, outcome in outcomes.items()}
        found = None
        if read:
            found = self._recovery(victims, read) | {"identified": identified}
        body = sections(victims, outcomes, told, folder.path)
        if found is not None:
            body[1:1] = reconstruction.recovery_sections(found)
        arrays = {
            f"{name}.{kind}": getattr(outcome.evaluation, kind).astype(np.float32)
            for name, outcome in outcomes.items()
            for kind in ("true", "random")
        }
        file = io.BytesIO()
        np.savez(file, **arrays)
        write_atomic(folder.path / SAMPLES, file.getvalue())
        summary = Summary(
            **command.shared(folder, hardware.of_mesh(setting.factory.mesh)),
            victims=len(victims.weights),
            examples=setting.examples,
            heads=setting.factory.layout.size,
            shadow_models=setting.shadow_models,
            accuracy=setting.accuracy(victims.weights),
            privacy=shadows.promised(setting.training, setting.examples),
            threshold=victims.threshold,
            attackers=told,
            not_available=self.not_available,
            recovery=found,
            fingerprint=setting.test.fingerprint,
            files={SAMPLES: sha256(folder.path / SAMPLES)},
        )
        reasons = [(name, reason) for name, reason in self.not_available.items()]
        if reasons:
            body.append(page.Section("Not available", page.Table(("attacker", "why"), reasons)))
        report = page.Page(
            "Images out of heads' weights",
            body,
            f"{len(victims.weights)} heads of {setting.examples} images each, which no attacker "
            "has seen."
            + (
                ""
                if summary.accuracy is None
                else f" On other images they are right in {100 * summary.accuracy:.1f} %."
            ),
        )
        ending = page.ending(vars(summary), hardware.describe(), configs.to_yaml(config))
        report.write(folder.path / "report.html", ending)
        return command.finish(folder, summary)

    def _recovery(self, victims: Victims, read: Mapping[str, Recovered]) -> dict[str, Any]:
        """Return how far recovered features are off, and how far they were expected to be."""
        own, prior, labels = read["weights"], self.setting.prior, self.setting.labels
        test = np.asarray(self.setting.test.features)
        classes = np.unique(labels)
        truth = np.stack(
            [test[victims.indices[:, labels == c]].mean(1, dtype=np.float64) for c in classes], 1
        )
        counts = np.bincount(labels)[classes]
        spread = prior.variances[classes].sum(-1) / counts
        measured = np.square(own.means[:, classes] - truth).sum(-1) / spread
        expected = own.mean_variances[:, classes].sum(-1) / spread
        order = np.argsort(expected, axis=None)
        bins = np.array_split(order, min(_BINS, len(order)))
        return {
            "error": float(np.sqrt(measured.mean())),
            "predicted": float(np.sqrt(expected.mean())),
            "believed": float(own.believable.mean()),
            "random_believed": float(read["random"].believable.mean()),
            "misfit": float(np.median(own.misfit)),
            "calibration": [
                {
                    "predicted": float(np.sqrt(expected.ravel()[some].mean())),
                    "measured": float(np.sqrt(measured.ravel()[some].mean())),
                }
                for some in bins
            ],
        }


SAMPLES = "samples.npz"


def unfit(own: Trained, setting: Setting) -> str:
    """Return why a reconstructor cannot attack these heads, "" if it can."""
    origin = own.origin
    layout, width = setting.factory.layout, setting.train.features.shape[1]
    image = setting.images(setting.test).shape[1:]
    makes = (origin.network.size, origin.network.size, origin.network.channels)
    if makes != image:
        return f"it makes images {makes}, these are {image}"
    if origin.input == "features":
        if origin.size != width:
            return f"it takes features of {origin.size}, these have {width}"
        return setting.unrecoverable
    if origin.size != layout.size:
        return f"it takes heads of {origin.size} parameters, these have {layout.size}"
    return ""


def compare(
    chosen: Sequence[study.Run], summaries: Sequence[dict[str, Any]], whole: RunFolder
) -> None:
    """Write the page and the summary of a study."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run, summary in zip(chosen, summaries, strict=True):
        found.setdefault(study.title(run.variant), []).append(summary)
    svg = reconstruction.sweep_curves(found)
    if svg is not None:
        write_atomic(whole.path / "curves.svg", svg)
    body = reconstruction.study_page(found, svg)
    variants = {
        name: {
            "attackers": reconstruction.rates(trials),
            "accuracy": reconstruction.accuracy(trials),
            "epsilon": (trials[0]["privacy"] or {}).get("epsilon"),
        }
        for name, trials in found.items()
    }
    study.finish(whole, chosen, summaries, body, {"variants": variants})


def _say(summary: dict[str, Any]) -> str:
    """Say how many images come back."""
    return "\n".join(say_attackers(summary["attackers"]))


def say_attackers(attackers: Mapping[str, Any]) -> list[str]:
    """Return a line for each attacker of a summary."""
    return [
        f"{name}: TPR {told['tpr_at_fpr']['0.01']:.2f} at FPR 1%, the true image first for "
        f"{100 * told['top1']:.0f}%"
        for name, told in attackers.items()
    ]


COMMAND = command.Command(
    name="attack-heads",
    about=str(__doc__),
    config=Config,
    load=Attack,
    summary=Summary,
    files=(SAMPLES, "pictures/", "curves.svg", "report.html"),
    say=_say,
    compare=compare,
    study=StudySummary,
    less="fewer victims",
)

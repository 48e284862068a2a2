"""Heads under attack and what an attacker has: shadow models, victims, features read exactly."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Self

import jax
import numpy as np

from jinv import checks
from jinv.checks import Count, File, Seed
from jinv.reconstruct import recovery, ridge
from jinv.reconstruct.decoding import Linear
from jinv.reconstruct.normalisation import Normalisation
from jinv.reconstruct.recovery import Prior, Recovered
from jinv.reconstruct.victims import Victims
from jinv.shadow import features, privacy, statistics
from jinv.shadow.config import Config as Training
from jinv.shadow.config import check_labels, make_head
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
        check_labels(config.training, drawn)
        self.examples = drawn.indices.shape[1]
        own = self._of_victims.draw(self.test.labels, 0)
        check_labels(config.training, own)
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

"""A recipe of shadow models, and its production into a store, or past it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jinv.files import write_atomic
from jinv.runs import config as configs
from jinv.runs import hardware, run_folder
from jinv.runs.progress import Progress
from jinv.shadow import features, privacy, sampling, statistics, store, training
from jinv.shadow.config import Config, make_head
from jinv.shadow.generation import Execution, Factory, Made, Restarts
from jinv.shadow.sampling import Sets

VERSIONS = ("python", "jax", "jaxlib", "jinv")


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Which examples a shadow model is trained on; see `jinv.shadow.sampling`.

    Attributes:
      kind: "balanced", as many of every class; "random_labels", out of distribution;
        "one_against_many", one person against others, where labels say who is in an image.
      class_size: examples of each class, or of the person.
      sets: shadow models a seed.
      positive: of "balanced": classes that get label 1, all others 0; by default labels are kept.
      classes: of "random_labels".
      others: of "one_against_many": images of others for each of the person's.
    """

    kind: Literal["balanced", "random_labels", "one_against_many"] = "balanced"
    class_size: int = 1
    sets: int = 5120
    positive: tuple[int, ...] | None = None
    classes: int = 10
    others: int = 9

    def __post_init__(self) -> None:
        if min(self.class_size, self.sets, self.classes, self.others) < 1:
            raise ValueError("class_size, sets, classes and others must be at least 1")
        if self.positive is not None and self.kind != "balanced":
            raise ValueError("positive classes belong to balanced sets")

    def draw(self, labels: np.ndarray, seed: int) -> Sets:
        """The training sets of a seed."""
        if self.kind == "balanced":
            return sampling.balanced(labels, seed, self.class_size, self.sets, self.positive)
        if self.kind == "random_labels":
            return sampling.random_labels(
                len(labels), seed, self.class_size, self.sets, self.classes
            )
        return sampling.one_against_many(labels, seed, self.class_size, self.sets, self.others)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a config file holds.

    Attributes:
      features: folder that scripts/extract_features.py wrote.
      split: whose images the models are trained on.
      sampling: which of them.
      training: how.
      restarts: None to keep every first training.
      seeds: 0 to so many less one; a store grows with them.
      seed: of the models' own randomness.
      dtype: of stored weights.
      store: False to train the models and keep statistics only.
      validate: models of a seed whose accuracy on the other split is measured; None for all.
      statistics: "moments", mean and standard deviation; "covariance", that too: P^2 numbers.
      execution: see there.
    """

    features: str
    split: Literal["train", "test"] = "train"
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    training: Config = dataclasses.field(default_factory=Config)
    restarts: Restarts | None = None
    seeds: int = 1
    seed: int = 0
    dtype: store.Dtype = "float32"
    store: bool = True
    validate: int | None = 16
    statistics: Literal["none", "moments", "covariance"] = "moments"
    execution: Execution = dataclasses.field(default_factory=Execution)

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, not {self.seeds}")
        if self.validate is not None and self.validate < 0:
            raise ValueError(f"validate must not be negative: {self.validate}")


@dataclasses.dataclass(frozen=True)
class Part:
    """Which seeds a process makes, of several that share a store: index, index + count, ..."""

    index: int = 0
    count: int = 1

    @classmethod
    def read(cls, text: str | None, environment: Mapping[str, str] = os.environ) -> Part:
        """ "I/N"; else this task of a SLURM array, this process of `jax.distributed`, or all."""
        if text is not None:
            index, _, count = text.partition("/")
            if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
                raise ValueError(f"a part is I/N with I from 0 to N - 1, not {text!r}")
            return cls(int(index), int(count))
        if "SLURM_ARRAY_TASK_ID" in environment:
            task, first, last, step = (
                int(environment.get(f"SLURM_ARRAY_TASK_{name}", default))
                for name, default in (("ID", 0), ("MIN", 0), ("MAX", 0), ("STEP", 1))
            )
            return cls((task - first) // step, (last - first) // step + 1)
        return cls(jax.process_index(), jax.process_count())


class Production:
    """A recipe with its features read: everything that can be wrong with it has been found.

    Attributes:
      metadata: of its store.
      factory: makes its models.
      reason: why row-space training does not apply; "" where it does.
    """

    def __init__(self, recipe: Recipe) -> None:
        own = features.load(Path(recipe.features) / recipe.split)
        if own.labels.ndim > 1:
            raise ValueError(f"{recipe.features}: labels are attributes; classes are needed")
        if own.labels.min() < 0:
            raise ValueError(f"{recipe.features}: labels are negative: {own.labels.min()}")
        drawn = recipe.sampling.draw(own.labels, 0)
        examples = drawn.indices.shape[1]
        kind = recipe.training.head
        classes = recipe.training.classes if kind == "linear" else 2
        if not 0 <= drawn.labels.min() <= drawn.labels.max() < classes:
            raise ValueError(
                f"labels are {drawn.labels.min()} to {drawn.labels.max()}, the {kind} head knows "
                f"{classes} classes" + (": give sampling.positive" if kind == "binary" else "")
            )
        config = privacy.resolved(recipe.training, examples)
        self.privacy = _promised(config, examples)
        self.recipe = dataclasses.replace(recipe, training=config)
        self.labels = own.labels
        self._drawn = drawn  # seed 0's, for a trial
        self.examples = examples
        head = make_head(config)
        self.reason = training.unsuitable(config, head)
        self.factory = Factory(
            config,
            own.features,
            examples,
            jax.random.key(recipe.seed, impl="threefry2x32"),
            dtype=recipe.dtype,
            restarts=recipe.restarts,
            execution=recipe.execution,
        )
        tree = configs.plain(self.recipe)
        origin = {
            name: tree[name] for name in ("split", "sampling", "training", "restarts", "seed")
        }
        origin["fingerprint"] = own.fingerprint
        self.metadata = store.Metadata(
            self.factory.layout, recipe.sampling.sets, recipe.seeds, recipe.dtype, origin
        )
        self.held_out = self._held_out(own)
        self._accuracies = jax.jit(
            lambda parameters, x, y: jax.lax.map(
                lambda one: head.correct(head.apply(one, x), y).mean(), parameters
            )
        )

    def _held_out(self, own: features.Features) -> tuple[np.ndarray, np.ndarray] | str:
        """Features and labels of the other split, or why there are none."""
        kind = self.recipe.sampling.kind
        if kind != "balanced":
            return f"{kind} sets have no labels that other images share"
        if self.recipe.validate == 0:
            return "not asked for"
        other = "test" if self.recipe.split == "train" else "train"
        found = features.load(Path(self.recipe.features) / other)
        same = (own.network, own.classes, own.features.shape[1], own.labels.ndim)
        if (found.network, found.classes, found.features.shape[1], found.labels.ndim) != same:
            raise ValueError(
                f"{self.recipe.features}: the splits have other classes, or are of other networks"
            )
        told = sampling.relabelled(found.labels, self.recipe.sampling.positive)
        return np.asarray(found.features), told

    def sets(self, seed: int) -> Sets:
        """The training sets of a seed."""
        return self.recipe.sampling.draw(self.labels, seed)

    def plan(self, folder: Path | None, seeds: int | None = None) -> dict[str, Any]:
        """What so many seeds take, all by default: models, bytes, seconds by a trial.

        Statistics and validation take time of their own. `folder`: for the free disk.
        """
        seeds = self.recipe.seeds if seeds is None else seeds
        drawn = Sets(*(part[: 2 * self.factory.chunk] for part in self._drawn))
        self.factory.seed(0, drawn)  # compiles
        start = time.perf_counter()
        self.factory.seed(0, drawn)
        each = (time.perf_counter() - start) / len(drawn.indices)
        models = seeds * self.recipe.sampling.sets
        plan: dict[str, Any] = {
            "models": models,
            "parameters": self.factory.layout.size,
            "examples": self.examples,
            "path": "ordinary" if self.reason else "row_space",
            "chunk": self.factory.chunk,
            "bytes": self.metadata.seed_bytes * seeds,
            "models_per_second": round(1 / each, 1),
            "seconds": round(models * each, 1),
        }
        if folder is not None:
            there = next(p for p in (folder, *folder.resolve().parents) if p.exists())
            plan["free_bytes"] = shutil.disk_usage(there).free
        return plan

    def claim(
        self, folder: Path, *, resume: bool, overwrite: bool, again: int | None = None
    ) -> store.Store | None:
        """The store to fill, or None if the folder holds these models and their summary.

        Without `recipe.store` an empty one.

        Args:
          folder: made if absent.
          resume: go on with what is there.
          overwrite: replace it.
          again: a seed that is there and shall be made again.

        Raises:
          StoreError: the folder holds other models, or neither flag says what to do with it.
        """
        if resume and overwrite:
            raise store.StoreError("--resume and --overwrite exclude each other")
        # In this order: another part may be making the store, which begins with the metadata.
        foreign = [n for n in (*store.FILES, *store.ARRAYS) if (folder / n).exists()]
        known = (folder / store.METADATA).exists()
        if not known and foreign:
            raise store.StoreError(
                f"{folder} holds something else than shadow models ({', '.join(foreign)}): choose "
                "another folder"
            )
        summary = folder / store.SUMMARY
        if overwrite:
            store.remove(folder)
        elif known and not resume:
            state = "a finished" if summary.exists() else "an unfinished"
            raise store.StoreError(f"{folder} holds {state} run: --resume or --overwrite it")
        before = store.read_metadata(folder).seeds if known and not overwrite else 0
        target = store.Store.create(folder, self.metadata)
        # A store may have more seeds than the recipe asks for: it is all of them that are finished.
        self.metadata = target.metadata
        self.recipe = dataclasses.replace(self.recipe, seeds=target.metadata.seeds)
        if again is not None and not 0 <= again < self.recipe.seeds:
            raise store.StoreError(f"{folder} has seeds 0 to {self.recipe.seeds - 1}, no {again}")
        if again is not None:
            target.discard(again)
        missing = target.missing() if self.recipe.store else []
        if summary.exists() and before == self.recipe.seeds and not missing:
            return None
        needed, free = len(missing) * self.metadata.seed_bytes, shutil.disk_usage(folder).free
        if needed > free:
            raise store.StoreError(
                f"{folder}: {needed / 1e9:.1f} GB are to be written, {free / 1e9:.1f} GB are free"
            )
        summary.unlink(missing_ok=True)
        write_atomic(folder / store.CONFIG, configs.to_yaml(self.recipe))
        return target

    def stream(
        self, seeds: Sequence[int], see: Callable[[int, Made], None] = lambda seed, made: None
    ) -> Iterator[tuple[int, Made]]:
        """(seed, its models) one after the other; `see` is shown every chunk, and may raise."""
        for seed in seeds:
            yield seed, self.factory.seed(seed, self.sets(seed), lambda made: see(seed, made))  # noqa: B023

    def missing(self, target: store.Store, part: Part = Part()) -> list[int]:
        """Seeds of this part that are not there yet."""
        return [s for s in target.missing() if s % part.count == part.index]

    def fill(self, target: store.Store, part: Part = Part()) -> Done:
        """Write the seeds of this part that are missing.

        Raises:
          Interrupted: by a signal; finished seeds are kept.
          StoreError: the disk is full, say; finished seeds are kept.
        """
        seeds = self.missing(target, part)
        done = Done()
        with (
            _Watch(target.folder, len(seeds) * self.recipe.sampling.sets) as watch,
            contextlib.ExitStack() as writing,
        ):
            for seed, made in self.stream(seeds, watch):
                writing.close()  # one seed is written while the next is made
                writing.callback(target.write(seed, *made))
                done.models += len(made.loss)
        done.seconds = watch.seconds
        return done

    def finish(self, target: store.Store, done: Done) -> dict[str, Any]:
        """Read a complete store, and write its statistics and summary."""
        # Without statistics only the models that are validated have to be read.
        models = slice(self.recipe.validate if self.recipe.statistics == "none" else None)
        read = (
            Made(
                target.read(s, models), target.read(s, name="loss"), target.read(s, name="attempts")
            )
            for s in range(self.recipe.seeds)
        )
        summary = self._summary(read, done, target.folder)
        _save(target.folder, summary)
        return summary

    def pass_by(self, folder: Path | None) -> dict[str, Any]:
        """Make all models without keeping them; statistics and summary go into the folder."""
        done = Done()

        def made(watch: _Watch) -> Iterator[Made]:
            for _, found in self.stream(range(self.recipe.seeds), watch):
                done.models += len(found.loss)
                done.seconds = watch.seconds
                yield found

        with _Watch(None, self.recipe.seeds * self.recipe.sampling.sets) as watch:
            summary = self._summary(made(watch), done, folder)
        if folder is not None:
            _save(folder, summary)
        return summary

    def _summary(self, seeds: Iterator[Made], done: Done, folder: Path | None) -> dict[str, Any]:
        recipe = self.recipe
        losses: list[np.ndarray] = []
        attempts: list[np.ndarray] = []
        accuracies: list[np.ndarray] = []
        found: statistics.Statistics | None = None
        for made in seeds:
            losses.append(made.loss)
            attempts.append(made.attempts)
            accuracies.append(self.accuracies(made.weights[: recipe.validate]))
            sound = np.isfinite(made.loss)
            if recipe.statistics != "none" and sound.any():
                kept = made.weights if sound.all() else made.weights[sound]
                new = statistics.of(kept, covariance=recipe.statistics == "covariance")
                found = new if found is None else statistics.merged(found, new)
        loss, tries, accuracy = map(np.concatenate, (losses, attempts, accuracies))
        if found is not None and folder is not None:
            found.save(folder / store.STATISTICS)
        machine = hardware.describe()
        failed = 0 if recipe.restarts is None else int((~(loss < recipe.restarts.loss)).sum())
        return {
            "models": len(loss),
            "seeds": recipe.seeds,
            "sets": recipe.sampling.sets,
            "examples": self.examples,
            "parameters": self.factory.layout.size,
            "layout": self.metadata.plain()["layout"],
            "dtype": recipe.dtype,
            "stored": recipe.store,
            "path": "ordinary" if self.reason else "row_space",
            "path_reason": self.reason or None,
            "fingerprint": self.metadata.origin["fingerprint"],
            "privacy": self.privacy,
            "diverged": int((~np.isfinite(loss)).sum()),
            "loss": _spread(loss),
            "restarts": None
            if recipe.restarts is None
            else {"mean": float(tries.mean()), "most": int(tries.max()), "failed": failed},
            "validation": {"not_available": self.held_out}
            if isinstance(self.held_out, str)
            else {"models": len(accuracy), "images": len(self.held_out[1]), **_spread(accuracy)},
            "statistics": None
            if found is None
            else {
                "file": store.STATISTICS if folder is not None else None,
                "covariance": recipe.statistics == "covariance",
                "zero_variance": self.factory.layout.size - len(found.varying),
            },
            "bytes": self.metadata.seed_bytes * recipe.seeds,
            "session": {
                "models": done.models,
                "seconds": round(done.seconds, 3),
                "models_per_second": round(done.models / done.seconds, 1) if done.seconds else None,
            },
            "device": f"{self.factory.mesh.size} x {self.factory.mesh.devices.flat[0].device_kind}",
            "versions": {name: machine[name] for name in VERSIONS},
        }

    def accuracies(self, weights: np.ndarray) -> np.ndarray:
        """(S,) share of the other split's images that each of S models gives their labels."""
        if isinstance(self.held_out, str) or not len(weights):
            return np.empty(0)
        parameters = self.factory.layout.split(np.asarray(weights, np.float32))
        return np.asarray(self._accuracies(parameters, *self.held_out))


@dataclasses.dataclass
class Done:
    """What a process has made since it was started."""

    models: int = 0
    seconds: float = 0.0


class _Watch:
    """Progress and signals over the models of a production."""

    def __init__(self, folder: Path | None, models: int) -> None:
        """Of a store's folder; None if nothing is kept."""
        self._folder = folder
        self._models = models
        self._done = 0
        self._signals = run_folder.Signals()
        self._progress = Progress([_Stage("shadow models", models)])
        self._began = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began

    def __enter__(self) -> _Watch:
        self._signals.__enter__()
        self._progress.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._progress.__exit__(*error)
        self._signals.__exit__(*error)

    def __call__(self, seed: int, made: Made) -> None:
        self._progress.update(0, self._done, {"loss": made.loss})
        self._done += len(made.loss)
        if self._signals.number and self._done < self._models:
            after = f"{self._folder}: go on with --resume" if self._folder else "nothing was kept"
            raise run_folder.Interrupted(f"stopped in seed {seed}; {after}", self._signals.number)


@dataclasses.dataclass(frozen=True)
class _Stage:
    name: str
    steps: int
    cost: float = 1.0


def _save(folder: Path, summary: dict[str, Any]) -> None:
    text = json.dumps(summary, indent=2, allow_nan=False)
    write_atomic(folder / store.SUMMARY, text + "\n")


def _promised(config: Config, examples: int) -> dict[str, Any] | None:
    """What the summary says of privacy."""
    if config.privacy is None:
        return None
    steps = config.steps(examples)
    epsilon = privacy.epsilon(config.privacy, examples, steps)
    return {
        "noise_multiplier": config.privacy.sigma,
        "l2_norm_clip": config.privacy.l2_norm_clip,
        "sampling": config.privacy.probability(examples),
        "steps": steps,
        "delta": privacy.usual_delta(examples),
        "epsilon": epsilon if math.isfinite(epsilon) else None,
    }


def _spread(values: np.ndarray) -> dict[str, float | None]:
    """Of the finite ones."""
    wide = values[np.isfinite(values)].astype(np.float64)
    if not len(wide):
        return {"mean": None, "std": None, "max": None}
    return {"mean": float(wide.mean()), "std": float(wide.std()), "max": float(wide.max())}

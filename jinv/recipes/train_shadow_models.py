"""Train shadow models by the million: small heads on frozen features, each on a few examples.

    jinv train-shadow-models --config shadow_fashion_mnist --out out/shadows/fashion_mnist
    jinv train-shadow-models --config ... --out ... --plan
    jinv train-shadow-models --config ... --out ... --resume --seeds 100
    jinv train-shadow-models --config ... --out none

The config names a folder of features (`jinv extract-features`), the training sets and the
training; every key can be overridden on the command line (`--config F --help` lists them). A seed
permutes the data and cuts it into training sets: seed and position name a model and its examples.
`jinv.shadow.store.Store(FOLDER)` reads the models.

--plan          tells how many models, bytes and seconds all of it takes, and stops
--resume        makes the seeds that are missing: after Ctrl-C, SIGTERM or a crash, the very same
                models; and with more --seeds than there are, the new ones
--overwrite     replaces an earlier run
--part I/N      makes every N-th seed from seed I on, into a folder that N processes share; the one
                that completes it writes statistics and summary. Without it the task of a SLURM
                array, or the process of `jax.distributed`, is such a part
--verify        reads everything in the folder, and names what is damaged
--regenerate S  makes seed S again, with --resume
--out none      keeps nothing: the summary is printed. `store: false` in the config keeps summary
                and statistics

The output folder holds shadows.json (what the models are), config.yaml, the Zarr arrays weights,
loss and attempts, statistics.npz (count, mean, std, covariance) and, last of all, summary.json.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

from jinv import checks, parallel
from jinv.checks import Count, File, Natural, Seed
from jinv.runs import command, hardware
from jinv.runs import config as configs
from jinv.runs.progress import Progress, Stretch
from jinv.runs.run_folder import RunFolder
from jinv.runs.signals import Interrupted, Signals
from jinv.shadow import features, privacy, sampling, statistics, store, training
from jinv.shadow.config import Config as Training
from jinv.shadow.config import check_labels, make_head
from jinv.shadow.generation import DivergedError, Execution, Factory, Made, Restarts
from jinv.shadow.heads import Parameters
from jinv.shadow.sampling import Sampling, Sets

_TELLING = 16
"""Models that do not all diverge by chance."""
_FPRS = (0.001, 0.01, 0.1)
_AT_ONCE = 8
"""Models whose accuracies are computed together: twice as fast as one by one on a CPU."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What a config file holds.

    Attributes:
      features: folder that `jinv extract-features` wrote.
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
      execution: devices and chunk, without influence on the result.
    """

    features: Annotated[str, File()]
    split: Literal["train", "test"] = "train"
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    training: Training = dataclasses.field(default_factory=Training)
    restarts: Restarts | None = None
    seeds: Count = 1
    seed: Seed = 0
    dtype: store.Dtype = "float32"
    store: bool = True
    validate: Natural | None = 16
    statistics: Literal["none", "moments", "covariance"] = "moments"
    execution: Execution = dataclasses.field(default_factory=Execution)

    def __post_init__(self) -> None:
        checks.fields(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """What summary.json holds.

    Attributes:
      models, seeds, sets: how many; sets a seed.
      examples: in a training set.
      parameters: P, of a model.
      layout: [name, shape] of its parameters, in the order of its P numbers.
      dtype, stored: of the weights; whether they were kept.
      path, path_reason: row_space or ordinary; why not row_space.
      fingerprint: of the features.
      privacy: noise_multiplier, l2_norm_clip, sampling, steps, delta, epsilon (null without noise),
        bound: the most that the TPR of any attack on an example can be at FPR 0.1, 1 and 10 %; or
        null.
      diverged: models whose loss is no number; statistics leave them out.
      loss: mean, std, max over models, on their training sets.
      restarts: mean, most: trainings of a model; failed: models whose loss stayed too high; or
        null.
      validation: models, images; mean, std, max of the models' accuracy on the other split; or
        not_available: why.
      statistics: file, covariance (whether it is there), zero_variance (coordinates that are the
        same in all models); or null.
      bytes: of all weights.
      session: models, seconds, models_per_second: of the process that wrote this, since its last
        start, statistics excluded; bytes_per_second: of their weights; waited_for_disk: how many of
        the seconds passed with nothing to do but to write (both null where nothing is stored).
      device: number and kind of the devices.
      versions: of python, jax, jaxlib, flax and jinv.
    """

    models: int
    seeds: int
    sets: int
    examples: int
    parameters: int
    layout: list[Any]
    dtype: str
    stored: bool
    path: str
    path_reason: str | None
    fingerprint: str
    privacy: dict[str, Any] | None
    diverged: int
    loss: dict[str, float | None]
    restarts: dict[str, Any] | None
    validation: dict[str, Any]
    statistics: dict[str, Any] | None
    bytes: int
    session: dict[str, Any]
    device: str
    versions: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Part:
    """Which seeds a process makes, of several that share a store: index, index + count, ..."""

    index: int = 0
    count: int = 1

    @classmethod
    def read(cls, text: str | None, environment: Mapping[str, str] = os.environ) -> Part:
        """Return part "I/N"; without a text that of a SLURM array or `jax.distributed`, or all.

        Raises:
          ValueError: the text says no part.
        """
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


class Production(command.Loaded):
    """A config with its features read.

    Attributes:
      config: the config, with the noise that its privacy needs.
      part: which seeds this process makes.
      again: a seed of this part that is there and shall be made again.
      metadata: of its store.
      factory: makes its models.
      reason: why row-space training does not apply; "" where it does.
    """

    def __init__(self, config: Config, part: Part = Part(), again: int | None = None) -> None:
        self._asked = config
        own = _features(config)
        drawn = config.sampling.draw(own.labels, 0)
        examples = drawn.indices.shape[1]
        check_labels(config.training, drawn)
        settled = privacy.resolved(config.training, examples)
        config = dataclasses.replace(config, training=settled)
        self.config = config
        self.part = part
        self.again = again
        self.privacy = promised(settled, examples)
        self.labels = own.labels
        self._drawn = drawn  # seed 0's, for a trial
        self.examples = examples
        head = make_head(settled)
        self.reason = training.unsuitable(settled, head)
        self.factory = Factory(
            settled,
            own.features,
            examples,
            jax.random.key(config.seed, impl="threefry2x32"),
            dtype=config.dtype,
            restarts=config.restarts,
            execution=config.execution,
        )
        self.metadata = metadata(config, self.factory.layout, own.fingerprint)
        self.held_out = self._held_out(own)
        layout = self.factory.layout

        def accuracies(weights: Array, x: Array, y: Array) -> Array:
            parameters = layout.split(weights.astype(np.float32))

            def accuracy(one: Parameters) -> Array:
                return head.correct(head.apply(one, x), y).mean()

            return jax.lax.map(accuracy, parameters, batch_size=_AT_ONCE)

        self._accuracies = jax.jit(accuracies)

    def _held_out(self, own: features.Features) -> tuple[Array, Array] | str:
        """Return features and labels of the other split, on the devices, or why there are none."""
        kind = self.config.sampling.kind
        if kind != "balanced":
            return f"{kind} sets have no labels that other images share"
        if self.config.validate == 0:
            return "not asked for"
        other = "test" if self.config.split == "train" else "train"
        found = features.load(Path(self.config.features) / other)
        same = (own.network, own.classes, own.features.shape[1], own.labels.ndim)
        if (found.network, found.classes, found.features.shape[1], found.labels.ndim) != same:
            raise ValueError(
                f"{self.config.features}: the splits have other classes, or are of other networks"
            )
        told = sampling.relabelled(found.labels, self.config.sampling.positive)
        placed = np.asarray(found.features), told
        return parallel.put(self.factory.mesh, PartitionSpec(), placed)

    def sets(self, seed: int) -> Sets:
        """Return the training sets of a seed."""
        return self.config.sampling.draw(self.labels, seed)

    def plan(self, folder: Path | None, seeds: int | None = None) -> dict[str, Any]:
        """Return what so many seeds take: models, bytes, seconds by a trial.

        Statistics and validation take time of their own.

        Args:
          folder: for the free disk; None if nothing is kept.
          seeds: all by default.
        """
        seeds = self.config.seeds if seeds is None else seeds
        drawn = Sets(*(part[: 2 * self.factory.chunk] for part in self._drawn))
        self._make(0, drawn)  # compiles
        start = time.perf_counter()
        self._make(0, drawn)
        each = (time.perf_counter() - start) / len(drawn.indices)
        models = seeds * self.config.sampling.sets
        plan: dict[str, Any] = {
            "models": models,
            "parameters": self.factory.layout.size,
            "examples": self.examples,
            "path": self._path,
            "chunk": self.factory.at_once(self.config.sampling.sets),
            "bytes": self.metadata.seed_bytes * seeds,
            "models_per_second": round(1 / each, 1),
            "seconds": round(models * each, 1),
        }
        if folder is not None:
            there = next(p for p in (folder, *folder.resolve().parents) if p.exists())
            plan["free_bytes"] = shutil.disk_usage(there).free
        return plan

    def say_plan(self, folder: Path | None, seeds: int | None = None) -> None:
        """Print the plan."""
        found = self.plan(folder, seeds)
        kept = "nothing is kept"
        if self.config.store and folder:
            to_write, free = found["bytes"] / 1e9, found["free_bytes"] / 1e9
            kept = f"{to_write:.2f} GB to write, {free:.0f} GB are free"
        parallel.say(
            f"{found['models']} models of {found['parameters']} parameters, {found['examples']} "
            f"examples each, {found['path']} path, {found['chunk']} at once\n"
            f"about {found['seconds']:.0f} s at {found['models_per_second']:.0f} models a second; "
            f"{kept}"
        )

    @property
    def _make(self) -> Callable[..., Made[Any]]:
        """Makes a seed's models where they are needed."""
        return self.factory.seed if self.config.store else self.factory.on_device

    @property
    def _path(self) -> str:
        return "ordinary" if self.reason else "row_space"

    def wants_more(self, folder: RunFolder) -> bool:
        """Whether a finished run has fewer seeds than are asked for, or lost or unwanted ones."""
        if not self.config.store:
            return folder.read_summary()["seeds"] < self.config.seeds
        if not (folder.path / store.METADATA).exists():
            return True
        found = store.Store(folder.path)
        self._check_again(folder, found.metadata)
        more = self.config.seeds > found.metadata.seeds
        return more or self.again is not None or bool(found.missing())

    def _check_again(self, folder: RunFolder, there: store.Metadata) -> None:
        """Raise StoreError if the seed that shall be made again is none of the store's."""
        if self.again is not None and not 0 <= self.again < there.seeds:
            raise store.StoreError(
                f"{folder.path} has seeds 0 to {there.seeds - 1}, no {self.again}"
            )

    def run(self, folder: RunFolder) -> dict[str, Any]:
        """Make this part's seeds; the process that completes them writes statistics and summary."""
        if not self.config.store:
            self.say_plan(folder.path)
            folder.reopen(configs.plain(self._asked))
            return self.pass_by(folder)
        target = self._open(folder)
        self.say_plan(folder.path, len(self.missing(target)))
        done = self.fill(target)
        if left := target.missing():
            parallel.say(f"{folder.path}: {len(left)} seeds are left to other parts")
            return {}
        # Without statistics only the models that are validated have to be read.
        models = slice(self.config.validate if self.config.statistics == "none" else None)
        read = (
            Made(
                target.read(s, models), target.read(s, name="loss"), target.read(s, name="attempts")
            )
            for s in range(self.config.seeds)
        )
        return command.finish(folder, self._summary(read, done, folder.path))

    def _open(self, folder: RunFolder) -> store.Store:
        """Return the store of the folder, made or extended, with room for what is missing.

        A store may have more seeds than the config asks for: it is all of them that are finished.
        """
        target = store.Store.create(folder.path, self.metadata)
        self.metadata = target.metadata
        self.config = dataclasses.replace(self.config, seeds=target.metadata.seeds)
        self._check_again(folder, self.metadata)
        more = 0 if self.again is None else 1
        needed = (len(target.missing()) + more) * self.metadata.seed_bytes
        free = shutil.disk_usage(folder.path).free
        if needed > free:
            raise store.StoreError(
                f"{folder.path}: {needed / 1e9:.1f} GB are to be written, {free / 1e9:.1f} GB are "
                "free"
            )
        # Nothing can be wrong any more.
        folder.reopen(configs.plain(self._asked) | {"seeds": self.config.seeds})
        if self.again is not None:
            target.discard(self.again)
        return target

    def stream(
        self, seeds: Sequence[int], see: Callable[[int, np.ndarray], None] = lambda seed, loss: None
    ) -> Iterator[tuple[int, Made[Any]]]:
        """Yield (seed, its models), one after the other; `see` is shown every chunk's losses.

        The models lie on the host if they are to be stored, else on the device.

        Raises:
          DivergedError: a good number of models is made, and none is of use.
        """
        models, sound = 0, False
        for seed, sets in self._drawn_ahead(seeds):
            made = self._make(seed, sets, lambda loss: see(seed, loss))  # noqa: B023
            loss = np.asarray(made.loss)
            models, sound = models + len(loss), sound or bool(np.isfinite(loss).any())
            if models >= _TELLING and not sound:
                raise DivergedError(models)
            yield seed, made

    def _drawn_ahead(self, seeds: Sequence[int]) -> Iterator[tuple[int, Sets]]:
        """Yield (seed, its sets), while the next are drawn: a GPU makes models in less time."""
        with ThreadPoolExecutor(1) as other:
            coming = [other.submit(self.sets, seed) for seed in seeds[:1]]
            for i, seed in enumerate(seeds):
                sets = coming.pop().result()
                coming = [other.submit(self.sets, following) for following in seeds[i + 1 : i + 2]]
                yield seed, sets

    def missing(self, target: store.Store) -> list[int]:
        """Return the seeds of this part that are not there yet."""
        return [s for s in target.missing() if s % self.part.count == self.part.index]

    def fill(self, target: store.Store) -> Done:
        """Write the seeds of this part that are missing.

        Raises:
          Interrupted: by a signal; finished seeds are kept.
          StoreError: the disk is full, say; finished seeds are kept.
        """
        seeds = self.missing(target)
        done = Done(model_bytes=self.metadata.seed_bytes // self.metadata.sets)
        with (
            _Watch(target.folder, len(seeds) * self.config.sampling.sets, done) as watch,
            contextlib.ExitStack() as writing,
        ):
            for seed, made in self.stream(seeds, watch):
                with done.waiting():
                    writing.close()  # one seed is written while the next is made
                    wait = target.write(seed, *made)
                writing.callback(wait)
            with done.waiting():
                writing.close()
        return done

    def pass_by(self, folder: RunFolder | None) -> dict[str, Any]:
        """Make all models without keeping them; statistics and summary go into the folder."""
        path = None if folder is None else folder.path
        done = Done()
        with _Watch(None, self.config.seeds * self.config.sampling.sets, done) as watch:
            made = (found for _, found in self.stream(range(self.config.seeds), watch))
            summary = self._summary(made, done, path)
        return vars(summary) if folder is None else command.finish(folder, summary)

    def _summary(self, seeds: Iterator[Made[Any]], done: Done, folder: Path | None) -> Summary:
        """Return the summary of models that are read or made while it is formed."""
        config, whole = self.config, _Whole(self)
        for made in seeds:
            whole.add(made)
        loss, tries, accuracy = whole.arrays()
        if not np.isfinite(loss).any():
            raise DivergedError(len(loss))
        if whole.statistics is not None and folder is not None:
            whole.statistics.save(folder / store.STATISTICS)
        failed = 0 if config.restarts is None else int((~(loss < config.restarts.loss)).sum())
        return Summary(
            models=len(loss),
            seeds=config.seeds,
            sets=config.sampling.sets,
            examples=self.examples,
            parameters=self.factory.layout.size,
            layout=self.metadata.plain()["layout"],
            dtype=config.dtype,
            stored=config.store,
            path=self._path,
            path_reason=self.reason or None,
            fingerprint=self.metadata.origin["fingerprint"],
            privacy=self.privacy,
            diverged=int((~np.isfinite(loss)).sum()),
            loss=_spread(loss),
            restarts=None
            if config.restarts is None
            else {"mean": float(tries.mean()), "most": int(tries.max()), "failed": failed},
            validation={"not_available": self.held_out}
            if isinstance(self.held_out, str)
            else {"models": len(accuracy), "images": len(self.held_out[1]), **_spread(accuracy)},
            statistics=None
            if whole.statistics is None
            else {
                "file": store.STATISTICS if folder is not None else None,
                "covariance": config.statistics == "covariance",
                "zero_variance": self.factory.layout.size - len(whole.statistics.varying),
            },
            bytes=self.metadata.seed_bytes * config.seeds,
            session=done.plain(),
            device=hardware.of_mesh(self.factory.mesh),
            versions=hardware.versions(),
        )

    def accuracies(self, weights: np.ndarray | Array) -> np.ndarray:
        """Return the share of the other split's images that each of S models gives their labels.

        Args:
          weights: (S, P), on the host or the device.

        Returns:
          (S,), or nothing where there is no other split.
        """
        if isinstance(self.held_out, str) or not len(weights):
            return np.empty(0)
        return np.asarray(self._accuracies(weights, *self.held_out))


class _Whole:
    """What all models have in common, gathered seed by seed."""

    def __init__(self, production: Production) -> None:
        self.statistics: statistics.Statistics | None = None
        self._production = production
        self._rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, made: Made[Any]) -> None:
        config = self._production.config
        accuracies = self._production.accuracies(made.weights[: config.validate])
        loss = np.asarray(made.loss)
        self._rows.append((loss, np.asarray(made.attempts), accuracies))
        sound = np.isfinite(loss)
        if config.statistics == "none" or not sound.any():
            return
        covariance = config.statistics == "covariance"
        new = statistics.of(made.weights, covariance=covariance, kept=sound)
        before = self.statistics
        self.statistics = new if before is None else statistics.merged(before, new)

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the models' losses, attempts and accuracies."""
        loss, attempts, accuracies = map(np.concatenate, zip(*self._rows, strict=True))
        return loss, attempts, accuracies


@dataclasses.dataclass
class Done:
    """What a process has made since it was started.

    Attributes:
      models: how many.
      seconds: it took.
      waited: of the seconds, in which the disk was waited for.
      model_bytes: of a stored model; 0 where nothing is stored.
    """

    models: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    model_bytes: int = 0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waited for the disk."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.waited += time.perf_counter() - began

    def plain(self) -> dict[str, Any]:
        """Return it as the summary says it."""
        rate = self.models / self.seconds if self.seconds else None
        stored = self.model_bytes > 0
        return {
            "models": self.models,
            "seconds": round(self.seconds, 3),
            "models_per_second": None if rate is None else round(rate, 1),
            "bytes_per_second": round(rate * self.model_bytes) if stored and rate else None,
            "waited_for_disk": round(self.waited, 3) if stored else None,
        }


class _Watch:
    """Progress and signals while models are made.

    Attributes:
      done: what has been made so far.
    """

    def __init__(self, folder: Path | None, models: int, done: Done) -> None:
        """Watch the making of so many models into a store's folder; None if nothing is kept."""
        self.done = done
        self._folder = folder
        self._models = models
        self._signals = Signals()
        self._progress = Progress([Stretch("shadow models", models)])
        self._began = time.perf_counter()

    def __enter__(self) -> _Watch:
        self._signals.__enter__()
        self._progress.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._progress.__exit__(*error)
        self._signals.__exit__(*error)
        self.done.seconds = time.perf_counter() - self._began

    def __call__(self, seed: int, loss: np.ndarray) -> None:
        done = self.done
        self._progress.update(0, done.models, {"loss": loss})
        done.models += len(loss)
        done.seconds = time.perf_counter() - self._began
        if self._signals.came and done.models < self._models:
            after = f"{self._folder}: go on with --resume" if self._folder else "nothing was kept"
            raise Interrupted(f"stopped in seed {seed}; {after}", self._signals.number)


def _features(config: Config) -> features.Features:
    """Return the features that models are trained on, which must have classes."""
    own = features.load(Path(config.features) / config.split)
    if own.labels.ndim > 1:
        raise ValueError(f"{config.features}: labels are attributes; classes are needed")
    if own.labels.min() < 0:
        raise ValueError(f"{config.features}: labels are negative: {own.labels.min()}")
    return own


def metadata(config: Config, layout: store.Layout, fingerprint: str) -> store.Metadata:
    """Return what a store says of its models.

    Args:
      config: of the models, with the noise that their privacy needs.
      layout: of their weights.
      fingerprint: of the features that they are trained on.
    """
    tree = configs.plain(config)
    origin = {name: tree[name] for name in ("split", "sampling", "training", "restarts", "seed")}
    origin["fingerprint"] = fingerprint
    return store.Metadata(layout, config.sampling.sets, config.seeds, config.dtype, origin)


def promised(config: Training, examples: int) -> dict[str, Any] | None:
    """Return what a summary says of privacy."""
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
        "bound": {f"{fpr:g}": privacy.power(fpr, config.privacy, examples, steps) for fpr in _FPRS},
    }


def _spread(values: np.ndarray) -> dict[str, float | None]:
    """Return mean, deviation and largest of the finite values; None where there are none."""
    wide = values[np.isfinite(values)].astype(np.float64)
    if not len(wide):
        return {"mean": None, "std": None, "max": None}
    return {"mean": float(wide.mean()), "std": float(wide.std()), "max": float(wide.max())}


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plan", action="store_true", help="tell what is to come, and stop")
    parser.add_argument("--part", metavar="I/N", help="every N-th seed from seed I on")
    parser.add_argument("--verify", action="store_true", help="read all, and name what is damaged")
    parser.add_argument("--regenerate", type=int, metavar="S", help="make seed S again")


def _load_with_flags(config: Config, flags: argparse.Namespace) -> Production | None:
    """Do what the flags ask for instead of a run, or return the production that is to run."""
    if flags.verify:
        _verify(flags.out)
        return None
    folder = None if str(flags.out) == "none" else flags.out
    part = Part.read(flags.part)
    if folder is None:
        config = dataclasses.replace(config, store=False)
    if part.count > 1 and (not config.store or flags.overwrite):
        raise ValueError(
            "several parts share a folder: they need a store, and none may overwrite it"
        )
    again = flags.regenerate
    if again is not None and (not config.store or again % part.count != part.index):
        again = None  # another part makes it, or there is nothing to make again
    production = parallel.everywhere(lambda: Production(config, part, again))
    if flags.plan or folder is None:
        production.say_plan(folder)
        if not flags.plan:
            parallel.say(json.dumps(production.pass_by(None), indent=2))
        return None
    flags.shared = part.count > 1
    flags.resume = flags.resume or part.count > 1 or flags.regenerate is not None
    return production


def _verify(folder: Path) -> None:
    """Say that everything is sound, or raise ValueError with what is not."""
    found = store.Store(folder)
    damaged, missing = found.damaged(), found.missing()
    if damaged:
        raise ValueError("\n".join(damaged.values()))
    parallel.say(f"{folder}: sound, {len(missing)} of {found.metadata.seeds} seeds are missing")


def _say(summary: dict[str, Any]) -> str:
    """Say how many models there are, and whether the disk held them up."""
    made = summary["session"]
    said = f"{summary['models']} models, {made['models']} of them now in {made['seconds']:.0f} s"
    if made["models"] and made["waited_for_disk"] is not None:
        said += f", {made['waited_for_disk']:.1f} s of it waiting for the disk"
    return said


COMMAND = command.Command(
    name="train-shadow-models",
    about=str(__doc__),
    config=Config,
    load=Production,
    summary=Summary,
    # The metadata last: a removal that is cut leaves a store that can be removed.
    files=(store.STATISTICS, *(f"{name}/" for name in store.ARRAYS), store.METADATA),
    say=_say,
    free=(*command.FREE, "seeds", "validate", "statistics", "store"),
    less="--execution.chunk with fewer models",
    flags=_add_flags,
    load_with_flags=_load_with_flags,
)

"""Make a labelled data set out of trained networks alone: inverted images, batch after batch.

    jinv synthesise --config synthesise_fashion_mnist --out out/synthetic \\
        --networks.0.weights out/teacher
    jinv synthesise --config ... --out out/synthetic --resume

The objective is that of `jinv invert`. Every batch has a seed of its own, which its number decides,
so that devices and hosts share the batches and the files stay the same. A run that was stopped goes
on with the batch that was not finished.

`filter` drops images that another network does not recognise, or that are near to another image of
their class, and makes new ones for them.

The output folder holds train/CCC/BBBBBB_II.png (class, batch, place in it), which is a folder of
pictures as `data: {format: images, folder: out/synthetic}` or torchvision's ImageFolder read it,
classes.txt (a name a line), images.csv, batches/*.json (what every batch gave), grid.png,
report.html and, last of all, summary.json; with `array_record` also tfds/, the same as TensorFlow
Datasets keep it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from jinv import checks, data, image, optimise, parallel
from jinv.attacks.deepinversion import Attack
from jinv.checks import Class, Count, NotNegative, Seed, Share, Some
from jinv.distill import array_record, lessons, plan
from jinv.distill.class_moments import class_moments
from jinv.files import csv_text, write_atomic
from jinv.models.network import Network
from jinv.recipes.invert import PRESETS, Objective, check_classes, distinct
from jinv.reports import page
from jinv.runs import command, hardware
from jinv.runs import config as configs
from jinv.runs.background import Background
from jinv.runs.progress import Progress, Stretch
from jinv.runs.run_folder import FolderError, RunFolder
from jinv.runs.signals import Signals
from jinv.scores import judging

_SHOWN = 60
"""Images in the grid and the report."""
_TRAIN, _BATCHES, _DUPLICATES = "train", "batches", "duplicates"
"""Folders: of the images, and of what was found out about every batch and every round."""


@dataclasses.dataclass(frozen=True)
class Filter:
    """Which images are kept.

    Attributes:
      judge: a network that must give an image its class.
      confidence: least probability of the class that it must give.
      distance: least root mean square distance, of pixels in [0, 1], to the earlier images of the
        class; a nearer image is a duplicate.
      rounds: how often images are made at most: in the second round for those that were dropped in
        the first, and so on.
    """

    judge: Network | None = None
    confidence: Share = 0.0
    distance: NotNegative = 0.0
    rounds: Count = 4

    def __post_init__(self) -> None:
        checks.fields(self)
        if self.judge is None:
            checks.unused(self, "there is no judge", "confidence")
            if not self.distance:
                raise ValueError("filter drops nothing: give it a judge or a distance")


@dataclasses.dataclass(frozen=True)
class Config(Objective):
    """What a config file holds.

    Attributes:
      judges: other networks that look at the images; they have no say in the optimisation.
      images_per_class: how many images of each class.
      classes: of which classes; all by default.
      batch: images that are optimised together.
      order: "mixed": a batch has images of many classes, as many of each as fit; "classes": every
        batch is of one class.
      class_statistics: real images of the classes. Batches of one class are then compared to the
        BatchNorm statistics of this class instead of those of all (LPLD). What is made depends on
        real data then.
      filter: which images are kept; all by default.
      class_names: a text file with one name a line, or one of "imagenet", "cifar10",
        "fashion_mnist", "emnist-letters" and so on; the network's own by default.
      array_record: write the images for TensorFlow Datasets too.
      seed: of everything random.
    """

    judges: tuple[Network, ...] = ()
    images_per_class: Count = 10
    classes: Annotated[tuple[Class, ...], Some()] | None = None
    batch: Count = 100
    order: plan.Order = "mixed"
    class_statistics: data.Source | None = None
    filter: Filter | None = None
    class_names: data.ClassNames | None = None
    array_record: bool = False
    seed: Seed = 0

    def __post_init__(self) -> None:
        checks.fields(self)
        if self.classes is not None and len(set(self.classes)) < len(self.classes):
            raise checks.FieldError("classes", " names a class twice")
        if self.class_statistics is not None and self.order != "classes":
            raise ValueError("class_statistics are of single classes: they need order: classes")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary(command.Summary):
    """What summary.json holds; a step is one of a batch.

    Attributes:
      model: names of the inverted networks, joined by "+".
      images: how many were kept.
      per_class: class -> how many were kept.
      missing: how many are wanting, because the filter has dropped them in the last round too.
      dropped: how many were dropped, by "judge" and as "duplicate".
      batches: how many were optimised.
      images_per_second: optimised, by all devices together, without compilation.
      top1: network -> share of the kept images that it gives their class.
      confidence: network -> mean probability of their class.
      loss: mean of the batches'.
      fingerprint: sha256 of all names and contents of the images.
    """

    model: str
    images: int
    per_class: dict[str, int]
    missing: int
    dropped: dict[str, int]
    batches: int
    images_per_second: float
    top1: dict[str, float]
    confidence: dict[str, float]
    loss: float
    fingerprint: str


class Synthesis(command.Loaded):
    """A config with its networks loaded, and an attack for every batch that is made at once.

    Attributes:
      config: the config.
      members: the inverted networks.
      wanted: class -> number of images.
      names: of all classes.
      judges: network -> what it says of pixels in [0, 1].
      workers: how many batches this process makes at once.
      steps: of a batch.
      digits: of a class in the names of folders, so that these sort like the classes.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.members = config.members()
        first = self.members[0].net
        if config.class_statistics is not None:
            real = config.class_statistics.load("train", first.preprocessing.size)
            real = lessons.lesson(real, first.classes, first.class_names, network=first.name)
            self.members = [
                dataclasses.replace(m, class_moments=class_moments(m.net, real))
                for m in self.members
            ]
        self.names = data.class_names(first.classes, config.class_names, first.class_names)
        self.wanted = Counter(
            dict.fromkeys(config.classes or range(first.classes), config.images_per_class)
        )
        inverted = [member.net for member in self.members]
        others = [network.load() for network in config.judges]
        self._filter = config.filter.judge.load() if config.filter and config.filter.judge else None
        others += [self._filter] if self._filter is not None else []
        self.nets = distinct(inverted, list(dict.fromkeys(others)))
        for net in self.nets:
            check_classes(net, first, list(self.wanted))
        self.judges = {net.name: judging.make_judge(net) for net in self.nets}
        self._competitor = config.competitor.load() if config.competitor else None
        self._key = jax.random.key(config.seed)
        targets = plan.plan(self.wanted, config.batch, config.order)[0].targets
        self._attacks = [self._attack(device, targets) for device in self._devices()]
        self.workers = len(self._attacks)
        self.steps = sum(phase.steps for phase in self._attacks[0].phases)
        self.digits = max(3, len(str(first.classes - 1)))

    def _devices(self) -> list[jax.Device | None]:
        """Return the devices that make a batch each; [None] if all share every batch."""
        execution = self.config.execution
        if execution.placement == "auto":
            return [*parallel.local_devices(execution.devices)]
        if jax.process_count() > 1:
            raise ValueError(
                "several processes share the batches, and not each batch: leave "
                "execution.placement out"
            )
        return [None]

    def _attack(self, device: jax.Device | None, targets: Sequence[int]) -> Attack:
        if device is None:
            return self.config.build(self.members, targets, self._competitor)
        execution = dataclasses.replace(self.config.execution, devices=None)
        config = dataclasses.replace(self.config, execution=execution)
        with parallel.only(device):
            return config.build(self.members, targets, self._competitor)

    def accepts(self, target: int, verdicts: Mapping[str, judging.Prediction], i: int) -> bool:
        """Return whether the filter's judge, if there is one, recognises image i of a batch."""
        if self._filter is None or self.config.filter is None:
            return True
        found = verdicts[self._filter.name]
        sure = found.probabilities[i, target] >= self.config.filter.confidence
        return bool(found.index[i] == target and sure)

    def run(self, folder: RunFolder) -> dict[str, Any]:
        """Make what is not made yet, and write the results; return the summary.

        Raises:
          Interrupted: SIGTERM or Ctrl-C came; finished batches are kept.
        """
        rounds = 1 if self.config.filter is None else self.config.filter.rounds
        nothing = parallel.put(self._attacks[0].mesh, PartitionSpec(), {"none": np.int32(0)})
        batches: list[plan.Batch] = []
        work = _Work(self, folder)
        with folder.checkpoints() as manager, Signals() as stopping:
            folder.restore(manager, lambda meta: nothing)  # for the time that has passed
            for number in range(rounds):
                missing = self.wanted - work.kept
                more = plan.plan(missing, self.config.batch, self.config.order, len(batches))
                batches += more
                work.make(more, stopping)
                if parallel.any_process(stopping.came):
                    done = sum(work.file(batch).exists() for batch in batches)
                    folder.save(manager, done, nothing)
                    raise folder.stopped(stopping.number, done, len(batches))
                parallel.on_main(lambda: work.find_duplicates(number, more), FolderError)  # noqa: B023
                work.count(number, more)
        summary: dict[str, Any] = {}
        parallel.on_main(lambda: summary.update(self._write(folder, work, batches)), FolderError)
        return summary

    def make(self, worker: int, batch: plan.Batch, **how: Any) -> tuple[jax.Array, jax.Array]:
        """Return a batch's images (B, H, W, C) as pixels, not clipped, and its loss.

        Args:
          worker: which of this process's attacks makes it.
          batch: the batch.
          **how: of `optimise.run`.
        """
        attack = self._attacks[worker].with_targets(batch.targets)
        run_key, noise_key = jax.random.split(jax.random.fold_in(self._key, batch.number))
        images = attack.initial(noise_key)
        state = optimise.run(attack.phases, run_key, images, attack.data, **how)
        return image.denormalise(state.best_images, attack.space), state.best_loss

    def _write(
        self, folder: RunFolder, work: _Work, batches: Sequence[plan.Batch]
    ) -> dict[str, Any]:
        """Write tables, pictures and the report; the summary last."""
        rows = [row for batch in batches for row in work.rows(batch)]
        kept = [row for row in rows if row["kept"]]
        if not kept:
            raise ValueError(f"the filter has dropped all {len(rows)} images: ask for less")
        write_atomic(folder.path / "classes.txt", "\n".join(self.names) + "\n")
        table = [[*rows[0]], *([*row.values()] for row in rows)]
        write_atomic(folder.path / "images.csv", csv_text(table))
        if self.config.array_record:
            channels = self._attacks[0].space.channels
            array_record.write(folder.path / "tfds", folder.path / _TRAIN, self.names, channels)
        shown = _spread(kept, _SHOWN)
        pictures = [page.read_png(folder.path / row["file"]) for row in shown]
        page.write_png(folder.path / "grid.png", image.grid(np.stack(pictures)))
        per_class = Counter(row["class"] for row in kept)
        found = {name: [row[name] == row["class"] for row in kept] for name in self.judges}
        summary = Summary(
            **command.shared(folder, hardware.describe()["devices"]),
            model="+".join(member.net.name for member in self.members),
            images=len(kept),
            per_class={str(c): per_class[c] for c in self.wanted},
            missing=sum((self.wanted - per_class).values()),
            dropped=dict(Counter(row["dropped"] for row in rows if not row["kept"])),
            batches=len(batches),
            images_per_second=self._rate(folder.clock),
            top1={name: float(np.mean(right)) for name, right in found.items()},
            confidence={
                name: float(np.mean([row[f"{name}_probability"] for row in kept]))
                for name in self.judges
            },
            loss=float(np.mean(work.losses)),
            fingerprint=work.fingerprint({row["file"] for row in kept}),
        )
        self._report(folder, summary, list(zip(shown, pictures, strict=True)))
        return command.finish(folder, summary)

    def _rate(self, clock: optimise.Clock) -> float:
        """Return images a second of all devices together.

        The clock has the batches of this process, and adds up the times of its devices.
        """
        each = clock.steps / self.steps * self.config.batch / max(clock.stepping, 1e-9)
        return round(each * self.workers * jax.process_count(), 3)

    def _report(
        self, folder: RunFolder, summary: Summary, shown: Sequence[tuple[dict[str, Any], Any]]
    ) -> None:
        pictures = [self._picture(row, pixels) for row, pixels in shown]
        told = [(name, top1, summary.confidence[name]) for name, top1 in summary.top1.items()]
        counts = [(int(c), self.names[int(c)], count) for c, count in summary.per_class.items()]
        sections = [
            page.Section("Images", page.Pictures(pictures), "Some of every class."),
            page.Section(
                "Networks",
                page.Table(("network", "top-1", "mean probability of the class"), told),
                f"Of all {summary.images} images. Networks that made them are the first "
                f"{len(self.members)}.",
            ),
            page.Section("Classes", page.Table(("class", "name", "images"), counts)),
        ]
        body = page.Page(
            f"{summary.images} images out of {summary.model}",
            sections,
            f"{summary.batches} batches of {self.config.batch}, "
            f"{summary.images_per_second:.3g} images a second.",
        )
        ending = page.ending(
            vars(summary),
            hardware.describe(),
            configs.to_yaml(self.config),
            {net.name: net.weights for net in self.nets},
        )
        body.write(folder.path / "report.html", ending)

    def _name(self, c: int) -> str:
        """Return the name of a class, which a judge may know more of."""
        return self.names[c] if c < len(self.names) else f"class {c}"

    def _picture(self, row: dict[str, Any], pixels: np.ndarray) -> page.Picture:
        verdicts = tuple(
            page.Verdict(
                name,
                self._name(row[name]),
                row[name],
                row[f"{name}_highest"],
                row[name] == row["class"],
            )
            for name in self.judges
        )
        return page.Picture(
            pixels, f"{row['class']} {self._name(row['class'])}", row["file"], verdicts
        )


class _Work:
    """What a run has in its folder, and how it makes the rest.

    Attributes:
      kept: class -> number of images, after the rounds that were counted.
      losses: of the batches of these rounds.
    """

    def __init__(self, synthesis: Synthesis, folder: RunFolder) -> None:
        self.kept: Counter[int] = Counter()
        self.losses: list[float] = []
        self._digests: dict[str, str] = {}
        self._synthesis = synthesis
        self._folder = folder
        self._duplicates: set[str] = set()
        self._lock = threading.Lock()
        for name in (_TRAIN, _BATCHES, _DUPLICATES):
            (folder.path / name).mkdir(exist_ok=True)

    # --- batches ----------------------------------------------------------------------------------

    def file(self, batch: plan.Batch) -> Path:
        """Return the file that says what a batch gave; it is there once the images are."""
        return self._folder.path / _BATCHES / f"{batch.number:06d}.json"

    def _read(self, batch: plan.Batch) -> dict[str, Any]:
        """Return what a batch gave."""
        return json.loads(self.file(batch).read_text())

    def make(self, batches: Sequence[plan.Batch], stopping: Signals) -> None:
        """Make this process's share of the batches that are not made yet."""
        todo = [batch for batch in batches if not self.file(batch).exists()]
        workers = self._synthesis.workers
        every, first = workers * jax.process_count(), workers * jax.process_index()
        steps = self._synthesis.steps
        share = range(first, first + workers)
        mine = [todo[i::every] for i in share]
        before = len(batches) - len(todo)
        with Progress([Stretch("images", (before + sum(map(len, mine))) * steps)]) as progress:
            show = _Show(progress, before * steps)
            # Without another thread if there is one device: signals come to the main thread.
            if workers == 1:
                self._make_all(0, mine[0], show, stopping)
                return
            with ThreadPoolExecutor(workers, "jinv-batches") as pool:
                jobs = [
                    pool.submit(self._make_all, worker, some, show, stopping)
                    for worker, some in enumerate(mine)
                ]
                for job in jobs:
                    job.result()

    def _make_all(
        self, worker: int, batches: Sequence[plan.Batch], show: _Show, stopping: Signals
    ) -> None:
        clock = optimise.Clock()
        with Background(alone=True) as background:
            for batch in batches:
                pixels, loss = self._synthesis.make(
                    worker,
                    batch,
                    callback=show,
                    clock=clock,
                    should_stop=lambda: stopping.came,
                    wanted=lambda done: False,
                )
                if stopping.came:
                    break
                # The device begins the next batch while these are looked at and written.
                background(functools.partial(self._keep, batch, pixels, loss))
        with self._lock:
            total = self._folder.clock
            total.compiling += clock.compiling
            total.stepping += clock.stepping
            total.steps += clock.steps

    def _keep(self, batch: plan.Batch, pixels: jax.Array, loss: jax.Array) -> None:
        """Write the images that the filter accepts, and then what the batch gave."""
        synthesis, wanted = self._synthesis, batch.wanted
        seen = image.to_bytes(np.asarray(pixels))
        verdicts = {name: judge(seen / np.float32(255)) for name, judge in synthesis.judges.items()}
        files: list[str | None] = []
        for i, target in enumerate(batch.targets[:wanted]):
            accepted = synthesis.accepts(target, verdicts, i)
            files.append(
                f"{_TRAIN}/{target:0{synthesis.digits}d}/{batch.number:06d}_{i:03d}.png"
                if accepted
                else None
            )
        named = {file: seen[i] for i, file in enumerate(files) if file is not None}
        digests = page.write_pngs(self._folder.path, named)
        rows = np.arange(wanted)
        told = {
            "loss": float(loss),
            "classes": batch.targets[:wanted],
            "files": files,
            "sha256": [digests.get(file) if file else None for file in files],
            "networks": {
                name: {
                    "class": found.index[:wanted].tolist(),
                    "highest": _rounded(found.probability[:wanted]),
                    "probability": _rounded(found.probabilities[rows, batch.targets[:wanted]]),
                }
                for name, found in verdicts.items()
            },
        }
        write_atomic(self.file(batch), json.dumps(told) + "\n")

    # --- rounds -----------------------------------------------------------------------------------

    def find_duplicates(self, number: int, batches: Sequence[plan.Batch]) -> None:
        """Remove a round's images that are near to earlier ones of their class; write which."""
        wanted = self._synthesis.config.filter
        if wanted is None or not wanted.distance:
            return
        told = self._told(number)
        if not told.exists():
            new = [row["file"] for batch in batches for row in self.rows(batch) if row["kept"]]
            write_atomic(told, json.dumps(self._near(new, wanted.distance)) + "\n")
        for file in json.loads(told.read_text()):
            (self._folder.path / file).unlink(missing_ok=True)

    def _told(self, number: int) -> Path:
        return self._folder.path / _DUPLICATES / f"{number:03d}.json"

    def _near(self, new: Sequence[str], distance: float) -> list[str]:
        """Return those of the new images that are near to any that came before them."""
        dropped = []
        for folder in sorted({str(Path(file).parent) for file in new}):
            own = {file for file in new if str(Path(file).parent) == folder}
            earlier = (self._folder.path / folder).glob("*.png")
            old = sorted({f"{folder}/{path.name}" for path in earlier} - own)
            kept = [page.read_png(self._folder.path / file) / 255 for file in old]
            for file in sorted(own):
                pixels = page.read_png(self._folder.path / file) / 255
                if kept and judging.pixel_distances(pixels[None], np.stack(kept)).min() < distance:
                    dropped.append(file)
                else:
                    kept.append(pixels)
        return dropped

    def count(self, number: int, batches: Sequence[plan.Batch]) -> None:
        """Count what a round has given."""
        if self._told(number).exists():
            self._duplicates |= set(json.loads(self._told(number).read_text()))
        for batch in batches:
            told = self._read(batch)
            self.losses.append(told["loss"])
            for target, file, digest in zip(
                told["classes"], told["files"], told["sha256"], strict=True
            ):
                if file is not None:
                    self._digests[file] = digest
                    self.kept[target] += file not in self._duplicates

    def fingerprint(self, files: Collection[str]) -> str:
        """Return the sha256 of names and contents of images that were counted."""
        digest = hashlib.sha256()
        for file in sorted(files):
            digest.update(f"{file} {self._digests[file]}\n".encode())
        return digest.hexdigest()

    def rows(self, batch: plan.Batch) -> list[dict[str, Any]]:
        """Return a batch's images, each as a row of images.csv."""
        told = self._read(batch)
        rows = []
        for i, (target, file) in enumerate(zip(told["classes"], told["files"], strict=True)):
            dropped = "judge" if file is None else "duplicate" if file in self._duplicates else ""
            row = {
                "file": file or "",
                "class": target,
                "batch": batch.number,
                "kept": not dropped,
                "dropped": dropped,
            }
            for name, found in told["networks"].items():
                row[name] = found["class"][i]
                row[f"{name}_highest"] = found["highest"][i]
                row[f"{name}_probability"] = found["probability"][i]
            rows.append(row)
        return rows


class _Show:
    """Shows the steps of all batches that are made at once; a callback of `optimise.run`."""

    def __init__(self, progress: Progress, done: int) -> None:
        self._progress = progress
        self._done = done
        self._lock = threading.Lock()

    def __call__(self, chunk: optimise.Chunk) -> None:
        with self._lock:
            losses = {"loss": chunk.metrics["loss"]}
            self._progress.update(0, self._done, losses)
            self._done += len(chunk.metrics["loss"])


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(value), 6) for value in values]


def _spread(rows: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Return so many rows at most, as many of every class as fit, class by class."""
    order: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        order.setdefault(row["class"], []).append(row)
    each = max(1, count // len(order))
    return [row for c in sorted(order)[:count] for row in order[c][:each]]


def _say(summary: dict[str, Any]) -> str:
    """Say how many images there are, and what networks think of them."""
    lines = [f"{summary['images']} images, {summary['images_per_second']:.3g} a second"]
    if summary["missing"]:
        lines.append(f"{summary['missing']} are wanting: the filter has dropped them")
    return "\n".join(
        [*lines, *(f"{n} gives {100 * s:.1f}% their class" for n, s in summary["top1"].items())]
    )


COMMAND = command.Command(
    name="synthesise",
    about=str(__doc__),
    config=Config,
    load=Synthesis,
    summary=Summary,
    files=(
        *(f"{folder}/" for folder in (_TRAIN, _BATCHES, _DUPLICATES, "tfds")),
        *("classes.txt", "images.csv", "grid.png", "report.html"),
    ),
    say=_say,
    presets=PRESETS,
    free=(*command.FREE, "class_names"),
    less="--execution.images-at-once, or a smaller --batch",
)

"""Judge a folder of images, real or synthetic: what networks say of them, and how varied they are.

    jinv evaluate --model resnet50 --weights resnet50-11ad3fa6.pth --out out/judged \\
        --data.format images --data.folder out/synthetic
    jinv evaluate --config evaluate_fashion_mnist --out out/judged
    jinv evaluate --config ... --out ... --resume

The images are in a folder with one subfolder a class, or any other data that `data` names. Their
classes are found among a network's by name, or by number ("3", "003", "class 3"); what cannot be
found is an error. With `real`, features of real images tell how far the others are from them.

A checkpoint is saved every ten seconds, and on Ctrl-C or SIGTERM; --resume goes on after the last
finished batch. The folder holds report.html (tables, confusions, pictures of the most frequent
mistakes), predictions.csv (what every network gives every image) and, last of all, summary.json.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

from jinv import checks, data, files, optimise, parallel, training
from jinv.checks import Count, File
from jinv.files import csv_text, write_atomic
from jinv.image import Preprocessing
from jinv.models import registry
from jinv.models.network import WORDS, Network
from jinv.net import Net
from jinv.reports import evaluation, page
from jinv.runs import command, compilation, hardware
from jinv.runs import config as configs
from jinv.runs.progress import Progress
from jinv.runs.run_folder import CHECKPOINTS, FolderError, RunFolder
from jinv.runs.signals import Signals
from jinv.scores import judging, predictions, quality
from jinv.scores.predictions import Predictions

CHECKPOINT_SECONDS = 10.0
"""Time between checkpoints."""
_PAIRED = 100
"""Images of a class whose features are compared in pairs, at most."""
_PAIRED_PIXELS = 2000
"""Images that are read again, for distances of pixels: 20 a class at most, and 2 at least."""
_NEAREST = 1000
"""Images whose nearest real image is looked for, at most."""
_MISTAKES = 10
"""Pairs of classes that are told as the most frequent mistakes."""
_EXAMPLES = 3
"""Pictures of each of these pairs."""


@dataclasses.dataclass(frozen=True)
class Images(data.Source):
    """Which images.

    Attributes:
      split: which part of them; None for "test", or for the whole of a folder of pictures that has
        no such part but the folders of the classes.
    """

    split: data.Split | None = None

    def folder_of_classes(self) -> Path:
        """Return the folder that holds the folders of the classes, of the format "images"."""
        root = files.path(self.folder or "")
        whole = self.split is None and not (root / self.splits.get("test", "test")).is_dir()
        return root if whole else self.pictures(self.split or "test")


@dataclasses.dataclass(frozen=True)
class Real(Images):
    """Which real images, if any.

    Attributes:
      format: as that of `data`; null for no real images.
    """

    format: data.Format | None = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.format is not None:
            super().__post_init__()
            return
        checks.fields(self)
        names = (f.name for f in dataclasses.fields(self) if f.name != "format")
        checks.unused(self, "real images need their format", *names)


@dataclasses.dataclass(frozen=True)
class Config:
    """What a config file holds.

    Attributes:
      model: name of the network, or `package.module:function` for one of your own; or `networks`.
      weights: a .pth or .safetensors file, "package" for weights inside an installed package, a
        folder that `jinv pretrain` wrote, or "random".
      classes: number of classes, if not the usual one.
      networks: several networks, in place of `model`.
      class_names: a text file with one name a line, or a known data set; None for the networks'.
      data: the images.
      real: real images to compare these with.
      size: of the images of a folder of pictures or of tfds as they are read, one side or height
        and width; None for each network's own, and then pictures are resized and cropped as its
        weights were evaluated. Others have their own.
      inception_splits: random parts of the images, over which the inception score has a mean and
        a deviation; papers have 10, of 5000 images each.
      batch: images at once.
    """

    model: registry.Name | None = None
    weights: Annotated[str, File(WORDS)] = "package"
    classes: Count | None = None
    networks: tuple[Network, ...] = ()
    class_names: data.ClassNames | None = None
    data: Images = dataclasses.field(default_factory=Images)
    real: Real = dataclasses.field(default_factory=Real)
    size: Count | tuple[Count, Count] | None = None
    inception_splits: Count = 1
    batch: Count = 64

    def __post_init__(self) -> None:
        checks.fields(self)
        if self.model is None:
            checks.unused(self, "they are those of `model`", "weights", "classes")
        if (self.model is None) != bool(self.networks):
            raise ValueError("model: name one network, or several under `networks`")
        for source in (self.data, self.real):
            if source.format is not None:
                source.check_size(self.size)

    @property
    def all_networks(self) -> tuple[Network, ...]:
        """The networks, however they are named."""
        return self.networks or (Network(str(self.model), self.weights, self.classes),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary(command.Summary):
    """What summary.json holds; a step is a batch.

    Attributes:
      images: number of images.
      classes: names of the data's classes.
      real_images: number of real images, 0 without.
      matched: network -> how its classes were found: by "name", "number" or "order".
      top1: network -> share of the images it gives their class.
      top5: network -> share of the images whose class is among its five likeliest.
      confidence: network -> mean probability of the images' class.
      mean_probability: network -> mean probability of the classes it gives.
      inception_score: network -> mean and std over the splits, of its own predictions; std is null
        for one split.
      fid: network -> Frechet distance of its features of the images and of the real ones; null
        without features or real images.
      nearest_real: network -> median, over a thousand images at most, of the cosine distance of
        features to the nearest real image: 0 for copies; null as above.
      diversity: mean over classes of the mean distance of two images of a class, of a sample of
        each: "pixels" (root mean square, pixels in [0, 1]), network -> cosine distance of its
        features; null without two images of a class, or features.
      per_class: network -> for every class its name, images, top1, top5, confidence and diversity.
      confusions: network -> the ten most frequent mistakes: the images' class, the one that is
        given, and the number of images.
    """

    images: int
    classes: list[str]
    real_images: int
    matched: dict[str, str]
    top1: dict[str, float]
    top5: dict[str, float]
    confidence: dict[str, float]
    mean_probability: dict[str, float]
    inception_score: dict[str, dict[str, float | None]]
    fid: dict[str, float | None]
    nearest_real: dict[str, float | None]
    diversity: dict[str, float | None]
    per_class: dict[str, list[dict[str, Any]]]
    confusions: dict[str, list[dict[str, Any]]]


class _Set:
    """Labelled images that are read a batch at a time, as a network wants them.

    Attributes:
      labels: (N,) indices of classes, or (N, K) attributes.
      classes: their names.
    """

    def __init__(self, source: Images, size: Any, nets: Sequence[Net]) -> None:
        self._size = size
        self._paths: list[Path] = []
        self._held: dict[Any, data.Dataset] = {}
        self._takes_size = source.takes_size
        if source.format == "images":
            self._root = source.folder_of_classes()
            self._paths, self.labels, self.classes = data.labelled_files(self._root)
            return
        for net in nets:
            key = self._key(net.preprocessing)
            if key not in self._held:
                wanted = size or net.preprocessing.size
                self._held[key] = source.load(source.split or "test", wanted)
        first = next(iter(self._held.values()))
        self.labels, self.classes = first.labels, first.classes

    def __len__(self) -> int:
        return len(self.labels)

    def _key(self, space: Preprocessing) -> Any:
        return (self._size or space.size) if self._takes_size else None

    def name(self, i: int) -> str:
        """Return an image's file below the folder of the classes, or its number."""
        return str(self._paths[i].relative_to(self._root)) if self._paths else str(i)

    def read(self, chosen: Sequence[int] | np.ndarray, space: Preprocessing) -> np.ndarray:
        """Return the chosen images as bytes (B, H, W, C)."""
        if self._paths:
            return data.image_files([self._paths[i] for i in chosen], self._size or space)
        return self._held[self._key(space)].images[np.asarray(chosen, int)]

    def batches(self, start: int, batch: int, space: Preprocessing) -> Iterator[np.ndarray]:
        """Yield the images from `start` on; the pictures of the next batch are read meanwhile."""
        waiting: collections.deque[list[Future]] = collections.deque()
        with ThreadPoolExecutor(os.cpu_count(), "jinv-reading") as pool:
            for first in range(start, len(self), batch):
                chosen = range(first, min(first + batch, len(self)))
                if not self._paths:
                    yield self.read(chosen, space)
                    continue
                waiting.append([pool.submit(self.read, [i], space) for i in chosen])
                if len(waiting) > 1:
                    yield np.concatenate([one.result() for one in waiting.popleft()])
            while waiting:
                yield np.concatenate([one.result() for one in waiting.popleft()])


class _Pass(NamedTuple):
    """One network over one set of images, as the progress bar shows it.

    Attributes:
      name: of both.
      steps: batches.
      net: the network.
      features: their length, None if there are none.
      images: the set.
      targets: (N,) classes of the images among the network's; None for real images.
      first: number of its first step.
    """

    name: str
    steps: int
    net: Net
    features: int | None
    images: _Set
    targets: np.ndarray | None
    first: int
    cost: float = 1.0


class Evaluation(command.Loaded):
    """A config with its networks read and its images found.

    Attributes:
      nets: the networks.
      names: network -> names of its classes, None if they are not known.
      images: what is judged.
      real: real images, None without.
      matched: network -> (its number of every class of the data, how that was found).
      batch: images at once.
      mesh: of the devices that share a batch.
      passes: what has to be computed.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.nets = [network.load() for network in config.all_networks]
        called = [net.name for net in self.nets]
        if len({*called, "pixels"}) <= len(called):
            raise ValueError(
                "networks need different names, and none may be called pixels; give them names: "
                f"{', '.join(called)}"
            )
        self.names: dict[str, Sequence[str] | None] = {
            net.name: net.class_names
            if config.class_names is None
            else data.class_names(net.classes, config.class_names)
            for net in self.nets
        }
        self.images = _Set(config.data, config.size, self.nets)
        if self.images.labels.ndim > 1:
            raise ValueError("data: its labels are attributes; one class an image is wanted")
        if config.inception_splits > len(self.images):
            raise ValueError(
                f"inception_splits must be at most {len(self.images)}, the number of images, not "
                f"{config.inception_splits}"
            )
        self.matched = {
            net.name: data.class_indices(
                self.images.classes, net.classes, self.names[net.name], net.name
            )
            for net in self.nets
        }
        self.real: _Set | None = None
        if config.real.format is not None:
            self.real = _Set(config.real, config.size, self.nets)
        self.batch = min(config.batch, max(len(self.images), len(self.real or ())))
        self.mesh = training.batch_mesh(self.batch)
        self.passes = self._passes()
        self._predict: dict[str, predictions.Predict] = {}

    def _passes(self) -> list[_Pass]:
        """Return what has to be computed; ValueError if images cannot be shown to a network."""
        found: list[_Pass] = []
        first = 0
        for net in self.nets:
            for images in filter(None, (self.images, self.real)):
                width = predictions.check(net, images.read([0], net.preprocessing))
                targets, name = self.matched[net.name][0][self.images.labels], net.name
                if images is self.real:
                    if width is None or min(len(images), len(self.images)) < 2:
                        continue  # there are no features, or no covariances of them
                    targets, name = None, f"{net.name}, real images"
                steps = -(-len(images) // self.batch)
                found.append(_Pass(name, steps, net, width, images, targets, first))
                first += steps
        return found

    def run(self, folder: RunFolder) -> dict[str, Any]:
        """Look at the images and write the results; return the summary (of the main process).

        Raises:
          Interrupted: SIGTERM or Ctrl-C came; a checkpoint was saved.
        """
        total = sum(one.steps for one in self.passes)
        summary: dict[str, Any] = {}
        with contextlib.ExitStack() as stack:
            written: list[predictions.Files] = []
            with (
                folder.checkpoints() as manager,
                Signals() as stopping,
                Progress(self.passes) as bar,
            ):
                restored = folder.restore(manager, lambda meta: self._state(0))
                done = 0 if restored is None else int(parallel.fetch(restored[1]["step"]))

                def begin() -> None:
                    for index in range(len(self.passes)):
                        written.append(stack.enter_context(self._files(folder, index, done)))

                def flush() -> None:
                    for file in written:
                        file.flush()

                def save() -> None:
                    parallel.on_main(flush, FolderError)
                    folder.save(manager, done, self._state(done))
                    manager.wait_until_finished()

                parallel.on_main(begin, FolderError)
                for index, block, terms in self._blocks(folder.clock, done):
                    parallel.on_main(lambda: written[index].add(block), FolderError)  # noqa: B023
                    bar.update(index, done, terms)
                    done += 1
                    stop = stopping() and done < total
                    if stop or done == total or folder.due(CHECKPOINT_SECONDS):
                        save()
                    if stop:
                        raise folder.stopped(stopping.number, done, total)

            def write() -> None:
                summary.update(self._write(folder, [file.read() for file in written]))

            parallel.on_main(write, FolderError)
        return summary

    def _files(self, folder: RunFolder, index: int, done: int) -> predictions.Files:
        """Return the files of a pass, of a run that has done so many steps."""
        one = self.passes[index]
        start = min(max(done - one.first, 0) * self.batch, len(one.images))
        place = folder.path / CHECKPOINTS / "passes" / str(index)
        return predictions.Files(place, len(one.images), one.net, one.features, start)

    def _blocks(
        self, clock: optimise.Clock, done: int
    ) -> Iterator[tuple[int, Predictions, dict[str, np.ndarray]]]:
        """Yield (pass, its next batch, what the progress bar says) after so many steps."""
        for index, one in enumerate(self.passes):
            begin = max(done - one.first, 0) * self.batch
            if begin >= len(one.images):
                continue
            if one.net.name not in self._predict:
                self._predict[one.net.name] = predictions.make_predict(one.net)
            predict, space = self._predict[one.net.name], one.net.preprocessing
            batches = one.images.batches(begin, self.batch, space)
            end, right = begin, 0
            compiled, began = compilation.seconds(), time.perf_counter()
            for block in predictions.blocks(one.net, predict, batches, self.batch, self.mesh):
                compiled = compilation.seconds() - compiled
                clock.compiling += compiled
                clock.stepping += time.perf_counter() - began - compiled
                clock.steps += 1
                start, end = end, end + len(block.top)
                terms = {"images": np.array([end])}
                if one.targets is not None:
                    right += int(block.hits(one.targets[start:end])[:, 0].sum())
                    terms["top-1"] = np.array([right / (end - begin)])
                yield index, block, terms
                compiled, began = compilation.seconds(), time.perf_counter()

    def _state(self, step: int) -> dict[str, Array]:
        """Return what a checkpoint holds."""
        return parallel.put(self.mesh, PartitionSpec(), {"step": np.int32(step)})

    # --- results ----------------------------------------------------------------------------------

    def _write(self, folder: RunFolder, found: Sequence[Predictions]) -> dict[str, Any]:
        """Write the predictions and the report; the summary last."""
        passes = list(zip(self.passes, found, strict=True))
        seen = {one.net.name: said for one, said in passes if one.targets is not None}
        real = {one.net.name: said.features for one, said in passes if one.targets is None}
        names = {
            net.name: data.class_names(net.classes, None, self.names[net.name]) for net in self.nets
        }
        write_atomic(folder.path / "predictions.csv", self._table(seen, names))
        scores: dict[str, dict[str, Any]] = {}
        judged = []
        for net in self.nets:
            said, matched = seen[net.name], self.matched[net.name][0]
            counts = quality.confusion_matrix(
                self.images.labels, said.top[:, 0], (len(matched), net.classes)
            )
            mistakes = _mistakes(counts, matched)
            scores[net.name] = self._scores(said, matched, real.get(net.name)) | {
                "matched": self.matched[net.name][1],
                "confusions": [
                    {
                        "class": self.images.classes[i],
                        "given": names[net.name][j],
                        "images": int(counts[i, j]),
                    }
                    for i, j in mistakes
                ],
            }
            pictures = self._examples(net, mistakes, seen, names)
            judged.append(evaluation.Judged(net.name, names[net.name], matched, counts, pictures))
        columns: dict[str, Any] = {
            key: {name: one[key] for name, one in scores.items()} for key in _SCORES
        }
        columns["diversity"] = {"pixels": self._diversity_of_pixels()} | columns["diversity"]
        summary = Summary(
            **command.shared(folder, hardware.of_mesh(self.mesh)),
            images=len(self.images),
            classes=list(self.images.classes),
            real_images=0 if self.real is None else len(self.real),
            **columns,
        )
        told = vars(summary)
        ending = page.ending(
            told,
            hardware.describe(),
            configs.to_yaml(self.config),
            {net.name: net.weights for net in self.nets},
        )
        evaluation.run_page(told, judged).write(folder.path / "report.html", ending)
        return command.finish(folder, summary)

    def _scores(
        self, said: Predictions, matched: np.ndarray, real: np.ndarray | None
    ) -> dict[str, Any]:
        """Return what the summary tells of a network, by its key."""
        labels, count = self.images.labels, len(self.images.classes)
        targets, rows = matched[labels], np.arange(len(labels))
        hits = said.hits(targets)
        values = {
            "top1": hits[:, 0],
            "top5": hits.any(1),
            "confidence": said.probabilities[rows, targets],
        }
        means = {key: quality.class_means(value, labels, count) for key, value in values.items()}
        means["diversity"] = self._diversity(said.features)
        images = np.bincount(labels, minlength=count)
        splits = self.config.inception_splits
        mean, std = quality.inception_score(said.probabilities, splits)
        fid = nearest = None
        if said.features is not None and real is not None:
            fid = quality.frechet_distance(said.features, real)
            chosen = quality.spread(rows, _NEAREST)
            nearest = float(np.median(quality.nearest_distances(said.features[chosen], real)))
        return {
            **{key: float(value.mean(dtype=np.float64)) for key, value in values.items()},
            "mean_probability": float(
                said.probabilities[rows, said.top[:, 0]].mean(dtype=np.float64)
            ),
            "inception_score": {"mean": mean, "std": std if splits > 1 else None},
            "fid": fid,
            "nearest_real": nearest,
            "diversity": _mean(means["diversity"]),
            "per_class": [
                {"class": name, "images": int(images[i])}
                | {key: _mean(value[i : i + 1]) for key, value in means.items()}
                for i, name in enumerate(self.images.classes)
            ],
        }

    def _diversity(self, features: np.ndarray | None) -> np.ndarray:
        """Return the mean distance of features of each class (K,), of a sample; NaN for none."""
        found = np.full(len(self.images.classes), np.nan)
        for i, members in enumerate(self._members() if features is not None else ()):
            assert features is not None
            if len(members) > 1:
                chosen = quality.spread(members, _PAIRED)
                distances = judging.feature_distances(features[chosen])
                found[i] = judging.diversity(distances, [0] * len(chosen))
        return found

    def _diversity_of_pixels(self) -> float | None:
        """Return the mean over classes of the mean distance of their images, of a sample."""
        most = max(2, min(20, _PAIRED_PIXELS // len(self.images.classes)))
        found = []
        for members in self._members():
            if len(members) > 1:
                chosen = quality.spread(members, most)
                pixels = self.images.read(chosen, self.nets[0].preprocessing) / np.float32(255)
                distances = judging.pixel_distances(pixels)
                found.append(judging.diversity(distances, [0] * len(chosen)))
        return _mean(np.asarray(found, np.float64))

    def _members(self) -> list[np.ndarray]:
        """Return the numbers of the images of every class."""
        labels = self.images.labels
        counts = np.bincount(labels, minlength=len(self.images.classes))
        return np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])

    def _examples(
        self,
        net: Net,
        mistakes: Sequence[tuple[int, int]],
        seen: Mapping[str, Predictions],
        names: Mapping[str, Sequence[str]],
    ) -> list[page.Picture]:
        """Return pictures of a network's most frequent mistakes, the surest ones of each."""
        said, labels = seen[net.name], self.images.labels
        pictures: list[page.Picture] = []
        for i, j in mistakes:
            found = np.flatnonzero((labels == i) & (said.top[:, 0] == j))
            order = np.argsort(-said.probabilities[found, j], kind="stable")
            for number in found[order[:_EXAMPLES]]:
                verdicts = []
                for name, other in seen.items():
                    given = int(other.top[number, 0])
                    likely = float(other.probabilities[number, given])
                    verdicts.append(page.Verdict(name, names[name][given], given, likely))
                pixels = self.images.read([number], net.preprocessing)[0]
                caption = f"{self.images.classes[i]}, {Path(self.images.name(number)).name}"
                if pixels.shape[-1] in (1, 3):  # others are no pictures
                    pictures.append(page.Picture(pixels, caption, verdicts=tuple(verdicts)))
        return pictures

    def _table(self, seen: Mapping[str, Predictions], names: Mapping[str, Sequence[str]]) -> bytes:
        """Return predictions.csv: a row an image."""
        told = ("class", "name", "probability", "right")
        rows: list[list[Any]] = [
            ["image", "label", *(f"{name} {key}" for name in seen for key in told)]
        ]
        for i, label in enumerate(self.images.labels):
            row = [self.images.name(i), self.images.classes[label]]
            for name, said in seen.items():
                given = int(said.top[i, 0])
                right = int(given == self.matched[name][0][label])
                row += [given, names[name][given], f"{said.probabilities[i, given]:.6g}", right]
            rows.append(row)
        # A file name need not be UTF-8.
        return csv_text(rows).encode(errors="surrogateescape")


_SCORES = (
    *("matched", "top1", "top5", "confidence", "mean_probability", "inception_score", "fid"),
    *("nearest_real", "diversity", "per_class", "confusions"),
)
"""Keys of the summary that map networks to what is told of them."""


def _mean(values: np.ndarray) -> float | None:
    """Return the mean of those that are numbers, None if none is."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else None


def _mistakes(counts: np.ndarray, matched: np.ndarray) -> list[tuple[int, int]]:
    """Return the (class of the data, class that is given) of the most frequent mistakes."""
    wrong = counts.copy()
    wrong[np.arange(len(matched)), matched] = 0
    order = np.argsort(-wrong, axis=None, kind="stable")[:_MISTAKES]
    rows, columns = np.unravel_index(order, wrong.shape)
    return [(int(i), int(j)) for i, j in zip(rows, columns, strict=True) if wrong[i, j]]


def _say(summary: dict[str, Any]) -> str:
    """Say what every network finds."""
    lines = []
    for name, share in summary["top1"].items():
        told = [f"top-1 {share:.4f}", f"top-5 {summary['top5'][name]:.4f}"]
        told.append(f"inception score {summary['inception_score'][name]['mean']:.3f}")
        if summary["fid"][name] is not None:
            told.append(f"FID {summary['fid'][name]:.3f}")
        lines.append(f"{name}: {', '.join(told)}")
    return "\n".join(lines)


COMMAND = command.Command(
    name="evaluate",
    about=str(__doc__),
    config=Config,
    load=Evaluation,
    summary=Summary,
    files=("report.html", "predictions.csv"),
    say=_say,
    standalone=True,
    less="--batch with fewer images",
)

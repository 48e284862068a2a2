"""Extract the deep features of a data set: what shadow models are trained on.

    jinv extract-features --config features_fashion_mnist --out out/features/fashion_mnist
    jinv extract-features --config ... --out ... --batch 64
    jinv extract-features --config ... --out ... --resume

Every key of the config can be overridden on the command line (`--config F --help` lists them).
A checkpoint is saved every ten seconds, and on Ctrl-C or SIGTERM; --resume goes on after the last
finished batch, to the very same files. A finished run is replaced only with --overwrite.

The output folder holds metrics.csv (mean norm of the features of every batch), the folders train
and test and, last of all, summary.json. Shadow models are made of `train`, the validation set of
`test`. Each of the two holds features.npy (float32), labels.npy, images.npy (bytes; not with
--images-size 0) and features.json (network, classes, shape and sha256 of every file, and their
fingerprint). `jinv.shadow.features.load(FOLDER/train)` reads one.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

from jinv import checks, data, parallel, training
from jinv.checks import Count, Natural, Positive
from jinv.models.network import Network
from jinv.runs import command, hardware
from jinv.runs import config as configs
from jinv.runs.progress import Progress
from jinv.runs.run_folder import FolderError, RunFolder
from jinv.runs.signals import Signals
from jinv.shadow import features

CHECKPOINT_SECONDS = 10.0
"""Time between checkpoints."""
_SPLITS: tuple[data.Split, ...] = ("train", "test")


@dataclasses.dataclass(frozen=True)
class Config:
    """What a config file holds.

    Attributes:
      network: whose features; its `weights` may be a folder that `jinv pretrain` wrote.
      data: its splits "train" and "test".
      size: of the images of a folder of pictures or of tfds as they are read, one side or height
        and width; None for the network's. Others have their own.
      images_size: side of the images that are kept beside the features, which a reconstructor
        shall make; None for the data's own, 0 to keep none.
      interpolation: to the network's size and to `images_size`.
      batch: images at once.
      dtype: of the network's arithmetic; features are written in float32.
      scale: features are multiplied by this. A linear head learns as fast as its learning rate
        times their squared norm, and does not learn at all where that is too much.
    """

    network: Network
    data: data.Source = dataclasses.field(default_factory=data.Source)
    size: Count | tuple[Count, Count] | None = None
    images_size: Natural | None = None
    interpolation: features.Interpolation = "bicubic"
    batch: Count = 256
    dtype: features.DType = "float32"
    scale: Positive = 1.0

    def __post_init__(self) -> None:
        checks.fields(self)
        self.data.check_size(self.size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary(command.Summary):
    """What summary.json holds; a step is a batch, without compilation and writing.

    Attributes:
      network: model, weights, classes, name: as in the config.
      data: as in the config.
      classes: names.
      preprocessing: of the network: size, mean, std, pixel_range, what makes an image normalised;
        resize, interpolation, what makes an image of a picture elsewhere.
      features: length of a feature vector.
      image: height, width and channels of the images that were kept; null if none were.
      images: split -> number of images.
      fingerprint: split -> sha256 of all that its folder holds.
    """

    network: dict[str, Any]
    data: dict[str, Any]
    classes: list[str]
    preprocessing: dict[str, Any]
    features: int
    image: list[int] | None
    images: dict[str, int]
    fingerprint: dict[str, str]


class _Split(NamedTuple):
    """One split, as the progress bar shows it.

    Attributes:
      name: "train" or "test".
      steps: batches.
      dataset: the images.
      first: number of its first step.
    """

    name: str
    steps: int
    dataset: data.Dataset
    first: int
    cost: float = 1.0


class Extraction(command.Loaded):
    """A config with its network and data read.

    Attributes:
      net: the network.
      splits: the images.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.net = config.network.load()
        self.splits: list[_Split] = []
        self.steps = 0
        size = config.size or self.net.preprocessing.size
        for name in _SPLITS:
            # Their classes may differ: people in one split are not in the other.
            dataset = config.data.load(name, size)
            features.check(self.net, dataset)
            steps = -(-len(dataset) // config.batch)
            self.splits.append(_Split(name, steps, dataset, self.steps))
            self.steps += steps
        self.mesh = training.batch_mesh(config.batch)

    def run(self, folder: RunFolder) -> dict[str, Any]:
        """Extract and write the features; return the summary (of the main process).

        Raises:
          Interrupted: SIGTERM or Ctrl-C came; a checkpoint was saved.
        """
        with folder.checkpoints() as manager, Signals() as stopping, Progress(self.splits) as bar:
            restored = folder.restore(manager, lambda meta: self._state(0))
            done = 0 if restored is None else int(parallel.fetch(restored[1]["step"]))

            def save(step: int) -> None:
                folder.save(manager, step, self._state(step))
                manager.wait_until_finished()  # before a split's folder gets its final name

            def look(index: int, block: features.Block) -> None:
                step = self.splits[index].first + block.start // self.config.batch
                norm = float(np.linalg.norm(block.features, axis=1).mean())
                folder.metrics.add(step=step, norm=norm)
                bar.update(index, step, {"norm": np.array([norm])})

            try:
                for index, split in enumerate(self.splits):
                    reached = self._split(folder, index, done, look, save, stopping)
                    if reached < split.first + split.steps or (stopping() and reached < self.steps):
                        raise folder.stopped(stopping.number, reached, self.steps)
            finally:
                folder.save_logs()
        summary: dict[str, Any] = {}
        parallel.on_main(lambda: summary.update(self._write(folder)), FolderError)
        return summary

    def _split(
        self,
        folder: RunFolder,
        index: int,
        done: int,
        look: Callable[[int, features.Block], None],
        save: Callable[[int], None],
        stopping: Signals,
    ) -> int:
        """Go on with a split until it is finished or the run is stopped; return the steps done."""
        config, split = self.config, self.splits[index]
        target = folder.path / split.name
        end = split.first + split.steps
        if parallel.any_process((target / features.INDEX).exists()):
            return end
        step = max(done, split.first)
        start = min((step - split.first) * config.batch, len(split.dataset))
        writers: list[features.Writer] = []
        with contextlib.ExitStack() as stack:

            def begin() -> None:
                writer = features.Writer(target, len(split.dataset), start)
                writers.append(stack.enter_context(writer))

            def checkpoint() -> None:
                parallel.on_main(lambda: writers[0].flush(), FolderError)
                save(step)

            parallel.on_main(begin, FolderError)
            for block in features.blocks(
                self.net,
                split.dataset,
                batch=config.batch,
                mesh=self.mesh,
                start=start,
                images_size=config.images_size,
                interpolation=config.interpolation,
                dtype=config.dtype,
                scale=config.scale,
                clock=folder.clock,
            ):
                parallel.on_main(lambda: writers[0].add(block), FolderError)  # noqa: B023
                look(index, block)
                step += 1
                if stopping():
                    break
                if folder.due(CHECKPOINT_SECONDS):
                    checkpoint()
            # Also of a whole split: a folder that is renamed has all its steps in a checkpoint.
            checkpoint()
            if step == end:
                parallel.on_main(
                    lambda: writers[0].finish(split.dataset.classes, self.net.name), FolderError
                )
        return step

    def _state(self, step: int) -> dict[str, Array]:
        """Return what a checkpoint holds."""
        return parallel.put(self.mesh, PartitionSpec(), {"step": np.int32(step)})

    def _write(self, folder: RunFolder) -> dict[str, Any]:
        """Write the summary of what lies in the folders."""
        config = self.config
        written = {split.name: features.load(folder.path / split.name) for split in self.splits}
        images = written["train"].images
        summary = Summary(
            **command.shared(folder, hardware.of_mesh(self.mesh)),
            network=configs.plain(config.network),
            data=configs.plain(config.data),
            classes=list(written["train"].classes),
            preprocessing=configs.plain(self.net.preprocessing),
            features=written["train"].features.shape[1],
            image=None if images is None else list(images.shape[1:]),
            images={name: len(found) for name, found in written.items()},
            fingerprint={name: found.fingerprint for name, found in written.items()},
        )
        return command.finish(folder, summary)


def _say(summary: dict[str, Any]) -> str:
    """Say what was extracted."""
    return f"{sum(summary['images'].values())} x {summary['features']} features"


_FILES = ("features.json", "features.npy", "labels.npy", "images.npy")

COMMAND = command.Command(
    name="extract-features",
    about=str(__doc__),
    config=Config,
    load=Extraction,
    summary=Summary,
    files=(
        *(
            f"{split}{cut}/{file}"
            for split in _SPLITS
            for cut in ("", ".partial")
            for file in _FILES
        ),
        "metrics.csv",
    ),
    say=_say,
    less="--batch with fewer images",
)

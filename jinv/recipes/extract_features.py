"""A recipe of deep features, and its run in a folder: one subfolder of features a split."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

from jinv import data, parallel, training
from jinv.models.network import Network
from jinv.recipes import pretrain
from jinv.runs import config as configs
from jinv.runs import hardware, run_folder
from jinv.runs.progress import Progress
from jinv.shadow import features

SAVE_EVERY = 10.0
"""Seconds between checkpoints."""
_SPLITS: tuple[data.Split, ...] = ("train", "test")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a config file holds.

    Attributes:
      network: whose features; its `weights` may be a folder that scripts/pretrain.py wrote.
      data: its splits "train" and "test".
      size: side of the images of a folder of pictures or of tfds as they are read; None for the
        network's. Others have their own.
      images_size: side of the images that are kept beside the features, which a reconstructor
        shall make; None for the data's own, 0 to keep none.
      interpolation: to the network's size and to `images_size`.
      batch: images at once.
      dtype: of the network's arithmetic; features are written in float32.
    """

    network: Network
    data: data.Source = dataclasses.field(default_factory=data.Source)
    size: int | None = None
    images_size: int | None = None
    interpolation: features.Interpolation = "bicubic"
    batch: int = 256
    dtype: features.DType = "float32"

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1, not {self.batch}")
        if self.images_size is not None and self.images_size < 0:
            raise ValueError(f"images_size must not be negative: {self.images_size}")
        pretrain.check_size(self.size, self.data)


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


class Extraction:
    """A recipe with its network and data read: everything that can be wrong has been found.

    Attributes:
      net: the network.
      splits: the images.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.net = recipe.network.load()
        self.splits: list[_Split] = []
        self.steps = 0
        size = recipe.size or self.net.preprocessing.size
        for name in _SPLITS:
            # Their classes may differ: people in one split are not in the other.
            dataset = recipe.data.load(name, size)
            features.check(self.net, dataset)
            steps = -(-len(dataset) // recipe.batch)
            self.splits.append(_Split(name, steps, dataset, self.steps))
            self.steps += steps
        self.mesh = training.batch_mesh(recipe.batch)

    def run(self, run: run_folder.Session) -> dict[str, Any]:
        """Extract and write the features; returns the summary (of the main process)."""
        with (
            run.checkpoints() as manager,
            run_folder.Signals() as stopping,
            Progress(self.splits) as bar,
        ):
            restored = run.restore(manager, lambda meta: self._state(0))
            done = 0 if restored is None else int(parallel.fetch(restored[1]["step"]))

            def save(step: int) -> None:
                run.save(manager, step, self._state(step))

            def look(index: int, block: features.Block) -> None:
                step = self.splits[index].first + block.start // self.recipe.batch
                norm = float(np.linalg.norm(block.features, axis=1).mean())
                run.metrics.add(step=step, norm=norm)
                bar.update(index, step, {"norm": np.array([norm])})

            try:
                for index, split in enumerate(self.splits):
                    reached = self._split(run, index, done, look, save, stopping)
                    if reached < split.first + split.steps or (stopping() and reached < self.steps):
                        raise run.stopped(stopping.number or signal.SIGTERM, reached, self.steps)
            finally:
                run.save_logs()
        summary: dict[str, Any] = {}
        parallel.on_main(lambda: summary.update(self._finish(run)), run_folder.SessionError)
        return summary

    def _split(
        self,
        run: run_folder.Session,
        index: int,
        done: int,
        look: Callable[[int, features.Block], None],
        save: Callable[[int], None],
        stopping: run_folder.Signals,
    ) -> int:
        """Go on with a split until it is finished or the run is stopped; returns the steps done."""
        recipe, split = self.recipe, self.splits[index]
        folder = run.folder / split.name
        end = split.first + split.steps
        if parallel.any_process((folder / features.INDEX).exists()):
            return end
        step = max(done, split.first)
        start = min((step - split.first) * recipe.batch, len(split.dataset))
        writers: list[features.Writer] = []
        with contextlib.ExitStack() as stack:

            def begin() -> None:
                writer = features.Writer(folder, len(split.dataset), start)
                writers.append(stack.enter_context(writer))

            def checkpoint() -> None:
                parallel.on_main(lambda: writers[0].flush(), run_folder.SessionError)
                save(step)

            parallel.on_main(begin, run_folder.SessionError)
            saved = time.monotonic()
            for block in features.blocks(
                self.net,
                split.dataset,
                batch=recipe.batch,
                mesh=self.mesh,
                start=start,
                images_size=recipe.images_size,
                interpolation=recipe.interpolation,
                dtype=recipe.dtype,
                clock=run.clock,
            ):
                parallel.on_main(lambda: writers[0].add(block), run_folder.SessionError)  # noqa: B023
                look(index, block)
                step += 1
                if stopping():
                    break
                if parallel.any_process(time.monotonic() - saved > SAVE_EVERY):
                    checkpoint()
                    saved = time.monotonic()
            # Also of a whole split: a folder that is renamed has all its steps in a checkpoint.
            checkpoint()
            if step == end:
                parallel.on_main(
                    lambda: writers[0].finish(split.dataset.classes, self.net.name),
                    run_folder.SessionError,
                )
        return step

    def _state(self, step: int) -> dict[str, Array]:
        """What a checkpoint holds."""
        return parallel.put(self.mesh, PartitionSpec(), {"step": np.int32(step)})

    def _finish(self, run: run_folder.Session) -> dict[str, Any]:
        """The summary, from what lies in the folders."""
        recipe, machine = self.recipe, hardware.describe()
        written = {split.name: features.load(run.folder / split.name) for split in self.splits}
        images = written["train"].images
        summary = {
            "network": configs.plain(recipe.network),
            "data": configs.plain(recipe.data),
            "classes": list(written["train"].classes),
            "preprocessing": configs.plain(self.net.preprocessing),
            "device": f"{self.mesh.size} x {self.mesh.devices.flat[0].device_kind}",
            "features": written["train"].features.shape[1],
            "image": None if images is None else list(images.shape[1:]),
            "images": {name: len(found) for name, found in written.items()},
            "fingerprint": {name: found.fingerprint for name, found in written.items()},
            "seconds": round(run.seconds, 3),
            "seconds_per_step": round(run.clock.stepping / max(run.clock.steps, 1), 6),
            "compile_seconds": round(run.clock.compiling, 3),
            "versions": {name: machine[name] for name in pretrain.VERSIONS},
        }
        run.finish(summary)
        return summary


def prepare(recipe: Recipe) -> Extraction:
    """The recipe with its network and data read, in every process or in none.

    Raises:
      ValueError: the mistake, in every process if one process has it.
    """
    return parallel.everywhere(lambda: Extraction(recipe))

"""A run in an output folder: metrics, pictures, checkpoints, progress; killed and resumed.

folder/
  config.yaml     what was run
  metrics.csv     every term at every step
  scores.csv      what the judges said on the way, or a trained network's test accuracy
  progress/       a picture grid every k steps
  checkpoints/    while the run is unfinished
  summary.json    written last: its presence means "finished"

Of several processes all compute, and only the main one writes (each its part of a checkpoint, so
that the folder must be on a disk that all of them see).
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from jax import Array

from jinv import optimise, parallel
from jinv.files import write_atomic
from jinv.runs import config as configs
from jinv.runs.progress import Progress

_FEATURES = tuple(
    f"{split}{partial}/{file}"
    for split in ("train", "test")
    for partial in ("", ".partial")
    for file in ("features.json", "features.npy", "labels.npy", "images.npy")
)
FOLDERS = ("checkpoints", "progress", "images", "bn_only")
FILES = (
    *("summary.json", "metrics.csv", "scores.csv", "grid.png", "curves.svg", "report.html"),
    *("weights.safetensors", "classes.txt", *_FEATURES, "config.yaml"),
)
"""What a run writes into its folder."""


class SessionError(RuntimeError):
    """The folder cannot be used as asked; the message says what to do."""


class Interrupted(RuntimeError):  # noqa: N818 - not an error: the run can go on
    """SIGTERM or Ctrl-C stopped the run after a checkpoint.

    Attributes:
      signal: its number.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number


@dataclasses.dataclass(frozen=True)
class Options:
    """How a run goes; nothing here changes its result.

    Attributes:
      chunk: steps between two looks of the host at the device.
      loop: "scan", "python" or "auto"; see `optimise.run`.
      pictures_every: steps between picture grids; 0 for none.
      scores_every: steps between the judges' looks; 0 for the end only.
      checkpoint_every: steps between checkpoints.
    """

    chunk: int = 10
    loop: optimise.Loop = "auto"
    pictures_every: int = 100
    scores_every: int = 100
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        if self.chunk < 1 or self.checkpoint_every < 1:
            raise ValueError("chunk and checkpoint_every must be at least 1")
        if self.pictures_every < 0 or self.scores_every < 0:
            raise ValueError("pictures_every and scores_every must not be negative")


class Log:
    """Rows of numbers by step, kept as one CSV file; columns may differ from row to row."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []

    def add(self, **row: Any) -> None:
        """Append a row, or replace the last one if it is of the same step; written by `save`."""
        if self.rows and self.rows[-1].get("step") == row.get("step"):
            self.rows.pop()
        self.rows.append(row)

    def columns(self) -> list[str]:
        """Names of all columns, in order of first appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def column(self, name: str) -> list[float]:
        """One column's values, NaN where a row has none."""
        return [float(row.get(name, np.nan)) for row in self.rows]

    def save(self) -> None:
        """Write the file, whole or not at all."""
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_atomic(self.path, text.getvalue())

    def restore(self, before: int) -> None:
        """Read the rows of steps below `before` back; the others will be made again."""
        if not self.path.exists():
            return
        with self.path.open(newline="") as file:
            for row in csv.DictReader(file):
                if int(row["step"]) < before:
                    self.add(**{name: _value(text) for name, text in row.items() if text != ""})


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


class Session:
    """The output folder of one run.

    Attributes:
      metrics, scores: the logs.
      finished: whether the folder holds this run with its summary.
      interrupted: number of the signal that asked the run to stop, 0 if none did.
      clock: where the time went, over all sessions of the run.
      state: after the last chunk, also when `run` raised; None before.

    Args:
      folder: made if absent.
      config: the run's config as a plain tree.
      options: see `Options`.
      resume: go on from the folder's last checkpoint, if there is one.
      overwrite: replace what an earlier run left.

    Raises:
      SessionError: the folder holds another run, and neither flag says what to do with it.
    """

    def __init__(
        self,
        folder: str | Path,
        config: Mapping[str, Any],
        options: Options = Options(),
        *,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.options = options
        self.metrics = Log(self.folder / "metrics.csv")
        self.scores = Log(self.folder / "scores.csv")
        self.clock = optimise.Clock()
        self.state: optimise.State | None = None
        self._checkpoints = self.folder / "checkpoints"
        self._saved: int | None = None
        self._ended = False
        self._began = time.perf_counter()
        self._resume = resume
        self._config = config
        self.interrupted = 0
        if resume and overwrite:
            raise SessionError("--resume and --overwrite exclude each other")
        parallel.on_main(lambda: self._claim(config, resume, overwrite), SessionError)
        self.finished = parallel.any_process(parallel.is_main() and self._summary.exists())

    @property
    def _summary(self) -> Path:
        return self.folder / "summary.json"

    @property
    def seconds(self) -> float:
        """Time since the run began, without the time between its sessions."""
        return time.perf_counter() - self._began

    def part(self, name: str) -> Session:
        """A run that belongs to this one, in a folder below; it goes on where it was stopped."""
        return Session(self.folder / name, self._config, self.options, resume=True)

    def read_summary(self) -> dict[str, Any]:
        """The summary of a finished run."""
        return json.loads(self._summary.read_text())

    def _claim(self, config: Mapping[str, Any], resume: bool, overwrite: bool) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise SessionError(f"{self.folder} is a file, not a folder")
        known = (self.folder / "config.yaml").exists() or self._summary.exists()
        if overwrite and known:
            self._clear()
        elif self._checkpoints.exists() and not known:
            raise SessionError(
                f"{self._checkpoints} is not of a run that is known here: remove it, or choose "
                "another folder"
            )
        elif self._summary.exists() and not resume:
            raise SessionError(
                f"{self.folder} holds a finished run: choose another folder, or --overwrite it"
            )
        elif (self.folder / "config.yaml").exists():
            if not resume:
                raise SessionError(
                    f"{self.folder} holds an unfinished run: --resume it, or --overwrite it"
                )
            self._check_same(config)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SessionError(f"cannot make the folder {self.folder}: {error}") from None
        if not self._summary.exists():
            write_atomic(self.folder / "config.yaml", configs.to_yaml(config))

    def _clear(self) -> None:
        """Remove what a run writes, and nothing else."""
        # The summary first and the config last: a clearing that is cut leaves an unfinished run.
        self._summary.unlink(missing_ok=True)
        for name in FOLDERS:
            if (self.folder / name).exists():
                shutil.rmtree(self.folder / name)
        for name in FILES:
            (self.folder / name).unlink(missing_ok=True)

    def _check_same(self, config: Mapping[str, Any]) -> None:
        before = configs.read_yaml(self.folder / "config.yaml")
        changed = [
            line
            for line in configs.differences(before, json.loads(json.dumps(dict(config))))
            if not line.startswith(("run.", "execution."))
        ]
        if changed:
            raise SessionError(
                f"{self.folder} was begun with another config; resuming would mix the two. "
                f"Different: {'; '.join(changed)}"
            )

    def run(
        self,
        phases: tuple[optimise.Phase, ...],
        key: Array,
        images: Array,
        data: Any,
        *,
        pictures: Callable[[np.ndarray], bytes] | None = None,
        score: Callable[[np.ndarray], Mapping[str, float]] | None = None,
    ) -> optimise.State:
        """`optimise.run` with everything a long run needs.

        Args:
          phases: the attack's program.
          key: of the run.
          images: initial images, lying on the devices that shall share them.
          data: what the steps read.
          pictures: images -> a PNG grid of them.
          score: images -> {column: value} for scores.csv.

        Raises:
          Interrupted: SIGTERM or Ctrl-C came; a checkpoint was saved.
          NonFiniteError: after the metrics up to there were saved.
        """
        total = sum(phase.steps for phase in phases)
        every = self.options
        with self.checkpoints() as manager, Signals() as stopping, Progress(phases) as progress:
            restored = self.restore(
                manager, lambda meta: optimise.abstract_state(phases[meta["phase"]], images)
            )
            resume = None
            if restored is not None:
                resume = restored[0]["phase"], optimise.State(*restored[1])

            latest: list[optimise.Chunk] = []

            def callback(chunk: optimise.Chunk) -> None:
                latest[:] = [chunk]
                count = len(chunk.metrics["loss"])
                done = chunk.start + count
                self.state = chunk.state
                last = chunk.phase == len(phases) - 1
                self._ended = last and (chunk.stopped or done == total)
                for i in range(count):
                    row = {name: float(values[i]) for name, values in chunk.metrics.items()}
                    self.metrics.add(step=chunk.start + i, phase=chunk.phase, **row)
                progress.update(chunk.phase, chunk.start, chunk.metrics)
                show = _crossed(chunk.start, done, every.pictures_every)
                judge = _crossed(chunk.start, done, every.scores_every) and done < total
                if show or judge:
                    images = parallel.fetch(chunk.state.images)

                def look() -> None:
                    if show and pictures:
                        grid = self.folder / "progress" / f"step_{done:06d}.png"
                        grid.parent.mkdir(exist_ok=True)
                        write_atomic(grid, pictures(images))
                    if judge and score:
                        found = score(images)
                        self.scores.add(step=done, **found)
                        progress.say(done, found)

                if show or judge:
                    parallel.on_main(look, SessionError)
                if not chunk.finite:
                    return  # a checkpoint of it would replace the last good one
                if stopping() or _crossed(chunk.start, done, every.checkpoint_every):
                    self._save_chunk(manager, chunk)

            try:
                state = optimise.run(
                    phases,
                    key,
                    images,
                    data,
                    callback=callback,
                    chunk=every.chunk,
                    loop=every.loop,
                    resume=resume,
                    clock=self.clock,
                    should_stop=stopping,
                )
            finally:
                self.save_logs()
            if stopping():
                # It may have come to another process.
                self.interrupted = stopping.number or signal.SIGTERM
            if self.interrupted and not self._ended:
                # The signal may have come after the callback.
                self._save_chunk(manager, latest[0])
                raise self.stopped(self.interrupted, int(parallel.fetch(state.step)), total)
            return state

    def stopped(self, number: int, step: int, total: int) -> Interrupted:
        """What to raise when a signal has stopped the run at this step, after a checkpoint."""
        return Interrupted(
            f"{self.folder}: stopped at step {step} of {total}; go on with --resume", number
        )

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the summary, which marks the run as finished, and drop the checkpoints."""
        write_atomic(self._summary, json.dumps(summary, indent=2) + "\n")
        shutil.rmtree(self._checkpoints, ignore_errors=True)
        self.finished = True

    @contextmanager
    def checkpoints(self) -> Iterator[ocp.CheckpointManager]:
        """Within, states can be saved and restored; the run's time begins here."""
        self._began = time.perf_counter()
        options = ocp.CheckpointManagerOptions(max_to_keep=1, create=True)
        manager = ocp.CheckpointManager(self._checkpoints.resolve(), options=options)
        try:
            yield manager
        finally:
            manager.wait_until_finished()
            manager.close()

    def save(self, manager: ocp.CheckpointManager, step: int, state: Any, **meta: Any) -> None:
        """Save the logs and the state after `step` steps, once; `meta` are plain values."""
        if step == self._saved:
            return
        # The logs first: rows beyond the checkpoint are dropped on resuming, missing ones are not
        # made again.
        self.save_logs()
        told = {**meta, "seconds": self.seconds, "clock": dataclasses.asdict(self.clock)}
        manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(told)
            ),
        )
        # The next step donates the state's buffers.
        manager.wait_until_finished()
        self._saved = step

    def restore(
        self, manager: ocp.CheckpointManager, template: Callable[[Mapping[str, Any]], Any]
    ) -> tuple[dict[str, Any], Any] | None:
        """The meta and the state that were saved last, with logs and clock; None to start afresh.

        Args:
          manager: of `checkpoints`.
          template: meta -> the state's shapes, types and shardings.
        """
        step = manager.latest_step() if self._resume else None
        if step is None:
            return None
        meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        restored = manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(template(meta)))
        )
        self.clock = optimise.Clock(**meta["clock"])
        self._began -= meta["seconds"]
        self.metrics.restore(step)
        self.scores.restore(step + 1)
        self._saved = step
        return meta, restored["state"]

    def _save_chunk(self, manager: ocp.CheckpointManager, chunk: optimise.Chunk) -> None:
        step = chunk.start + len(chunk.metrics["loss"])
        self.save(manager, step, chunk.state, phase=chunk.phase)

    def save_logs(self) -> None:
        """Write the logs as they are."""

        def save() -> None:
            self.metrics.save()
            if self.scores.rows:
                self.scores.save()

        parallel.on_main(save, SessionError)


def _crossed(start: int, done: int, every: int) -> bool:
    """Whether a multiple of `every` lies in (start, done]."""
    return every > 0 and done // every > start // every


class Signals:
    """Within, the first SIGTERM or Ctrl-C only asks to stop; the second acts as usual."""

    def __init__(self) -> None:
        self.number = 0
        self._agreed = False
        self._before: dict[int, Any] = {}

    def __call__(self) -> bool:
        """Whether one has come to any process; all ask at the same points."""
        self._agreed = self._agreed or parallel.any_process(self.number != 0)
        return self._agreed

    def __enter__(self) -> Signals:
        # Python handles signals in the main thread only; elsewhere they act as usual.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: Any) -> None:
        del frame
        self.number = number
        self._restore()

    def __exit__(self, *error: object) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

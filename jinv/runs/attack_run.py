"""`optimise.run` of an attack with everything a long run needs: logs, pictures, checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import orbax.checkpoint as ocp
from jax import Array

from jinv import checks, optimise, parallel
from jinv.checks import Count, Natural, NotNegative
from jinv.files import write_atomic
from jinv.runs.background import Background
from jinv.runs.progress import Progress
from jinv.runs.run_folder import FolderError, RunFolder
from jinv.runs.signals import Signals

FILES = (
    *("images/", "progress/", "grid.png", "curves.svg", "report.html"),
    *("metrics.csv", "scores.csv"),
)
"""What every run of an attack writes besides its config and summary."""


@checks.todays_keywords
@dataclasses.dataclass(frozen=True)
class Options:
    """How a run goes; nothing here changes its result.

    Attributes:
      chunk: steps between two looks of the host at the device; about a second's by default.
      loop: "scan", "python" or "auto"; see `optimise.run`.
      pictures_every: steps between picture grids; 0 for none.
      scores_every: steps between scores on the way; 0 for the end only.
      checkpoint_seconds: time between checkpoints, which are written in the background.
    """

    chunk: Count | None = None
    loop: optimise.Loop = "auto"
    pictures_every: Natural = 100
    scores_every: Natural = 100
    checkpoint_seconds: NotNegative = 60.0

    def __post_init__(self) -> None:
        checks.fields(self)


@dataclasses.dataclass(frozen=True)
class Watch:
    """What is looked at on the way; both take the images as NumPy arrays, as they are optimised.

    Attributes:
      pictures: images -> PNG bytes of a grid of them.
      score: images -> {column: value} for scores.csv; None for no scores.
    """

    pictures: Callable[[Any], bytes]
    score: Callable[[Any], Mapping[str, float]] | None = None


def run(
    attack: optimise.Attack,
    key: Array,
    noise_key: Array,
    folder: RunFolder,
    options: Options,
    watch: Watch,
    keep: Callable[[Any], None] = lambda images: None,
) -> optimise.State:
    """Run an attack in a folder; a run that was cut goes on from its last checkpoint.

    Args:
      attack: what is run.
      key: of the run.
      noise_key: of the initial images.
      folder: where it is run.
      options: how it goes.
      watch: what is looked at on the way.
      keep: called with the best images so far if the loss becomes infinite or NaN.

    Raises:
      Interrupted: SIGTERM or Ctrl-C came; a checkpoint was saved.
      NonFiniteError: after `keep` was called and the metrics up to there were saved.
    """
    images = attack.initial(noise_key)
    with (
        folder.checkpoints() as manager,
        Signals() as stopping,
        Progress(attack.phases) as progress,
        Background() as background,
    ):
        restored = folder.restore(
            manager, lambda meta: optimise.abstract_state(attack.phases[meta["phase"]], images)
        )
        resume = None
        if restored is not None:
            resume = restored[0]["phase"], optimise.State(*restored[1])
        callback = _Callback(
            attack.phases, folder, options, watch, progress, manager, stopping, background
        )
        try:
            state = optimise.run(
                attack.phases,
                key,
                images,
                attack.data,
                callback=callback,
                chunk=options.chunk,
                marks=callback.marks,
                wanted=callback.wanted,
                loop=options.loop,
                resume=resume,
                clock=folder.clock,
                should_stop=stopping,
            )
        except optimise.NonFiniteError:
            assert callback.latest is not None
            best = parallel.fetch(callback.latest.state.best_images)
            parallel.on_main(lambda: keep(best), FolderError)
            raise
        finally:
            folder.save_logs()
        background.wait()
        if stopping():
            folder.interrupted = stopping.number
        if folder.interrupted and not callback.ended:
            callback.save()  # the signal may have come after the callback
            done = int(parallel.fetch(state.step))
            raise folder.stopped(folder.interrupted, done, callback.total)
        return state


class _Callback:
    """Looks at every chunk: logs, progress, pictures, scores, checkpoints."""

    latest: optimise.Chunk | None = None

    def __init__(
        self,
        phases: tuple[optimise.Phase, ...],
        folder: RunFolder,
        options: Options,
        watch: Watch,
        progress: Progress,
        manager: ocp.CheckpointManager,
        stopping: Signals,
        background: Background,
    ) -> None:
        self.total = sum(phase.steps for phase in phases)
        self.ended = False
        self._phases = phases
        self._folder = folder
        self._options = options
        self._watch = watch
        self._progress = progress
        self._manager = manager
        self._stopping = stopping
        self._background = background
        self._saves = False

    @property
    def marks(self) -> tuple[int, ...]:
        """Return the numbers of steps at whose multiples something is looked at."""
        options = self._options
        scores = options.scores_every if self._watch.score is not None else 0
        return tuple(every for every in (options.pictures_every, scores) if every)

    def wanted(self, done: int) -> bool:
        """Return whether the state after so many steps is looked at, or saved."""
        self._saves = self._stopping() or self._folder.due(self._options.checkpoint_seconds)
        return self._saves or any(done % mark == 0 for mark in self.marks)

    def __call__(self, chunk: optimise.Chunk) -> None:
        self.latest = chunk
        done = chunk.start + len(chunk.metrics["loss"])
        last = chunk.phase == len(self._phases) - 1
        self.ended = last and (chunk.stopped or done == self.total)
        if parallel.is_main():
            columns = {name: values.tolist() for name, values in chunk.metrics.items()}
            for step, values in enumerate(zip(*columns.values(), strict=True), chunk.start):
                row = dict(zip(columns, values, strict=True))
                self._folder.metrics.add(step=step, phase=chunk.phase, **row)
        self._folder.save_logs()
        self._progress.update(chunk.phase, chunk.start, chunk.metrics)
        self._look(chunk, done)
        # A checkpoint of a state that is not finite would replace the last good one.
        if chunk.finite and self._saves:
            self.save(self._background)

    def save(self, later: Callable[[Callable[[], None]], None] = lambda job: job()) -> None:
        """Save a checkpoint of the latest chunk; `later` does what takes long."""
        chunk = self.latest
        if chunk is None:
            return  # nothing was done since the checkpoint that the run goes on from
        step = chunk.start + len(chunk.metrics["loss"])
        self._folder.save(self._manager, step, chunk.state, later=later, phase=chunk.phase)

    def _look(self, chunk: optimise.Chunk, done: int) -> None:
        options, watch = self._options, self._watch
        show = _at_multiple(done, options.pictures_every)
        judge = (
            watch.score is not None
            and _at_multiple(done, options.scores_every)
            and done < self.total
        )
        if not chunk.finite or not (show or judge):
            return
        found = chunk.state.images

        def look() -> None:
            images = parallel.fetch(found)
            parallel.on_main(lambda: tell(images), FolderError)

        def tell(images: Any) -> None:
            if show:
                grid = self._folder.path / "progress" / f"step_{done:06d}.png"
                grid.parent.mkdir(exist_ok=True)
                write_atomic(grid, watch.pictures(images))
            if judge:
                self._score(done, images)

        self._background(look)

    def _score(self, done: int, images: Any) -> None:
        assert self._watch.score is not None
        found = self._watch.score(images)
        self._folder.scores.add(step=done, **found)
        self._folder.scores.save()
        self._progress.say(done, found)


def _at_multiple(done: int, every: int) -> bool:
    return every > 0 and done % every == 0

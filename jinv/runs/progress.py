"""A progress bar with the time left and the current terms; plain lines without a terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import NamedTuple, Protocol, Self

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Progress as RichProgress

from jinv import optimise, parallel

LINE_EVERY = 30.0
"""Seconds between lines where there is no terminal."""


class Stage(Protocol):
    """A stretch of a run, such as `optimise.Phase`: steps of the same cost."""

    @property
    def name(self) -> str:
        """For logs."""

    @property
    def steps(self) -> int:
        """Number of steps."""

    @property
    def cost(self) -> float:
        """Cost of a step, relative to those of other stages."""


class Stretch(NamedTuple):
    """A `Stage` that is nothing else."""

    name: str
    steps: int
    cost: float = 1.0


class Progress:
    """Shows a run of these phases: a context manager, or a callback of `optimise.run`.

        optimise.run(attack.phases, key, images, attack.data, callback=Progress(attack.phases))

    Args:
      phases: of the run.
      console: where it is shown; stderr by default.
    """

    def __init__(self, phases: Sequence[Stage], console: Console | None = None) -> None:
        self._phases = phases
        self._console = console or Console(stderr=True, quiet=not parallel.is_main())
        self._total = sum(phase.steps for phase in phases)
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]} left  {task.fields[terms]}", markup=False),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("compiling", total=self._total, left="?", terms="")
        self._rate = _Rate()
        self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def __call__(self, chunk: optimise.Chunk) -> None:
        """Show a chunk of a run; the bar begins with the first and ends with the last."""
        self._bar.start()
        self.update(chunk.phase, chunk.start, chunk.metrics)
        done = chunk.start + len(chunk.metrics["loss"])
        last = chunk.phase == len(self._phases) - 1 and (chunk.stopped or done == self._total)
        if last or not chunk.finite:
            self._bar.stop()

    def update(self, index: int, start: int, metrics: Mapping[str, np.ndarray]) -> None:
        """Show the state of a run after steps `start` and following of phase `index`.

        Args:
          index: of the phase.
          start: number of the first of these steps, over all phases.
          metrics: names -> their values at each of these steps.
        """
        count = len(next(iter(metrics.values())))
        if not count:
            return
        done = start + count
        phase = self._phases[index]
        left = _duration(self._rate.left(index, count, done, self._phases))
        terms = "  ".join(f"{name} {values[-1]:.4g}" for name, values in metrics.items())
        self._bar.update(self._task, completed=done, description=phase.name, left=left, terms=terms)
        now = time.monotonic()
        if self._bar.disable and (now - self._last_line > LINE_EVERY or done == self._total):
            self._last_line = now
            self._console.print(
                f"{phase.name}  step {done}/{self._total}  {left} left  {terms}",
                highlight=False,
                markup=False,  # "label[resnet18]" is a name
                soft_wrap=True,
            )

    def say(self, step: int, values: Mapping[str, float]) -> None:
        """Print numbers above the bar."""
        text = "  ".join(f"{name} {value:.2f}" for name, value in values.items())
        self._console.print(f"step {step}: {text}", highlight=False, markup=False, soft_wrap=True)


class _Rate:
    """Seconds a step, phase by phase: phases of other resolutions cost otherwise."""

    def __init__(self) -> None:
        self._phase = -1
        self._seconds = 0.0
        self._steps = 0
        self._since = time.monotonic()

    def left(self, phase: int, count: int, done: int, phases: Sequence[Stage]) -> float | None:
        """Seconds left, None while unknown; later phases at this one's rate times their cost."""
        now = time.monotonic()
        if phase != self._phase:
            # The first chunk includes compilation: it counts for nothing.
            self._phase, self._seconds, self._steps = phase, 0.0, 0
        else:
            self._seconds += now - self._since
            self._steps += count
        self._since = now
        if not self._steps:
            return None
        end = sum(p.steps for p in phases[: phase + 1])
        later = sum(p.steps * p.cost / phases[phase].cost for p in phases[phase + 1 :])
        return self._seconds / self._steps * (end - done + later)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"

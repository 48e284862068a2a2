"""Work that goes on beside the steps of a run: pictures, scores, checkpoints."""

from __future__ import annotations

import collections
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import jax

_WAITING = 2
"""Jobs that may wait: each keeps the images it looks at in memory."""


class Background:
    """One job after the other, in a thread of its own; a context manager that ends with the last.

    Several processes do their jobs at once, in the main thread: what they ask of each other must
    come in the same order in all.

    Args:
      alone: the jobs ask nothing of other processes.
    """

    def __init__(self, alone: bool = False) -> None:
        self._alone = alone or jax.process_count() == 1
        self._pool = ThreadPoolExecutor(1, "jinv-background")
        self._jobs: collections.deque[Future[None]] = collections.deque()

    def __call__(self, job: Callable[[], None]) -> None:
        """Do a job soon; wait if others wait already, and raise what one of them has raised."""
        if not self._alone:
            return job()
        while self._jobs and (len(self._jobs) > _WAITING or self._jobs[0].done()):
            self._jobs.popleft().result()
        self._jobs.append(self._pool.submit(job))

    def wait(self) -> None:
        """Wait for all jobs, and raise what one of them has raised."""
        while self._jobs:
            self._jobs.popleft().result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=True)
        if error is None:
            self.wait()

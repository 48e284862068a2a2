"""SIGTERM and Ctrl-C, as a question that a run asks between steps."""

from __future__ import annotations

import signal
import threading
from typing import Any

from jinv import parallel


class Interrupted(RuntimeError):  # noqa: N818 - not an error: the run can go on
    """SIGTERM or Ctrl-C stopped the run after a checkpoint.

    Attributes:
      signal: its number.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number


class Signals:
    """Within, the first SIGTERM or Ctrl-C only asks to stop; the second acts as usual."""

    def __init__(self) -> None:
        self._number = 0
        self._agreed = False
        self._before: dict[int, Any] = {}

    def __call__(self) -> bool:
        """Whether one has come to any process; all must ask at the same points."""
        self._agreed = self._agreed or parallel.any_process(self.came)
        return self._agreed

    @property
    def came(self) -> bool:
        """Whether one has come to this process."""
        return self._number != 0

    @property
    def number(self) -> int:
        """The number of the one that came; SIGTERM's if it came to another process."""
        return self._number or signal.SIGTERM

    def __enter__(self) -> Signals:
        # Python handles signals in the main thread only; elsewhere they act as usual.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: Any) -> None:
        del frame
        self._number = number
        self._restore()

    def __exit__(self, *error: object) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

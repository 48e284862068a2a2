"""Numbers by step, appended to a CSV file that survives being killed."""

from __future__ import annotations

import csv
import io
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinv.files import write_atomic


class Log:
    """Rows of numbers by step in one CSV file; columns may differ from row to row.

    Rows wait in memory for `save`, which appends them. What is asked of all of them is read from
    the file, so that a step costs as much time and memory at the end of a run as at its beginning.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        self._waiting: list[dict[str, Any]] = []
        self._columns: list[str] = []
        self._written = 0
        # The last row in the file, which another of its step would replace, and the bytes before.
        self._last: dict[str, Any] = {}
        self._before_last = 0

    def __len__(self) -> int:
        with self._lock:
            replaces = bool(self._waiting) and self._replaces_last()
            return self._written + len(self._waiting) - replaces

    @property
    def last(self) -> dict[str, Any]:
        """Return the last row; empty if there is none."""
        with self._lock:
            return self._waiting[-1] if self._waiting else self._last

    def add(self, **row: Any) -> None:
        """Append a row, or replace the last one if it has the same step; `save` writes it."""
        with self._lock:
            if self._waiting and self._waiting[-1].get("step") == row.get("step"):
                self._waiting.pop()
            self._waiting.append(row)

    def save(self) -> None:
        """Append the rows that wait to the file; one that is cut in writing is left out later."""
        with self._lock:
            if not self._waiting:
                return
            names = dict.fromkeys((*self._columns, *(n for row in self._waiting for n in row)))
            if self._replaces_last():
                self._written -= 1
                self._truncate(self._before_last)
            if not self._written or len(names) > len(self._columns):
                kept = _rows(self.path) if self._written else ()
                self._rewrite([*kept, *self._waiting], list(names))
            else:
                *others, last = [_line(row, self._columns) for row in self._waiting]
                with self.path.open("a", newline="", encoding="utf-8") as file:
                    file.writelines(others)
                    self._before_last = file.tell()
                    file.write(last)
                self._written += len(self._waiting)
            self._last, self._waiting = self._waiting[-1], []

    def restore(self, before: int) -> None:
        """Read the rows of steps below `before` back; the others will be made again."""
        if not self.path.exists():
            return
        with self._lock:
            rows = [row for row in _rows(self.path) if row["step"] < before]
            if not rows:  # the first save makes the file anew
                return
            self._rewrite(rows, list(dict.fromkeys(name for row in rows for name in row)))
            self._last = rows[-1]

    def _replaces_last(self) -> bool:
        return bool(self._last) and self._last.get("step") == self._waiting[0].get("step")

    def _truncate(self, size: int) -> None:
        with self.path.open("r+b") as file:
            file.truncate(size)

    def _rewrite(self, rows: list[dict[str, Any]], names: list[str]) -> None:
        """Write the whole file, or nothing of it: with other columns, or without some rows."""
        lines = [_line(dict(zip(names, names, strict=True)), names)]
        lines += [_line(row, names) for row in rows]
        write_atomic(self.path, "".join(lines))
        self._columns, self._written = names, len(rows)
        self._before_last = sum(len(line.encode()) for line in lines[:-1])

    # --- what is asked at the end: of the file, to which waiting rows go first --------------------

    def columns(self) -> dict[str, list[float]]:
        """Return every column by name, in order of first appearance, NaN where a row has none."""
        self.save()
        if not self._written:
            return {}
        with self.path.open(newline="", encoding="utf-8") as file:
            names, *rows = csv.reader(file)
        return {
            name: [float(text) if text else math.nan for text in column]
            for name, column in zip(names, zip(*rows, strict=True), strict=True)
        }

    def terms(self) -> dict[str, list[float]]:
        """Return every column but the step's and the phase's."""
        return {n: values for n, values in self.columns().items() if n not in ("step", "phase")}

    def steps(self) -> list[int]:
        """Return every row's step."""
        return [int(step) for step in self.columns().get("step", [])]

    def boundaries(self) -> list[int]:
        """Return the steps at which a new phase began."""
        phases, steps = self.columns().get("phase", []), self.steps()
        pairs = zip(phases, phases[1:], steps[1:], strict=False)
        return [step for before, now, step in pairs if now != before]


def _line(row: dict[str, Any], names: list[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow([row.get(name, "") for name in names])
    return text.getvalue()


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file, without one that was cut."""
    with path.open(newline="", encoding="utf-8") as file:
        whole = (line for line in file if line.endswith("\n"))
        for row in csv.DictReader(whole):
            yield {name: _value(text) for name, text in row.items() if text != ""}


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text

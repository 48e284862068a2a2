"""Numbers by step, as a CSV file that survives being killed."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np

from jinv.files import write_atomic


class Log:
    """Rows of numbers by step, kept as one CSV file; columns may differ from row to row."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []

    def add(self, **row: Any) -> None:
        """Append a row, or replace the last one if it has the same step; `save` writes it."""
        if self.rows and self.rows[-1].get("step") == row.get("step"):
            self.rows.pop()
        self.rows.append(row)

    def columns(self) -> list[str]:
        """Return the names of all columns, in order of first appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def column(self, name: str) -> list[float]:
        """Return one column's values, NaN where a row has none."""
        return [float(row.get(name, np.nan)) for row in self.rows]

    def terms(self) -> dict[str, list[float]]:
        """Return every column but the step's and the phase's."""
        return {name: self.column(name) for name in self.columns() if name not in _NO_TERMS}

    def steps(self) -> list[int]:
        """Return every row's step."""
        return [int(row["step"]) for row in self.rows]

    def boundaries(self) -> list[int]:
        """Return the steps at which a new phase began."""
        pairs = zip(self.rows, self.rows[1:], strict=False)
        return [now["step"] for before, now in pairs if now["phase"] != before["phase"]]

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


_NO_TERMS = ("step", "phase")


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text

"""A log is its file: appended to, whole after a kill, the same size in memory at any step."""

from __future__ import annotations

import csv
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jinv.runs.log import Log


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_are_appended(tmp_path: Path) -> None:
    log = Log(tmp_path / "log.csv")
    for step in range(6):
        log.add(step=step, phase=step // 4, loss=0.1 * step)
        if step % 2:
            before = log.path.read_bytes() if log.path.exists() else b""
            log.save()
            assert log.path.read_bytes().startswith(before)
    assert rows(log.path) == [
        {"step": str(i), "phase": str(i // 4), "loss": repr(0.1 * i)} for i in range(6)
    ]
    assert len(log) == 6
    assert log.last == {"step": 5, "phase": 1, "loss": 0.5}
    assert log.terms() == {"loss": [0.1 * i for i in range(6)]}
    assert log.steps() == list(range(6))
    assert log.boundaries() == [4]


def test_new_columns_are_empty_before(tmp_path: Path) -> None:
    log = Log(tmp_path / "log.csv")
    log.add(step=0, a=1.5)
    log.save()
    log.add(step=1, b=2.5)
    log.save()
    log.add(step=2, a=3.5)
    log.save()
    assert rows(log.path) == [
        {"step": "0", "a": "1.5", "b": ""},
        {"step": "1", "a": "", "b": "2.5"},
        {"step": "2", "a": "3.5", "b": ""},
    ]
    np.testing.assert_array_equal(log.terms()["a"], [1.5, np.nan, 3.5])


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("before", [0, 1])
def test_a_row_replaces_the_last_of_its_step(tmp_path: Path, saved: bool, before: int) -> None:
    log = Log(tmp_path / "log.csv")
    for step in range(before + 1):
        log.add(step=step, top1=0.25)
    if saved:
        log.save()
    log.add(step=before, top1=0.75)
    assert len(log) == before + 1
    assert log.columns()["top1"] == [0.25] * before + [0.75]
    log.add(step=before + 1, top1=1.0)
    log.save()
    assert [row["top1"] for row in rows(log.path)] == ["0.25"] * before + ["0.75", "1.0"]


def test_a_log_goes_on_after_a_kill(tmp_path: Path) -> None:
    """Without the steps that are made again, and without the row that was being written."""
    log = Log(tmp_path / "log.csv")
    for step in range(5):
        log.add(step=step, loss=float(step))
    log.save()
    with log.path.open("a") as file:
        file.write("5,5.")
    later = Log(log.path)
    later.restore(3)
    assert len(later) == 3
    assert later.last == {"step": 2, "loss": 2.0}
    later.add(step=3, loss=30.0)
    later.save()
    assert later.terms() == {"loss": [0.0, 1.0, 2.0, 30.0]}


@pytest.mark.parametrize("text", ["", "step,lo", "step,loss\n", "step,loss\n7,0.5\n"])
def test_nothing_of_use_is_nothing(tmp_path: Path, text: str) -> None:
    path = tmp_path / "log.csv"
    path.write_text(text)
    log = Log(path)
    log.restore(3)
    assert (len(log), log.last, log.columns()) == (0, {}, {})
    log.add(step=0, other=1.0)
    log.save()
    assert rows(path) == [{"step": "0", "other": "1.0"}]


def test_time_and_memory_are_flat(tmp_path: Path) -> None:
    """Over 10^5 steps of seven numbers, saved every hundred: the last tenth costs as the first."""
    log = Log(tmp_path / "log.csv")
    tracemalloc.start()

    def tenth(start: int) -> tuple[float, int]:
        began = time.process_time()
        for step in range(start, start + 10_000):
            values: dict[str, Any] = {f"term{i}": step / (i + 1) for i in range(5)}
            log.add(step=step, phase=0, **values)
            if step % 100 == 99:
                log.save()
        return time.process_time() - began, tracemalloc.get_traced_memory()[0]

    try:
        seconds, memory = zip(*(tenth(start) for start in range(0, 100_000, 10_000)), strict=True)
    finally:
        tracemalloc.stop()
    assert len(log) == 100_000
    assert memory[-1] < memory[0] + 50_000
    assert min(seconds[5:]) < 2 * min(seconds[:5])
    assert log.terms()["term4"][-1] == 99_999 / 5

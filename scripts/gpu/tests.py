"""The tests that are marked `gpu`, in this process: several on one card die."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from gpu.part import Given

ROOT = Path(__file__).resolve().parents[2]


class Told:
    """A plugin of pytest's that keeps what comes of every test."""

    def __init__(self, given: Given) -> None:
        self.given = given
        self.seconds = 0.0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add up setup, call and teardown; the first that does not pass tells."""
        if report.when == "setup":
            self.seconds = 0.0
        self.seconds += report.duration
        if report.when == "call" or report.outcome != "passed":
            self.given.emit(
                test=report.nodeid,
                outcome=report.outcome,
                seconds=self.seconds,
                message=str(report.longrepr)[-500:] if report.failed else "",
            )


def run(given: Given) -> None:
    """One row a test; ends this process with pytest's status."""
    os.chdir(ROOT)
    # Collecting the other files takes as long as these tests.
    marked = [f for f in sorted(Path("tests").rglob("test_*.py")) if "mark.gpu" in f.read_text()]
    chosen = ["tests/test_prng.py"] if given.tiny else list(map(str, marked))
    options = ["-m", "gpu", "-p", "no:xdist", "-p", "no:cacheprovider", "--no-header"]
    status = pytest.main([*options, *chosen], plugins=[Told(given)])
    sys.exit(int(status))

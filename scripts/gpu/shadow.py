"""Shadow models that stay on the card, come to the host, and go to disk."""

from __future__ import annotations

from benchmarks import shadow
from gpu.part import Given


def run(given: Given) -> None:
    """One row a setting of the paper."""
    chosen, models = (shadow.CASES[2:3], 50) if given.tiny else (shadow.CASES, 40_000)
    for i, case in enumerate(chosen):
        given.emit(**shadow.delivery(case, models, given.out / f"shadow_{i}"))

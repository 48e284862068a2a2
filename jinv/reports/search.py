"""The page of a search: the best trial, the best so far, and all trials by their score."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinv.reports import curves, page


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search has found so far.

    Attributes:
      command: of the trials.
      score: name of what counts.
      goal: "max" or "min".
      trials: of each: folder, values (key -> value), status, score, seconds, reason.
      best: index of the best one.
    """

    command: str
    score: str
    goal: str
    trials: Sequence[dict[str, Any]]
    best: int


def make(found: Found, folder: Path) -> page.Page:
    """Return the page.

    Args:
      found: the trials.
      folder: where theirs are; a grid.png in that of the best is shown.
    """
    best = found.trials[found.best]
    rows = tuple((key, _shown(value)) for key, value in best["values"].items())
    sections = [page.Section("The best values", page.Table(("key", "value"), rows))]
    grid = folder / best["folder"] / "grid.png"
    if grid.exists():
        alt = f"grid of the images of {best['folder']}"
        sections.append(page.Section("Its images", page.Figure(grid.read_bytes(), alt)))
    sections += [
        page.Section("The best so far", page.Figure(_curves(found), "score of every trial")),
        page.Section("All trials", _table(found)),
    ]
    done = sum(trial["score"] is not None for trial in found.trials)
    return page.Page(
        f"Search of jinv {found.command}",
        sections,
        f"{best['folder']} has the {_GOALS[found.goal]} {found.score} of {done} trials: "
        f"{best['score']:.6g}. best.yaml is its recipe.",
    )


_GOALS = {"max": "largest", "min": "smallest"}


def _curves(found: Found) -> bytes:
    scores = {i: t["score"] for i, t in enumerate(found.trials) if t["score"] is not None}
    so_far = itertools.accumulate(scores.values(), max if found.goal == "max" else min)
    panels = {found.score: list(scores.values()), "best so far": list(so_far)}
    return curves.plot(panels, list(scores), against="trial")


def _table(found: Found) -> page.Table:
    """Return the trials, the best first and those without a score last."""
    sign = -1 if found.goal == "max" else 1

    def rank(trial: dict[str, Any]) -> float:
        return math.inf if trial["score"] is None else sign * trial["score"]

    keys = list(found.trials[0]["values"])
    rows = [
        (
            trial["folder"],
            *(_shown(trial["values"][key]) for key in keys),
            "" if trial["score"] is None else f"{trial['score']:.6g}",
            "" if trial["seconds"] is None else f"{trial['seconds']:.1f}",
            ": ".join(filter(None, (trial["status"], trial["reason"]))),
        )
        for trial in sorted(found.trials, key=rank)
    ]
    return page.Table(("trial", *keys, found.score, "seconds", "status"), rows)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)

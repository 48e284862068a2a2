"""Several runs that belong together: variants of a recipe, trials with other seeds.

A study is a recipe with `variants` (name -> the keys that are different) or `trials`. Every run
has a folder of its own below the study's, with everything that a single run leaves there; a page
above them compares their summaries.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from jinv import parallel
from jinv.reports import page
from jinv.runs import config as configs
from jinv.runs import run_folder

Value = Callable[[Mapping[str, Any]], float | None]
"""Reads a number off a summary."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a study: its variant's name, its folder below the study's, its recipe."""

    variant: str
    folder: str
    recipe: Any

    @property
    def title(self) -> str:
        """In the study's page."""
        return " ".join(filter(None, (title(self.variant), *self.folder.split("/")[1:])))


class Runnable(Protocol):
    """A recipe with everything loaded."""

    def run(self, run: run_folder.Session) -> dict[str, Any]:
        """Do it, write the results, return the summary."""


Compare = Callable[[Sequence[Run], Sequence[dict[str, Any]], run_folder.Session], None]
"""(runs, their summaries, the study's folder): writes the page, and calls `finish`."""


def runs(
    recipe: Any,
    variants: Mapping[str, Mapping[str, Any]],
    recipe_from: Callable[[dict[str, Any]], Any],
) -> list[Run]:
    """All runs, variant by variant.

    Args:
      recipe: what they share; it has `seed`, `trials` and `attack`.
      variants: name -> a tree of keys to replace; mappings are merged, lists replaced.
      recipe_from: makes a recipe of a tree.

    Raises:
      ConfigError: a variant that makes no recipe.
    """
    found = []
    for name, changes in variants.items() or [("", {})]:
        base = configs.plain(recipe)
        if "preset" in (changes.get("attack") or {}):
            base.pop("attack")  # the preset takes the place of all its keys
        try:
            changed = recipe_from(_merged(base, changes))
        except ValueError as error:
            raise configs.ConfigError(f"variant {name!r}: {error}") from None
        slug = re.sub(r"[^A-Za-z0-9_.+-]+", "-", name).strip("-.")
        if (name and not slug) or slug in run_folder.FOLDERS:
            raise configs.ConfigError(f"variant {name!r} cannot name a folder: use other letters")
        for trial in range(changed.trials):
            folder = "/".join(filter(None, (slug, f"trial_{trial}" if changed.trials > 1 else "")))
            seeded = dataclasses.replace(changed, seed=changed.seed + trial, trials=1)
            found.append(Run(name, folder, seeded))
    folders = [run.folder for run in found]
    if len(set(folders)) < len(folders):
        raise configs.ConfigError(f"variants need different names: {list(variants)}")
    return found


_LEAVES = ("optimizer_args",)  # of one optimiser; another takes others


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping) and key not in _LEAVES
        merged[key] = _merged(old, value) if both else value  # type: ignore[arg-type]
    return merged


def execute(
    chosen: Sequence[Run],
    whole: run_folder.Session,
    prepare: Callable[[Any], Runnable],
    compare: Compare,
    *,
    resume: bool,
    overwrite: bool,
) -> None:
    """Run what is not finished, then write the study's page and summary.

    Args:
      chosen: the runs.
      whole: the study's own folder.
      prepare: loads what a recipe needs.
      compare: writes the page and the summary.
      resume, overwrite: as of a session.

    Raises:
      Interrupted, NonFiniteError: of the run that was going; finished ones are kept.
    """
    # All at once, so that overwriting leaves no old run for a later --resume to take for new.
    sessions = [
        run_folder.Session(
            whole.folder / run.folder,
            configs.plain(run.recipe),
            run.recipe.run,
            resume=resume,
            overwrite=overwrite,
        )
        for run in chosen
    ]
    for run, own in zip(chosen, sessions, strict=True):
        parallel.say(f"{run.folder}{': finished already' if own.finished else ''}")
        if not own.finished:
            prepare(run.recipe).run(own)
        if own.interrupted:
            raise run_folder.Interrupted(
                f"{whole.folder}: stopped after {run.folder}; go on with --resume", own.interrupted
            )
    parallel.on_main(
        lambda: compare(chosen, [own.read_summary() for own in sessions], whole),
        run_folder.SessionError,
    )


def finish(
    whole: run_folder.Session,
    chosen: Sequence[Run],
    summaries: Sequence[dict[str, Any]],
    heading: str,
    lead: str,
    sections: Sequence[page.Section],
    found: Mapping[str, Any],
) -> None:
    """Write report.html, with the config at its end, and the summary with what was found."""
    config = (whole.folder / "config.yaml").read_text()
    ending = page.Section("Config", page.Text(config))
    page.write_html(whole.folder / "report.html", heading, [*sections, ending], lead=lead)
    whole.finish(
        {
            "runs": {run.folder: s for run, s in zip(chosen, summaries, strict=True)},
            **found,
            "seconds": round(sum(s["seconds"] for s in summaries), 3),
        }
    )


def at(*keys: str) -> Value:
    """Reads a summary's value, None where it has none."""

    def value(summary: Mapping[str, Any]) -> float | None:
        found: Any = summary
        for key in keys:
            found = found.get(key) if found is not None else None
        return found

    return value


def title(variant: str) -> str:
    """Of a variant in tables."""
    return variant or "trials"


def cell(values: Sequence[float | None]) -> str:
    """ "0.75", or "0.75 ± 0.05" of several trials; empty where there is nothing."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    mean = f"{np.mean(known):.3g}"
    return mean if len(known) == 1 else f"{mean} ± {np.std(known, ddof=1):.2g}"

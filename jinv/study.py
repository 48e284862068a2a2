"""Several runs that belong together: variants of a recipe, trials with other seeds, one page.

A study is a recipe with `variants` (name -> the keys that are different) or `trials`. Every run
has a folder of its own below the study's, with everything that a single run leaves there.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jinv import config as configs
from jinv import parallel, report, session
from jinv.inversion import Inversion, Recipe, recipe_from

Value = Callable[[Mapping[str, Any]], float | None]


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a study: its variant's name, its folder below the study's, its recipe."""

    variant: str
    folder: str
    recipe: Recipe


def runs(recipe: Recipe, variants: Mapping[str, Mapping[str, Any]]) -> list[Run]:
    """All runs, variant by variant.

    Args:
      recipe: what they share.
      variants: name -> a tree of keys to replace; mappings are merged, lists replaced.

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
        if (name and not slug) or slug in session.FOLDERS:
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
    chosen: Sequence[Run], whole: session.Session, *, resume: bool, overwrite: bool
) -> None:
    """Run what is not finished, then write the study's page and summary.

    Raises:
      Interrupted, NonFiniteError: of the run that was going; finished ones are kept.
    """
    # All at once, so that overwriting leaves no old run for a later --resume to take for new.
    sessions = [
        session.Session(
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
            Inversion(run.recipe).run(own)
        if own.interrupted:
            raise session.Interrupted(
                f"{whole.folder}: stopped after {run.folder}; go on with --resume", own.interrupted
            )
    parallel.on_main(
        lambda: _write(chosen, [own.read_summary() for own in sessions], whole),
        session.SessionError,
    )


def _write(
    chosen: Sequence[Run], summaries: Sequence[dict[str, Any]], whole: session.Session
) -> None:
    variants = list(dict.fromkeys(run.variant for run in chosen))
    by_variant = {
        name: [s for run, s in zip(chosen, summaries, strict=True) if run.variant == name]
        for name in variants
    }
    networks = list(dict.fromkeys(name for s in summaries for name in s["mean_probability"]))
    inverted = {run.variant: {n.label for n in run.recipe.networks} for run in chosen}
    rivals = {run.recipe.competitor.label for run in chosen if run.recipe.competitor}
    held_out = [n for n in networks if n not in rivals.union(*inverted.values())]

    def table(kind: str, rows: Mapping[str, Value]) -> report.Table:
        lines = []
        for row, value in rows.items():
            cells = [
                _cell([value(s) for s in found])
                + (" (inverted)" if row in inverted[name] and kind == "network" else "")
                for name, found in by_variant.items()
            ]
            lines.append((row, *cells))
        return report.Table((kind, *map(_title, variants)), lines)

    sections = []
    if any(s["top1"] for s in summaries):
        sections.append(
            report.Section(
                "Judges",
                table("network", {n: _at("top1", n) for n in networks}),
                "Share of images that a network gives the class they were made for. "
                + (f"In no run had {', '.join(held_out)} a say." if held_out else ""),
            )
        )
        sections.append(
            report.Section(
                "Confidence",
                table("network", {n: _at("confidence", n) for n in networks}),
                "Mean probability of the class the images were made for.",
            )
        )
    variety = {
        "agreement of judges": _at("agreement"),
        "distance of pixels": _at("diversity", "pixels"),
        **{f"distance of features, {n}": _at("diversity", n) for n in networks},
    }
    sections.append(
        report.Section(
            "Agreement and diversity",
            table("", variety),
            "How often two judges name the same class; how far two images of a class are apart.",
        )
    )
    for run in chosen:
        title = " ".join(filter(None, (_title(run.variant), *run.folder.split("/")[1:])))
        grid = (whole.folder / run.folder / "grid.png").read_bytes()
        intro = f"Inverted: {run.recipe.networks[0].label}" + "".join(
            f", {network.label}" for network in run.recipe.networks[1:]
        )
        sections.append(report.Section(title, report.Figure(grid, f"Images of {title}"), intro))
    timing: dict[str, Value] = {
        "seconds": _at("seconds"),
        "seconds a step": _at("seconds_per_step"),
        "steps": _at("steps"),
    }
    sections.append(report.Section("Time", table("", timing)))
    config = (whole.folder / "config.yaml").read_text()
    sections.append(report.Section("Config", report.Text(config)))
    report.write_html(
        whole.folder / "report.html",
        f"{len(variants)} ways to invert" if len(variants) > 1 else f"{len(chosen)} trials",
        sections,
        lead=f"{len(chosen)} runs. Where a cell holds several trials it says mean ± deviation.",
    )
    whole.finish(
        {
            "runs": {run.folder: s for run, s in zip(chosen, summaries, strict=True)},
            "variants": {
                _title(name): {
                    "inverted": sorted(inverted[name]),
                    "trials": len(found),
                    "top1": {
                        n: float(np.mean([s["top1"][n] for s in found]))
                        for n in networks
                        if all(n in s["top1"] for s in found)
                    },
                    "seconds": sum(s["seconds"] for s in found),
                }
                for name, found in by_variant.items()
            },
            "held_out": held_out,
            "seconds": round(sum(s["seconds"] for s in summaries), 3),
        }
    )


def _at(*keys: str) -> Value:
    """Reads a summary's value, None where it has none."""

    def value(summary: Mapping[str, Any]) -> float | None:
        found: Any = summary
        for key in keys:
            found = found.get(key) if found is not None else None
        return found

    return value


def _title(variant: str) -> str:
    return variant or "trials"


def _cell(values: Sequence[float | None]) -> str:
    """ "0.75", or "0.75 ± 0.05" of several trials; empty where there is nothing."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    mean = f"{np.mean(known):.3g}"
    return mean if len(known) == 1 else f"{mean} ± {np.std(known, ddof=1):.2g}"

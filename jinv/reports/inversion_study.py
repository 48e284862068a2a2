"""The page that compares the inversions of a study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jinv.reports import page
from jinv.runs import run_folder, study


def write(
    chosen: Sequence[study.Run], summaries: Sequence[dict[str, Any]], whole: run_folder.Session
) -> None:
    """Write report.html and the summary of a study, see scripts/invert.py for its keys."""
    variants = list(dict.fromkeys(run.variant for run in chosen))
    by_variant = {
        name: [s for run, s in zip(chosen, summaries, strict=True) if run.variant == name]
        for name in variants
    }
    networks = list(dict.fromkeys(name for s in summaries for name in s["mean_probability"]))
    inverted = {run.variant: {n.label for n in run.recipe.networks} for run in chosen}
    rivals = {run.recipe.competitor.label for run in chosen if run.recipe.competitor}
    held_out = [n for n in networks if n not in rivals.union(*inverted.values())]

    def table(kind: str, rows: Mapping[str, study.Value]) -> page.Table:
        lines = []
        for row, value in rows.items():
            cells = [
                study.cell([value(s) for s in found])
                + (" (inverted)" if row in inverted[name] and kind == "network" else "")
                for name, found in by_variant.items()
            ]
            lines.append((row, *cells))
        return page.Table((kind, *map(study.title, variants)), lines)

    sections = []
    if any(s["top1"] for s in summaries):
        sections.append(
            page.Section(
                "Judges",
                table("network", {n: study.at("top1", n) for n in networks}),
                "Share of images that a network gives the class they were made for. "
                + (f"In no run had {', '.join(held_out)} a say." if held_out else ""),
            )
        )
        sections.append(
            page.Section(
                "Confidence",
                table("network", {n: study.at("confidence", n) for n in networks}),
                "Mean probability of the class the images were made for.",
            )
        )
    variety = {
        "agreement of judges": study.at("agreement"),
        "distance of pixels": study.at("diversity", "pixels"),
        **{f"distance of features, {n}": study.at("diversity", n) for n in networks},
    }
    sections.append(
        page.Section(
            "Agreement and diversity",
            table("", variety),
            "How often two judges name the same class; how far two images of a class are apart.",
        )
    )
    for run in chosen:
        grid = (whole.folder / run.folder / "grid.png").read_bytes()
        intro = f"Inverted: {run.recipe.networks[0].label}" + "".join(
            f", {network.label}" for network in run.recipe.networks[1:]
        )
        sections.append(page.Section(run.title, page.Figure(grid, f"Images of {run.title}"), intro))
    timing: dict[str, study.Value] = {
        "seconds": study.at("seconds"),
        "seconds a step": study.at("seconds_per_step"),
        "steps": study.at("steps"),
    }
    sections.append(page.Section("Time", table("", timing)))
    title = f"{len(variants)} ways to invert" if len(variants) > 1 else f"{len(chosen)} trials"
    lead = f"{len(chosen)} runs. Where a cell holds several trials it says mean ± deviation."
    summary = {
        "variants": {
            study.title(name): {
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
    }
    study.finish(whole, chosen, summaries, title, lead, sections, summary)

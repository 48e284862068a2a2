"""The page of a study of leaks: what each defence, batch size or number of steps leaves to find."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jinv.files import write_atomic
from jinv.reports import curves, page
from jinv.runs import run_folder, study

MEASURES: dict[str, tuple[str, study.Value]] = {
    "psnr": ("PSNR [dB]", study.at("scores", "psnr")),
    "ssim": ("SSIM", study.at("scores", "ssim")),
    "iip": ("IIP", study.at("scores", "iip")),
    "labels": ("labels found", study.at("labels", "accuracy")),
}


def write(
    chosen: Sequence[study.Run], summaries: Sequence[dict[str, Any]], whole: run_folder.Session
) -> None:
    """Write report.html and the summary of a sweep, see scripts/invert_gradients.py for its keys.

    Variants called "NAME NUMBER" are points of a curve NAME; the first of the others is drawn as
    the line to compare with.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for run, summary in zip(chosen, summaries, strict=True):
        found.setdefault(run.variant, []).append(summary)
    table = page.Table(
        ("", *(title for title, _ in MEASURES.values()), "epsilon"),
        [
            (
                study.title(name),
                *(study.cell([value(s) for s in of]) for _, value in MEASURES.values()),
                study.cell([s["evidence"]["epsilon"] for s in of][:1]),
            )
            for name, of in found.items()
        ],
    )
    sections = [
        page.Section(
            "What leaks",
            table,
            "Means over the images of a client; of several clients mean ± deviation.",
        )
    ]
    panels = _panels(found)
    if panels:
        svg = curves.plot_series(panels)
        write_atomic(whole.folder / "curves.svg", svg)
        sections.insert(
            0, page.Section("Leakage", page.Figure(svg, "Leakage against strength"), _LEGEND)
        )
    for run in chosen:
        grid = (whole.folder / run.folder / "grid.png").read_bytes()
        figure = page.Figure(grid, f"Original and reconstruction, {run.title}")
        sections.append(page.Section(run.title, figure))
    variants = {
        study.title(name): {
            "trials": len(of),
            **{key: _mean(value, of) for key, (_, value) in MEASURES.items()},
            "epsilon": of[0]["evidence"]["epsilon"],
        }
        for name, of in found.items()
    }
    lead = f"{len(chosen)} attacks on simulated clients."
    title = "What gradients betray"
    study.finish(whole, chosen, summaries, title, lead, sections, {"variants": variants})


_LEGEND = "Dots are clients, lines their means; dashed: the first variant without a number."


def _mean(value: study.Value, summaries: Sequence[Mapping[str, Any]]) -> float | None:
    known = [v for s in summaries if (v := value(s)) is not None]
    return float(np.mean(known)) if known else None


def _panels(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[list[curves.Series]]:
    """A row a measure, a column a family of variants."""
    families: dict[str, dict[float, Sequence[Mapping[str, Any]]]] = {}
    plain: list[Sequence[Mapping[str, Any]]] = []
    for name, of in found.items():
        match = re.fullmatch(r"(.*\S)\s+([0-9.]+(?:e-?[0-9]+)?)", name)
        if match:
            families.setdefault(match[1], {})[float(match[2])] = of
        else:
            plain.append(of)
    if not families:
        return []

    def values(value: study.Value, of: Sequence[Mapping[str, Any]]) -> list[float]:
        return [v for s in of if (v := value(s)) is not None]

    return [
        [
            curves.Series(
                title,
                family,
                {x: known for x, of in points.items() if (known := values(value, of))},
                values(value, plain[0]) if plain else (),
            )
            for family, points in families.items()
        ]
        for title, value in MEASURES.values()
    ]

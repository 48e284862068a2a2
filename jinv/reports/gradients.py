"""The pages of inverted gradients: one client's images and scores, a study's comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jinv import image
from jinv.reports import curves, page
from jinv.scores.reconstruction import SCORES

_KNOWN = {
    "none": "Nothing is known of BatchNorm statistics.",
    "running": "Of BatchNorm statistics the network's running ones are known.",
    "exact": "BatchNorm statistics of the very batch are known.",
    "update": "BatchNorm statistics are solved from the client's new running ones.",
}


def run_page(
    summary: Mapping[str, Any],
    rows: Mapping[str, np.ndarray],
    svg: bytes,
    names: Sequence[str],
) -> page.Page:
    """Return the page of one run, but for its ending.

    Args:
      summary: of the run.
      rows: title -> uint8 images (K, H, W, C), such as originals and reconstructions.
      svg: curves of all terms.
      names: of the classes.
    """
    size = max(1, 112 // next(iter(rows.values())).shape[1])
    sheet = page.png(image.rows(list(rows.values()), size))
    sections = [
        page.Section(
            "Images",
            page.Figure(sheet, f"Rows: {', '.join(rows)}"),
            f"From top to bottom: {', '.join(rows)}; one column an image.",
        )
    ]
    if summary["scores"] is not None:
        sections += _scores(summary)
    sections.append(_labels(summary, names))
    if summary["seeds"] > 1:
        sections.append(
            page.Section(
                "Seeds",
                page.Table(
                    ("seed", "distance of gradients"),
                    [(str(i), d) for i, d in enumerate(summary["distances"])],
                ),
                f"Seed {summary['chosen_seed']} comes nearest and is shown.",
            )
        )
    told = {k: "" if v is None else str(v) for k, v in summary["evidence"].items()}
    evidence = page.Table(("", "value"), tuple(told.items()))
    sections += [
        page.Section("Evidence", evidence, _privacy(summary["evidence"])),
        page.Section("Curves", page.Figure(svg, "Every term at every step")),
    ]
    return page.Page(f"What a gradient of {summary['model']} betrays", sections, _lead(summary))


def _lead(summary: Mapping[str, Any]) -> str:
    held = summary["evidence"]
    steps = held["local_steps"]
    what = f"a weight update of {steps} local steps" if steps else "gradient"
    mode = "training" if held["training"] else "evaluation"
    plural = "s" if held["images"] > 1 else ""
    return (
        f"{held['images']} image{plural} out of the {what} of a client in {mode} mode. "
        f"{_KNOWN[held['statistics']]} Labels: {summary['labels']['method']}."
    )


def _scores(summary: Mapping[str, Any]) -> list[page.Section]:
    header = ["", *(title for title, _ in SCORES.values())]
    lines = [["reconstruction", *_cells(summary["scores"])]]
    intro = "Means over the images, each matched to an original by linear assignment."
    if summary["bn_only"] is not None:
        lines.append(["BatchNorm statistics alone", *_cells(summary["bn_only"])])
        intro += " The second row is the same attack without the gradient."
    else:
        intro += " No BatchNorm statistics are known, so there is no attack without gradient."
    for name, reason in summary["not_available"].items():
        intro += f" {SCORES[name][0]} is not available: {reason}"
    each = {k: v for k, v in summary["per_image"].items() if isinstance(v, list)}
    per_image = page.Table(
        ("image", *(SCORES[name][0] for name in each)),
        [(str(i), *values) for i, values in enumerate(zip(*each.values(), strict=True))],
    )
    return [
        page.Section("Scores", page.Table(header, lines), intro),
        page.Section("Scores by image", per_image),
    ]


def _labels(summary: Mapping[str, Any], names: Sequence[str]) -> page.Section:
    def named(classes: Sequence[int]) -> str:
        counted = {c: classes.count(c) for c in dict.fromkeys(classes)}
        return ", ".join(names[c] + (f" x {n}" if n > 1 else "") for c, n in counted.items())

    columns = ("accuracy", "precision", "recall", "exact")
    used = summary["labels"]
    methods = dict(summary["label_methods"])
    methods.setdefault(used["method"], used)
    lines = [
        [
            method,
            *(page.cell([found.get(name)]) for name in columns),
            found.get("not_available") or named(found["restored"]),
        ]
        for method, found in methods.items()
    ]
    intro = f"Used: {used['method']}."
    if "truth" in used:
        intro += f" The truth: {named(used['truth'])}."
    return page.Section("Labels", page.Table(("method", *columns, "found"), lines), intro)


def _privacy(told: Mapping[str, Any]) -> str:
    if told["epsilon"] is None:
        return ""
    return (
        f"The noise gives the client's whole update ({told['epsilon']:.3g}, "
        f"{told['delta']:g}) differential privacy (adding or removing one client, one round)."
    )


def _cells(scores: Mapping[str, float | None]) -> list[str]:
    return [page.cell([scores[name]]) or "not available" for name in SCORES]


# A study ------------------------------------------------------------------------------------------

Summaries = Mapping[str, Sequence[Mapping[str, Any]]]
"""Title of a variant -> the summaries of its trials."""

MEASURES: dict[str, tuple[str, Callable[[Mapping[str, Any]], float | None]]] = {
    "psnr": ("PSNR [dB]", lambda s: s["scores"] and s["scores"]["psnr"]),
    "ssim": ("SSIM", lambda s: s["scores"] and s["scores"]["ssim"]),
    "iip": ("IIP", lambda s: s["scores"] and s["scores"]["iip"]),
    "labels": ("labels found", lambda s: s["labels"].get("accuracy")),
}


def variants(found: Summaries) -> dict[str, dict[str, Any]]:
    """Return every variant's means over its trials."""
    return {
        name: {
            "trials": len(trials),
            **{key: _mean(_known(key, trials)) for key in MEASURES},
            "epsilon": trials[0]["evidence"]["epsilon"],
        }
        for name, trials in found.items()
    }


def study_page(found: Summaries, grids: Mapping[str, bytes], svg: bytes | None) -> page.Page:
    """Return the page that compares what clients leak.

    Args:
      found: the summaries.
      grids: title of a run -> PNG of its images.
      svg: what `leakage_curves` gave.
    """
    table = page.Table(
        ("", *(title for title, _ in MEASURES.values()), "epsilon"),
        [
            (
                name,
                *(page.cell(_known(key, trials)) for key in MEASURES),
                page.cell([trials[0]["evidence"]["epsilon"]]),
            )
            for name, trials in found.items()
        ],
    )
    sections = [
        page.Section(
            "What leaks",
            table,
            "Means over the images of a client; of several clients mean ± deviation.",
        )
    ]
    if svg is not None:
        figure = page.Figure(svg, "Leakage against strength")
        legend = "Dots are clients, lines their means; dashed: the first variant without a number."
        sections.insert(0, page.Section("Leakage", figure, legend))
    for title, grid in grids.items():
        figure = page.Figure(grid, f"Original and reconstruction, {title}")
        sections.append(page.Section(title, figure))
    runs = sum(map(len, found.values()))
    return page.Page("What gradients betray", sections, f"{runs} attacks on simulated clients.")


def leakage_curves(found: Summaries) -> bytes | None:
    """Return curves as SVG, a row a measure and a column a family of variants "NAME NUMBER".

    The first variant without a number is drawn as the line to compare with. None without families.
    """
    families, plain = curves.families(found)
    if not families:
        return None
    panels = [
        [
            curves.Series(
                title,
                family,
                {x: known for x, trials in points.items() if (known := _known(key, trials))},
                _known(key, plain[0]) if plain else (),
            )
            for family, points in families.items()
        ]
        for key, (title, _) in MEASURES.items()
    ]
    return curves.plot_series(panels)


def _known(key: str, trials: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return a measure's values, of the trials that have one."""
    return [v for s in trials if (v := MEASURES[key][1](s)) is not None]


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None

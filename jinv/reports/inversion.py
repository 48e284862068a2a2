"""The pages of inversions: one run's images with the judges' verdicts, a study's comparison."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jinv.reports import page
from jinv.scores.judging import Prediction

Value = Callable[[Mapping[str, Any]], float | None]
"""Reads a number off a summary."""


@dataclasses.dataclass(frozen=True)
class Found:
    """What an inversion has found.

    Attributes:
      pixels: uint8 images (B, H, W, C).
      targets: their classes; empty if none were asked for.
      names: of the classes.
      predictions: network -> what it says of the images.
      roles: network -> " (inverted)" or " (competitor)"; judges have none.
    """

    pixels: np.ndarray
    targets: Sequence[int]
    names: Sequence[str]
    predictions: Mapping[str, Prediction]
    roles: Mapping[str, str]


def run_page(summary: Mapping[str, Any], found: Found, svg: bytes, statistics: bool) -> page.Page:
    """Return the page of one run, but for its ending.

    Args:
      summary: of the run.
      found: images and verdicts.
      svg: curves of all terms.
      statistics: whether BatchNorm statistics were known.
    """
    inverted = [name for name, role in found.roles.items() if role == " (inverted)"]
    sections = [
        page.Section(
            "Images",
            page.Pictures([_picture(found, i, file) for i, file in enumerate(summary["files"])]),
        ),
        _judges(summary, found),
        _variety(summary, bool(found.targets)),
        page.Section("Curves", page.Figure(svg, "Every term of the objective at every step")),
    ]
    return page.Page(
        f"What {summary['model']} {'have' if len(inverted) > 1 else 'has'} learned",
        sections,
        f"{len(found.pixels)} images, {summary['steps']} steps, from the weights"
        f"{' and BatchNorm statistics' if statistics else ''} alone: no data was read.",
    )


def _picture(found: Found, i: int, file: str) -> page.Picture:
    target = found.targets[i] if found.targets else None

    def verdict(network: str, prediction: Prediction) -> page.Verdict:
        index = int(prediction.index[i])
        label = found.names[index] if index < len(found.names) else f"class {index}"
        agrees = None if target is None else index == target
        return page.Verdict(network, label, index, float(prediction.probability[i]), agrees)

    verdicts = tuple(verdict(name, p) for name, p in found.predictions.items())
    caption = f"image {i}" if target is None else found.names[target]
    return page.Picture(found.pixels[i], caption, file, verdicts)


def _judges(summary: Mapping[str, Any], found: Found) -> page.Section:
    header = ["network", "mean probability of the class it gives"]
    if found.targets:
        header += ["gives the target class", "probability of the target class"]
    rows = []
    for name in found.predictions:
        rows.append([name + found.roles.get(name, ""), f"{summary['mean_probability'][name]:.2f}"])
        if found.targets:
            share, confidence = summary["top1"][name], summary["confidence"][name]
            rows[-1] += [f"{100 * share:.0f}%", f"{confidence:.2f}"]
    intro = "Networks that had no say in the optimisation are the test."
    if summary["agreement"] is not None:
        share = 100 * summary["agreement"]
        intro += f" Any two of them name the same class for {share:.0f}% of images."
    return page.Section("Judges", page.Table(header, rows), intro)


def _variety(summary: Mapping[str, Any], labelled: bool) -> page.Section:
    found = summary["diversity"]
    if found["pixels"] is None:
        return page.Section("Diversity", page.Table(("every class has one image",), ()))
    rows = [
        (
            "pixels (root mean square)" if name == "pixels" else f"features of {name} (cosine)",
            f"{value:.3f}",
        )
        for name, value in found.items()
    ]
    which = "of one class" if labelled else "of the batch"
    return page.Section(
        "Diversity",
        page.Table(("distance", "mean"), rows),
        f"How far two images {which} are apart; 0 if they are all the same.",
    )


# A study ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Variant:
    """A variant of a study.

    Attributes:
      title: in tables.
      inverted: names of the networks that it inverts.
      summaries: of its trials.
    """

    title: str
    inverted: Sequence[str]
    summaries: Sequence[Mapping[str, Any]]


def at(*keys: str) -> Value:
    """Return a function that reads a summary's value, None where it has none."""

    def value(summary: Mapping[str, Any]) -> float | None:
        found: Any = summary
        for key in keys:
            found = found.get(key) if found is not None else None
        return found

    return value


def study_page(
    variants: Sequence[Variant],
    networks: Sequence[str],
    held_out: Sequence[str],
    grids: Mapping[str, tuple[bytes, str]],
) -> page.Page:
    """Return the page that compares the runs of a study.

    Args:
      variants: what is compared.
      networks: names of all networks that say something.
      held_out: those that were inverted in no run.
      grids: title of a run -> (PNG of its images, what was inverted).
    """

    def table(kind: str, rows: Mapping[str, Value]) -> page.Table:
        lines = []
        for row, value in rows.items():
            cells = [
                page.cell([value(s) for s in v.summaries])
                + (" (inverted)" if row in v.inverted and kind == "network" else "")
                for v in variants
            ]
            lines.append((row, *cells))
        return page.Table((kind, *(v.title for v in variants)), lines)

    sections = []
    if any(s["top1"] for v in variants for s in v.summaries):
        sections = [
            page.Section(
                "Judges",
                table("network", {n: at("top1", n) for n in networks}),
                "Share of images that a network gives the class they were made for. "
                + (f"In no run had {', '.join(held_out)} a say." if held_out else ""),
            ),
            page.Section(
                "Confidence",
                table("network", {n: at("confidence", n) for n in networks}),
                "Mean probability of the class the images were made for.",
            ),
        ]
    variety = {
        "agreement of judges": at("agreement"),
        "distance of pixels": at("diversity", "pixels"),
        **{f"distance of features, {n}": at("diversity", n) for n in networks},
    }
    sections.append(
        page.Section(
            "Agreement and diversity",
            table("", variety),
            "How often two judges name the same class; how far two images of a class are apart.",
        )
    )
    for title, (grid, intro) in grids.items():
        sections.append(page.Section(title, page.Figure(grid, f"Images of {title}"), intro))
    timing = {
        "seconds": at("seconds"),
        "seconds a step": at("seconds_per_step"),
        "steps": at("steps"),
    }
    sections.append(page.Section("Time", table("", timing)))
    runs = sum(len(v.summaries) for v in variants)
    title = f"{len(variants)} ways to invert" if len(variants) > 1 else f"{runs} trials"
    lead = f"{runs} runs. Where a cell holds several trials it says mean ± deviation."
    return page.Page(title, sections, lead)

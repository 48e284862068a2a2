"""The pages of heads' reconstructed images: samples, ROC curves, pictures. Needs matplotlib."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jinv import image
from jinv.reports import curves, page
from jinv.reports.curves import (
    CURVE,
    INK,
    MUTED,
    SERIES,
    STYLE,
    frame,
    load_matplotlib,
    svg,
)

_RANDOM = MUTED
_DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)))
_POINTS = 200


@dataclasses.dataclass(frozen=True, eq=False)
class Attacker:
    """What there is to show of one attacker, as `jinv.reconstruct.evaluation` gives it.

    Attributes:
      name: of the attacker.
      true, random: samples x under true and under random weights.
      curve: (FPR, TPR), both rising.
      intervals: FPR -> (TPR, low, high).
      at_threshold: (TPR, FPR) of claims below the threshold.
      top1: share of reconstructions whose true image is the nearest candidate, if known.
    """

    name: str
    true: np.ndarray
    random: np.ndarray
    curve: tuple[np.ndarray, np.ndarray]
    intervals: Mapping[float, tuple[float, float, float]]
    at_threshold: tuple[float, float]
    top1: float | None = None


def histograms(attackers: Sequence[Attacker], threshold: float, bins: int = 48) -> bytes:
    """Draw a panel an attacker: how often each x occurs under either weights, as adaptive SVG.

    The axis of x is logarithmic; a dashed line stands at the threshold. Under true weights the
    bars are filled, under random ones outlined.
    """
    matplotlib = load_matplotlib()
    columns = min(3, len(attackers))
    rows = math.ceil(len(attackers) / columns)
    positive = np.concatenate([x[x > 0] for a in attackers for x in (a.true, a.random)])
    ends = (positive.min(), positive.max()) if positive.size else (threshold / 10, threshold * 10)
    edges = np.geomspace(0.9 * min(ends[0], threshold), 1.1 * max(ends[1], threshold), bins + 1)
    with matplotlib.rc_context(STYLE):
        figure = matplotlib.figure.Figure((3.4 * columns, 2.2 * rows + 0.2))
        figure.set_layout_engine("constrained", w_pad=0.05, h_pad=0.08)
        axes = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
        for axis in axes[len(attackers) :]:
            axis.set_axis_off()
        for axis, attacker in zip(axes, attackers, strict=False):
            frame(axis, attacker.name)
            axis.set_xscale("log")
            # What is 0 lies in the first bin.
            true, random = (np.maximum(x, edges[0]) for x in (attacker.true, attacker.random))
            shares = [np.histogram(x, edges)[0] / len(x) for x in (true, random)]
            axis.stairs(shares[0], edges, fill=True, color=CURVE, alpha=0.75, label="true weights")
            axis.stairs(shares[1], edges, color=_RANDOM, linewidth=1.2, label="random weights")
            axis.axvline(threshold, color=INK, linewidth=0.8, dashes=(3, 3))
            axis.text(
                threshold,
                1.0,
                f" {threshold:.3g}",
                transform=axis.get_xaxis_transform(),
                color=INK,
                va="top",
            )
            axis.xaxis.set_major_formatter("{x:g}")
            axis.tick_params(axis="x", which="minor", length=0, labelbottom=False)
            axis.set_xlabel("least MSE", color=MUTED)
            _legend(axis, "upper left")
        return svg(figure)


def roc_curves(attackers: Sequence[Attacker]) -> bytes:
    """Draw all attackers' curves on logarithmic axes, with intervals, as adaptive SVG.

    A dashed line shows what chance gives.
    """
    matplotlib = load_matplotlib()
    floor = 10.0 ** -math.ceil(math.log10(max(10, *(len(a.random) for a in attackers))))
    with matplotlib.rc_context(STYLE):
        figure = matplotlib.figure.Figure((5.6, 4.6))
        figure.set_layout_engine("constrained")
        axis = figure.subplots()
        frame(axis, "true positives against false ones")
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.plot([floor, 1], [floor, 1], color=MUTED, linewidth=0.8, dashes=(3, 3), label="chance")
        for i, attacker in enumerate(attackers):
            color = list(SERIES)[i % len(SERIES)]
            dashes = _DASHES[i // len(SERIES) % len(_DASHES)]
            fpr, tpr = _thinned(attacker.curve, floor)
            shown = tpr > 0
            axis.plot(
                fpr[shown],
                tpr[shown],
                color=color,
                linestyle=dashes,
                linewidth=1.5,
                label=attacker.name,
            )
            for at, (value, low, high) in attacker.intervals.items():
                if at >= floor and high > 0:
                    x = at * 1.07 ** (i - (len(attackers) - 1) / 2)  # beside each other
                    axis.plot([x, x], [max(low, floor), high], color=color, linewidth=1)
                    axis.plot(x, max(value, floor), "o", color=color, markersize=3.5)
        axis.set_xlim(floor, 1.1)
        axis.set_ylim(floor, 1.1)
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_formatter("{x:g}")
            side.set_minor_locator(matplotlib.ticker.NullLocator())
        axis.set_xlabel("false positive rate", color=MUTED)
        axis.set_ylabel("true positive rate", color=MUTED)
        _legend(axis, "lower right")
        return svg(figure)


def _thinned(curve: tuple[np.ndarray, np.ndarray], floor: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the best TPR at each of few FPRs: curves have as many points as samples."""
    fpr, tpr = curve
    at = np.geomspace(floor, 1, _POINTS)
    place = np.searchsorted(fpr, at * (1 + 1e-12), "right") - 1
    return at, np.where(place >= 0, np.maximum.accumulate(tpr)[np.maximum(place, 0)], 0)


def _legend(axis: Any, where: str) -> None:
    legend = axis.legend(loc=where, frameon=False, labelcolor=INK, fontsize=8)
    for text in legend.get_texts():
        text.set_parse_math(False)


def chosen(x: np.ndarray, each: int) -> dict[str, np.ndarray]:
    """Return which samples to show: the best, those around the median, the worst.

    Args:
      x: (n,) samples under true weights.
      each: how many of each kind, at most.
    """
    order = np.argsort(x, kind="stable")
    each = min(each, len(order))
    middle = (len(order) - each) // 2
    return {
        "best": order[:each],
        "median": order[middle : middle + each],
        "worst": order[len(order) - each :],
    }


def sheet(found: np.ndarray, truth: np.ndarray, neighbours: np.ndarray) -> bytes:
    """Return a PNG of three rows: reconstructions, their images, the nearest other images.

    Args:
      found: (n, H, W, C) in [-1, 1].
      truth: (n, H, W, C) in [-1, 1], which of the training images each is of.
      neighbours: (n, H, W, C) in [-1, 1], of each of these the nearest other image of its class.

    Raises:
      ValueError: these are not as many images of one size.
    """
    if not found.shape == truth.shape == neighbours.shape or found.ndim != 4 or not found.size:
        raise ValueError(
            f"images {found.shape}, {truth.shape} and {neighbours.shape} make no rows: they are "
            "(n, H, W, C), of one size"
        )
    return in_rows((found, truth, neighbours))


def in_rows(batches: Sequence[np.ndarray]) -> bytes:
    """Return a PNG of batches (n, H, W, C) in [-1, 1], a row each; small images are enlarged."""
    shown = [np.round(127.5 * (np.clip(x, -1, 1) + 1)).astype(np.uint8) for x in batches]
    return page.png(image.rows(shown, max(1, 96 // shown[0].shape[1])))


def sections(
    attackers: Sequence[Attacker],
    threshold: float,
    sheets: Mapping[str, Mapping[str, bytes]] | None = None,
) -> list[page.Section]:
    """Return the sections of a page that compares attackers.

    Args:
      attackers: of one setting.
      threshold: on x, of the histograms and the table.
      sheets: attacker -> which samples ("best", ...) -> PNG, see `sheet`.
    """
    ats = sorted({at for attacker in attackers for at in attacker.intervals})
    rows = []
    for attacker in attackers:
        told = [attacker.intervals.get(at) for at in ats]
        rows.append(
            (
                attacker.name,
                *("" if t is None else f"{t[0]:.3g} [{t[1]:.3g}, {t[2]:.3g}]" for t in told),
                *(f"{rate:.3g}" for rate in attacker.at_threshold),
                page.cell([attacker.top1]),
            )
        )
    header = (
        "attacker",
        *(f"TPR at FPR {at:g}" for at in ats),
        "TPR below threshold",
        "FPR below threshold",
        "true image first",
    )
    found = [
        page.Section(
            "True positives",
            page.Table(header, rows),
            "Claims under a head's true weights that are made where random weights lead to so few. "
            f"In brackets 95 % intervals. The threshold on the least MSE is {threshold:.4g}.",
        ),
        page.Section("ROC curves", page.Figure(roc_curves(attackers), "ROC curves")),
        page.Section(
            "Samples",
            page.Figure(histograms(attackers, threshold), "Histograms of the least MSE"),
            "Least mean squared error, in pixels of [-1, 1], between a reconstruction and the "
            "training images. Dashed: the threshold.",
        ),
    ]
    for name, kinds in (sheets or {}).items():
        for kind, png in kinds.items():
            found.append(
                page.Section(
                    f"{name}: {kind}",
                    page.Figure(png, f"The {kind} reconstructions of {name}"),
                    "From top to bottom: reconstruction, training image, nearest other image of "
                    "the class.",
                )
            )
    return found


def recovery_sections(told: Mapping[str, Any]) -> list[page.Section]:
    """Return the sections on exact recovery.

    Args:
      told: as the summary of `jinv attack-heads` tells it.
    """
    rows = [
        ("error of features", f"{told['error']:.3f}"),
        ("as expected from the weights", f"{told['predicted']:.3f}"),
        ("heads that are believed", f"{100 * told['believed']:.1f} %"),
        ("random weights that are believed", f"{100 * told['random_believed']:.1f} %"),
    ]
    identified = told["identified"]
    if identified is not None:
        among = f"first of {identified['candidates']} candidates"
        rows += [
            (f"true image {among}", f"{100 * identified['first']:.1f} %"),
            (
                "or among as many as its class has examples",
                f"{100 * identified['first_of_class']:.1f} %",
            ),
        ]
        membership = identified["membership"]
        for at, rate in membership["tpr_at_fpr"].items():
            low, high = membership["intervals"][at]
            rows.append(
                (f"membership: TPR at FPR {at}", f"{rate:.3g} [{low:.3g}, {high:.3g}]"),
            )
    return [
        page.Section(
            "Exact recovery",
            page.Table(("", ""), rows),
            "Errors are relative to that of the class mean: 0 is perfect, 1 no better.",
        ),
        page.Section(
            "Calibration",
            page.Figure(_calibration(told["calibration"]), "Measured against predicted errors"),
            "Error of recovered features as measured, against what the weights alone promise.",
        ),
    ]


def _calibration(bins: Sequence[Mapping[str, float]]) -> bytes:
    """Draw measured against predicted errors, as adaptive SVG."""
    matplotlib = load_matplotlib()
    predicted, measured = ([one[key] for one in bins] for key in ("predicted", "measured"))
    with matplotlib.rc_context(STYLE):
        figure = matplotlib.figure.Figure((3.4, 2.8))
        figure.set_layout_engine("constrained")
        axis = figure.subplots()
        frame(axis, "measured error")
        most = 1.05 * max(*predicted, *measured)
        axis.plot([0, most], [0, most], color=MUTED, linewidth=0.8, dashes=(3, 3))
        axis.plot(predicted, measured, "o", color=CURVE, markersize=4)
        axis.set_xlim(0, most)
        axis.set_ylim(0, most)
        axis.set_xlabel("predicted error", color=MUTED)
        return svg(figure)


# Settings that are compared -----------------------------------------------------------------------

Found = Mapping[str, Sequence[Mapping[str, Any]]]
"""Variant -> summaries of `jinv attack-heads`, of its trials."""

_AT = "0.01"


def rates(trials: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return attacker -> TPR at FPR 1 %, mean over the trials that have it."""
    names = dict.fromkeys(name for trial in trials for name in trial["attackers"])
    return {
        name: float(
            np.mean(
                [t["attackers"][name]["tpr_at_fpr"][_AT] for t in trials if name in t["attackers"]]
            )
        )
        for name in names
    }


def accuracy(trials: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the heads' accuracy, mean over the trials; None where it is not known."""
    known = [t["accuracy"] for t in trials if t["accuracy"] is not None]
    return float(np.mean(known)) if known else None


def sweep_curves(found: Found) -> bytes | None:
    """Draw a panel a family of variants "NAME NUMBER": TPR at FPR 1 % of every attacker, as SVG.

    Bars are the 95 % intervals of a single trial. None without families.
    """
    families, _ = curves.families(found)
    if not families:
        return None
    matplotlib = load_matplotlib()
    attackers = list(dict.fromkeys(name for trials in found.values() for name in rates(trials)))
    columns = min(3, len(families))
    lines = math.ceil(len(families) / columns)
    with matplotlib.rc_context(STYLE):
        figure = matplotlib.figure.Figure((3.4 * columns, 2.5 * lines))
        figure.set_layout_engine("constrained", w_pad=0.05, h_pad=0.08)
        axes = figure.subplots(lines, columns, squeeze=False).ravel()
        for axis in axes[len(families) :]:
            axis.set_axis_off()
        for axis, (family, points) in zip(axes, families.items(), strict=False):
            frame(axis, "TPR at FPR 1 %")
            numbers = sorted(points)
            for i, attacker in enumerate(attackers):
                color = list(SERIES)[i % len(SERIES)]
                known = [x for x in numbers if attacker in rates(points[x])]
                axis.plot(
                    known,
                    [rates(points[x])[attacker] for x in known],
                    "o",
                    linestyle=_DASHES[i // len(SERIES) % len(_DASHES)],
                    color=color,
                    linewidth=1.4,
                    markersize=3.5,
                    label=attacker,
                )
                for x in known if all(len(points[x]) == 1 for x in known) else ():
                    ends = points[x][0]["attackers"][attacker]["intervals"][_AT]
                    axis.plot([x, x], ends, color=color, linewidth=1)
            curves.number_axis(axis, numbers)
            axis.set_ylim(0, 1.03)
            axis.set_xlabel(family, color=MUTED)
        _legend(axes[0], "best")
        return svg(figure)


def study_page(found: Found, svg: bytes | None) -> page.Page:
    """Return the page of settings that are compared.

    Args:
      found: their summaries.
      svg: of `sweep_curves`.
    """
    attackers = list(dict.fromkeys(name for trials in found.values() for name in rates(trials)))
    rows = []
    for name, trials in found.items():
        own = rates(trials)
        read = [t["recovery"] for t in trials if t["recovery"] is not None]
        identified = [r["identified"]["first"] for r in read if r["identified"] is not None]
        private = trials[0]["privacy"] or {}
        bounds = private.get("bound") or {}
        rows.append(
            (
                name,
                *(page.cell([own.get(attacker)]) for attacker in attackers),
                page.cell([float(np.mean([r["error"] for r in read])) if read else None]),
                page.cell([float(np.mean(identified)) if identified else None]),
                page.cell([accuracy(trials)]),
                page.cell([private.get("epsilon")]),
                page.cell([bounds.get(_AT)]),
            )
        )
    header = (
        "setting",
        *attackers,
        "error of recovered features",
        "image identified",
        "heads' accuracy",
        "epsilon",
        "bound",
    )
    body = [
        page.Section(
            "Settings",
            page.Table(header, rows),
            "TPR at FPR 1 % of every attacker; where one has no number, it does not apply. The "
            "bound is the most that any attack's TPR can be, by differential privacy.",
        )
    ]
    if svg is not None:
        body.append(page.Section("Curves", page.Figure(svg, "TPR against the settings")))
    reasons = {
        (name, attacker): reason
        for name, trials in found.items()
        for attacker, reason in trials[0]["not_available"].items()
    }
    if reasons:
        told = [(name, attacker, reason) for (name, attacker), reason in reasons.items()]
        table = page.Table(("setting", "attacker", "why"), told)
        body.append(page.Section("Not available", table))
    return page.Page("Attacks on heads", body, f"{len(found)} settings.")

"""The pages of heads' reconstructed images: samples, ROC curves, pictures. Needs matplotlib."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jinv import image
from jinv.reports import page
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
    rows = [
        np.round(127.5 * (np.clip(x, -1, 1) + 1)).astype(np.uint8)
        for x in (found, truth, neighbours)
    ]
    return page.png(image.rows(rows, max(1, 96 // found.shape[1])))


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

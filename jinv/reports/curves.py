"""Curves of a run as SVG that follows the reader's light or dark mode. Needs matplotlib."""

from __future__ import annotations

import dataclasses
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")

# Each colour with its stand-in on a dark page.
INK, MUTED, RULE, CURVE = "#23262b", "#686e78", "#d9dbdf", "#2b6a99"
DARK = {INK: "#e4e5e8", MUTED: "#9aa0aa", RULE: "#3b3f46", CURVE: "#82b7e0"}
SERIES = {CURVE: DARK[CURVE], "#b4581a": "#f0a46c", "#3d7d45": "#8acb90", "#7b52a6": "#c5a6ea"}
"""Colours of curves that share a panel."""
DARK |= SERIES
FONTS = "-apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'Noto Sans', Arial, sans-serif"


def plot(
    metrics: Mapping[str, Sequence[float]],
    steps: Sequence[int],
    *,
    title: str = "",
    boundaries: Sequence[int] = (),
    against: str = "step",
) -> bytes:
    """Draw one panel per metric over `steps`, as SVG that follows the reader's light or dark mode.

    A panel is logarithmic where every finite value is positive and they span a factor of 50 or
    more. Values that are not finite leave gaps and are counted in the panel's corner.

    Args:
      metrics: name -> its value at every step.
      steps: their numbers.
      title: above all panels.
      boundaries: first steps of new phases, at which dashed lines stand.
      against: what the steps are; under all panels.

    Raises:
      ValueError: a metric has more or fewer values than there are steps.
    """
    matplotlib = load_matplotlib()
    for name, values in metrics.items():
        if len(values) != len(steps):
            raise ValueError(f"{name!r} has {len(values)} values for {len(steps)} steps")
    count = len(metrics)
    columns = max(1, min(count, 2 if count == 4 else 3))
    rows = max(1, math.ceil(count / columns))
    width, height = (11.0, 2.0) if columns == 3 else (5.5 * columns, 2.5)
    with matplotlib.rc_context(STYLE):
        figure = matplotlib.figure.Figure((width, rows * height + 0.35 * bool(title)))
        figure.set_layout_engine("constrained", w_pad=0.03, h_pad=0.08, wspace=0.08)
        if title:
            figure.suptitle(title, color=INK, parse_math=False, fontsize=11)
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for axis in axes[count:]:
            axis.set_axis_off()
        if count:
            figure.supxlabel(against, color=MUTED, fontsize=8.5)
        else:
            axes[0].text(0.5, 0.5, "no curves recorded", color=MUTED, ha="center")
        for axis, (name, values) in zip(axes, metrics.items(), strict=False):
            _panel(axis, name, np.asarray(steps, float), np.asarray(values, float), boundaries)
        return svg(figure)


@dataclasses.dataclass(frozen=True)
class Series:
    """Values against a number, several for each of its values.

    Attributes:
      name: what the values are; the panel's title.
      against: what the number is; under the axis.
      points: number -> values.
      reference: values that stand for themselves, drawn as a line across.
    """

    name: str
    against: str
    points: Mapping[float, Sequence[float]]
    reference: Sequence[float] = ()


def plot_series(series: Sequence[Sequence[Series]]) -> bytes:
    """Draw rows of panels, mean and every single value of each point, as adaptive SVG."""
    matplotlib = load_matplotlib()
    rows, columns = len(series), max(map(len, series))
    with matplotlib.rc_context(STYLE):
        figure = matplotlib.figure.Figure((3.2 * columns, 2.0 * rows))
        figure.set_layout_engine("constrained", w_pad=0.05, h_pad=0.08)
        axes = figure.subplots(rows, columns, squeeze=False)
        for line, drawn in zip(axes, series, strict=True):
            for axis in line[len(drawn) :]:
                axis.set_axis_off()
            for axis, one in zip(line, drawn, strict=False):
                _draw_series(axis, one)
        return svg(figure)


def _draw_series(axis: Any, series: Series) -> None:
    numbers = sorted(series.points)
    frame(axis, series.name)
    axis.set_xlabel(series.against, color=MUTED)
    if series.reference:
        axis.axhline(np.mean(series.reference), color=MUTED, linewidth=0.8, dashes=(3, 3))
    axis.plot(numbers, [np.mean(series.points[x]) for x in numbers], color=CURVE, linewidth=1.4)
    for x in numbers:
        values = series.points[x]
        axis.plot([x] * len(values), values, ".", color=CURVE, markersize=4)
    number_axis(axis, numbers)


def number_axis(axis: Any, numbers: Sequence[float]) -> None:
    """Mark these numbers on the axis of x, which is logarithmic where they span much."""
    if numbers and min(numbers) > 0 and max(numbers) >= 8 * min(numbers):
        axis.set_xscale("log")
    axis.set_xticks(numbers, [f"{x:g}" for x in numbers])
    axis.minorticks_off()


def families(found: Mapping[str, T]) -> tuple[dict[str, dict[float, T]], list[T]]:
    """Return variants "NAME NUMBER" as name -> number -> value, and the values of the others."""
    named: dict[str, dict[float, T]] = {}
    plain = []
    for name, value in found.items():
        match = re.fullmatch(r"(.*\S)\s+([0-9.]+(?:e-?[0-9]+)?)", name)
        if match:
            named.setdefault(match[1], {})[float(match[2])] = value
        else:
            plain.append(value)
    return named, plain


STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "jinv",
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
}
"""Of figures, for `matplotlib.rc_context`."""


def load_matplotlib() -> Any:
    """Return matplotlib; ImportError with what to do if it is missing."""
    try:
        import matplotlib
        import matplotlib.figure
    except ImportError as error:
        raise ImportError("curves need matplotlib: pip install matplotlib") from error
    return matplotlib


def svg(figure: Any) -> bytes:
    """Return a figure as SVG that follows the reader's light or dark mode."""
    buffer = io.BytesIO()
    empty = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=empty)
    return _adaptive(buffer.getvalue())


def frame(axis: Any, title: str) -> None:
    """Give an axis the look of all panels, and a title."""
    axis.set_title(title, loc="left", color=INK, parse_math=False, fontsize=9.5, weight="bold")
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.spines["bottom"].set_color(RULE)
    axis.tick_params(colors=MUTED, color=RULE, length=3)
    axis.tick_params(axis="y", which="both", length=0)
    axis.grid(axis="y", color=RULE, linewidth=0.6)


def _panel(
    axis: Any, name: str, steps: np.ndarray, values: np.ndarray, boundaries: Sequence[int]
) -> None:
    """Draw one curve with its name, its last value and the phases."""
    finite = np.isfinite(values)
    known = values[finite]
    frame(axis, name)
    for boundary in boundaries:
        axis.axvline(boundary, color=MUTED, linewidth=0.8, dashes=(3, 3))
    axis.locator_params(axis="x", nbins=5, integer=True)
    axis.locator_params(axis="y", nbins=5)
    axis.ticklabel_format(useOffset=False)
    if steps.size:
        margin = 0.03 * float(np.ptp(steps)) or 1
        axis.set_xlim(steps.min() - margin, steps.max() + margin)
    else:
        axis.set_xticks([])
    notes = [f"{known[-1]:.4g}"] if known.size else ["no finite value"]
    if known.size and not finite.all():
        notes.append(f"{np.count_nonzero(~finite)} not finite")
    axis.set_title(", ".join(notes), loc="right", color=MUTED, fontsize=8.5)
    if not known.size:
        axis.set_yticks([])
        return
    around = np.pad(finite, 1)
    alone = finite & ~around[:-2] & ~around[2:]  # a line would not show these
    dots = finite if len(steps) <= 20 else alone
    axis.plot(steps, np.where(finite, values, np.nan), color=CURVE, linewidth=1.4)
    axis.plot(steps[dots], values[dots], ".", color=CURVE)
    axis.plot(steps[finite][-1], known[-1], marker="o", markersize=3.5, color=CURVE)
    if known.min() > 0 and known.max() >= 50 * known.min():
        from matplotlib.ticker import LogLocator, NullFormatter

        axis.set_yscale("log")
        decades = math.log10(known.max() / known.min())
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 3) if decades < 2.5 else (1,), numticks=6))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.yaxis.set_major_formatter("{x:g}")


def _adaptive(svg: bytes) -> bytes:
    """Give matplotlib's SVG the reader's own font, and dark colours on a dark page."""
    dark = "".join(
        f'[style*="{what}: {light}"]{{{what}: {dark} !important}}'
        for light, dark in DARK.items()
        for what in ("fill", "stroke")
    )
    text = svg[svg.index(b"<svg") :].decode().replace("'DejaVu Sans'", FONTS)
    media = f"@media (prefers-color-scheme: dark) {{{dark}}}"
    return text.replace("</style>", f"{media}</style>", 1).encode()

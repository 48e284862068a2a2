"""The page of an evaluation: scores, what is taken for what, and pictures of mistakes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jinv.reports import curves, page

_DRAWN = 40
"""Classes whose names fit beside a matrix."""
_COUNTED = 20
"""Classes whose numbers of images fit into the cells of a matrix."""
_STRONGEST = 0.7
"""Opacity of a cell that holds all images of its class: numbers stay readable on it."""


@dataclasses.dataclass(frozen=True)
class Judged:
    """What one network says of all images.

    Attributes:
      network: its name.
      names: of its classes.
      matched: (K,) its number of every class of the data.
      counts: (K, classes): how many images of a class of the data are given which of its classes.
      pictures: of its most frequent mistakes.
    """

    network: str
    names: Sequence[str]
    matched: np.ndarray
    counts: np.ndarray
    pictures: Sequence[page.Picture]


def run_page(summary: Mapping[str, Any], judged: Sequence[Judged]) -> page.Page:
    """Return the page of an evaluation, but for its ending."""
    sections = [_scores(summary), _variety(summary)]
    for one in judged:
        name, chosen = one.network, most_confused(one.matched, one.counts)
        left_out = len(one.matched) - len(chosen)
        sections += [
            page.Section(
                f"{name}: what is taken for what",
                page.Figure(
                    confusion(
                        [summary["classes"][i] for i in chosen],
                        one.matched[chosen],
                        one.counts[chosen],
                    ),
                    f"The classes of the images, and those that {name} gives them",
                ),
                "A row is a class of the images, a column the class that they are given; the "
                "darker, the larger a share of the row."
                + (f" {left_out} classes with fewer mistakes are left out." if left_out else ""),
            ),
            page.Section(f"{name}: classes", _classes(summary, one)),
        ]
        if summary["confusions"][name]:
            told = ", ".join(
                f"{pair['class']} as {pair['given']} ({pair['images']})"
                for pair in summary["confusions"][name]
            )
            sections.append(
                page.Section(
                    f"{name}: the most frequent mistakes",
                    page.Pictures(one.pictures),
                    f"{told}. The pictures are those that {name} is surest of.",
                )
            )
    real = f", compared with {summary['real_images']} real ones" if summary["real_images"] else ""
    return page.Page(
        f"What {' and '.join(one.network for one in judged)} "
        f"{'say' if len(judged) > 1 else 'says'} of the images",
        sections,
        f"{summary['images']} images of {len(summary['classes'])} classes{real}.",
    )


def _scores(summary: Mapping[str, Any]) -> page.Section:
    header = ("network", "top-1", "top-5", "confidence", "mean probability", "classes found by")
    rows = [
        (
            name,
            f"{100 * share:.2f}%",
            f"{100 * summary['top5'][name]:.2f}%",
            f"{summary['confidence'][name]:.3f}",
            f"{summary['mean_probability'][name]:.3f}",
            summary["matched"][name],
        )
        for name, share in summary["top1"].items()
    ]
    return page.Section(
        "Networks",
        page.Table(header, rows),
        "Confidence is the mean probability of the images' own class, mean probability that of "
        "the class a network gives.",
    )


def _variety(summary: Mapping[str, Any]) -> page.Section:
    header = ["network", "inception score", "diversity"]
    if summary["real_images"]:
        header += ["FID", "nearest real image"]
    rows = []
    for name, score in summary["inception_score"].items():
        deviation = "" if score["std"] is None else f" ± {score['std']:.2g}"
        rows.append([name, f"{score['mean']:.4g}{deviation}", _told(summary["diversity"][name])])
        if summary["real_images"]:
            rows[-1] += [_told(summary["fid"][name]), _told(summary["nearest_real"][name])]
    return page.Section(
        "Variety",
        page.Table(header, rows),
        "Every number is of the named network's own classes or features: compare numbers of one "
        "network only. Diversity is the mean cosine distance of two images of a class"
        f" (of pixels, root mean square: {_told(summary['diversity']['pixels'])})."
        + (
            " The nearest real image is at this cosine distance in the median; copies are at 0."
            if summary["real_images"]
            else ""
        ),
    )


def _told(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _classes(summary: Mapping[str, Any], one: Judged) -> page.Table:
    header = ("class", "images", "top-1", "top-5", "confidence", "diversity", "mostly taken for")
    wrong = one.counts.copy()
    wrong[np.arange(len(one.matched)), one.matched] = 0
    rows = []
    for i, row in enumerate(summary["per_class"][one.network]):
        if row["images"]:
            other = int(wrong[i].argmax())
            taken = f"{one.names[other]} ({wrong[i, other]})" if wrong[i, other] else ""
            scores = [_told(row[key]) for key in ("top1", "top5", "confidence", "diversity")]
            rows.append((row["class"], row["images"], *scores, taken))
    return page.Table(header, rows)


def most_confused(matched: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the numbers of the data's classes, or of the 40 with the most frequent mistakes.

    These are the classes of one mistake after the other, both of them where the data has both.

    Args:
      matched, counts: as of `Judged`.
    """
    if len(matched) <= _DRAWN:
        return np.arange(len(matched))
    wrong = counts.copy()
    wrong[np.arange(len(matched)), matched] = 0
    known = {int(index): i for i, index in enumerate(matched)}
    chosen: dict[int, None] = {}
    for place in np.argsort(-wrong, axis=None, kind="stable"):
        row, column = divmod(int(place), counts.shape[1])
        chosen[row] = None
        if column in known:
            chosen[known[column]] = None
        if len(chosen) >= _DRAWN:
            break
    return np.sort(list(chosen))


def confusion(classes: Sequence[str], matched: np.ndarray, counts: np.ndarray) -> bytes:
    """Draw how many images of every class are given which, as SVG.

    Args:
      classes: names of the data's K classes.
      matched: (K,) the network's number of each.
      counts: (K, C) how many images of a class are given which of the network's C; what is none of
        the K comes as the last column, "another".
    """
    matplotlib = curves.load_matplotlib()
    cells, columns = counts[:, matched], list(classes)
    rest = counts.sum(1) - cells.sum(1)
    if rest.any():
        cells, columns = np.column_stack([cells, rest]), [*columns, "another"]
    shares = cells / np.maximum(cells.sum(1, keepdims=True), 1)
    colour = matplotlib.colors.to_rgb(curves.CURVE)
    shades = np.empty((*cells.shape, 4))
    shades[..., :3], shades[..., 3] = colour, _STRONGEST * shares
    counted = len(classes) <= _COUNTED
    side = 2.2 + (0.42 if counted else 0.2) * len(classes)
    with matplotlib.rc_context(curves.STYLE):
        figure = matplotlib.figure.Figure((side, side))
        figure.set_layout_engine("constrained")
        axis = figure.subplots()
        axis.imshow(shades, interpolation="nearest")
        axis.spines[:].set_color(curves.RULE)
        axis.tick_params(colors=curves.MUTED, color=curves.RULE, length=0)
        axis.set_ylabel("class of the images", color=curves.MUTED)
        axis.set_xlabel("class that they are given", color=curves.MUTED)
        axis.set_yticks(range(len(classes)), map(_short, classes), parse_math=False)
        axis.set_xticks(range(len(columns)), map(_short, columns), parse_math=False)
        axis.tick_params(axis="x", rotation=90)
        for i, j in zip(*np.nonzero(cells), strict=True) if counted else ():
            axis.text(j, i, f"{cells[i, j]}", ha="center", va="center", color=curves.INK, size=7.5)
        return curves.svg(figure)


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:22]}..."

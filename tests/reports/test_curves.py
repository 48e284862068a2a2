"""Curves are valid, say what is missing, and follow the reader's colours."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET

import pytest

from jinv.reports import curves

NAN, INF = float("nan"), float("inf")
CURVES = {
    "constant": [2.0, 2.0, 2.0],
    "zero": [0.0, 0.0, 0.0],
    "negative": [-1.0, -100.0, -1e4],
    "wide": [1e4, 1.0, 1e-4],
    "nan": [1.0, NAN, 3.0],
    "nothing": [NAN, INF, -INF],
}


def labels(svg):
    root = ET.fromstring(svg)
    assert root.tag.endswith("svg")
    return ["".join(text.itertext()).strip() for text in root.iter() if text.tag.endswith("}text")]


@pytest.mark.parametrize("names", [[name] for name in CURVES] + [list(CURVES), []])
def test_curves_are_valid_svg_with_a_panel_each(names):
    svg = curves.plot({name: CURVES[name] for name in names}, [0, 50, 100], boundaries=[50])
    assert set(names) <= set(labels(svg))


def test_curves_of_one_step_and_of_none():
    assert "a" in labels(curves.plot({"a": [3.0]}, [7], boundaries=[7]))
    assert "no finite value" in labels(curves.plot({"a": []}, []))


def test_curves_say_their_last_value_and_what_is_missing():
    shown = labels(curves.plot({k: CURVES[k] for k in ("wide", "nan")}, [0, 1, 2]))
    assert "0.0001" in shown
    assert "3, 1 not finite" in shown


def test_wide_positive_curves_are_logarithmic():
    assert {"0.01", "100"} <= set(labels(curves.plot({"w": CURVES["wide"]}, [0, 1, 2])))
    assert "1000" not in labels(curves.plot({"n": [1.0, 2.0, 3.0]}, [0, 1, 2]))


def test_curves_draw_a_line_at_every_boundary():
    plain = curves.plot({"a": [1.0, 2.0]}, [0, 10])
    split = curves.plot({"a": [1.0, 2.0]}, [0, 10], boundaries=[3, 6])
    assert split.count(b"stroke-dasharray") - plain.count(b"stroke-dasharray") == 2


def test_curves_follow_dark_mode_and_are_reproducible():
    svg = curves.plot(CURVES, [0, 1, 2], title="$5 & <six>")
    assert b"prefers-color-scheme: dark" in svg
    assert "$5 & <six>" in labels(svg)
    assert svg == curves.plot(CURVES, [0, 1, 2], title="$5 & <six>")


def test_curves_show_values_that_stand_alone():
    def dots(values):
        return curves.plot({"a": values}, range(30)).count(b"<use ")

    holes = [1.0 + i if i % 2 else NAN for i in range(30)]
    assert dots(holes) - dots([1.0 + i for i in range(30)]) >= 14


def test_curves_of_another_length_than_the_steps_are_an_error():
    with pytest.raises(ValueError, match="'a' has 2 values for 3 steps"):
        curves.plot({"a": [1.0, 2.0]}, [0, 1, 2])


def test_a_missing_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install matplotlib"):
        curves.plot({"a": [1.0]}, [0])


def test_the_axis_says_what_the_steps_are():
    assert "step" in labels(curves.plot({"loss": [1.0, 2.0]}, [0, 1]))
    told = labels(curves.plot({"loss": [1.0, 2.0]}, [0, 1], against="trial"))
    assert "trial" in told
    assert "step" not in told

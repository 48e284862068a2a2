"""Pictures of reconstructions: right shares, right rows, readable in either mode."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_curves import labels

from jinv.reconstruct.evaluation import Evaluation
from jinv.reports import page, reconstruction
from jinv.reports.reconstruction import Attacker


def attacker(name: str, apart: float, count: int = 400) -> Attacker:
    rng = np.random.default_rng(len(name))
    x = [4 / (1 + np.exp(-(mean + rng.standard_normal(count)))) for mean in (-2 - apart, -2)]
    found = Evaluation(*x)
    return Attacker(
        name,
        found.true,
        found.random,
        found.cumulative(),
        found.intervals([0.01, 0.1], resamples=50),
        found.rates(0.07),
    )


ATTACKERS = [attacker("ridge", 1.5), attacker("$network$ <weights>", 2.5), attacker("chance", 0)]


def test_histograms_have_a_panel_an_attacker_and_the_threshold() -> None:
    svg = reconstruction.histograms(ATTACKERS, 0.07)
    shown = labels(svg)
    assert {a.name for a in ATTACKERS} <= set(shown)
    assert shown.count("0.07") == 3
    assert shown.count("random weights") == 3
    assert b"prefers-color-scheme: dark" in svg
    assert svg == reconstruction.histograms(ATTACKERS, 0.07)


def test_histograms_show_samples_of_no_error() -> None:
    perfect = Attacker("p", np.zeros(5), np.zeros(5), (np.ones(1),) * 2, {}, (1.0, 1.0))
    assert "p" in labels(reconstruction.histograms([perfect], 0.07))


def test_curves_name_every_attacker_and_have_its_colour() -> None:
    many = [*ATTACKERS, attacker("four", 1), attacker("fifth", 3)]
    svg = reconstruction.roc_curves(many)
    assert {a.name for a in many} | {"chance", "0.001", "1"} <= set(labels(svg))
    for light, dark in reconstruction.SERIES.items():
        assert light.encode() in svg
        assert dark.encode() in svg


def test_thinned_curves_keep_the_best_rate_at_every_fpr() -> None:
    found = Evaluation(ATTACKERS[0].true, ATTACKERS[0].random)
    fpr, tpr = reconstruction._thinned(found.cumulative(), 1e-3)
    np.testing.assert_allclose(tpr, [found.tpr_at(f) for f in fpr], atol=1e-12)


def test_best_median_and_worst_are_chosen() -> None:
    x = np.random.default_rng(0).permutation(21) / 21
    found = reconstruction.chosen(x, 3)
    ranked = {kind: np.round(21 * x[which]).astype(int).tolist() for kind, which in found.items()}
    assert ranked == {"best": [0, 1, 2], "median": [9, 10, 11], "worst": [18, 19, 20]}
    assert [len(which) for which in reconstruction.chosen(x[:2], 3).values()] == [2, 2, 2]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_sheet_has_a_row_of_each_kind(channels: int) -> None:
    kinds = [np.full((4, 32, 32, channels), value) for value in (-1.0, 0.0, 2.0)]
    picture = np.asarray(Image.open(io.BytesIO(reconstruction.sheet(*kinds))).convert("L"))
    assert picture.shape == (3 * 98 + 2, 4 * 98 + 2)
    assert [int(picture[50 + 98 * row, 50]) for row in range(3)] == [0, 128, 255]
    with pytest.raises(ValueError, match="make no rows"):
        reconstruction.sheet(kinds[0], kinds[1], kinds[2][:3])


def test_the_page_tells_rates_with_intervals(tmp_path: Path) -> None:
    png = reconstruction.sheet(*[np.zeros((2, 32, 32, 1))] * 3)
    parts = reconstruction.sections(ATTACKERS, 0.07, {"ridge": {"best": png}})
    page.Page("What heads betray", parts).write(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    value, low, high = ATTACKERS[0].intervals[0.01]
    assert f"{value:.3g} [{low:.3g}, {high:.3g}]" in text
    assert "TPR at FPR 0.01" in text
    assert "ridge: best" in text
    assert "$network$ &lt;weights&gt;" in text

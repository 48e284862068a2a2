"""Scores of attacks against brute force, scikit-learn and closed forms."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import roc_curve

from jinv.reconstruct import evaluation
from jinv.reconstruct.evaluation import Evaluation


def images(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def samples(true: int, random: int, seed: int = 0, apart: float = 2.0) -> Evaluation:
    """Return x whose phi is N(-2 - apart, 0.8^2) and N(-2, 1)."""
    rng = np.random.default_rng(seed)
    phis = -2 - apart + 0.8 * rng.standard_normal(true), -2 + rng.standard_normal(random)
    return Evaluation(*(4 / (1 + np.exp(-p)) for p in phis))


def test_x_is_the_least_error_against_the_images_of_the_class(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(evaluation, "_BLOCK", 60)  # two reconstructions at a time
    found, sets = images(5, 3, 2, 1), images(5, 4, 3, 2, 1, seed=1)
    members = np.arange(4) % 2 == np.arange(5)[:, None] % 2
    each = [
        [np.mean((f - x).astype(float) ** 2) for x in s] for f, s in zip(found, sets, strict=True)
    ]
    np.testing.assert_allclose(evaluation.min_mse(found, sets), np.min(each, 1), rtol=1e-6)
    own = [
        min(e for e, m in zip(row, ms, strict=True) if m)
        for row, ms in zip(each, members, strict=True)
    ]
    np.testing.assert_allclose(evaluation.min_mse(found, sets, members), own, rtol=1e-6)
    black, white = -np.ones((1, 2, 2, 1)), np.ones((1, 1, 2, 2, 1))
    assert evaluation.min_mse(black, white) == 4
    with pytest.raises(ValueError, match="no image of its class"):
        evaluation.min_mse(found, sets, members & (np.arange(5) > 0)[:, None])
    with pytest.raises(ValueError, match=r"\(5, 3, 2, 1\) have no images \(4, 4, 3, 2, 1\)"):
        evaluation.min_mse(found, sets[:4])


def test_phi_is_the_logit_of_a_quarter_of_x() -> None:
    x = np.asarray([1e-3, 0.5, 2, 3.9])
    np.testing.assert_allclose(evaluation.phi(x), np.log(x / 4) - np.log(1 - x / 4), rtol=1e-12)
    assert np.isfinite(evaluation.phi(np.asarray([0.0, 4.0]))).all()


@pytest.mark.parametrize("ties", [False, True])
def test_the_cumulative_curve_is_scikit_learn_s_and_tpr_at_fpr_its_best(ties: bool) -> None:
    found = samples(40, 60, apart=0.7)
    if ties:
        found = Evaluation(np.round(found.true, 1), np.round(found.random, 1))
    truth = np.repeat([1, 0], [40, 60])
    scores = -np.concatenate([found.true, found.random])
    fpr, tpr, _ = roc_curve(truth, scores, drop_intermediate=False)
    ours = found.cumulative()
    np.testing.assert_allclose(ours.fpr, fpr, atol=1e-12)
    np.testing.assert_allclose(ours.tpr, tpr, atol=1e-12)
    for at in (0.0, 0.01, 1 / 60, 0.1, 0.3, 0.5, 0.999, 1.0):
        assert found.tpr_at(at) == pytest.approx(tpr[fpr <= at + 1e-12].max())


def test_allowed_claims_are_not_lost_to_rounding() -> None:
    # 0.1 * 30 is just above 3, 0.29 * 100 just below 29: so many false claims are allowed.
    for count, fpr, allowed in ((30, 0.1, 3), (100, 0.29, 29)):
        found = Evaluation(np.arange(count) + 0.5, np.arange(count) + 1.0)
        assert found.tpr_at(fpr) == pytest.approx((allowed + 1) / count)


def test_the_neyman_pearson_curve_is_the_share_of_ratios_above_c() -> None:
    found = samples(70, 50)
    curve = found.neyman_pearson(33)
    phis = evaluation.phi(found.true), evaluation.phi(found.random)
    fits = [norm(*norm.fit(values)) for values in phis]
    for i, c in enumerate(np.linspace(8, -8, 33)):
        fpr, tpr = (
            np.mean(fits[0].logpdf(values) - fits[1].logpdf(values) > c) for values in phis[::-1]
        )
        assert curve.fpr[i] == pytest.approx(fpr)
        assert curve.tpr[i] == pytest.approx(tpr)
    assert (np.diff(curve.fpr) >= 0).all()


def test_curves_of_gaussian_samples_are_the_closed_form() -> None:
    found = samples(200_000, 200_000, apart=2.0)
    fpr = np.asarray([0.001, 0.01, 0.1, 0.5])
    closed = norm.cdf((norm.ppf(fpr) + 2) / 0.8)
    np.testing.assert_allclose(found.analytic(fpr).tpr, closed, atol=0.005)
    np.testing.assert_allclose([found.tpr_at(f) for f in fpr], closed, atol=0.02)
    # Equal variances: the likelihood ratio is a threshold on x.
    rng = np.random.default_rng(0)
    x = [4 / (1 + np.exp(-(mean + rng.standard_normal(100_000)))) for mean in (-4, -2)]
    same = Evaluation(*x)
    curve = same.neyman_pearson()
    np.testing.assert_allclose(
        np.interp(fpr, curve.fpr, curve.tpr), norm.cdf(norm.ppf(fpr) + 2), atol=0.02
    )


def test_attacks_that_find_nothing_are_on_the_diagonal() -> None:
    rng = np.random.default_rng(1)
    found = Evaluation(rng.random(20000), rng.random(20000))
    for fpr in evaluation.FPRS:
        assert found.tpr_at(fpr) == pytest.approx(fpr, abs=4 * np.sqrt(fpr / 20000) + 1e-3)
        assert found.analytic(np.asarray([fpr])).tpr[0] == pytest.approx(fpr, rel=0.2)


def covered(grouped: bool, fpr: float, count: int, trials: int = 120) -> float:
    """Share of studies whose interval holds the true rate; phi N(-2, 1) and N(0, 1)."""
    rng = np.random.default_rng(0)
    closed, right = norm.cdf(norm.ppf(fpr) + 2), 0
    groups = np.repeat(np.arange(count // 10), 10)
    for trial in range(trials):
        drawn = [rng.standard_normal(count) for _ in range(2)]
        if grouped:  # samples of a head have half their variance together
            common = (rng.standard_normal(count // 10)[groups] for _ in range(2))
            drawn = [np.sqrt(0.5) * (a + b) for a, b in zip(drawn, common, strict=True)]
        x = drawn[0] - 2, drawn[1]
        found = Evaluation(*x, *((groups, groups) if grouped else ()))
        interval = found.intervals([fpr], level=0.9, resamples=150, seed=trial)[fpr]
        right += interval.low <= closed <= interval.high
    return right / trials


@pytest.mark.parametrize(
    ("grouped", "fpr", "count"), [(False, 0.1, 400), (False, 0.01, 1000), (True, 0.1, 1000)]
)
def test_bootstrap_intervals_cover_at_the_stated_rate(
    grouped: bool, fpr: float, count: int
) -> None:
    # 120 studies: a standard deviation of 0.027.
    assert 0.82 <= covered(grouped, fpr, count) <= 0.975


def test_intervals_hold_the_value_and_narrow_with_more_samples() -> None:
    widths = []
    for count in (500, 5000):
        found = samples(count, count).intervals([0.1], resamples=200)[0.1]
        assert found.low <= found.value <= found.high
        widths.append(found.high - found.low)
    assert widths[1] < 0.6 * widths[0]
    again = samples(500, 500)
    assert again.intervals(resamples=20) == again.intervals(resamples=20)


def test_a_summary_is_plain_values() -> None:
    found = samples(300, 300)
    told = json.loads(json.dumps(found.summary(np.float32(0.1), resamples=20)))
    assert list(told["tpr_at_fpr"]) == ["0.001", "0.01", "0.1"]
    assert told["tpr_at_fpr"]["0.1"] == found.tpr_at(0.1)
    low, high = told["intervals"]["0.1"]
    assert low <= told["tpr_at_fpr"]["0.1"] <= high
    assert told["at_threshold"] == {
        "mse": float(np.float32(0.1)),
        "tpr": np.mean(found.true <= np.float32(0.1)),
        "fpr": np.mean(found.random <= np.float32(0.1)),
    }


def test_nearest_neighbours_are_those_of_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "_BLOCK", 40)
    pictures, labels = images(30, 3, 3, 2), np.arange(30) % 3
    ours = evaluation.nearest_neighbours(pictures, labels)
    for i in range(30):
        others = [j for j in range(30) if j != i and labels[j] == labels[i]]
        apart = [np.mean((pictures[i] - pictures[j]).astype(float) ** 2) for j in others]
        assert ours.nearest[i] == others[int(np.argmin(apart))]
        assert ours.mse[i] == pytest.approx(min(apart), rel=1e-6)
    every = evaluation.nearest_neighbours(pictures)
    assert (every.mse <= ours.mse + 1e-9).all()
    with pytest.raises(ValueError, match="class 7 has a single image"):
        evaluation.nearest_neighbours(pictures, np.where(np.arange(30) == 4, 7, labels))


def test_ranks_are_those_of_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "_BLOCK", 40)
    candidates = images(20, 3, 3, 1)
    candidates[11] = candidates[3]  # a copy, of another class
    truth = np.arange(12)
    found = candidates[:12] + 0.8 * images(12, 3, 3, 1, seed=1)
    labels = np.arange(20) % 2
    labels[11] = 0
    for ours, classes in (
        (evaluation.ranks(found, candidates, truth), np.zeros(20)),
        (evaluation.ranks(found, candidates, truth, labels[:12], labels), labels),
    ):
        for i, f in enumerate(found):
            apart = ((f - candidates).astype(float) ** 2).mean((1, 2, 3))
            apart[classes != classes[i]] = np.inf
            assert ours[i] == (apart <= apart[i] + 1e-12).sum()
    exact = evaluation.ranks(candidates, candidates, np.arange(20))
    assert set(np.flatnonzero(exact == 2)) == {3, 11}
    assert evaluation.top(exact, 1) == 0.9
    assert evaluation.top(exact, 2) == 1
    with pytest.raises(ValueError, match="or of neither"):
        evaluation.ranks(found, candidates, truth, labels[:12])


def test_samples_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="samples under random weights are finite numbers"):
        Evaluation(np.ones(3), np.asarray([np.nan]))
    with pytest.raises(ValueError, match="samples under true weights are finite numbers"):
        Evaluation(np.ones((3, 1)), np.ones(3))
    with pytest.raises(ValueError, match=r"groups \(2,\) do not fit samples \(3,\)"):
        Evaluation(np.ones(3), np.ones(3), np.ones(2))
    with pytest.raises(ValueError, match="all samples under true weights are the same"):
        Evaluation(np.ones(3), np.arange(3.0)).neyman_pearson()

"""Ridge regression against scikit-learn, and as an attack on real shadow models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import Ridge

from jinv.reconstruct import ridge
from jinv.shadow import sampling
from jinv.shadow.config import Config
from jinv.shadow.generation import Factory, Made
from jinv.shadow.store import Layout, Metadata, Store

LINEAR = Layout((("bias", (3,)), ("weight", (3, 4))))


def pairs(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, 6)) * [1, 5, 0.1, 1, 1, 0] + [0, 3, 1, 0, 0, 2]
    slope = np.random.default_rng(0).standard_normal((6, 4))
    return x, x @ slope + rng.standard_normal((count, 4)) + 1


def scaled(x: np.ndarray, like: np.ndarray) -> np.ndarray:
    std = like.std(0)
    return x / np.where(std > 0, std, 1)


def test_sums_of_parts_are_those_of_the_whole() -> None:
    x, y = pairs(50, 1)
    whole = ridge.Sums.of(x, y)
    parts = (
        ridge.Sums.of(x[:7], y[:7]) + ridge.Sums.of(x[7:8], y[7:8]) + ridge.Sums.of(x[8:], y[8:])
    )
    assert parts.count == 50
    for name in ("mean_x", "mean_y", "xx", "xy", "yy"):
        ours, theirs = getattr(parts, name), getattr(whole, name)
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10)


def test_the_regression_is_scikit_learn_s_with_the_penalty_that_held_out_pairs_choose() -> None:
    (x, y), (x_held, y_held) = pairs(40, 1), pairs(30, 2)
    ours = ridge.regress([ridge.Sums.of(x, y)], [ridge.Sums.of(x_held, y_held)])
    assert tuple(ours.errors) == ridge.PENALTIES
    for penalty, error in ours.errors.items():
        tried = Ridge(alpha=penalty).fit(scaled(x, x), y)
        expected = np.square(tried.predict(scaled(x_held, x)) - y_held).mean()
        np.testing.assert_allclose(error, expected, rtol=1e-6)
    assert ours.errors[ours.penalty] == min(ours.errors.values())
    assert ours.penalty not in (ridge.PENALTIES[0], ridge.PENALTIES[-1])
    every, targets = np.concatenate([x, x_held]), np.concatenate([y, y_held])
    last = Ridge(alpha=ours.penalty).fit(scaled(every, every), targets)
    new = pairs(5, 3)[0]
    np.testing.assert_allclose(ours(new), last.predict(scaled(new, every)), rtol=1e-8)


def test_pooled_groups_share_a_slope_and_keep_their_means() -> None:
    (x, y), (x2, y2) = pairs(40, 1), pairs(30, 2)
    x2, y2 = x2 + 10, y2 - 7

    def halves(a: np.ndarray, b: np.ndarray) -> tuple[ridge.Sums, ridge.Sums]:
        return ridge.Sums.of(a[::2], b[::2]), ridge.Sums.of(a[1::2], b[1::2])

    first, second = halves(x, y), halves(x2, y2)
    ours = ridge.regress([first[0], second[0]], [first[1], second[1]], penalties=[2.0])
    centred = np.concatenate([x - x.mean(0), x2 - x2.mean(0)])
    targets = np.concatenate([y - y.mean(0), y2 - y2.mean(0)])
    expected = Ridge(alpha=2.0, fit_intercept=False).fit(scaled(centred, centred), targets)
    new = pairs(5, 3)[0]
    for group, (a, b) in enumerate([(x, y), (x2, y2)]):
        wanted = b.mean(0) + expected.predict(scaled(new - a.mean(0), centred))
        np.testing.assert_allclose(ours(new, group), wanted, rtol=1e-8)


def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bytes (M, 8, 8, 1), labels, and ReLU features."""
    images, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    features = np.maximum(images / 16 @ rng.standard_normal((64, 48)), 0)
    pixels = np.round(images * 255 / 16).astype(np.uint8).reshape(-1, 8, 8, 1)
    return pixels, labels, features.astype(np.float32)


class Study:
    """Heads of two disjoint parts of the digits."""

    def __init__(self) -> None:
        pixels, labels, features = digits()
        self.images, self.labels = pixels[:1400], labels[:1400]
        self.others, self.other_labels = pixels[1400:], labels[1400:]
        config = Config(epochs=30, lr=0.05, init_std=0.002)
        self.factory = Factory(config, features[:1400], 10, jax.random.key(0))
        self.victims = Factory(config, features[1400:], 10, jax.random.key(1))
        self.seeds = [self.made(self.factory, self.labels, seed, 120) for seed in range(12)]

    def made(
        self, factory: Factory, labels: np.ndarray, seed: int, sets: int
    ) -> tuple[Made[Any], sampling.Sets]:
        chosen = sampling.balanced(labels, seed, 1, sets)
        return factory.seed(seed, chosen), chosen


@pytest.fixture(scope="module")
def study() -> Study:
    return Study()


@pytest.mark.parametrize("pooled", [False, True])
def test_ridge_finds_the_images_of_heads_that_it_has_not_seen(study: Study, pooled: bool) -> None:
    fitting = ridge.Fitting(study.factory.layout, study.images)
    for made, sets in study.seeds:
        fitting.add(made.weights, sets)
    attack = fitting.fit(pooled=pooled)
    made, sets = study.made(study.victims, study.other_labels, 0, 35)
    found = attack.reconstruct(made.weights)
    assert found.shape == (35, 10, 8, 8, 1)
    truth = ridge.unit(study.others[sets.indices])  # classes are in rising order
    means = np.stack([ridge.unit(study.images[study.labels == c]).mean(0) for c in range(10)])
    error, guess = (np.square(a - truth).mean() for a in (found, means))
    assert error < 0.5 * guess
    candidates = truth.transpose(1, 0, 2, 3, 4).reshape(10, 35, -1)
    apart = np.square(found.reshape(35, 10, 1, 64) - candidates[None]).sum(-1)
    right = apart.argmin(-1) == np.arange(35)[:, None]
    assert right.mean() > 0.6


def test_heads_come_from_a_store_as_well(study: Study, tmp_path: Path) -> None:
    folder = Store.create(tmp_path / "s", Metadata(study.factory.layout, 120, 3, "float32", {}))
    direct = ridge.Fitting(study.factory.layout, ridge.unit(study.images).astype(np.float32))
    stored = ridge.Fitting(folder.metadata.layout, study.images)
    for seed, (made, sets) in enumerate(study.seeds[:3]):
        folder.write(seed, made.weights, made.loss, made.attempts)()
        direct.add(jax.numpy.asarray(made.weights), sets)
        stored.add(folder.read(seed), sets)
    weights = study.seeds[5][0].weights
    ours, theirs = (f.fit(pooled=True).reconstruct(weights) for f in (direct, stored))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_several_images_of_a_class_count_by_their_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (60, 2, 2, 1))
    labels = np.tile(np.repeat(np.arange(3), 2), (9, 1))
    order = np.concatenate([rng.permutation(60) for _ in range(1)])[:54].reshape(9, 6)
    weights = rng.standard_normal((9, LINEAR.size))
    monkeypatch.setattr(ridge, "_BLOCK", 2 * 6 * 4)  # two heads at a time
    fitting = ridge.Fitting(LINEAR, images)
    # In any order within a set.
    turned = np.argsort(rng.random((9, 6)), 1)
    mixed = sampling.Sets(
        np.take_along_axis(order, turned, 1), np.take_along_axis(labels, turned, 1)
    )
    fitting.add(weights, mixed)
    parts = LINEAR.split(weights)
    for c in range(3):
        x = np.concatenate([parts["weight"][:, c], parts["bias"][:, c, None]], 1)
        chosen = order[:, 2 * c : 2 * c + 2]
        y = images[chosen].mean(1).reshape(9, 4)
        held = (chosen % ridge.HELD_OUT == 0).any(1)
        for part, sums in enumerate(fitting._sums[c]):
            expected = ridge.Sums.of(x[held == part], y[held == part])
            assert sums is not None
            assert sums.count == expected.count
            np.testing.assert_allclose(sums.xy, expected.xy, rtol=1e-10, atol=1e-12)
            np.testing.assert_allclose(sums.yy, expected.yy, rtol=1e-10)


def test_what_ridge_cannot_attack_is_refused() -> None:
    images = np.zeros((20, 2, 2, 1))
    with pytest.raises(ValueError, match="it needs linear heads"):
        ridge.Fitting(Layout((("hidden.weight", (8, 4)), ("hidden.bias", (8,)))), images)
    fitting = ridge.Fitting(LINEAR, images)
    sets = sampling.Sets(np.asarray([[1, 2, 3]]), np.asarray([[0, 1, 2]]))
    with pytest.raises(ValueError, match="2 heads were trained on 1 sets"):
        fitting.add(np.zeros((2, LINEAR.size)), sets)
    with pytest.raises(ValueError, match="class 0 had no image in any head: add more"):
        fitting.fit()
    fitting.add(np.zeros((1, LINEAR.size)), sets)
    with pytest.raises(ValueError, match="class 0 had no held-out image in any head"):
        fitting.fit()
    with pytest.raises(ValueError, match="are no pairs"):
        ridge.Sums.of(np.zeros((2, 3)), np.zeros((1, 3)))

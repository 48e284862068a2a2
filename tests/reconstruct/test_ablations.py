"""An attack that is right by chance alone looks so: on random weights, or with shuffled pairs."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jinv.reconstruct import ridge
from jinv.reconstruct.normalisation import Normalisation
from jinv.reconstruct.victims import Attacked, Victims, attacked
from jinv.shadow import sampling, statistics
from jinv.shadow.config import Config
from jinv.shadow.generation import Factory

HEADS = 400


@pytest.fixture(scope="module")
def world() -> tuple[Victims, dict[str, ridge.Attack]]:
    """Victims, and ridge regression that has learned from true or from shuffled pairs."""
    rng = np.random.default_rng(0)
    labels = np.arange(1200) % 3
    pattern, axes = rng.normal(size=(3, 16)), rng.normal(size=(6, 16))
    pixels = np.tanh(0.5 * pattern[labels] + 0.4 * rng.normal(size=(1200, 6)) @ axes)
    images = pixels.reshape(-1, 4, 4, 1).astype(np.float32)
    features = np.maximum(pixels @ rng.normal(size=(16, 64)) / 2 + 0.5, 0).astype(np.float32)
    config = Config(classes=3, lr=0.05, epochs=30, init_std=2e-3)
    own, theirs = slice(0, 600), slice(600, 1200)
    factory = Factory(config, features[own], 3, jax.random.key(0))
    fits = {name: ridge.Fitting(factory.layout, images[own]) for name in ("true", "shuffled")}
    found = None
    for seed in range(4):
        sets = sampling.balanced(labels[own], seed, 1, 200)
        weights = factory.seed(seed, sets).weights
        fits["true"].add(weights, sets)
        fits["shuffled"].add(weights[rng.permutation(len(weights))], sets)
        new = statistics.of(weights)
        found = new if found is None else statistics.merged(found, new)
    assert found is not None
    made, chosen = [], []
    other = Factory(config, features[theirs], 3, jax.random.key(1))
    for seed in range(HEADS // 200):
        sets = sampling.balanced(labels[theirs], seed, 1, 200)
        made.append(np.array(other.seed(seed, sets).weights))
        chosen.append(sets.indices)
    normalisation = Normalisation.of(found)
    random = normalisation.weights(
        normalisation.random(jax.random.key(2), HEADS), np.asarray(found.mean)
    )
    victims = Victims(
        images[theirs], labels[theirs], np.concatenate(chosen), np.concatenate(made), random
    )
    return victims, {name: fit.fit() for name, fit in fits.items()}


def outcome(victims: Victims, attack: ridge.Attack, weights: np.ndarray) -> Attacked:
    return attacked(victims, attack.reconstruct(weights), attack.reconstruct(victims.random))


def test_it_sees_the_images_in_the_weights(world: tuple) -> None:
    victims, attacks = world
    found = outcome(victims, attacks["true"], victims.weights)
    assert found.evaluation.tpr_at(0.01) > 0.5
    assert found.top1 > 0.5


def test_shuffled_pairs_give_chance(world: tuple) -> None:
    victims, attacks = world
    found = outcome(victims, attacks["shuffled"], victims.weights)
    assert found.evaluation.tpr_at(0.1) == pytest.approx(0.1, abs=0.04)
    assert found.top1 < 0.02


def test_random_weights_give_chance(world: tuple) -> None:
    victims, attacks = world
    other = victims.random[np.random.default_rng(3).permutation(HEADS)]
    found = outcome(victims, attacks["true"], other)
    assert found.evaluation.tpr_at(0.1) == pytest.approx(0.1, abs=0.04)
    assert found.top1 < 0.02

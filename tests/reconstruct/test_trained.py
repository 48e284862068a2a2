"""Reconstructors in folders: they come back as they were, and damaged ones are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import weights_convert
from jinv.reconstruct import network, trained
from jinv.reconstruct.normalisation import Normalisation
from jinv.reconstruct.trained import Origin, Trained
from jinv.shadow.config import Config


@pytest.fixture
def own() -> Trained:
    config = network.Config(3, 2, classes=2)
    net = network.make(config)
    normalisation = Normalisation(5, np.array([0, 2, 4]), np.ones(3), np.full(3, 2.0))
    origin = Origin("weights", config, 5, Config(classes=2), 1, "abc")
    return Trained(origin, net, net.init(jax.random.key(0)), normalisation)


def test_it_comes_back(own: Trained, tmp_path: Path) -> None:
    own.save(tmp_path)
    found = trained.load(tmp_path)
    assert found.origin == own.origin
    weights = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    images = own.of_weights(weights)
    assert images.shape == (4, 2, 32, 32, 1)
    np.testing.assert_array_equal(found.of_weights(weights), images)
    x = own.normalisation.normalised(weights)
    told = own.net.apply(own.variables, x, np.array([0, 1, 0, 1]))
    np.testing.assert_allclose(images[np.arange(4), [0, 1, 0, 1]], told, atol=1e-5)


def test_one_image_for_every_feature_of_a_class(own: Trained) -> None:
    features = np.random.default_rng(0).normal(size=(4, 2, 5)).astype(np.float32)
    images = own.of_features(features)
    assert images.shape == (4, 2, 32, 32, 1)
    np.testing.assert_array_equal(images[:, 1], own.of_weights(features[:, 1])[:, 1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": {"inputs": 4}}, "safetensors"),
        ({"input": "pixels"}, "input"),
        ({"size": 4}, "its normalisation is not one of 3 numbers of 4"),
        ({"network": {"width": 10**9}}, "safetensors"),
        ({"more": 1}, "more"),
    ],
)
def test_what_does_not_fit_is_refused(
    own: Trained, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    own.save(tmp_path)
    path = tmp_path / trained.INDEX
    told = json.loads(path.read_text())
    for key, value in changes.items():
        told[key] = told[key] | value if isinstance(value, dict) else value
    path.write_text(json.dumps(told))
    with pytest.raises(ValueError, match=message):
        trained.load(tmp_path)


def test_missing_files_are_named(own: Trained, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"reconstructor.json is missing or damaged"):
        trained.load(tmp_path)
    own.save(tmp_path)
    state = weights_convert.read(tmp_path / trained.WEIGHTS)
    del state["normalisation.std"]
    weights_convert.write(tmp_path / trained.WEIGHTS, state)
    with pytest.raises(ValueError, match=r"'normalisation.std' is missing"):
        trained.load(tmp_path)
    (tmp_path / trained.WEIGHTS).unlink()
    with pytest.raises((ValueError, OSError), match=r"reconstructor\.safetensors"):
        trained.load(tmp_path)

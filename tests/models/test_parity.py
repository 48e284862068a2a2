"""torchvision's logits, computed in a process of its own, beside jinv's."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

import jinv
import weights_convert
from jinv.models import parity, registry
from torch_peers import random_network, state_arrays
from weights_convert import WeightsError

pytest.importorskip("torchvision")
import numpy as np


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    images = np.random.default_rng(1).normal(size=(2, 64, 64, 3)).astype(np.float32)
    weights_convert.write(path, state_arrays(random_network("resnet18", images)))
    return path


def test_the_same_weights_give_the_same_logits(weights: Path, tmp_path: Path) -> None:
    """Other weights, and a file that torchvision does not load, are noticed."""
    net = jinv.models.load("resnet18", weights)
    assert 0 < parity.difference(net, weights) < 1e-5
    state = weights_convert.read(weights)
    state["layer3.0.bn1.running_var"] *= 1.1
    weights_convert.write(tmp_path / "other.pth", state)
    assert parity.difference(net, tmp_path / "other.pth") > 10 * parity.LIMIT
    del state["layer3.0.bn1.running_var"]
    weights_convert.write(tmp_path / "less.pth", state)
    with pytest.raises(WeightsError, match=r"does not load it: .*layer3\.0\.bn1\.running_var"):
        parity.difference(net, tmp_path / "less.pth")


def test_a_network_that_torchvision_lacks_is_not_compared(tmp_path: Path) -> None:
    net = jinv.models.load("lenet", None)
    with pytest.raises(parity.NotComparedError, match="torchvision has no such network"):
        parity.difference(net, tmp_path / "w.pth")


def test_without_torchvision_nothing_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(parity.NotComparedError, match="torchvision is not installed"):
        parity.difference(jinv.models.load("lenet", None), tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("name", "classes", "like"),
    [("lenet", 10, ""), ("lenet", 4, "lenet"), ("resnet20_cifar", 10, "x")],
)
def test_the_network_that_weights_are_of_is_found(
    monkeypatch: pytest.MonkeyPatch, name: str, classes: int, like: str
) -> None:
    monkeypatch.setattr(registry, "_ZOO", ("resnet20_cifar", "lenet", "resnet18_cifar_slim"))
    shapes = weights_convert.shapes(jinv.models.template(name, classes))
    state = {f"model.{n}": np.ones(shape, np.float32) for n, shape in shapes.items()}
    assert jinv.models.fitting(state, like) == (name, classes)
    state.pop(next(iter(state)))
    assert jinv.models.fitting(state, like) is None

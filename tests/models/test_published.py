"""The table of published weights against torchvision's own, and files that are known by it."""

from __future__ import annotations

import re
import types
from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import weights_convert
from jinv import files, image, models
from jinv.image import Preprocessing
from jinv.models import published, registry
from jinv.models.published import Published


@pytest.fixture(scope="module")
def torchvision_models() -> ModuleType:
    pytest.importorskip("torch")
    torchvision = pytest.importorskip("torchvision")
    if not torchvision.__version__.startswith("0.28."):
        pytest.skip(f"the table is of torchvision 0.28, not {torchvision.__version__}")
    return torchvision.models


TRANSFORMED = ("googlenet", "inception_v3")
"""Networks of torchvision that change their input themselves."""
OTHERS = ("swin_", "vit_")
"""Networks of torchvision that are not here."""


def members(models: ModuleType) -> dict[tuple[str, str], Any]:
    """Every published weight of the classifiers that are here."""
    names = [n for n in models.list_models(module=models) if not n.startswith(OTHERS)]
    return {(name, m.name): m for name in names for m in models.get_model_weights(name)}


def test_the_table_is_torchvisions(torchvision_models: ModuleType) -> None:
    """No row is missing, none is too many, and each says what torchvision does."""
    expected = members(torchvision_models)
    assert [(row.network, row.member) for row in published.ALL] == list(expected)
    for row in published.ALL:
        theirs = expected[row.network, row.member]
        transforms = theirs.transforms()
        assert row.file == theirs.url.rpartition("/")[2]
        assert [row.size] == transforms.crop_size
        assert [row.resize] == transforms.resize_size
        assert row.interpolation == transforms.interpolation.value
        assert transforms.antialias
        if row.network not in TRANSFORMED:
            assert list(row.mean) == transforms.mean, row
            assert list(row.std) == transforms.std, row


@pytest.mark.parametrize("name", TRANSFORMED)
def test_what_networks_change_themselves_is_in_the_normalisation(
    name: str, torchvision_models: ModuleType
) -> None:
    """torchvision's transform, then its network's `_transform_input`: our mean and std."""
    torch = pytest.importorskip("torch")
    row = next(row for row in published.ALL if row.network == name)
    network = types.SimpleNamespace(transform_input=True)  # the method needs nothing else
    of = torchvision_models.GoogLeNet if name == "googlenet" else torchvision_models.Inception3
    pixels = np.random.default_rng(0).random((2, 3, 5, 7), np.float32)
    theirs = torchvision_models.get_model_weights(name).IMAGENET1K_V1.transforms()
    mean, std = (torch.tensor(v)[:, None, None] for v in (theirs.mean, theirs.std))
    expected = of._transform_input(network, (torch.from_numpy(pixels) - mean) / std)
    ours = (pixels - np.reshape(row.mean, (3, 1, 1))) / np.reshape(row.std, (3, 1, 1))
    np.testing.assert_allclose(ours, expected.numpy(), atol=2e-6)


def test_every_file_ends_in_the_beginning_of_its_sha256() -> None:
    digits = [row.sha256 for row in published.ALL]
    assert all(re.fullmatch("[0-9a-f]{8}|[0-9a-f]{10}", found) for found in digits)
    assert len(set(digits)) == len(digits)
    assert {"3ffadce67e", "0676ba61", "b0353104"} <= set(digits)


def test_networks_usual_preprocessing_is_that_of_their_first_weights() -> None:
    for row in reversed(published.ALL):
        space = published.preprocessing(row.network)
        first = next(other for other in published.ALL if other.network == row.network)
        assert space == first.preprocessing
        if row.network in models.names():
            assert models.entry(row.network).preprocessing == space
    v1 = published.preprocessing("resnet50")
    assert v1 == Preprocessing(224, resize=256, interpolation="bilinear")
    assert published.preprocessing("efficientnet_b7").size == 600
    inception = published.preprocessing("inception_v3")
    assert (inception.size, inception.resize, inception.mean) == (299, 342, (0.5,) * 3)
    assert published.preprocessing("regnet_y_128gf").size == 384
    with pytest.raises(ValueError, match="no weights of a network called 'lenet'"):
        published.preprocessing("lenet")


# --- files ---------------------------------------------------------------------------------------


NAME = "resnet20_cifar"


def write(path: Path) -> Path:
    """Random weights of a small network."""
    weights_convert.write(path, weights_convert.from_flax(models.load(NAME, None).variables))
    return path


@pytest.fixture
def publish(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`publish(path, network, member)`: as if torchvision did."""

    def add(path: Path, network: str, member: str = "IMAGENET1K_V2") -> Published:
        file = f"{network}-{files.sha256(path)[:8]}.pth"
        row = Published(network, member, file, 32, 36, "bilinear", (0.5,) * 3, (0.25,) * 3)
        monkeypatch.setattr(published, "ALL", (*published.ALL, row))
        return row

    return add


def test_a_published_file_is_known_by_its_content(tmp_path: Path, publish: Any) -> None:
    """It brings its preprocessing along, if nobody gives another; its name does not count."""
    path = write(tmp_path / "any.pth")
    assert published.of(path) is None
    net = models.load(NAME, path)
    assert (net.weights, net.preprocessing) == (None, registry.CIFAR10)

    row = publish(path, NAME)
    assert published.of(path) == row
    net = models.load(NAME, path)
    space = Preprocessing(32, (0.5,) * 3, (0.25,) * 3, resize=36, interpolation="bilinear")
    assert (net.weights, net.preprocessing) == ("IMAGENET1K_V2", space)
    net = models.load(NAME, path, preprocessing=registry.CIFAR10)
    assert (net.weights, net.preprocessing) == ("IMAGENET1K_V2", registry.CIFAR10)
    net = models.Network(NAME, str(path), name="mine").load()
    assert (net.name, net.weights) == ("mine", "IMAGENET1K_V2")
    assert models.load(NAME, None).weights is None


def test_a_file_that_was_trained_on_and_kept_its_name_is_unknown(
    tmp_path: Path, publish: Any
) -> None:
    row = publish(write(tmp_path / "any.pth"), NAME)
    state = weights_convert.read(tmp_path / "any.pth")
    path = tmp_path / row.file
    weights_convert.write(path, {key: value + 0.5 for key, value in state.items()})
    net = models.load(NAME, path)
    assert (net.weights, net.preprocessing) == (None, registry.CIFAR10)


def test_the_published_file_of_another_network_is_refused_by_name(
    tmp_path: Path, publish: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "resnet18-f37072fd.pth")
    publish(path, "resnet50")
    message = r"resnet18-f37072fd\.pth is the published file of resnet50 \(IMAGENET1K_V2\), not of "
    # Although the weights fit this one.
    with pytest.raises(ValueError, match=f"{message}{NAME}$"):
        models.load(NAME, path)
    with pytest.raises(ValueError, match=f"cannot load mine: .*{message}{NAME}"):
        models.Network(NAME, str(path), name="mine").load()
    # A network of the user's own may be one of torchvision's.
    monkeypatch.setitem(registry._REGISTRY, "mine", models.entry(NAME))
    net = models.load("mine", path)
    assert (net.weights, net.preprocessing) == (None, registry.CIFAR10)


def test_weights_without_last_layers_are_refused(tmp_path: Path, publish: Any) -> None:
    path = write(tmp_path / "any.pth")
    publish(path, NAME, "IMAGENET1K_FEATURES")
    with pytest.raises(ValueError, match=r"IMAGENET1K_FEATURES.*lacks the weights of the last"):
        models.load(NAME, path)
    unusable = [row.file for row in published.ALL if not row.classifies]
    assert "vgg16_features-amdegroot-88682ab5.pth" in unusable


def test_what_cannot_be_a_published_file_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert published.of(tmp_path) is None
    assert published.of(tmp_path / "nowhere.pth") is None
    with (tmp_path / "large.pth").open("wb") as file:
        file.truncate(published._LARGEST + 1)  # takes no room on the disk
    monkeypatch.setattr(files, "sha256", lambda path: pytest.fail("it was read"))
    assert published.of(tmp_path / "large.pth") is None


def photograph() -> Image.Image:
    skimage = pytest.importorskip("skimage")
    return Image.open(Path(skimage.__file__).parent / "data" / "chelsea.png")


def test_a_packaged_file_gives_torchvisions_logits_of_a_photograph(
    tmp_path: Path, torchvision_models: ModuleType
) -> None:
    """From the picture on, each with its own reading, resizing, cropping and network."""
    torch = pytest.importorskip("torch")
    try:
        path = models.packaged_weights("mobilenet_v2")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    net = models.load("mobilenet_v2", "package")
    assert net.weights == "IMAGENET1K_V1"
    images = image.stack_square([photograph()], net.preprocessing)
    found = np.asarray(net(jnp.asarray(images)).logits)[0]

    theirs = torchvision_models.mobilenet_v2().eval()
    theirs.load_state_dict(torch.load(path, weights_only=True))
    transform = torchvision_models.MobileNet_V2_Weights.IMAGENET1K_V1.transforms()
    with torch.no_grad():
        expected = theirs(transform(photograph().convert("RGB"))[None])[0].numpy()
    assert np.argsort(-found)[:5].tolist() == [285, 282, 281, 287, 728]
    # A few bytes differ by one grey level; what was usual before differs by 0.2.
    np.testing.assert_allclose(found, expected, atol=0.02)

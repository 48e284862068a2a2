"""LPIPS against the reference implementation, on random VGG16 weights and the published heads."""

from __future__ import annotations

import importlib.metadata
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import weights_convert
from jinv.scores import lpips


class Reference:
    """The package lpips with random VGG16 weights, and a file of those."""

    def __init__(self, folder: Path) -> None:
        self.torch = pytest.importorskip("torch")
        pytest.importorskip("torchvision")
        package = pytest.importorskip("lpips")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it calls torchvision as torchvision was
            self.model = package.LPIPS(net="vgg", pnet_rand=True, verbose=False)
        state = {}
        for name, value in self.model.net.named_parameters():
            if name.endswith("bias"):
                value.data.normal_(0, 0.1, generator=self.torch.Generator().manual_seed(len(state)))
            state[f"features.{name.split('.', 1)[1]}"] = value.data
        self.file = folder / "vgg16.pth"
        # A classifier belongs to the published file, and is of no use.
        self.torch.save({**state, "classifier.0.bias": self.torch.zeros(4096)}, self.file)

    def __call__(self, found: np.ndarray, truth: np.ndarray) -> np.ndarray:
        channels_first = (
            self.torch.from_numpy(x.transpose(0, 3, 1, 2).copy()) for x in (found, truth)
        )
        with self.torch.no_grad():
            return self.model(*channels_first, normalize=True).numpy().ravel()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(tmp_path_factory.mktemp("lpips"))


@pytest.fixture(scope="module")
def ours(reference: Reference) -> lpips.Distance:
    return lpips.load(reference.file)


def pair(shape: tuple[int, ...], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Originals and noisy versions of them, each noisier than the last."""
    rng = np.random.default_rng(seed)
    truth = rng.random(shape, np.float32)
    levels = np.linspace(0.02, 1, shape[0])[:, None, None, None]
    found = np.clip(truth + levels * rng.standard_normal(shape), 0, 1)
    return found.astype(np.float32), truth


@pytest.mark.parametrize(
    "shape", [(3, 64, 75, 3), (lpips.IMAGES_AT_ONCE + 2, 28, 28, 3), (2, 16, 17, 3)]
)
def test_distances_equal_the_references(
    shape: tuple[int, ...], reference: Reference, ours: lpips.Distance
) -> None:
    found, truth = pair(shape)
    distances, expected = ours(found, truth), reference(found, truth)
    assert distances.shape == expected.shape == shape[:1]
    np.testing.assert_allclose(distances, expected, atol=1e-5, rtol=0)
    np.testing.assert_allclose(distances, expected, rtol=1e-4)
    assert distances[0] < 0.5 * distances[-1]


def test_gray_images_are_shown_in_three_equal_channels(
    reference: Reference, ours: lpips.Distance
) -> None:
    found, truth = pair((2, 28, 28, 1))
    expected = reference(*(np.repeat(x, 3, axis=-1) for x in (found, truth)))
    np.testing.assert_allclose(ours(found, truth), expected, atol=1e-5)


def test_equal_images_have_no_distance(ours: lpips.Distance) -> None:
    found, truth = pair((2, 28, 28, 3))
    np.testing.assert_allclose(ours(truth, truth), 0, atol=1e-12)
    np.testing.assert_allclose(ours(found, truth), ours(truth, found), rtol=1e-6)
    assert np.isnan(ours(found * np.nan, truth)).all()


def test_gradient_is_finite_where_images_are_equal_and_nothing_is_active() -> None:
    heads = [jnp.ones(3), jnp.ones(3)]

    def stages(x: jax.Array) -> list[jax.Array]:
        return [x, jax.nn.relu(x - 100)]

    truth = jnp.asarray(pair((2, 4, 4, 3))[1])
    gradient = jax.grad(lambda x: lpips.distance(stages, heads, x, truth).sum())
    np.testing.assert_array_equal(gradient(truth), 0)
    assert np.abs(gradient(truth + 0.1)).max() > 0


def test_what_it_cannot_compare_is_refused(ours: lpips.Distance) -> None:
    found, truth = pair((2, 28, 28, 3))
    with pytest.raises(ValueError, match=r"at least 16 x 16 pixels .* not 15 x 28 x 3"):
        ours(found[:, :15], truth[:, :15])
    with pytest.raises(ValueError, match=r"1 or 3 channels, not 28 x 28 x 2"):
        ours(found[..., :2], truth[..., :2])
    with pytest.raises(ValueError, match="do not pair"):
        ours(found, truth[:1])
    with pytest.raises(ValueError, match="divide bytes by 255"):
        ours((255 * found).astype(np.uint8), truth)


def test_missing_files_are_named(
    tmp_path: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError, match=r"vgg16-397923af\.pth: give its path"):
        lpips.load(None)
    with pytest.raises(FileNotFoundError, match=r"there is no .*absent\.pth"):
        lpips.load(tmp_path / "absent.pth")

    def missing(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    install = r"heads are not installed: pip install --no-deps lpips==0\.1\.4"
    with pytest.raises(FileNotFoundError, match=install):
        lpips.load(reference.file)


def test_wrong_files_are_refused(tmp_path: Path, reference: Reference) -> None:
    other = tmp_path / "other.safetensors"
    weights_convert.write(other, {"features.0.weight": np.zeros((64, 3, 5, 5), np.float32)})
    with pytest.raises(ValueError, match=r"other.* does not fit VGG16: .*features\.28\.bias"):
        _load_flat(other)
    with pytest.raises(ValueError, match=r"other.* does not fit LPIPS's heads: .*lin4\.model\.1"):
        _load_flat(reference.file, other)
    published = tmp_path / lpips.VGG16
    published.write_bytes(b"not what was published")
    with pytest.raises(ValueError, match=r"is damaged: .* not 397923af; get a fresh copy"):
        lpips.load(published)


def _load_flat(*files: Path) -> None:
    """`load`, with its error on one line."""
    try:
        lpips.load(*files)
    except ValueError as error:
        raise ValueError(" ".join(str(error).split())) from None

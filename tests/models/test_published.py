"""The table of published weights against torchvision's own."""

from __future__ import annotations

import re
import types
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from jinv.models import published


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

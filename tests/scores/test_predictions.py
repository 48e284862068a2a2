"""What a network says of many images: batch by batch as at once, and in files that go on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from jinv import image, training
from jinv.net import Net
from jinv.scores import predictions
from jinv.scores.predictions import Predictions

IMAGES = np.random.default_rng(0).integers(0, 256, (10, 16, 16, 3), np.uint8)
NET = tiny.network()


def said(net: Net, images: np.ndarray, batch: int) -> Predictions:
    batches = (images[i : i + batch] for i in range(0, len(images), batch))
    mesh = training.batch_mesh(batch)
    predict = predictions.make_predict(net)
    found = list(predictions.blocks(net, predict, batches, batch, mesh))
    assert [len(block.top) for block in found] == [
        min(batch, len(images) - i) for i in range(0, len(images), batch)
    ]
    return Predictions(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


@pytest.mark.parametrize("batch", [4, 16])
def test_batches_say_what_the_network_says(batch: int) -> None:
    found = said(NET, IMAGES, batch)
    outputs = NET(image.from_bytes(jnp.asarray(IMAGES), NET.preprocessing))
    likely = np.asarray(jax.nn.softmax(outputs.logits))
    np.testing.assert_allclose(found.probabilities, likely, atol=1e-5)
    np.testing.assert_array_equal(found.top, np.argsort(-likely, axis=1)[:, :5])
    assert found.features is not None
    np.testing.assert_allclose(found.features, outputs.features, atol=1e-5)
    targets = np.arange(10) % 7
    expected = [[c == target for c in row] for row, target in zip(found.top, targets, strict=True)]
    assert found.hits(targets).tolist() == expected


def test_few_classes_sizes_and_channels() -> None:
    """Two classes have no five likeliest; other sizes are resized, colours become gray."""
    assert predictions.check(NET, IMAGES) == 8
    assert predictions.check(tiny.featureless(), IMAGES) is None
    net = tiny.network(space=tiny.GRAY, classes=2)
    large = np.asarray(image.resize_bytes(jnp.asarray(IMAGES[:2]), 20))
    (found,) = predictions.blocks(
        net, predictions.make_predict(net), [large], 2, training.batch_mesh(2)
    )
    assert found.top.shape == (2, 2)
    small = np.asarray(image.resize_bytes(jnp.asarray(large), 16))
    logits = net(image.from_bytes(jnp.asarray(small), net.preprocessing)).logits
    np.testing.assert_allclose(found.probabilities, jax.nn.softmax(logits), atol=1e-5)


def test_channels_and_numbers_are_checked() -> None:
    with pytest.raises(ValueError, match="images of 4 channels cannot be shown to tiny"):
        predictions.check(NET, np.zeros((1, 16, 16, 4), np.uint8))
    variables: Any = {**NET.variables, "head": {"kernel": np.full((8, 7), 3e38, np.float32)}}
    variables["head"]["bias"] = NET.variables["head"]["bias"]
    with pytest.raises(ValueError, match="what tiny says of an image is not finite"):
        said(dataclasses.replace(NET, variables=variables), IMAGES, 10)


def test_files_go_on_where_they_were_left(tmp_path: Path) -> None:
    whole = said(NET, IMAGES, 10)

    def add(start: int, end: int, at: int) -> None:
        with predictions.Files(tmp_path, 10, NET, 8, at) as files:
            files.add(Predictions(*(part[start:end] for part in whole)))  # type: ignore[index]

    add(0, 7, 0)
    add(4, 10, 4)
    with predictions.Files(tmp_path, 10, NET, 8, 10) as files:
        for found, expected in zip(files.read(), whole, strict=True):
            np.testing.assert_array_equal(found, expected)
    add(0, 4, 0)
    with pytest.raises(ValueError, match="top lacks what was written there: begin anew"):
        predictions.Files(tmp_path, 10, NET, 8, 5)
    with predictions.Files(tmp_path / "bare", 10, NET, None) as files:
        files.add(whole._replace(features=None))
        assert files.read().features is None

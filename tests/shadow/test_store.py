"""Stores: what is written is read, by seeds that are whole or absent; damage is named."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jinv.shadow import store
from jinv.shadow.store import Layout, Metadata, Store, StoreError

LAYOUT = Layout((("bias", (3,)), ("weight", (3, 4))))
METADATA = Metadata(LAYOUT, 7, 3, "float32", {"seed": 1, "training": {"lr": 0.1}})


def models(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    weights, loss = rng.normal(size=(7, 15)), rng.uniform(size=7)
    return weights.astype(np.float32), loss.astype(np.float32), np.full(7, seed, np.uint16)


def filled(folder: Path, seeds: tuple[int, ...] = (0, 2)) -> Store:
    found = Store.create(folder, METADATA)
    for seed in seeds:
        found.write(seed, *models(seed))()
    return found


@pytest.mark.gpu
def test_a_store_gives_back_what_was_written(tmp_path: Path) -> None:
    filled(tmp_path)
    found = Store(tmp_path)
    for seed in (0, 2):
        for name, expected in zip(store.ARRAYS, models(seed), strict=True):
            np.testing.assert_array_equal(found.read(seed, name=name), expected)
    parameters = found.parameters(2, slice(3, 5))
    expected = models(2)[0][3:5]
    np.testing.assert_array_equal(parameters["bias"], expected[:, :3])
    np.testing.assert_array_equal(parameters["weight"], expected[:, 3:].reshape(2, 3, 4))
    assert found.missing() == [1]
    assert found.damaged() == {}


def test_written_weights_are_let_go(tmp_path: Path) -> None:
    """They are read where they lie, as a GPU's are, read-only; afterwards memory is free again."""
    found = Store.create(tmp_path, METADATA)
    weights, *others = models(0)
    weights.flags.writeable = False
    held = sys.getrefcount(weights)
    found.write(0, weights, *others)()
    end = time.monotonic() + 60
    while sys.getrefcount(weights) > held and time.monotonic() < end:
        time.sleep(0.001)
    assert sys.getrefcount(weights) == held
    weights.flags.writeable = True
    weights[:] = 0
    np.testing.assert_array_equal(found.read(0), models(0)[0])


def test_halves_are_stored_as_such(tmp_path: Path) -> None:
    import ml_dtypes

    found = Store.create(tmp_path, dataclasses.replace(METADATA, dtype="bfloat16"))
    weights = models(0)[0].astype(ml_dtypes.bfloat16)
    found.write(0, weights, *models(0)[1:])()
    np.testing.assert_array_equal(Store(tmp_path).read(0), weights)


@pytest.mark.parametrize("name", store.ARRAYS)
def test_what_is_missing_is_not_read_as_zeros(tmp_path: Path, name: str) -> None:
    found = filled(tmp_path)
    with pytest.raises(StoreError, match=rf"holds no seed 1: .*{name}/c/1/0.* is missing"):
        found.read(1, name=name)
    next((tmp_path / name / "c/2").rglob("0/0" if name == "weights" else "0")).unlink()
    assert list(Store(tmp_path).damaged()) == ([] if name == "weights" else [2])


def test_zeros_are_there_too(tmp_path: Path) -> None:
    found = Store.create(tmp_path, METADATA)
    found.write(1, *(np.zeros_like(part) for part in models(1)))()
    assert 1 in Store(tmp_path)
    assert not Store(tmp_path).read(1).any()


@pytest.mark.parametrize("name", store.ARRAYS)
def test_damage_is_named_and_can_be_repaired_alone(tmp_path: Path, name: str) -> None:
    found = filled(tmp_path)
    shard = next((tmp_path / name / "c" / "2").rglob("0" if name != "weights" else "0/0"))
    content = bytearray(shard.read_bytes())
    content[5] ^= 1
    shard.write_bytes(content)
    damaged = Store(tmp_path).damaged()
    assert list(damaged) == [2]
    assert str(shard) in damaged[2]
    assert "--regenerate 2" in damaged[2]
    found.discard(2)
    assert found.missing() == [1, 2]
    found.write(2, *models(2))()
    assert Store(tmp_path).damaged() == {}


def test_a_shard_that_was_cut_is_damaged(tmp_path: Path) -> None:
    filled(tmp_path)
    shard = tmp_path / "weights/c/0/0/0"
    shard.write_bytes(shard.read_bytes()[:-7])
    assert list(Store(tmp_path).damaged()) == [0]


def test_other_models_are_not_mixed_in(tmp_path: Path) -> None:
    filled(tmp_path)
    other = dataclasses.replace(METADATA, origin={"seed": 1, "training": {"lr": 0.2}})
    with pytest.raises(StoreError, match=r"other models: origin.training.lr \(0.1 against 0.2\)"):
        Store.create(tmp_path, other)
    assert Store(tmp_path).metadata == METADATA


def test_a_store_grows_and_never_shrinks(tmp_path: Path) -> None:
    filled(tmp_path)
    more = Store.create(tmp_path, dataclasses.replace(METADATA, seeds=5))
    assert more.missing() == [1, 3, 4]
    assert Store.create(tmp_path, dataclasses.replace(METADATA, seeds=1)).metadata.seeds == 5


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "[" * 100_000,
        '{"version": 2}',
        '{"version": 1, "layout": [["w", [-3]]], "sets": 1, "seeds": 1}',
        json.dumps(METADATA.plain() | {"seeds": 10**18}),
    ],
)
def test_damaged_metadata_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / store.METADATA).write_text(text)
    with pytest.raises(StoreError, match=r"shadows\.json is damaged"):
        Store(tmp_path)


def test_metadata_that_do_not_fit_the_arrays_are_noticed(tmp_path: Path) -> None:
    filled(tmp_path)
    told = json.loads((tmp_path / store.METADATA).read_text())
    (tmp_path / store.METADATA).write_text(json.dumps(told | {"sets": 10**6}))
    with pytest.raises(StoreError, match="no array of this store"):
        Store(tmp_path)


def test_no_store_is_made_by_looking(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"there is no shadows\.json"):
        Store(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()

"""Paths as people write them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jinv import files
from jinv.scores import lpips
from jinv.shadow import features, store


def test_paths_may_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.path("~/a/b.png") == tmp_path / "a" / "b.png"
    assert files.path(Path("~")) == tmp_path
    assert files.path("a/~/b") == Path("a/~/b")
    with pytest.raises(ValueError, match="cannot read the path ~nobody_of_this_name/a"):
        files.path("~nobody_of_this_name/a")


def test_readers_of_other_files_expand_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    given = features.Features(np.ones((2, 3), np.float32), np.zeros(2, np.int32), ("a",), None, "")
    given.save("~/features")
    assert (tmp_path / "features" / "features.json").exists()
    np.testing.assert_array_equal(features.load("~/features").features, given.features)
    with pytest.raises(FileNotFoundError, match=f"there is no {tmp_path}/vgg16"):
        lpips.load("~/vgg16-397923af.pth")
    with pytest.raises(store.StoreError, match=str(tmp_path)):
        store.Store("~/store")

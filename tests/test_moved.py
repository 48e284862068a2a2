"""Old names of modules: an import says what they are called now."""

from __future__ import annotations

import importlib

import pytest

from conftest import ROOT
from jinv import moved


@pytest.mark.parametrize("old", moved.MODULES)
def test_an_old_name_fails_with_the_new_one(old: str) -> None:
    new = moved.MODULES[old]
    package, _, name = old.rpartition(".")
    with pytest.raises(ImportError, match=f"{old} is now called {new}"):
        importlib.import_module(old)
    if name != "priors":  # is still one of `jinv`'s
        with pytest.raises(ImportError, match=f"{old} is now called {new}"):
            exec(f"from {package} import {name}")
    assert importlib.util.find_spec(new) is not None


def test_names_that_never_were_fail_as_usual() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'jinv\.nothing'"):
        importlib.import_module("jinv.nothing")


def test_the_page_of_the_layout_lists_them() -> None:
    page = (ROOT / "docs" / "layout.md").read_text()
    for old, new in moved.MODULES.items():
        assert f"| `{old}` | `{new}` |" in page

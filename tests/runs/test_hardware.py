"""The machine that a report names."""

from __future__ import annotations

import importlib.metadata

import pytest

from jinv.runs import hardware


def test_hardware_names_the_machine_and_the_software():
    found = hardware.describe()
    assert list(found) == [
        *("devices", "cpu", "cores", "memory", "os"),
        *("python", "jax", "jaxlib", "flax", "jinv"),
    ]
    assert all(isinstance(value, str) and value for value in found.values())
    assert int(found["cores"]) >= 1


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    hardware.check_installed()
    wanted = ["jax>=0.1", "nowhere-to_be.found>=3", "other[x]!=1", 'tfds>=1; extra == "tfds"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: wanted)
    with pytest.raises(ImportError) as caught:
        hardware.check_installed()
    assert str(caught.value) == (
        "jinv needs nowhere-to_be.found, other: pip install nowhere-to_be.found other"
    )

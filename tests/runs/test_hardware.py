"""The machine that a report names."""

from __future__ import annotations

from jinv.runs import hardware


def test_hardware_names_the_machine_and_the_software():
    found = hardware.describe()
    assert list(found) == [
        *("devices", "cpu", "cores", "memory", "os"),
        *("python", "jax", "jaxlib", "flax", "jinv"),
    ]
    assert all(isinstance(value, str) and value for value in found.values())
    assert int(found["cores"]) >= 1

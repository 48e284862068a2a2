"""What a run ran on."""

from __future__ import annotations

import collections
import importlib.metadata
import os
import platform
import re
from pathlib import Path

import jax
from jax.sharding import Mesh

VERSIONS = ("python", "jax", "jaxlib", "flax", "jinv")


def of_mesh(mesh: Mesh) -> str:
    """Return number and kind of a mesh's devices: "4 x NVIDIA H100"."""
    return f"{mesh.size} x {mesh.devices.flat[0].device_kind}"


def versions() -> dict[str, str]:
    """Return the versions that a summary names."""
    python = {"python": platform.python_version()}
    return python | {name: _version(name) for name in VERSIONS[1:]}


def describe() -> dict[str, str]:
    """Return what a run ran on: devices, processor, memory, system, versions of software."""
    kinds = collections.Counter(device.device_kind for device in jax.devices())
    return {
        "devices": ", ".join(f"{count} x {kind}" for kind, count in kinds.items()),
        "cpu": _cpu(),
        "cores": str(_cores()),
        "memory": _memory(),
        "os": platform.platform(),
        **versions(),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, "") or platform.processor() or platform.machine() or "unknown"


def _cores() -> int:
    """Cores this process may use, where the system says; else those there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    except (AttributeError, ValueError, OSError):
        return "unknown"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def check_installed() -> None:
    """Raise ImportError if a package is missing that some part of a run needs, perhaps its end."""
    try:
        requirements = importlib.metadata.requires("jinv") or []
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return
    missing = []
    for requirement in requirements:
        name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
        if "extra ==" not in requirement and not any(importlib.metadata.distributions(name=name)):
            missing.append(name)
    if missing:
        raise ImportError(f"jinv needs {', '.join(missing)}: pip install {' '.join(missing)}")

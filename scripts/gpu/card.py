"""The card, and how fast it copies and multiplies: what all other times stand beside."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import jax

from benchmarks import timing
from gpu.part import Given

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "torch")


def run(given: Given) -> None:
    """One row."""
    known = {each.name for each in importlib.metadata.distributions()}
    found = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES if name in known]
    mebibytes, side = (1, 128) if given.tiny else (2048, 8192)
    given.emit(
        device=jax.devices()[0].device_kind,
        cores=os.cpu_count(),
        versions=[f"python {platform.python_version()}", *found],
        xla_flags=os.environ.get("XLA_FLAGS", ""),
        copy_bytes_per_s=timing.copy_rate(mebibytes),
        bfloat16_flops_per_s=timing.product_rate("bfloat16", side),
        float32_flops_per_s=timing.product_rate("float32", side),
    )

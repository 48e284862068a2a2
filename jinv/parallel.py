"""Devices: one mesh axis over the batch; everything else on every device.

Under `jit` with these shardings a mean over the batch is the mean over the *global* batch, so
BatchNorm moments and losses are those of one device.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

BATCH = "batch"


def batch_mesh(batch: int, devices: int | None = None) -> Mesh:
    """A mesh of the first `devices` local devices (all by default) that share a batch evenly."""
    available = jax.local_devices()
    count = len(available) if devices is None else devices
    if not 1 <= count <= len(available):
        raise ValueError(f"{count} devices asked for; there are {len(available)} here")
    if batch % count:
        fitting = max(n for n in range(1, count + 1) if batch % n == 0)
        raise ValueError(
            f"a batch of {batch} images cannot be shared evenly by {count} devices: use a "
            f"multiple of {count} images, or {fitting} device{'s' if fitting > 1 else ''}"
        )
    return jax.make_mesh((count,), (BATCH,), axis_types=(AxisType.Auto,), devices=available[:count])


def shard(mesh: Mesh, batch: Array) -> Array:
    """Spread axis 0 over the mesh."""
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec(BATCH)))


def replicate(mesh: Mesh, tree: Any) -> Any:
    """A copy of every array on every device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def enable_compilation_cache() -> None:
    """Keep compiled programs for later processes.

    In JAX_COMPILATION_CACHE_DIR, else the user's cache folder.
    """
    if not jax.config.values["jax_compilation_cache_dir"]:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(base / "jinv" / "compiled"))

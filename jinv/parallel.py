"""Devices and hosts: where arrays lie, and what all processes must agree on.

Programs are jit-compiled over a mesh of all devices of all processes. Under `jit` a mean over a
batch that is sharded over the mesh is the mean over the *global* batch, so BatchNorm moments and
losses are those of one device.

Several processes (hosts) run the same program on the same arguments; only the main one writes.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

T = TypeVar("T")

BATCH = "batch"

_OPEN_MPI_4 = "OMPI_MCA_orte_hnp_uri"  # where process 0 is; version 5 does not say
_MESSAGE_BYTES = 2000


def launcher(environment: Mapping[str, str] = os.environ) -> str | None:
    """What started this process as one of several: SLURM, Open MPI, Kubernetes, or nothing."""
    if "SLURM_STEP_NODELIST" in environment and int(environment.get("SLURM_NTASKS", 1)) > 1:
        return "SLURM"
    if int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return "Open MPI"
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return "Kubernetes"
    return None


def start(
    coordinator: str | None = None, processes: int | None = None, process_id: int | None = None
) -> None:
    """Join the other processes of the run, if there are any; call it before JAX computes.

    Args:
      coordinator: "HOST:PORT" of process 0. Without it the environment is asked: SLURM (`srun`),
        Open MPI (`mpirun`; from version 5 on it needs mpi4py), Kubernetes (an indexed job; needs
        `pip install 'jax[k8s]'`).
      processes: how many there are.
      process_id: which one this is, from 0.

    Raises:
      ValueError: some of the three are given, but not all; or the others did not come.
    """
    found, method = None, None
    if coordinator is None and processes is None and process_id is None:
        found = launcher()
        if found is None:
            return
        if found == "Open MPI" and _OPEN_MPI_4 not in os.environ:
            method = "mpi4py"
    elif coordinator is None or processes is None or process_id is None:
        raise ValueError("coordinator, processes and process_id go together: give all or none")
    elif not 0 <= process_id < processes:
        raise ValueError(f"process_id must be 0 to {processes - 1}, not {process_id}")
    elif not coordinator.rpartition(":")[2].isdigit():
        raise ValueError(f"coordinator must be HOST:PORT, not {coordinator!r}")
    try:
        jax.distributed.initialize(
            coordinator, processes, process_id, cluster_detection_method=method
        )
    except Exception as error:  # each launcher's own kind
        advice = f" (found {found}; flags say it without a launcher's help)" if found else ""
        raise ValueError(f"cannot join the other processes: {error}{advice}") from None


def is_main() -> bool:
    """Whether this is the process that writes and prints."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Print a line once, however many processes there are."""
    if is_main():
        print(text, flush=True)


def any_process(flag: bool) -> bool:
    """Whether any process says so; all must ask at the same point of the program."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def first_failure(message: str | None) -> str | None:
    """The first process's complaint, if any has one; all must ask at the same point."""
    if jax.process_count() == 1:
        return message
    text = np.zeros(_MESSAGE_BYTES, np.uint8)
    own = np.frombuffer((message or "").encode()[:_MESSAGE_BYTES], np.uint8)
    text[: len(own)] = own
    for i, other in enumerate(multihost_utils.process_allgather(text)):
        said = bytes(other).rstrip(b"\0").decode(errors="replace")
        if said:
            return message if i == jax.process_index() else f"process {i}: {said}"
    return None


def on_main(function: Callable[[], None], error: type[Exception]) -> None:
    """Call it in the main process; if it fails, the others raise `error` instead of waiting.

    It may write and compute alone, not over a mesh of all: that would wait for the others.
    """
    if jax.process_count() == 1:
        return function()
    failure: Exception | None = None
    if is_main():
        try:
            function()
        except Exception as caught:
            failure = caught
    message = first_failure(None if failure is None else str(failure) or repr(failure))
    if failure is not None:
        raise failure
    if message is not None:
        raise error(message.removeprefix("process 0: "))


def everywhere(make: Callable[[], T]) -> T:
    """What `make` returns, in every process or in none.

    Raises:
      ValueError: the mistake, in every process if one process has it.
    """
    message, made = None, None
    try:
        made = make()
    except (ValueError, OSError, ImportError, jax.errors.JaxRuntimeError) as error:
        message = str(error)
    message = first_failure(message)
    if made is None or message is not None:
        raise ValueError(message)
    return made


def devices(count: int | None = None) -> list[jax.Device]:
    """Return the devices of all processes, or the first `count`; within `only`, its one.

    Raises:
      ValueError: there are not so many, or several processes would leave some out.
    """
    alone = _ALONE.get()
    if alone is not None and count in (None, 1):
        return [alone]
    available = jax.devices()
    if count is not None and jax.process_count() > 1 and count != len(available):
        raise ValueError(f"several processes use all their {len(available)} devices, not {count}")
    return _first(available, count)


def local_devices(count: int | None = None) -> list[jax.Device]:
    """Return this process's devices, or the first `count`.

    Raises:
      ValueError: there are not so many.
    """
    return _first(jax.local_devices(), count)


def _first(available: list[jax.Device], count: int | None) -> list[jax.Device]:
    if count is not None and not 1 <= count <= len(available):
        raise ValueError(f"{count} devices asked for; there are {len(available)} here")
    return available[:count]


_ALONE: contextvars.ContextVar[jax.Device | None] = contextvars.ContextVar("alone", default=None)


@contextlib.contextmanager
def only(device: jax.Device) -> Iterator[None]:
    """Within, in this thread, everything goes to one device of this process."""
    token = _ALONE.set(device)
    try:
        with jax.default_device(device):
            yield
    finally:
        _ALONE.reset(token)


def check_all_take_part(devices: Sequence[jax.Device]) -> None:
    """Raise ValueError if a process would have none of these devices."""
    if _ALONE.get() is not None:
        return
    busy = {device.process_index for device in devices}
    if len(busy) < jax.process_count():
        raise ValueError(
            f"only {len(devices)} devices can share this work, which leaves processes with none: "
            f"{jax.process_count()} processes are too many for it"
        )


def mesh(axes: str | Mapping[str, int], devices: Sequence[jax.Device]) -> Mesh:
    """One axis over these devices, or several of the given lengths."""
    lengths = {axes: len(devices)} if isinstance(axes, str) else axes
    return jax.make_mesh(
        tuple(lengths.values()),
        tuple(lengths),
        axis_types=(AxisType.Auto,) * len(lengths),
        devices=list(devices),
    )


def put(mesh: Mesh, spec: PartitionSpec, tree: Any) -> Any:
    """Arrays that every process holds whole, laid over the devices of a mesh."""
    sharding = NamedSharding(mesh, spec)

    def place(array: Any) -> Array:
        if sharding.is_fully_addressable:
            return jax.device_put(array, sharding)
        whole = np.asarray(array)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(place, tree)


def fetch(tree: Any) -> Any:
    """Whole arrays, wherever their parts lie; all processes must ask at the same point."""
    return jax.tree.map(_fetched, tree)


def _fetched(array: Array) -> np.ndarray:
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return np.asarray(array)
    if array.is_fully_replicated:
        return np.asarray(array.addressable_data(0))
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def enable_compilation_cache() -> None:
    """Keep compiled programs for later processes.

    In JAX_COMPILATION_CACHE_DIR, else the user's cache folder.
    """
    if not jax.config.values["jax_compilation_cache_dir"]:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(base / "jinv" / "compiled"))

"""Runs in processes of their own, side by side; none outlives the process that began it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

_COUNT = "import jax; print(jax.default_backend(), jax.local_device_count())"
_RUN = """\
import sys
from jinv.runs import processes
processes.end_with_parent()
from jinv.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
_VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
"""Variables that narrow the GPUs of a process down; AMD's software heeds both."""
_STDIN = 0


def has_gpus() -> bool:
    """Whether the system has GPUs that JAX may be able to use."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists()


def devices() -> tuple[str, int]:
    """Return JAX's backend and the number of its devices.

    A process of its own counts them: one that has seen a GPU keeps its memory.

    Raises:
      ValueError: JAX does not start.
    """
    found = subprocess.run([sys.executable, "-c", _COUNT], capture_output=True, text=True)
    if found.returncode:
        last = found.stderr.strip().splitlines()[-1:]
        raise ValueError(f"JAX finds no devices: {''.join(last)}")
    backend, count = found.stdout.split()[-2:]
    return backend, int(count)


def on_gpu(number: int) -> dict[str, str]:
    """Return the variables of the environment that leave a process one GPU of those there are."""
    name = next((name for name in _VISIBLE if os.environ.get(name)), _VISIBLE[0])
    visible = os.environ.get(name, "")
    return {name: visible.split(",")[number] if visible else str(number)}


def start(arguments: Sequence[str], log: Path, environment: dict[str, str]) -> subprocess.Popen:
    """Start `jinv ARGUMENTS`; a signal of the terminal does not reach it.

    Args:
      arguments: name of the command, and its flags.
      log: file for what it prints.
      environment: variables that are different from those here.
    """
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-c", _RUN, *arguments],
            stdin=subprocess.PIPE,  # it ends when this process does
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | environment,
            start_new_session=True,
        )


def stop(running: Sequence[subprocess.Popen]) -> None:
    """Send SIGTERM to processes, and wait for their checkpoints."""
    for process in running:
        process.terminate()
    try:
        for process in running:
            process.wait()
    finally:  # a second Ctrl-C ends the waiting
        for process in running:
            process.kill()


def ended(process: subprocess.Popen) -> bool:
    """Whether a process has ended; its `returncode` says how."""
    if process.poll() is None:
        return False
    if process.stdin is not None:
        process.stdin.close()
    return True


def end_with_parent() -> None:
    """Let SIGTERM come to this process, which `start` began, when its parent ends in any way."""

    def wait() -> None:
        os.read(_STDIN, 1)  # nothing is ever written
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def complaint(log: Path) -> str:
    """Return the last error that a command has printed; "" if it printed none."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    found = [line for line in lines if line.startswith("error: ")]
    return found[-1].removeprefix("error: ") if found else ""

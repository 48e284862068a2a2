"""What all tests share: backend, compilation cache, torch beside JAX, the `slow` marker."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if os.environ["JAX_PLATFORMS"] == "cpu":
    # Compiling takes most of the tests' time. Unoptimised programs give the same numbers.
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax  # reads JAX_PLATFORMS when it is imported

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache" / "jax"

jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
if os.environ["JAX_PLATFORMS"] != "cpu":
    # Accelerators multiply float32 in fewer bits unless told otherwise: useless against references.
    jax.config.update("jax_default_matmul_precision", "highest")

if importlib.util.find_spec("torch"):
    import torch

    torch.set_num_threads(1)  # two would wait for those of the other worker
    if torch.version.cuda is None and importlib.util.find_spec("torchvision"):
        # torchvision's compiled operators do not load beside a CPU-only torch, and it will not be
        # imported unless these two exist. Its classifiers use neither. Keep the reference alive.
        _operators = torch.library.Library("torchvision", "DEF")
        for _name in ("nms", "qnms"):
            _operators.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: pass --slow"))


RunPython = Callable[..., Any]


@pytest.fixture(scope="session")
def run_python() -> RunPython:
    """`run_python(code, devices=4)`: what `code` prints last, as JSON, on simulated CPU devices."""

    def run(code: str, devices: int = 4, timeout: float = 600) -> Any:
        settings = {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "JAX_COMPILATION_CACHE_DIR": str(CACHE),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, **settings},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr[-4000:]}"
        return json.loads(done.stdout.splitlines()[-1])

    return run

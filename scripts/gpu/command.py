"""`jinv invert` as a user starts it, beside the same steps alone."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import yaml

from benchmarks import timing
from gpu import steps
from gpu.part import Given
from jinv.models import registry
from jinv.recipes import invert
from jinv.runs import config as configs

ROOT = Path(__file__).resolve().parents[2]


def run(given: Given) -> None:
    """One row."""
    given.emit(**measure("gpu.cases:tiny" if given.tiny else "mobilenet_v2", given))


def settings(network: str, tiny: bool) -> dict[str, Any]:
    """The published settings with fewer steps."""
    weights = {} if tiny else {"weights": weights_of(network)}
    lengths = (20, 10) if tiny else (400, 200)
    return {
        "networks": [{"model": network, **weights}],
        "images": 2 if tiny else 84,
        "labels": "random" if tiny else "hand-picked",
        "size": 16 if tiny else 224,
        "attack": {
            "phases": [
                {"steps": lengths[0], "downscale": 2, "jitter": 4 if tiny else 15},
                {"steps": lengths[1], "jitter": 4 if tiny else 30},
            ],
        },
    }


def weights_of(network: str) -> str:
    """Real ones if they are installed."""
    try:
        registry.packaged_weights(network)
    except (ValueError, ImportError, OSError):
        return "random"
    return "package"


def measure(network: str, given: Given) -> dict[str, Any]:
    """Run the command, then time its phases' steps without it."""
    config = settings(network, given.tiny)
    name = network.rpartition(":")[2]
    file, folder = given.out / f"command_{name}.yaml", given.out / f"command_{name}"
    file.write_text(yaml.safe_dump(config))
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "jinv", "invert", "--config", file, "--out", folder, "--overwrite"],
        cwd=ROOT,
        check=True,
    )
    seconds = time.perf_counter() - start
    summary = json.loads((folder / "summary.json").read_text())
    attack = invert.Inversion(configs.build(invert.Config, configs.read_yaml(file))).attack
    alone = 0.0
    for i, phase in enumerate(attack.phases):
        one = timing.Steps.of(attack, attack.initial(jax.random.key(0)), phase=i)
        alone += phase.steps * steps.timed({"": one}, 1)[""].ms / 1e3
    stepping = summary["seconds_per_step"] * summary["steps"]
    return {
        "case": f"{name} {config['images']}x{config['size']}",
        "weights": config["networks"][0].get("weights", "its own"),
        "steps": summary["steps"],
        "seconds": seconds,
        "run_s": summary["seconds"],
        "compile_s": summary["compile_seconds"],
        "stepping_s": stepping,
        "steps_alone_s": alone,
        "stepping_ratio": stepping / alone,
        "run_ratio": (summary["seconds"] - summary["compile_seconds"]) / alone,
    }

"""The network that the pretrain command leaves in a folder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from jinv import files
from jinv.image import Preprocessing
from jinv.models import registry
from jinv.net import Net

WEIGHTS, CLASSES = "weights.safetensors", registry.CLASSES
SUMMARY = "summary.json"


def load_trained(folder: str | Path) -> Net:
    """Return the network that a finished run left in its folder, with its preprocessing.

    Raises:
      ValueError: the folder holds no finished run.
    """
    folder = files.path(folder)
    try:
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        told: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in summary["preprocessing"].items()
        }
        net = registry.load(
            summary["model"],
            folder / WEIGHTS,
            classes=len(summary["classes"]),
            preprocessing=Preprocessing(**told),
        )
        return dataclasses.replace(net, class_names=tuple(summary["classes"]))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{folder} holds no trained network: {error}") from None

"""The network that the pretrain command leaves in a folder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from jinv import files
from jinv.image import Preprocessing
from jinv.models import registry
from jinv.models.subnetwork import Subnetwork
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
            subnetwork=_subnetwork(summary),
            compare_kept=False,  # it was trained so
        )
        return dataclasses.replace(net, class_names=tuple(summary["classes"]))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{folder} holds no trained network: {error}") from None


def kept(folder: Path) -> float | None:
    """Return the share of the weights that stays in the subnetwork in a folder; None without one.

    Raises:
      ValueError, OSError, TypeError, KeyError, AttributeError: there is no summary of a training.
    """
    found = _subnetwork(json.loads((folder / SUMMARY).read_text(encoding="utf-8")))
    return None if found is None else found.kept


def _subnetwork(summary: dict[str, Any]) -> Subnetwork | None:
    told = summary.get("subnetwork")
    return None if told is None else Subnetwork(**told)

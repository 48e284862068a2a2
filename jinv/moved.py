"""Modules that once lay elsewhere: importing one by its old name says where it is now."""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Sequence
from types import ModuleType

MODULES = {
    "jinv.attacks.ensemble": "jinv.attacks.begin",
    "jinv.attacks.labels": "jinv.federated.labels",
    "jinv.attacks.registration": "jinv.federated.registration",
    "jinv.command": "jinv.runs.command_line",
    "jinv.comparison": "jinv.reports.inversion",
    "jinv.config": "jinv.runs.config",
    "jinv.curves": "jinv.reports.curves",
    "jinv.defences": "jinv.federated.defences",
    "jinv.evidence": "jinv.federated.evidence",
    "jinv.extraction": "jinv.recipes.extract_features",
    "jinv.hardware": "jinv.runs.hardware",
    "jinv.inversion": "jinv.recipes.invert",
    "jinv.joint": "jinv.objective.ensemble",
    "jinv.leakage": "jinv.recipes.invert_gradients",
    "jinv.lpips": "jinv.scores.lpips",
    "jinv.matching": "jinv.objective.gradient_matching",
    "jinv.metrics": "jinv.scores.judging",
    "jinv.microbatch": "jinv.objective.microbatch",
    "jinv.models.mobilenet": "jinv.models.mobilenet_v2",
    "jinv.pretraining": "jinv.recipes.pretrain",
    "jinv.priors": "jinv.objective.priors",
    "jinv.progress": "jinv.runs.progress",
    "jinv.recipes.convert_weights": "jinv.recipes.convert",
    "jinv.report": "jinv.reports.page",
    "jinv.session": "jinv.runs.run_folder",
    "jinv.shadow.production": "jinv.recipes.train_shadow_models",
    "jinv.similarity": "jinv.scores.similarity",
    "jinv.study": "jinv.runs.study",
    "jinv.sweep": "jinv.reports.gradients",
}
"""Old name -> new name."""


class _Finder(importlib.abc.MetaPathFinder):
    """Asked last, so only for modules that nobody else has found."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> None:
        del path, target
        if fullname in MODULES:
            # Without its `name`, or `from jinv import ...` would pass over it.
            raise ModuleNotFoundError(f"{fullname} is now called {MODULES[fullname]}")


def announce() -> None:
    """Let imports by old names fail with the new one."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())

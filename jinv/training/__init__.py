"""Supervised training: what a step sees, what it changes, and the run."""

from jinv.training.statistics import with_moments, with_statistics
from jinv.training.supervised import (
    Config,
    Criterion,
    Examples,
    Learns,
    State,
    Step,
    abstract_state,
    batch_mesh,
    batches,
    init,
    keys,
    learned,
    make_accuracy,
    make_optimizer,
    make_step,
    run,
)
from jinv.training.views import View, Views, augment, make_view, normalised, shown

__all__ = [
    "Config",
    "Criterion",
    "Examples",
    "Learns",
    "State",
    "Step",
    "View",
    "Views",
    "abstract_state",
    "augment",
    "batch_mesh",
    "batches",
    "init",
    "keys",
    "learned",
    "make_accuracy",
    "make_optimizer",
    "make_step",
    "make_view",
    "normalised",
    "run",
    "shown",
    "with_moments",
    "with_statistics",
]

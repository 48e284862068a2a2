"""The commands, one file each: config -> loaded -> run -> files and summary."""

from __future__ import annotations

import importlib
import importlib.metadata

from jinv.runs.command import Command

RECIPES = (
    "invert",
    "invert-gradients",
    "synthesise",
    "relabel",
    "train-student",
    "distill",
    "pretrain",
    "extract-features",
    "train-shadow-models",
    "train-reconstructor",
    "attack-heads",
    "reconstruct",
    "classify",
    "evaluate",
    "search",
)
"""Names of the commands that run recipes; each is the `COMMAND` of a file here."""

ENTRY_POINTS = "jinv.commands"
"""Group in which installed packages name commands: `name = "package.module:COMMAND"`."""


def find(name: str) -> Command | None:
    """Return the command of this name, ours or one that an installed package brings; or None."""
    name = name.replace("_", "-")
    if name in RECIPES:
        return importlib.import_module(f"jinv.recipes.{name.replace('-', '_')}").COMMAND
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS, name=name):
        return point.load()
    return None


def names() -> tuple[str, ...]:
    """Return the names of all commands that run recipes."""
    others = importlib.metadata.entry_points(group=ENTRY_POINTS)
    return (*RECIPES, *sorted(point.name for point in others))

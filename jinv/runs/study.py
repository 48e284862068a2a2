"""Several runs that belong together: variants of a recipe, trials with other seeds.

A study is a recipe with `variants` (name -> the keys that are different) or `trials`. Every run
has a folder of its own below the study's, with everything that a single run leaves there; a page
above them compares their summaries.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinv import parallel
from jinv.reports import page
from jinv.runs import config as configs
from jinv.runs.command import Command, Loaded
from jinv.runs.run_folder import CHECKPOINTS, FolderError, RunFolder
from jinv.runs.signals import Interrupted


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a study.

    Attributes:
      variant: name of its variant, "" without variants.
      folder: its folder below the study's, "" for a single run.
      config: its config.
    """

    variant: str
    folder: str
    config: Any

    @property
    def title(self) -> str:
        """Its name in the study's page."""
        return " ".join(filter(None, (title(self.variant), *self.folder.split("/")[1:])))


def take_variants(tree: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Take the variants out of a config file's tree; return name -> the keys that are different.

    Raises:
      ConfigError: they are something else.
    """
    variants = tree.pop("variants", None) or {}
    if not isinstance(variants, dict) or not all(isinstance(v, dict) for v in variants.values()):
        raise configs.ConfigError("variants must map names to the keys that are different")
    return {str(name): changes for name, changes in variants.items()}


def runs(
    command: Command, config: Any, variants: Mapping[str, Mapping[str, Any]] = {}
) -> list[Run]:
    """Return all runs of a config, variant by variant; a single one is in the folder "".

    Args:
      command: of the runs.
      config: what they share; it has `seed` and `trials` if the command has studies.
      variants: name -> a tree of keys to replace; mappings are merged, lists replaced.

    Raises:
      ConfigError: a variant that makes no config, or no folder.
    """
    if command.compare is None:
        if variants:
            raise configs.ConfigError(f"`jinv {command.name}` has no variants")
        return [Run("", "", config)]
    found = []
    for name, changes in variants.items() or [("", {})]:
        changed = _changed(command, config, name, changes)
        slug = re.sub(r"[^\w.+-]+", "-", name).strip("-.")
        taken = {f.rstrip("/") for f in (CHECKPOINTS, *command.files)}
        if (name and not slug) or slug in taken:
            raise configs.ConfigError(f"variant {name!r} cannot name a folder: use other letters")
        for trial in range(changed.trials):
            folder = "/".join(filter(None, (slug, f"trial_{trial}" if changed.trials > 1 else "")))
            seeded = dataclasses.replace(changed, seed=changed.seed + trial, trials=1)
            found.append(Run(name, folder, seeded))
    folders = [run.folder for run in found]
    if len(set(folders)) < len(folders):
        raise configs.ConfigError(f"variants need different names: {list(variants)}")
    return found


def _changed(command: Command, config: Any, name: str, changes: Mapping[str, Any]) -> Any:
    base = configs.plain(config)
    if "preset" in (changes.get("attack") or {}):
        base.pop("attack")  # the preset takes the place of all its keys
    try:
        return command.recipe_from(_merged(base, changes))
    except ValueError as error:
        raise configs.ConfigError(f"variant {name!r}: {error}") from None


_LEAVES = ("optimizer_args",)  # of one optimizer; another takes others


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping) and key not in _LEAVES
        merged[key] = _merged(old, value) if both else value  # type: ignore[arg-type]
    return merged


def load(command: Command, chosen: Sequence[Run]) -> list[Loaded]:
    """Return all runs, loaded: a mistake in any of them stops all.

    Trials of a variant share what their seeds do not decide.

    Raises:
      ValueError: the mistake, in every process if one process has it.
    """
    first: dict[str, Loaded] = {}

    def one(run: Run) -> Loaded:
        if run.variant in first:
            return first[run.variant].with_seed(run.config.seed)
        return first.setdefault(run.variant, command.load(run.config))

    return [parallel.everywhere(lambda: one(run)) for run in chosen]  # noqa: B023


def execute(
    command: Command,
    chosen: Sequence[Run],
    loaded: list[Loaded],
    whole: RunFolder,
    **how: Any,
) -> None:
    """Run what is not finished, then write the study's page and summary.

    Args:
      command: of the runs.
      chosen: the runs.
      loaded: the same, loaded; each is dropped once it is done.
      whole: the study's own folder.
      **how: `resume` or `overwrite`, for all folders.

    Raises:
      Interrupted, NonFiniteError: in the run that was going; finished ones are kept.
    """
    # All at once, so that overwriting leaves no old run for a later --resume to take for new.
    folders = [command.folder(whole.path / run.folder, run.config, **how) for run in chosen]
    for run, own in zip(chosen, folders, strict=True):
        trial = loaded.pop(0)
        parallel.say(f"{run.folder}{': finished already' if own.finished else ''}")
        if not own.finished:
            trial.run(own)
        if own.interrupted:
            raise Interrupted(
                f"{whole.path}: stopped after {run.folder}; go on with --resume", own.interrupted
            )
    assert command.compare is not None
    compare = command.compare
    summaries = [own.read_summary() for own in folders] if parallel.is_main() else []
    parallel.on_main(lambda: compare(chosen, summaries, whole), FolderError)


def finish(
    whole: RunFolder,
    chosen: Sequence[Run],
    summaries: Sequence[dict[str, Any]],
    told: page.Page,
    found: Mapping[str, Any],
) -> None:
    """Write a study's page, with the config at its end, and its summary.

    Args:
      whole: the study's folder.
      chosen: the runs.
      summaries: theirs.
      told: the page.
      found: keys of the summary besides `runs` and `seconds`.
    """
    config = (whole.path / "config.yaml").read_text()
    ending = page.Section("Config", page.Text(config))
    told.write(whole.path / "report.html", [ending])
    whole.finish(
        {
            "runs": {run.folder: s for run, s in zip(chosen, summaries, strict=True)},
            **found,
            "seconds": round(sum(s["seconds"] for s in summaries), 3),
        }
    )


def title(variant: str) -> str:
    """Return a variant's name in tables."""
    return variant or "trials"

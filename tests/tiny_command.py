"""A command without networks, whose runs take no time: what searches are tested with."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from jinv import checks, optimise
from jinv.runs import command
from jinv.runs.run_folder import RunFolder
from jinv.runs.signals import Interrupted

NAME = "tiny-command"
LOADED: list[Config] = []
"""Configs that this process has loaded."""


@dataclasses.dataclass(frozen=True)
class Inner:
    """What happens.

    Attributes:
      fails: how runs with x = 3 end.
      once: a file; where it is, nothing happens any more.
    """

    fails: Literal["", "nan", "memory", "kill", "stop", "crash"] = ""
    once: str | None = None


@dataclasses.dataclass(frozen=True)
class Config:
    """A config.

    Attributes:
      x, y: of the score.
      inner: what happens.
      missing: a file that is read.
      seed, trials: of studies.
    """

    x: Annotated[float, checks.Range(0, 10)]
    y: Annotated[int, checks.Range()] = 0
    inner: Inner = dataclasses.field(default_factory=Inner)
    missing: str | None = None
    seed: checks.Seed = 0
    trials: checks.Count = 1

    def __post_init__(self) -> None:
        checks.fields(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary(command.Summary):
    """What summary.json holds.

    Attributes:
      score: name -> (x - 3)^2 + y + seed; null for y = 7.
    """

    score: dict[str, float | None]


class Run(command.Loaded):
    """A config with its file read."""

    def __init__(self, config: Config) -> None:
        LOADED.append(config)
        if config.missing is not None:
            Path(config.missing).read_bytes()
        self.config = config

    def with_seed(self, seed: int) -> Self:
        other = type(self).__new__(type(self))
        other.config = dataclasses.replace(self.config, seed=seed)
        return other

    def run(self, folder: RunFolder) -> dict[str, Any]:
        config = self.config
        once = config.inner.once
        if config.x == 3 and config.inner.fails and not (once and Path(once).exists()):
            if once:
                Path(once).touch()
            fail(config.inner.fails, folder)
        score = (config.x - 3) ** 2 + config.y + config.seed
        told = Summary(
            **command.shared(folder, "1 x nothing"),
            score={"a.b": None if config.y == 7 else score},
        )
        return command.finish(folder, told)


def fail(how: str, folder: RunFolder) -> None:
    if how == "nan":
        raise optimise.NonFiniteError("loss", 3)
    if how == "memory":
        raise MemoryError("16 TB.")
    if how == "stop":
        raise Interrupted(f"{folder.path}: stopped", signal.SIGTERM)
    if how == "crash":
        raise SystemExit(9)
    os.kill(os.getpid(), signal.SIGKILL)


def compare(chosen: Any, summaries: list[dict[str, Any]], whole: RunFolder) -> None:
    mean = sum(s["score"]["a.b"] for s in summaries) / len(summaries)
    runs = {run.folder: s for run, s in zip(chosen, summaries, strict=True)}
    whole.finish({"runs": runs, "mean": mean, "seconds": 1.0})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """What the summary.json of a study holds.

    Attributes:
      runs, mean, seconds: of all runs.
    """

    runs: dict[str, Any]
    mean: float
    seconds: float


COMMAND = command.Command(NAME, str(__doc__), Config, Run, Summary, compare=compare, study=Study)


def install(site: Path) -> None:
    """Make a folder of packages in which `jinv` finds the command."""
    info = site / "tiny_command-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-command\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[jinv.commands]\n{NAME} = tiny_command:COMMAND\n")

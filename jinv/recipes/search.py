"""Search for the best values of any keys of any recipe: a grid, or Optuna.

    jinv search --config search_deepinversion --out out/search
    jinv search --config search_deepinversion --out out/search --resume
    jinv invert --config out/search/best.yaml --out out/best

Every trial is a run of `command` with the recipe `base` and other values of the keys of `grid` (all
combinations) or `space` (as Optuna suggests them; pip install optuna), in trials/NNN with all that
such a run leaves. The key `score` of its summary.json is what counts. Whatever the keys of the base
are, --base.KEY VALUE replaces one for all trials.

With several GPUs, each trial has one of its own, in a process of its own that prints to
trials/NNN.log; `parallel` says how many run at once. Elsewhere one runs after the other.

--resume goes on where the search was stopped or killed: finished trials stay, unfinished ones go on
from their last checkpoints. A trial whose loss is not finite counts as failed. So does one with a
mistake in its config, or without enough memory; --resume tries these again.

The output folder holds search.csv (a line a trial), report.html, best.yaml (the whole recipe of the
best trial) and, last of all, summary.json; the first three after every trial.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from subprocess import Popen
from typing import Annotated, Any, Literal

import jax

from jinv import checks, parallel, recipes
from jinv.checks import Count, Seed, Some, Word
from jinv.files import csv_text, write_atomic
from jinv.reports import page
from jinv.reports import search as report
from jinv.runs import command, command_line, hardware, lock, points, processes, study
from jinv.runs import config as configs
from jinv.runs.run_folder import CONFIG, SUMMARY, FolderError, RunFolder
from jinv.runs.signals import Interrupted, Signals

TABLE, BEST, TRIALS = "search.csv", "best.yaml", "trials/"
_DRAWS = 20
"""Random points of a space that are looked at before the first trial."""
_SHOWN = 3
"""Mistakes that a message tells."""
_LOOK = 0.2
"""Seconds between looks at the processes."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What a config file holds.

    Attributes:
      command: of the trials, such as "invert".
      base: the recipe that all trials share, as keys, or as the name of a file or of a recipe; with
        `trials` or `variants` of its own, each trial is a study.
      score: dotted key of the summary.json of a trial: a number, such as `top1.mobilenet_v2`.
      goal: whether the score shall be large or small, "max" or "min".
      grid: dotted key of the recipe -> list of values; all combinations are tried. A number stands
        for an entry of a list: `networks.0.weights`.
      space: dotted key -> list of values, or {low, high, log, step}: what Optuna chooses from.
      trials: how many points of the space are tried; more of a finished search go on with it.
      seed: of Optuna's choices.
      parallel: trials at once; one on each GPU by default, and one elsewhere. With 1 a trial has
        all devices.
    """

    command: Annotated[str, Word(recipes.names)]
    base: str | dict[str, Any]
    score: str
    goal: Literal["max", "min"] = "max"
    grid: dict[str, Annotated[tuple[Any, ...], Some()]] = dataclasses.field(default_factory=dict)
    space: dict[str, points.Choice] = dataclasses.field(default_factory=dict)
    trials: Count | None = None
    seed: Seed = 0
    parallel: Count | None = None

    def __post_init__(self) -> None:
        checks.fields(self)
        if self.command == COMMAND.name:
            raise checks.FieldError("command", ": a trial is a run of another command")
        if bool(self.grid) == bool(self.space):
            raise ValueError("give the keys that are searched either as grid or as space")
        if self.grid:
            checks.unused(self, "a grid is tried as a whole", "trials", "seed")
        elif self.trials is None:
            raise checks.FieldError("trials", " is missing: how many points of the space to try")
        if isinstance(self.base, str):  # the file may be another one when the search is resumed
            object.__setattr__(self, "base", configs.read_yaml(configs.find(self.base)))


Status = Literal["waiting", "done", "not finite", "failed"]


@dataclasses.dataclass
class Trial:
    """A point and what came of it.

    Attributes:
      number: from 0.
      values: dotted key -> value.
      status: "failed" trials are tried again on resuming, those "not finite" are not.
      score: None if the trial is not done.
      seconds: the same.
      reason: why it failed.
      begun: whether this process has begun it.
    """

    number: int
    values: dict[str, Any]
    status: Status = "waiting"
    score: float | None = None
    seconds: float | None = None
    reason: str = ""
    begun: bool = False

    @property
    def folder(self) -> str:
        """Its folder below the search's."""
        return f"{TRIALS}{self.number:03d}"

    def told(self) -> dict[str, Any]:
        """Return what the summary says of it."""
        names = ("values", "status", "score", "seconds", "reason")
        return {"folder": self.folder} | {name: getattr(self, name) for name in names}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary(command.Summary):
    """What summary.json holds; a step is a trial.

    Attributes:
      seconds: of all trials that are done, one after the other.
      command, score, goal: as in the config.
      best: the best trial, as in `trials`.
      trials: of each: folder, values, status ("done", "not finite" or "failed"), score, seconds,
        reason (why it failed).
    """

    command: str
    score: str
    goal: str
    best: dict[str, Any]
    trials: list[dict[str, Any]]


class Search(command.Loaded):
    """A config whose points have been looked at.

    Attributes:
      config: the config.
      command: of the trials.
      variants: of the base.
      points: of the grid; None for a space.
      gpus: whether trials run on GPUs of their own.
      slots: how many at once.
    """

    def __init__(self, config: Config) -> None:
        if jax.distributed.is_initialized():
            raise ValueError("jinv search runs in one process: start it without the others")
        found = recipes.find(config.command)
        assert found is not None
        assert not isinstance(config.base, str)
        self.config = config
        self.command = found
        self.gpus, self.slots = _slots(config.parallel)
        if self.gpus:  # this process computes nothing, and must leave them their memory
            jax.config.update("jax_platforms", "cpu")
        self._base = dict(config.base)
        self.variants = study.take_variants(self._base)
        self.points = points.grid(config.grid) if config.grid else None
        self._check_points()
        self._kept: tuple[Any, command.Loaded] | None = None

    def _recipe(self, values: Mapping[str, Any]) -> tuple[Any, list[study.Run]]:
        """Return the config of a point, and its runs."""
        config = points.recipe(self.command, self._base, values)
        return config, study.runs(self.command, config, self.variants)

    def _check_points(self) -> None:
        """Raise ConfigError if points of the grid, or all points of a space, make no run."""
        config = self.config
        looked = self.points
        if looked is None:
            looked = [
                points.suggest(config.space, config.goal, number, []) for number in range(_DRAWS)
            ]
        mistakes, fine = [], []
        for values in looked:
            try:
                fine.append(self._recipe(values)[1])
            except ValueError as error:
                mistakes.append(f"{_shown(values)}: {error}")
        if mistakes and (self.points is not None or not fine):
            told = "\n".join(f"  {line}" for line in mistakes[:_SHOWN])
            more = "\n  ..." if mistakes[_SHOWN:] else ""
            raise configs.ConfigError(
                f"{len(mistakes)} of {len(looked)} points make no run of `jinv "
                f"{config.command}`:\n{told}{more}"
            )
        summary = self.command.summary if not fine[0][0].folder else self.command.study
        assert summary is not None
        keys = [field.name for field in dataclasses.fields(summary)]
        checks.one_of("the first word of score", config.score.partition(".")[0], keys)

    def wants_more(self, folder: RunFolder) -> bool:
        """Whether a finished search has tried fewer points than are asked for."""
        return (self.config.trials or 0) > len(folder.read_summary()["trials"])

    def run(self, folder: RunFolder) -> dict[str, Any]:
        """Run the trials that are not done; return the summary.

        Raises:
          Interrupted: SIGTERM or Ctrl-C came.
          ValueError: no trial gave a score.
        """
        if folder.finished:
            folder.reopen(configs.plain(self.config))
        (folder.path / TRIALS).mkdir(exist_ok=True)
        trials = self._read(folder)
        done = sum(trial.status != "waiting" for trial in trials)
        if done:
            parallel.say(f"{done} of {self.config.trials or len(trials)} trials are done already")
        self._write(folder, trials)
        if self.gpus or self.slots > 1:
            self._side_by_side(folder, trials)
        else:
            while trial := self._next(trials):
                self._write_table(folder, trials)  # what was suggested once stays
                self._in_process(folder, trials, trial)
                self._end(folder, trials, trial)
        best = self._best(trials)
        if best is None:
            first = next((t for t in trials if t.status == "failed"), trials[0])
            again = "; mend it and --resume, which tries it again"
            raise ValueError(
                f"{folder.path}: none of {len(trials)} trials gave a score; {first.folder}: "
                f"{first.reason}{again if first.status == 'failed' else ''}"
            )
        return self._finish(folder, trials, best)

    # --- which trials ----------------------------------------------------------------------------

    def _read(self, folder: RunFolder) -> list[Trial]:
        """Return the trials of earlier sessions, and those of the grid."""
        rows = self._read_table(folder)
        found = self.points
        if found is None:
            found = [dict(zip(self._keys, map(_value, row[1:]), strict=False)) for row in rows]
        trials = [Trial(number, values) for number, values in enumerate(found)]
        for trial, (*_, status, reason) in zip(trials, rows, strict=False):
            if status == "not finite":
                trial.status, trial.reason = "not finite", reason
        for trial in trials:
            if (folder.path / trial.folder / SUMMARY).exists():
                self._score(folder, trials, trial)
        return trials

    def _next(self, trials: list[Trial]) -> Trial | None:
        """Return the next trial to begin; None if there is none."""
        for trial in trials:
            if trial.status == "waiting" and not trial.begun:
                trial.begun = True
                return trial
        config = self.config
        if self.points is not None or len(trials) >= (config.trials or 0):
            return None
        told = [points.Told(t.values, t.score, t.status == "waiting") for t in trials]
        values = points.suggest(config.space, config.goal, config.seed, told)
        trials.append(Trial(len(trials), values, begun=True))
        return trials[-1]

    def _best(self, trials: list[Trial]) -> Trial | None:
        """Return the first of the best trials that are done."""
        done = [trial for trial in trials if trial.score is not None]
        return min(done, key=self._rank, default=None)

    def _rank(self, trial: Trial) -> float:
        """Return a number that is smaller for better trials."""
        if trial.score is None:
            return math.inf
        return -trial.score if self.config.goal == "max" else trial.score

    # --- one trial -------------------------------------------------------------------------------

    def _in_process(self, folder: RunFolder, trials: list[Trial], trial: Trial) -> None:
        """Run a trial here."""
        parallel.say(f"{trial.folder}: {_shown(trial.values)}")
        try:
            config, chosen = self._recipe(trial.values)
            loaded = self._load(chosen)
            path = folder.path / trial.folder
            own = self.command.folder(path, config, self.variants, resume=True)
            if chosen[0].folder:
                study.execute(self.command, chosen, loaded, own, resume=True)
            else:
                loaded.pop().run(own)
        except FolderError:
            raise
        except Interrupted as stop:
            raise self._stopped(folder, trials, stop.signal) from None
        except command_line.FORESEEN as error:
            code, trial.reason = command_line.failure(error, self.command.less)
            trial.status = "not finite" if code == command_line.NOT_FINITE else "failed"
            return
        self._score(folder, trials, trial)
        if own.interrupted:
            self._write(folder, trials)
            raise self._stopped(folder, trials, own.interrupted)

    def _load(self, chosen: list[study.Run]) -> list[command.Loaded]:
        """Return a trial's runs, loaded: one with another seed shares programs with the last."""
        if len(chosen) > 1 or self.command.compare is None:
            return study.load(self.command, chosen)
        config = chosen[0].config
        if self._kept and self._kept[0] == dataclasses.replace(config, seed=0):
            return [self._kept[1].with_seed(config.seed)]
        self._kept = None  # it need not stay in memory beside the next one
        loaded = study.load(self.command, chosen)
        self._kept = dataclasses.replace(config, seed=0), loaded[0]
        return loaded

    def _side_by_side(self, folder: RunFolder, trials: list[Trial]) -> None:
        """Run all trials in processes of their own."""
        free = list(range(self.slots))
        running: dict[int, tuple[Trial, Popen]] = {}
        with Signals() as stopping:
            try:
                while not stopping():
                    while free and (trial := self._next(trials)):
                        process = self._start(folder, trial, free[0])
                        if process is None:
                            self._end(folder, trials, trial)
                        else:
                            running[free.pop(0)] = trial, process
                            self._write_table(folder, trials)
                    if not running:
                        return
                    time.sleep(_LOOK)
                    for slot, (trial, process) in list(running.items()):
                        if processes.ended(process):
                            del running[slot]
                            free.append(slot)
                            self._judge(folder, trials, trial, process.returncode)
                            self._end(folder, trials, trial)
            finally:
                processes.stop([process for _, process in running.values()])
        raise self._stopped(folder, trials, stopping.number)

    def _start(self, folder: RunFolder, trial: Trial, slot: int) -> Popen | None:
        """Start a trial; None if its config is refused."""
        path = folder.path / trial.folder
        try:
            config, _ = self._recipe(trial.values)
        except ValueError as error:
            trial.status, trial.reason = "failed", str(error)
            return None
        self.command.folder(path, config, self.variants, resume=True)  # writes the config
        lock.release(path)
        place = f" on GPU {slot}" if self.gpus else ""
        parallel.say(f"{trial.folder}{place}: {_shown(trial.values)}")
        flags = ["--config", str(path / CONFIG), "--out", str(path), "--resume"]
        environment = processes.on_gpu(slot) if self.gpus else {}
        return processes.start([self.command.name, *flags], _log(path), environment)

    def _judge(self, folder: RunFolder, trials: list[Trial], trial: Trial, code: int) -> None:
        """Take down how the process of a trial has ended."""
        if code == 0:
            self._score(folder, trials, trial)
            return
        log = _log(folder.path / trial.folder)
        ended = f"was killed by signal {-code}" if code < 0 else f"ended with the exit code {code}"
        trial.reason = processes.complaint(log) or f"its process {ended}: see {log}"
        trial.status = "not finite" if code == command_line.NOT_FINITE else "failed"

    def _score(self, folder: RunFolder, trials: list[Trial], trial: Trial) -> None:
        """Read the score of a finished trial.

        Raises:
          ConfigError: it has none, and no other has one: the key is wrong.
        """
        path = folder.path / trial.folder / SUMMARY
        summary = json.loads(path.read_text())
        trial.seconds = summary.get("seconds", 0.0)  # commands of others need not tell it
        try:
            score = points.lookup(summary, self.config.score)
            told = f"it must be a number, not {checks.shown(score)}"
        except KeyError as error:
            score, told = "", error.args[0]
        if checks.fits(points.Number, score):
            trial.status, trial.score = "done", float(score)
            return
        told = f"score {self.config.score}: {told}"
        measured_nothing = score is None or isinstance(score, float)
        if not measured_nothing and self._best(trials) is None:
            raise configs.ConfigError(
                f"{path}: {told}; choose another --score and --resume: the trial is kept"
            )
        trial.status, trial.reason = "failed", told

    def _end(self, folder: RunFolder, trials: list[Trial], trial: Trial) -> None:
        """Write and say what came of a trial."""
        self._write(folder, trials)
        best = self._best(trials)
        if trial.score is None or best is None:
            told = f"{trial.status}: {trial.reason}"
        else:
            told = f"{trial.score:.6g} (best {best.score:.6g}, {best.folder})"
        parallel.say(f"{trial.folder}: {told}")

    def _stopped(self, folder: RunFolder, trials: list[Trial], number: int) -> Interrupted:
        count = sum(trial.status != "waiting" for trial in trials)
        total = self.config.trials or len(trials)
        return Interrupted(
            f"{folder.path}: stopped after {count} of {total} trials; go on with --resume", number
        )

    # --- files -----------------------------------------------------------------------------------

    def _write(
        self, folder: RunFolder, trials: list[Trial], ending: Sequence[page.Section] = ()
    ) -> None:
        """Write the table, and of the best trial so far the recipe and the page."""
        self._write_table(folder, trials)
        best = self._best(trials)
        if best is None:
            return
        config, _ = self._recipe(best.values)
        tree = configs.plain(config) | ({"variants": self.variants} if self.variants else {})
        told = f"{self.config.score} {best.score:.6g}, {best.folder} of {len(trials)}"
        write_atomic(
            folder.path / BEST, f"# jinv {self.command.name}: {told}\n{configs.to_yaml(tree)}"
        )
        found = report.Found(
            self.command.name,
            self.config.score,
            self.config.goal,
            [trial.told() for trial in trials],
            best.number,
        )
        report.make(found, folder.path).write(folder.path / "report.html", ending)

    def _write_table(self, folder: RunFolder, trials: list[Trial]) -> None:
        rows: list[list[Any]] = [self._columns]
        for t in trials:
            values = [_cell(t.values[key]) for key in self._keys]
            numbers = ["" if v is None else v for v in (t.score, t.seconds)]
            rows.append([t.number, *values, *numbers, t.folder, t.status, t.reason])
        write_atomic(folder.path / TABLE, csv_text(rows))

    @property
    def _keys(self) -> list[str]:
        return list(self.config.grid or self.config.space)

    @property
    def _columns(self) -> list[str]:
        return ["trial", *self._keys, "score", "seconds", "folder", "status", "reason"]

    def _read_table(self, folder: RunFolder) -> list[list[str]]:
        """Return the rows of an earlier session."""
        path = folder.path / TABLE
        if not path.exists():
            return []
        columns, *rows = [*csv.reader(io.StringIO(path.read_text(encoding="utf-8")))] or [[]]
        if columns != self._columns or any(len(row) != len(columns) for row in rows):
            raise FolderError(f"{path} has been changed: restore it, or choose another folder")
        return rows

    def _finish(self, folder: RunFolder, trials: list[Trial], best: Trial) -> dict[str, Any]:
        finished = [trial for trial in trials if trial.seconds is not None]
        runs: list[dict[str, Any]] = []
        for trial in finished:
            found = json.loads((folder.path / trial.folder / SUMMARY).read_text())
            runs += found["runs"].values() if _is_study(found) else [found]
        device = runs[0].get("device", "")
        seconds = sum(trial.seconds or 0 for trial in finished)
        summary = Summary(
            device=device if self.slots == 1 else f"{device} a trial, {self.slots} at once",
            seconds=round(seconds, 3),
            seconds_per_step=round(seconds / len(finished), 6),
            compile_seconds=round(sum(run.get("compile_seconds", 0) for run in runs), 3),
            versions=hardware.versions(),
            command=self.command.name,
            score=self.config.score,
            goal=self.config.goal,
            best=best.told(),
            trials=[trial.told() for trial in trials],
        )
        machine = hardware.describe() | {"devices": summary.device}
        self._write(
            folder,
            trials,
            page.ending(vars(summary), machine, configs.to_yaml(self.config)),
        )
        return command.finish(folder, summary)


def _is_study(summary: Mapping[str, Any]) -> bool:
    return "device" not in summary and isinstance(summary.get("runs"), Mapping)


def _slots(asked: int | None) -> tuple[bool, int]:
    """Return whether trials have GPUs of their own, and how many run at once.

    Raises:
      FieldError: there are not so many GPUs.
      ValueError: there are devices that cannot be divided here.
    """
    if asked == 1 or (asked is None and not processes.has_gpus()):
        return False, 1
    backend, count = processes.devices()
    if backend == "gpu":
        if (asked or 1) > count:
            raise checks.FieldError(
                "parallel", f" must be at most {count}, the number of GPUs, not {asked}"
            )
        return (asked or count) > 1, asked or count
    if backend != "cpu" and asked:
        raise ValueError(
            f"trials at once need GPUs or a CPU, here is a {backend}: leave parallel out"
        )
    return False, asked or 1


def _log(folder: Path) -> Path:
    """Return the file for what the process of a trial prints."""
    return folder.with_name(f"{folder.name}.log")


def _shown(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {checks.shown(value)}" for key, value in values.items())


def _cell(value: Any) -> str:
    """Return a value as text that `_value` reads back: text as it is, if it is no JSON."""
    if isinstance(value, str) and _value(value) == value:
        return value
    return json.dumps(value)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _say(summary: dict[str, Any]) -> str:
    best = summary["best"]
    told = f"{summary['score']} {best['score']:.6g}, {_shown(best['values'])}"
    return f"best of {len(summary['trials'])} trials: {best['folder']}: {told}"


COMMAND = command.Command(
    name="search",
    about=str(__doc__),
    config=Config,
    load=Search,
    summary=Summary,
    files=(TABLE, BEST, "report.html", TRIALS),
    say=_say,
    free=(*command.FREE, "score", "goal", "trials", "parallel"),
    less="a smaller batch in the base",
)

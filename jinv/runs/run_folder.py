"""The folder of one run: claimed, filled, killed, resumed, finished, overwritten.

folder/
  config.yaml     what was run; comments name the command and the digests of what it reads
  metrics.csv     every term at every step
  scores.csv      what was measured on the way
  checkpoints/    while the run is unfinished
  summary.json    written last: its presence means "finished"

and the files that the command declares. Of several processes all compute, and only the main one
writes (each its part of a checkpoint, so that the folder must be on a disk that all of them see).
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import orbax.checkpoint as ocp

from jinv import optimise, parallel
from jinv.files import path as expanded
from jinv.files import write_atomic
from jinv.runs import config as configs
from jinv.runs import lock
from jinv.runs.log import Log
from jinv.runs.signals import Interrupted

CONFIG, SUMMARY, CHECKPOINTS = "config.yaml", "summary.json", "checkpoints/"
_PICTURES = ("images/", "progress/")
"""Folders in which people may keep pictures of their own: ours have names that theirs have not."""
_OURS = re.compile(r"(\d{3,}(_.*)?|step_\d{6,})\.png")

_DIGEST = "# sha256 of "


class FolderError(RuntimeError):
    """The folder cannot be used as asked; the message says what to do."""


class RunFolder:
    """The output folder of one run.

    Attributes:
      path: the folder.
      metrics, scores: the logs.
      finished: whether the folder holds this run with its summary.
      changed: keys, with both values, in which the run that is there had another config; only those
        that a resumed run may change.
      interrupted: number of the signal that asked the run to stop, 0 if none did.
      clock: where the time went, over all sessions of the run.

    Args:
      path: made if absent.
      config: the run's config as a plain tree.
      command: name of the command that fills it.
      inputs: key of the config -> digest of the files that it names, see `inputs.digests`.
      files: what the command writes besides config and summary; names of folders end with "/".
        Overwriting removes these, and nothing else.
      free: keys of the config that a resumed run may change; "run." stands for all below `run`.
      settle: tree of an earlier run, perhaps of an older version -> the same as it is written now.
      resume: go on from the folder's last checkpoint, if there is one.
      overwrite: replace what an earlier run of this command left.
      shared: other processes write into it at the same time, by agreement.

    Raises:
      FolderError: the folder holds another run, and neither flag says what to do with it; it holds
        something that this command did not write; or another process is writing into it.
    """

    def __init__(
        self,
        path: str | Path,
        config: Mapping[str, Any],
        *,
        command: str = "",
        inputs: Mapping[str, str] = MappingProxyType({}),
        files: Sequence[str] = (),
        free: Sequence[str] = (),
        settle: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda tree: tree,
        resume: bool = False,
        overwrite: bool = False,
        shared: bool = False,
    ) -> None:
        self.path = expanded(path)
        self.metrics = Log(self.path / "metrics.csv")
        self.scores = Log(self.path / "scores.csv")
        self.clock = optimise.Clock()
        self.interrupted = 0
        self.changed: list[str] = []
        self._config = config
        self._command = command
        self._inputs = inputs
        self._files = files
        self._free = tuple(free)
        self._settle = settle
        self._resume = resume
        self._shared = shared
        self._saved: int | None = None
        self._began = self._last_save = time.perf_counter()
        if resume and overwrite:
            raise FolderError("--resume and --overwrite exclude each other")
        parallel.on_main(lambda: self._claim(overwrite), FolderError)
        self.finished = parallel.any_process(parallel.is_main() and self._summary.exists())

    @property
    def _summary(self) -> Path:
        return self.path / SUMMARY

    @property
    def seconds(self) -> float:
        """Time since the run began, without the time between its sessions."""
        return time.perf_counter() - self._began

    def part(self, name: str) -> RunFolder:
        """Return a run that belongs to this one, in a folder below; it goes on where it stopped."""
        return RunFolder(
            self.path / name,
            self._config,
            command=self._command,
            files=self._files,
            inputs=self._inputs,
            free=self._free,
            settle=self._settle,
            resume=True,
        )

    def read_summary(self) -> dict[str, Any]:
        """Return the summary of a finished run."""
        return json.loads(self._summary.read_text())

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the summary, which marks the run as finished, and drop the checkpoints."""
        write_atomic(self._summary, json.dumps(summary, indent=2) + "\n")
        shutil.rmtree(self.path / CHECKPOINTS, ignore_errors=True)
        self.finished = True
        lock.release(self.path)

    def reopen(self, config: Mapping[str, Any]) -> None:
        """Make the run an unfinished one of which more is asked: this config."""
        self._config = config
        parallel.on_main(self._reopen, FolderError)
        self.finished = False

    def _reopen(self) -> None:
        self._summary.unlink(missing_ok=True)
        self._write_config()

    # --- claiming ---------------------------------------------------------------------------------

    def _claim(self, overwrite: bool) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise FolderError(f"{self.path} is a file, not a folder")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            locked = lock.hold(self.path, f"jinv {self._command}", shared=self._shared)
        except BlockingIOError as error:
            raise FolderError(
                f"{self.path} cannot be used now: {error}; wait for it, or choose another folder"
            ) from None
        except OSError as error:
            raise FolderError(
                f"cannot make the folder {self.path}, or write into it: {error}"
            ) from None
        try:
            self._check_and_clear(overwrite)
        except BaseException:
            if locked:
                lock.release(self.path)
            raise
        if not self._summary.exists():
            self._write_config()

    def _check_and_clear(self, overwrite: bool) -> None:
        """Raise FolderError if what is there stands in the way; remove it if that was asked for."""
        # In this order: another process may be making the run, which begins with its config.
        found = self._undeclared()
        if not (self.path / CONFIG).exists():
            if found:
                raise FolderError(
                    f"{self.path} holds files that no run known here has written "
                    f"({', '.join(found)}): remove them, or choose another folder"
                )
        else:
            before = self._read_config()
            if overwrite:
                self._clear()
            elif not self._resume:
                state = "a finished" if self._summary.exists() else "an unfinished"
                raise FolderError(
                    f"{self.path} holds {state} run: --resume it, --overwrite it, or choose "
                    "another folder"
                )
            else:
                self._check_same(before)

    def _write_config(self) -> None:
        text = configs.to_yaml(self._config)
        told = [f"{_DIGEST}{key}: {digest}\n" for key, digest in self._inputs.items()]
        write_atomic(self.path / CONFIG, f"{_first_line(self._command)}\n{''.join(told)}{text}")

    def _undeclared(self) -> list[str]:
        """Return what would be mistaken for a run's, or replaced, where there is no config."""
        declared = (SUMMARY, CHECKPOINTS, *(f for f in self._files if f not in _PICTURES))
        return [name for name in declared if (self.path / name).exists()]

    def _read_config(self) -> dict[str, Any]:
        """Return the config of the run that is there; refuse one of another command."""
        path = self.path / CONFIG
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        beginning = _first_line("")
        if lines and lines[0].startswith(beginning) and lines[0] != _first_line(self._command):
            raise FolderError(
                f"{self.path} holds a run of `jinv {lines[0].removeprefix(beginning)}`, not of "
                f"`jinv {self._command}`: choose another folder"
            )
        try:
            return configs.read_yaml(path)
        except configs.ConfigError as error:
            raise FolderError(
                f"{self.path} holds something else than a run ({error}): choose another folder"
            ) from None

    def _read_inputs(self) -> dict[str, str]:
        """Return the digests of what the run that is there has read, as far as it tells them."""
        lines = (self.path / CONFIG).read_text(encoding="utf-8").splitlines()
        told = [line.removeprefix(_DIGEST) for line in lines if line.startswith(_DIGEST)]
        return {key: digest for key, _, digest in (line.rpartition(": ") for line in told)}

    def _clear(self) -> None:
        """Remove what a run writes, and nothing else."""
        # The summary first and the config last: a clearing that is cut leaves an unfinished run.
        for name in (SUMMARY, CHECKPOINTS, *self._files, CONFIG):
            path = self.path / name
            if path.is_dir() and name in _PICTURES:
                _clear_pictures(path)
            elif path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def _check_same(self, before: Mapping[str, Any]) -> None:
        now = json.loads(json.dumps(dict(self._config)))
        told = json.loads(json.dumps(dict(self._settle(before))))
        read = self._read_inputs()
        same = {key for key, digest in self._inputs.items() if read.get(key) == digest}
        lines = configs.differences(told, now)
        changed = [line for line in lines if line.partition(" (")[0] not in same]
        changed += [
            f"{key} (its files hold something else than then)"
            for key in sorted(self._inputs.keys() & read.keys() - same)
        ]
        self.changed = [line for line in changed if line.startswith(self._free)]
        changed = [line for line in changed if line not in self.changed]
        if changed:
            raise FolderError(
                f"{self.path} was begun with another config; resuming would mix the two. "
                f"Different: {'; '.join(changed)}"
            )

    # --- checkpoints ------------------------------------------------------------------------------

    def begin(self) -> None:
        """Let the run's time begin now: folders of a study are all made before its first run."""
        self._began = self._last_save = time.perf_counter()

    @contextmanager
    def checkpoints(self) -> Iterator[ocp.CheckpointManager]:
        """Within, states can be saved and restored; the run's time begins here."""
        self.begin()
        options = ocp.CheckpointManagerOptions(max_to_keep=1, create=True)
        folder = (self.path / CHECKPOINTS).resolve()
        manager = ocp.CheckpointManager(folder, options=options)
        try:
            yield manager
        finally:
            manager.wait_until_finished()
            manager.close()

    def due(self, every: float) -> bool:
        """Whether so many seconds have passed since the last checkpoint, in any process."""
        return parallel.any_process(time.perf_counter() - self._last_save >= every)

    def save(
        self,
        manager: ocp.CheckpointManager,
        step: int,
        state: Any,
        *,
        later: Callable[[Callable[[], None]], None] = lambda job: job(),
        **meta: Any,
    ) -> None:
        """Save the logs now and the state after `step` steps in the background, once.

        Args:
          manager: the one that `checkpoints` gives.
          step: number of steps done.
          state: tree of arrays; no step may take it over before it is on the host.
          later: does the job of bringing it there; by default that is waited for.
          **meta: plain values that are saved beside it.
        """
        if step == self._saved:
            return
        # The logs first: rows beyond the checkpoint are dropped on resuming, missing ones are not
        # made again.
        self.save_logs()
        told = {**meta, "seconds": self.seconds, "clock": dataclasses.asdict(self.clock)}

        def save() -> None:
            # It returns once the host has the state (on a CPU a view, which keeps the buffers from
            # being taken over), and writes in a thread of its own.
            manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(told)
                ),
            )

        later(save)
        self._saved = step
        self._last_save = time.perf_counter()

    def restore(
        self, manager: ocp.CheckpointManager, template: Callable[[Mapping[str, Any]], Any]
    ) -> tuple[dict[str, Any], Any] | None:
        """Return the meta and the state that were saved last; None to start afresh.

        Logs and clock become what they were then.

        Args:
          manager: the one that `checkpoints` gives.
          template: meta -> the state's shapes, types and shardings.
        """
        step = manager.latest_step() if self._resume else None
        if step is None:
            return None
        meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        restored = manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(template(meta)))
        )
        self.clock = optimise.Clock(**meta["clock"])
        self._began -= meta["seconds"]
        self.metrics.restore(step)
        self.scores.restore(step + 1)
        self._saved = step
        return meta, restored["state"]

    def stopped(self, number: int, step: int, total: int) -> Interrupted:
        """Return what to raise when a signal has stopped the run at a step, after a checkpoint."""
        return Interrupted(
            f"{self.path}: stopped at step {step} of {total}; go on with --resume", number
        )

    def save_logs(self) -> None:
        """Write the logs as they are."""

        def save() -> None:
            self.metrics.save()
            self.scores.save()

        parallel.on_main(save, FolderError)


def _first_line(command: str) -> str:
    return f"# jinv {command}"


def _clear_pictures(folder: Path) -> None:
    """Remove the pictures that a run wrote, and the folder if it holds nothing else."""
    for file in folder.iterdir():
        if _OURS.fullmatch(file.name):
            file.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()

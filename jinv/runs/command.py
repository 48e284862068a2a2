"""The contract of a command: config -> loaded -> run -> declared files and summary.

A command is one `Command`. Whoever writes one gives the dataclass of its config, a function that
loads what a config names, and the dataclass of its summary; `command_line.main` does the rest.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, Self, TypeVar, get_args, get_origin

from jinv import checks
from jinv.runs import config as configs
from jinv.runs import hardware, inputs
from jinv.runs.run_folder import RunFolder

C = TypeVar("C")

FREE = ("run.", "execution.")
"""Beginnings of the keys that have no influence on a run's result."""


class Loaded:
    """A config with everything loaded: all that can be wrong with it has been found."""

    def run(self, folder: RunFolder) -> dict[str, Any]:
        """Do the work, write the files, `finish` the folder; return the summary.

        The summary may be empty in processes other than the main one.
        """
        raise NotImplementedError

    def with_seed(self, seed: int) -> Self:
        """Return the same with another seed, sharing networks and compiled programs.

        Commands with studies need it.
        """
        raise NotImplementedError

    def wants_more(self, folder: RunFolder) -> bool:
        """Whether a finished folder lacks something that the config asks for.

        If so, `run` is called, which has to `reopen` the folder once nothing can be wrong.
        """
        del folder
        return False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """What every run's summary.json holds.

    Attributes:
      device: number and kind of the devices.
      seconds: from start to finish, of all sessions of a resumed run.
      seconds_per_step: without compilation.
      compile_seconds: spent compiling.
      versions: of python, jax, jaxlib, flax and jinv.
    """

    device: str
    seconds: float
    seconds_per_step: float
    compile_seconds: float
    versions: dict[str, str]


def shared(folder: RunFolder, device: str) -> dict[str, Any]:
    """Return the values of `Summary` for a run that is about to finish.

    Args:
      folder: the run's.
      device: `hardware.of_mesh` of its devices.
    """
    clock = folder.clock
    return {
        "device": device,
        "seconds": round(folder.seconds, 3),
        "seconds_per_step": round(clock.stepping / max(clock.steps, 1), 6),
        "compile_seconds": round(clock.compiling, 3),
        "versions": hardware.versions(),
    }


def finish(folder: RunFolder, summary: Any) -> dict[str, Any]:
    """Finish a folder with a dataclass of a summary, and return it as the dict that is written."""
    told = {f.name: getattr(summary, f.name) for f in dataclasses.fields(summary)}
    folder.finish(told)
    return told


@dataclasses.dataclass(frozen=True)
class Command(Generic[C]):
    """A command.

    Attributes:
      name: as it is typed: `jinv NAME`.
      about: what `--help` says; its first line stands in the list of commands.
      config: dataclass of its recipes.
      load: config -> `Loaded`; raises ValueError, OSError or ImportError for what is wrong.
      summary: dataclass whose attributes are the keys of summary.json.
      files: what a run writes besides config.yaml and summary.json; names of folders end with "/".
      say: summary -> the main point, in a line; "" for none.
      presets: name -> config of the attack, for `attack: {preset: NAME}`.
      compare: writes the page of a study and finishes its folder; None if the command has none. A
        command with one has `seed` and `trials` in its config, and what it loads has `with_seed`.
      study: dataclass of a study's summary.
      free: beginnings of the keys that a resumed run may change: they have no influence on what is
        computed, but perhaps on what is said of it.
      less: flags to try where memory does not suffice.
      standalone: its keys may all come from the command line, without a config.
      without_folder: does a run that writes nothing and returns what it says, where there is no
        --out; None if the command needs a folder.
      flags: adds flags of its own to the parser.
      load_with_flags: (config, flags) -> `Loaded`, or None if the flags left nothing to run; for
        commands with flags of their own.
    """

    name: str
    about: str
    config: type[C]
    load: Callable[[C], Loaded]
    summary: type
    files: tuple[str, ...] = ()
    say: Callable[[dict[str, Any]], str] = lambda summary: ""
    presets: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    compare: Callable[..., None] | None = None
    study: type | None = None
    free: tuple[str, ...] = FREE
    less: str = "a smaller batch"
    standalone: bool = False
    without_folder: Callable[[Any], str] | None = None
    flags: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    load_with_flags: Callable[[C, argparse.Namespace], Loaded | None] | None = None

    def recipe_from(self, tree: Mapping[str, Any]) -> C:
        """Return a config file's tree as this command's config, its preset applied."""
        return configs.build(self.config, configs.with_preset(tree, self.presets))

    def folder(
        self, path: Any, config: C, variants: Mapping[str, Any] = {}, **how: Any
    ) -> RunFolder:
        """Return the output folder of a run, or of a study.

        Args:
          path: of the folder.
          config: the run's, or what a study's have in common.
          variants: of a study.
          **how: `resume`, `overwrite` or `shared`, see `RunFolder`.
        """
        return RunFolder(
            path,
            configs.plain(config) | ({"variants": dict(variants)} if variants else {}),
            command=self.name,
            inputs=inputs.digests(config),
            files=self.files,
            free=self.free,
            settle=self._settled,
            **how,
        )

    def _settled(self, tree: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the tree of an earlier run with the keys, and all the keys, of today."""
        told = configs.modern(tree)
        variants = {k: told.pop(k) for k in ("variants",) if k in told}
        try:
            return configs.plain(self.recipe_from(told)) | variants
        except ValueError:  # it is told in what the two differ
            return tree

    def help(self) -> str:
        """Return what `--help` says: what it does, and the keys of recipes and summary."""
        told = [
            self.about.strip(),
            "",
            "A recipe holds, with usual values in brackets; --KEY VALUE replaces one for a run",
            "",
            recipe_keys(self.config),
            "",
            "summary.json holds",
            "",
            described(self.summary),
        ]
        if self.study is not None:
            told += [
                "",
                _STUDY,
                "",
                described(self.study),
            ]
        return "\n".join((*told, "", _EXIT_CODES))


_STUDY = """\
A config with `variants` (name -> the keys that are different) or with `trials` above 1 makes
several runs, each in a folder of its own, and a page that compares them. The summary.json above
them holds"""

_EXIT_CODES = """\
On several hosts start the same command on each: SLURM (srun), Open MPI (mpirun) and Kubernetes are
recognised, else pass --coordinator HOST:PORT --processes N --process-id I. The folder must be on a
disk that all of them see; process 0 writes.

Exit codes: 0 done; 2 a mistake in what was asked for; 3 a loss that is not finite; 4 out of
memory or another failure of the device; 130 or 143 stopped and resumable."""


def documented(cls: type) -> dict[str, str]:
    """Return the fields of a dataclass with what its docstring, and its bases', says of them."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        text = inspect.cleandoc(base.__dict__.get("__doc__") or "")
        _, _, attributes = text.partition("Attributes:\n")
        for match in re.finditer(r"^  (\w[\w, ]*): (.*(?:\n    .*)*)", attributes, re.MULTILINE):
            for name in match[1].split(", "):
                found[name] = " ".join(match[2].split())
    return found


def described(summary: type) -> str:
    """Return a summary's keys with their meanings, as lines of at most 100 characters."""
    told = documented(summary)
    return _table({f.name: told.get(f.name, "") for f in dataclasses.fields(summary)})


def recipe_keys(config: type) -> str:
    """Return all keys of a recipe with meanings and usual values, as `described` does."""
    return _table(dict(_keys(config, "", {})))


def _keys(cls: type, path: str, told: dict[type, str]) -> Iterator[tuple[str, str]]:
    """Yield a dataclass's keys with what they mean; those that are `told` already only once."""
    known = [place for other, place in told.items() if issubclass(other, cls)]
    if known:
        yield f"{path}*", f"as {known[0]}*"
        return
    told[cls] = path
    meanings = documented(cls)
    for field in dataclasses.fields(cls):
        name, default = path + field.name, field.default
        usual = ""
        if default is None or isinstance(default, str | int | float):
            usual = f" [{'null' if default is None else str(default).lower()}]"
        elif default is field.default_factory:  # there is neither
            usual = " [needed]"
        yield name, meanings.get(field.name, "") + usual
        for kind, _ in map(checks.bare, checks.options(checks.hints(cls)[field.name])):
            listed = get_origin(kind) is tuple
            inner = checks.bare(get_args(kind)[0])[0] if listed else kind
            if dataclasses.is_dataclass(inner):
                yield from _keys(inner, f"{name}.0." if listed else f"{name}.", told)  # type: ignore[arg-type]


def _table(told: Mapping[str, str]) -> str:
    """Return names and texts in two columns, as lines of at most 100 characters."""
    width = min(max(map(len, told)), 36) + 6
    lines = []
    for name, text in told.items():
        line = f"    {name:<{width - 4}}"
        if not line.endswith(" "):
            lines.append(line)
            line = " " * width
        for word in text.split():
            if len(line) + 1 + len(word) > 100:
                lines.append(line)
                line = " " * width
            line += word if line.endswith(" ") else f" {word}"
        lines.append(line.rstrip())
    return "\n".join(lines)

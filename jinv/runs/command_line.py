"""The one `main` of all commands: flags, overrides of a config, run or study, exit codes."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import tyro

from jinv import optimise, parallel
from jinv.runs import config as configs
from jinv.runs import hardware, lock, study
from jinv.runs.command import FREE, Command, Loaded
from jinv.runs.run_folder import FolderError
from jinv.runs.signals import Interrupted


def main(command: Command, arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code.

    Args:
      command: which.
      arguments: of the command line; those of this process by default.
    """

    def everything() -> None:
        flags, rest = _flags(command, arguments)
        hardware.check_installed()
        tree = {} if flags.config is None else configs.read_yaml(configs.find(flags.config))
        variants = study.take_variants(tree)
        recipe = None if flags.config is None else command.recipe_from(tree)
        config = _override(command, recipe, flags, rest)
        parallel.start(flags.coordinator, flags.processes, flags.process_id)
        _run(command, config, variants, flags)

    try:
        return exit_code(everything, command.less)
    finally:
        lock.release_all()


def exit_code(function: Callable[[], None], less: str) -> int:
    """Call a function; every failure that was foreseen becomes a line and an exit code.

    Args:
      function: all of a command.
      less: what to try if the device's memory does not suffice.
    """
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            function()
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return 128 + stop.signal
    except KeyboardInterrupt:
        print("stopped; go on with --resume", file=sys.stderr)
        return 130
    except FORESEEN as error:
        code, told = failure(error, less)
        print(f"error: {told}", file=sys.stderr)
        return code
    return 0


FORESEEN = (
    *(optimise.NonFiniteError, ValueError, OSError, ImportError, FolderError, MemoryError),
    jax.errors.JaxRuntimeError,
)
"""What may go wrong in a run."""
NOT_FINITE = 3
"""Exit code of a run whose loss is not finite."""


def failure(error: Exception, less: str) -> tuple[int, str]:
    """Return the exit code and the line that tell of what went wrong.

    Args:
      error: one of the `FORESEEN`.
      less: what to try if the device's memory does not suffice.
    """
    if isinstance(error, optimise.NonFiniteError):
        return NOT_FINITE, str(error)
    if isinstance(error, MemoryError):
        return 4, f"out of memory: {error} Try {less}"
    if isinstance(error, jax.errors.JaxRuntimeError):
        advice = f" Try {less}" if "RESOURCE_EXHAUSTED" in str(error) else ""
        return 4, f"the device failed: {str(error).splitlines()[0]}{advice}"
    return 2, str(error)


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    """Print a warning as the commands print errors, without the line of code that gives it."""
    print(f"warning: {message}", file=sys.stderr)


def _folder(text: str) -> Path:
    if not text.strip():  # of a shell's variable that is not set
        raise argparse.ArgumentTypeError("needs the name of a folder, not an empty one")
    return Path(text)


def _flags(
    command: Command, arguments: Sequence[str] | None
) -> tuple[argparse.Namespace, list[str]]:
    """Return the flags, and what is left of the command line: overrides of the config.

    Leaves the program where help is asked for without a config, or a flag is missing.
    """
    parser = argparse.ArgumentParser(
        prog=f"jinv {command.name}",
        description=command.help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="NAME", help="a file, or a recipe of `jinv configs`")
    parser.add_argument("--out", type=_folder, metavar="FOLDER")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier run")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0")
    parser.add_argument("--processes", type=int, metavar="N", help="how many run this command")
    parser.add_argument("--process-id", type=int, metavar="I", help="which one this is, from 0")
    parser.set_defaults(shared=False)
    command.flags(parser)
    flags, rest = parser.parse_known_args(arguments)
    wants_help = {"-h", "--help"} & set(rest)
    alone = command.standalone and rest and not wants_help
    if flags.config is None and not alone:
        parser.print_help()
        sys.exit(0 if wants_help else 2)
    if flags.out is None and not wants_help:
        if command.without_folder is None:
            parser.error("--out FOLDER is missing")
        if flags.resume or flags.overwrite:
            parser.error("--resume and --overwrite are about a folder: --out FOLDER is missing")
    return flags, rest


def _override(
    command: Command, config: Any | None, flags: argparse.Namespace, rest: list[str]
) -> Any:
    """Return the config with the overrides of the command line, or what this alone says."""
    configs.check_flags(rest)
    given = {} if config is None else {"default": config}
    named = "" if config is None else f" --config {flags.config}"
    return tyro.cli(
        command.config,
        **given,
        args=rest,
        prog=f"jinv {command.name}{named} --out FOLDER",
        description="Overrides of the config.",
        config=(tyro.conf.AvoidSubcommands,),
    )


def _run(
    command: Command, config: Any, variants: Mapping[str, Any], flags: argparse.Namespace
) -> None:
    """Do one run, or a study of several, in the folder that was asked for."""
    chosen = study.runs(command, config, variants)
    if command.load_with_flags is not None:
        one = command.load_with_flags(config, flags)
        if one is None:
            return
        loaded = [one]
    else:
        loaded = study.load(command, chosen)
    if flags.out is None:
        assert command.without_folder is not None
        parallel.say(command.without_folder(loaded[0]))
        return
    how = {"resume": flags.resume, "overwrite": flags.overwrite, "shared": flags.shared}
    folder = command.folder(flags.out, config, variants, **how)
    single: Loaded | None = None if chosen[0].folder else loaded[0]
    more = single is not None and parallel.everywhere(
        lambda: folder.finished and single.wants_more(folder)
    )
    if folder.finished and not more:
        other = [line for line in folder.changed if not line.startswith(FREE)]
        parallel.say(f"{flags.out} holds this run, finished: nothing to do")
        if other:
            parallel.say(f"it was run with other values, which --overwrite takes: {other}")
        return
    if single is None:
        study.execute(command, chosen, loaded, folder, **how)
        parallel.say(f"{flags.out / 'report.html'} written")
        return
    summary = single.run(folder)
    if summary and (said := command.say(summary)):
        parallel.say(said)
    if parallel.is_main() and folder.finished:
        page = flags.out / "report.html"
        told = page if page.exists() else flags.out
        parallel.say(f"{told} written after {folder.seconds:.0f} s")

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
        variants = _variants(tree)
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
    except optimise.NonFiniteError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    except (ValueError, OSError, ImportError, FolderError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except MemoryError as error:
        print(f"error: out of memory: {error} Try {less}", file=sys.stderr)
        return 4
    except jax.errors.JaxRuntimeError as error:
        advice = f" Try {less}" if "RESOURCE_EXHAUSTED" in str(error) else ""
        print(f"error: the device failed: {str(error).splitlines()[0]}{advice}", file=sys.stderr)
        return 4
    return 0


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


def _variants(tree: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Take the variants out of a config's tree."""
    variants = tree.pop("variants", None) or {}
    if not isinstance(variants, dict) or not all(isinstance(v, dict) for v in variants.values()):
        raise configs.ConfigError("variants must map names to the keys that are different")
    return {str(name): changes for name, changes in variants.items()}


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

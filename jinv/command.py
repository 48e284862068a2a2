"""What the commands that compute a run share: flags, overrides of a config, exit codes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import jax

from jinv import optimise, session

T = TypeVar("T")


def flags(
    description: str, arguments: Sequence[str] | None = None
) -> tuple[argparse.Namespace, list[str]]:
    """The common flags, and what is left of the command line: overrides of the config.

    Leaves the program where help is asked for without a config, or a flag is missing.
    """
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    parser.add_argument("--config", type=Path, metavar="FILE")
    parser.add_argument("--out", type=Path, metavar="FOLDER")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier run")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0")
    parser.add_argument("--processes", type=int, metavar="N", help="how many run this command")
    parser.add_argument("--process-id", type=int, metavar="I", help="which one this is, from 0")
    args, rest = parser.parse_known_args(arguments)
    wants_help = {"-h", "--help"} & set(rest)
    if args.config is None:
        parser.print_help()
        sys.exit(0 if wants_help else 2)
    if args.out is None and not wants_help:
        parser.error("--out FOLDER is missing")
    return args, rest


def override(config: T, args: argparse.Namespace, rest: Sequence[str]) -> T:
    """The config with the overrides of the command line."""
    import tyro  # in the `scripts` extra

    return tyro.cli(
        type(config),
        default=config,
        args=rest,
        prog=f"{Path(sys.argv[0]).name} --config {args.config} --out FOLDER",
        description="Overrides of the config.",
        config=(tyro.conf.AvoidSubcommands,),
    )


def run(function: Callable[[], None], out_of_memory: str) -> int:
    """Call it; every failure that was foreseen becomes a line and an exit code.

    Args:
      function: all of the command.
      out_of_memory: what to try if the device's memory does not suffice.
    """
    try:
        function()
    except session.Interrupted as stop:
        print(stop, file=sys.stderr)
        return 128 + stop.signal
    except KeyboardInterrupt:
        print("stopped; go on with --resume", file=sys.stderr)
        return 130
    except optimise.NonFiniteError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    except (ValueError, OSError, ImportError, session.SessionError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except jax.errors.JaxRuntimeError as error:
        advice = f" Try {out_of_memory}" if "RESOURCE_EXHAUSTED" in str(error) else ""
        print(f"error: the device failed: {str(error).splitlines()[0]}{advice}", file=sys.stderr)
        return 4
    return 0

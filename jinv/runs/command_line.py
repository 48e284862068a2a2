"""What the commands that compute a run share: flags, overrides of a config, exit codes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax

from jinv import optimise, parallel
from jinv.runs import config as configs
from jinv.runs import run_folder, study

T = TypeVar("T")


def flags(
    description: str,
    arguments: Sequence[str] | None = None,
    more: Callable[[argparse.ArgumentParser], object] = lambda parser: None,
) -> tuple[argparse.Namespace, list[str]]:
    """The common flags and `more`, and what is left of the command line: overrides of the config.

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
    more(parser)
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
    except run_folder.Interrupted as stop:
        print(stop, file=sys.stderr)
        return 128 + stop.signal
    except KeyboardInterrupt:
        print("stopped; go on with --resume", file=sys.stderr)
        return 130
    except optimise.NonFiniteError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    except (ValueError, OSError, ImportError, run_folder.SessionError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except MemoryError as error:
        print(f"error: out of memory: {error} Try {out_of_memory}", file=sys.stderr)
        return 4
    except jax.errors.JaxRuntimeError as error:
        advice = f" Try {out_of_memory}" if "RESOURCE_EXHAUSTED" in str(error) else ""
        print(f"error: the device failed: {str(error).splitlines()[0]}{advice}", file=sys.stderr)
        return 4
    return 0


class Kind(NamedTuple):
    """What a command runs that takes a recipe, and studies of it.

    Attributes:
      recipe_from: a config's tree -> a recipe, which has `run`, `seed` and `trials`.
      prepare: a recipe -> the same with everything loaded.
      compare: writes the page and the summary of a study.
      say: tells the main points of a run's summary.
    """

    recipe_from: Callable[[dict[str, Any]], Any]
    prepare: Callable[[Any], study.Runnable]
    compare: study.Compare
    say: Callable[[dict[str, Any]], None]


def parse(
    kind: Kind, description: str, arguments: Sequence[str] | None
) -> tuple[Any, dict[str, Any], argparse.Namespace]:
    """Command line -> (recipe with overrides, its variants, the common flags)."""
    args, rest = flags(description, arguments)
    tree = configs.read_yaml(args.config)
    variants = tree.pop("variants", None) or {}
    if not isinstance(variants, dict) or not all(isinstance(v, dict) for v in variants.values()):
        raise configs.ConfigError("variants must map names to the keys that are different")
    recipe = override(kind.recipe_from(tree), args, rest)
    return recipe, {str(name): changes for name, changes in variants.items()}, args


def run_or_study(
    kind: Kind, recipe: Any, variants: dict[str, Any], args: argparse.Namespace
) -> None:
    """One run, or a study of several, in the folder that was asked for."""
    chosen = study.runs(recipe, variants, kind.recipe_from)
    for each in chosen:  # a mistake in any stops all before anything is computed
        prepared = kind.prepare(each.recipe)
    tree = configs.plain(recipe) | ({"variants": variants} if variants else {})
    how = {"resume": args.resume, "overwrite": args.overwrite}
    whole = run_folder.Session(args.out, tree, recipe.run, **how)
    if whole.finished:
        parallel.say(f"{args.out} holds this run, finished: nothing to do")
        return
    if chosen[0].folder:
        study.execute(chosen, whole, kind.prepare, kind.compare, **how)
        parallel.say(f"{args.out / 'report.html'} written")
        return
    summary = prepared.run(whole)
    if summary:
        kind.say(summary)
    parallel.say(f"{args.out / 'report.html'} written after {whole.seconds:.0f} s")


def main(kind: Kind, description: str, arguments: Sequence[str] | None, out_of_memory: str) -> int:
    """All of a command that takes a recipe; returns the exit code."""

    def everything() -> None:
        recipe, variants, args = parse(kind, description, arguments)
        parallel.start(args.coordinator, args.processes, args.process_id)
        run_or_study(kind, recipe, variants, args)

    return run(everything, out_of_memory)


def main_single(
    recipe: type,
    prepare: Callable[[Any], study.Runnable],
    say: Callable[[dict[str, Any]], str],
    description: str,
    arguments: Sequence[str] | None,
    out_of_memory: str,
) -> int:
    """All of a command whose recipe makes one run; returns the exit code.

    Args:
      recipe: class of the config.
      prepare: a recipe -> the same with everything loaded.
      say: the main points of a run's summary, in a line.
      description, arguments, out_of_memory: as of `flags` and `run`.
    """

    def everything() -> None:
        args, rest = flags(description, arguments)
        tree = configs.read_yaml(args.config)
        chosen: Any = override(configs.build(recipe, tree), args, rest)
        parallel.start(args.coordinator, args.processes, args.process_id)
        prepared = prepare(chosen)
        own = run_folder.Session(
            args.out, configs.plain(chosen), resume=args.resume, overwrite=args.overwrite
        )
        if own.finished:
            parallel.say(f"{args.out} holds this run, finished: nothing to do")
            return
        summary = prepared.run(own)
        if summary:
            parallel.say(f"{args.out}: {say(summary)} after {summary['seconds']:.0f} s")

    return run(everything, out_of_memory)

"""`jinv COMMAND ...`: every command behind one door."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence

CONVERT, CONFIGS = "convert", "configs"
FORMERLY = {"convert-weights": CONVERT}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that is named first; return its exit code.

    Args:
      arguments: of the command line; those of this process by default.
    """
    try:
        code = _main(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `jinv configs | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _main(arguments: Sequence[str] | None) -> int:
    name, *rest = (sys.argv[1:] if arguments is None else list(arguments)) or [""]
    name = name.replace("_", "-")
    if name in FORMERLY:
        print(f"`jinv {name}` is `jinv {FORMERLY[name]}` now", file=sys.stderr)
        name = FORMERLY[name]
    if name in ("", "--help", "-h", "help"):
        print(_usage())
        return 0 if name else 2
    if name in ("--version", "-V"):
        return _version()
    if name == CONFIGS:
        return _configs()
    if name == CONVERT:
        from jinv.recipes import convert

        return convert.main(rest)
    from jinv import parallel, recipes
    from jinv.runs import command_line

    try:
        command = recipes.find(name)
    except ImportError as error:
        print(f"error: jinv {name} cannot be loaded: {error}", file=sys.stderr)
        return 2
    if command is None:
        near = difflib.get_close_matches(name, (*recipes.names(), CONVERT, CONFIGS), 1)
        advice = f": did you mean {near[0]!r}?" if near else ""
        print(f"error: jinv has no command {name!r}{advice}\n\n{_usage()}", file=sys.stderr)
        return 2
    parallel.enable_compilation_cache()
    return command_line.main(command, rest)


def _usage() -> str:
    """Return the list of commands with what each does."""
    from jinv import recipes
    from jinv.recipes import convert

    told = {}
    for name in recipes.names():
        try:
            command = recipes.find(name)
        except Exception as error:  # of a package that brings it, whatever that raises
            told[name] = f"cannot be loaded: {error}"
        else:
            assert command is not None
            told[name] = command.about
    told[CONVERT] = str(convert.__doc__)
    told[CONFIGS] = "List the recipes that come with jinv."
    width = max(map(len, told))
    lines = [f"  {name:<{width}}  {about.strip().splitlines()[0]}" for name, about in told.items()]
    return "\n".join(
        [
            "usage: jinv COMMAND --config RECIPE --out FOLDER [--key value ...]",
            "",
            *lines,
            "",
            "`jinv COMMAND --help` tells more; `jinv configs` lists recipes.",
        ]
    )


def _configs() -> int:
    from jinv.runs import config

    found = config.shipped_recipes()
    width = max(map(len, found))
    for name, path in found.items():
        print(f"{name:<{width}}  {config.first_line(path)}")
    return 0


def _version() -> int:
    from jinv.runs import hardware

    print("\n".join(f"{name} {version}" for name, version in hardware.versions().items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Networks of the user's own: `package.module:function` names the function that makes one."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flax import nnx

from jinv.net import Net


def names_one(name: str) -> bool:
    """Whether the name is that of a function that makes a network."""
    return ":" in name


def make(name: str, classes: int | None = None) -> Net:
    """Return the network that the function makes, under this name.

    The function is called with `classes=N` only if a number is given.

    Raises:
      ValueError: there is no such function, or it makes no such network.
    """
    with _current_folder_searched():
        function = _find(name)
        arguments = {} if classes is None else {"classes": classes}
        try:
            inspect.signature(function).bind(**arguments)
        except TypeError as error:
            asked = "without arguments" if classes is None else f"with classes={classes}"
            raise ValueError(f"{name} cannot be called {asked}: {error}") from None
        net = _run(lambda: function(**arguments), f"{name} fails")
    if isinstance(net, nnx.Module):
        raise ValueError(
            f"{name} returns a bare {type(net).__name__}: wrap it, "
            "`return Net.from_nnx(model, preprocessing)`"
        )
    if not isinstance(net, Net):
        raise ValueError(f"{name} must return a jinv.Net, not a {type(net).__name__}")
    if classes not in (None, net.classes):
        raise ValueError(f"{name} has {net.classes} classes, not the {classes} asked for")
    return dataclasses.replace(net, name=name)


def _run(made: Callable[[], Any], what: str) -> Any:
    """Run a user's code; ValueError if it fails or ends the program."""
    try:
        return made()
    except (ImportError, ValueError):
        raise
    except (Exception, SystemExit) as error:
        raise ValueError(f"{what}: {type(error).__name__}: {error}") from error


def _find(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), function)):
        raise ValueError(f"write package.module:function for a network of your own, not {name!r}")
    try:
        made = _run(lambda: importlib.import_module(module), f"{module} cannot be imported")
        found = getattr(made, function, None)
    except ImportError as error:
        raise ValueError(
            f"cannot import {module} for the network {name}: {error} (installed packages and "
            f"{Path.cwd()} are searched)"
        ) from None
    if not callable(found):
        raise ValueError(f"{module} has no function {function}")
    return found


@contextlib.contextmanager
def _current_folder_searched() -> Iterator[None]:
    """A command's own folder is on the path, not the one that it is called from."""
    here = str(Path.cwd())
    if here in sys.path:
        yield
        return
    sys.path.append(here)
    try:
        yield
    finally:
        sys.path.remove(here)

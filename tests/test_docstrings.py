"""What docstrings of public functions must say."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import ROOT

_DOORS = ("read.py", "write.py", "layout.py")
FILES = [path for p in ("jinv", "weights_convert") for path in sorted((ROOT / p).rglob("*.py"))]


def public(path: Path) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """Yield public functions, methods and classes; not those inside functions."""
    stack: list[ast.AST] = [ast.parse(path.read_text())]
    while stack:
        for node in ast.iter_child_nodes(stack.pop()):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                yield node
                if isinstance(node, ast.ClassDef):
                    stack.append(node)


def complaints(path: Path) -> Iterator[str]:
    for node in public(path):
        said = ast.get_docstring(node) or ""
        where = f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        if said.startswith("Of "):
            yield f"{where}: no sentence begins with 'Of'"
        if isinstance(node, ast.ClassDef):
            continue
        arguments = [*node.args.args, *node.args.kwonlyargs, *node.args.posonlyargs]
        names = [a.arg for a in arguments if a.arg not in ("self", "cls")]
        if len(names) >= 4 and "Args:" not in said:
            yield f"{where}: has {len(names)} parameters and no Args"
        raised = {
            getattr(n.exc.func, "id", getattr(n.exc.func, "attr", ""))
            for n in own_statements(node)
            if isinstance(n, ast.Raise) and isinstance(n.exc, ast.Call)
        }
        if path.is_relative_to(ROOT / "weights_convert") and path.name not in _DOORS:
            continue  # everything there raises WeightsError; its doors say so
        for error in raised - {"", "NotImplementedError"}:
            if error not in said and "Raises:" not in said and "rais" not in said.lower():
                yield f"{where}: does not say that it raises {error}"


def own_statements(node: ast.FunctionDef) -> Iterator[ast.AST]:
    """Yield what is inside a function, but not inside functions in it."""
    stack: list[ast.AST] = list(node.body)
    while stack:
        found = stack.pop()
        yield found
        if not isinstance(found, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            stack += ast.iter_child_nodes(found)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_say_what_they_must(path: Path) -> None:
    assert list(complaints(path)) == []

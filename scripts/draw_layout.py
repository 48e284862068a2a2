"""Draw the import graph of jinv: rooms on floors, every arrow downward; writes docs/layout.svg.

    python scripts/draw_layout.py [--out docs/layout.svg]

A room is a module at the top of `jinv/` or one of its packages; an arrow from A to B says that
something in A imports something in B. The tests check that no arrow goes up (`ORDER`), and that
the picture shows the code as it is.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

ORDER = (
    *(
        "weights_convert",
        "moved",
        "checks",
        "backend",
        "files",
        "parallel",
        "prng",
        "privacy",
        "image",
    ),
    *("calls", "watch", "net", "data", "optimise", "schedules", "models", "objective"),
    *("training", "federated"),
    *(
        "attacks",
        "scores",
        "reports",
        "runs",
        "shadow",
        "reconstruct",
        "distill",
        "recipes",
        "__main__",
    ),
)
"""The rooms from the lowest on: each may import those before it."""

Graph = Mapping[str, set[str]]


def module_graph(root: Path = ROOT) -> Graph:
    """Return every module of jinv and weights_convert with the modules that it imports.

    Imports inside functions count, too.
    """
    files = {
        _name(path.relative_to(root)): path
        for package in ("jinv", "weights_convert")
        for path in sorted((root / package).rglob("*.py"))
    }
    return {
        name: {found for found in _imports(path, files) if found != name}
        for name, path in files.items()
    }


def _name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path: Path, known: Mapping[str, Path]) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module in known and node.level == 0:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in known else node.module


def rooms(modules: Graph) -> Graph:
    """Return the graph of rooms: modules at the top and whole packages."""
    found: dict[str, set[str]] = {}
    for name, imported in modules.items():
        room = _room(name)
        if room:
            own = found.setdefault(room, set())
            own |= {other for i in imported if (other := _room(i)) and other != room}
    return found


def _room(module: str) -> str:
    """Return the room that a module is in; "" for `jinv` itself, which only names things."""
    top, *rest = module.split(".")
    return rest[0] if top == "jinv" and rest else "" if top == "jinv" else top


def cycle(graph: Graph) -> list[str]:
    """Return the nodes of a cycle, in order; nothing if there is none."""
    state: dict[str, int] = {}
    path: list[str] = []

    def visit(node: str) -> list[str]:
        state[node] = 1
        path.append(node)
        for other in sorted(graph.get(node, ())):
            if state.get(other) == 1:
                return [*path[path.index(other) :], other]
            if other not in state and (found := visit(other)):
                return found
        state[node] = 2
        path.pop()
        return []

    for node in graph:
        if node not in state and (found := visit(node)):
            return found
    return []


def floors(graph: Graph) -> dict[str, int]:
    """Return every room's floor: 0 if it imports none, else one above its highest import."""
    found: dict[str, int] = {}

    def floor(room: str) -> int:
        if room not in found:
            found[room] = 1 + max((floor(other) for other in graph[room]), default=-1)
        return found[room]

    for room in graph:
        floor(room)
    return found


def digest(graph: Graph) -> str:
    """Return a fingerprint of the rooms and arrows, which the picture carries."""
    text = "\n".join(f"{room}: {' '.join(sorted(graph[room]))}" for room in sorted(graph))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def draw(graph: Graph, out: Path) -> None:
    """Draw the rooms on their floors as SVG."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "jinv"  # the same picture from the same graph
    from matplotlib import pyplot

    levels = floors(graph)
    rows: dict[int, list[str]] = {}
    for room in sorted(graph, key=lambda name: (levels[name], name)):
        rows.setdefault(levels[room], []).append(room)
    widest = max(map(len, rows.values()))
    places = {
        room: ((i + 0.5) * widest / len(row), level)
        for level, row in rows.items()
        for i, room in enumerate(row)
    }
    figure, axes = pyplot.subplots(figsize=(2.1 * widest, 1.05 * len(rows)))
    for room, imported in graph.items():
        for other in sorted(imported):
            axes.annotate(
                "",
                xy=places[other],
                xytext=places[room],
                arrowprops={
                    "arrowstyle": "-|>",
                    "color": "#2b6a99",
                    "alpha": 0.3,
                    "shrinkA": 14,
                    "shrinkB": 14,
                },
            )
    packages = {path.name for path in (ROOT / "jinv").iterdir() if path.is_dir()}
    for room, (x, y) in places.items():
        title = f"{room}/" if room in packages or room == "weights_convert" else room
        box = {"boxstyle": "round,pad=0.45", "facecolor": "#f3f3f1", "edgecolor": "#686e78"}
        weight = "bold" if title.endswith("/") else "normal"
        axes.text(x, y, title, ha="center", va="center", bbox=box, fontsize=11, weight=weight)
    axes.set_xlim(-0.2, widest + 0.2)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.axis("off")
    figure.savefig(
        out,
        metadata={"Date": None, "Description": digest(graph)},
        facecolor="white",
        bbox_inches="tight",
    )


def main() -> int:
    """Write the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "layout.svg")
    args = parser.parse_args()
    draw(rooms(module_graph()), args.out)
    print(f"{args.out} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The kernels of a step: bytes from the program's text, time from a profile."""

from __future__ import annotations

import collections
import gzip
import json
import re
from pathlib import Path
from typing import Any

import jax

from benchmarks import timing
from gpu import cases, hlo, steps
from gpu.part import Given

CASES = (cases.RESNET50, cases.MOBILENET_V2)
TOP, STEPS = 10, 20


def run(given: Given) -> None:
    """A row for every kind, then one for each of the ten slowest kernels; all in a file beside."""
    for case in (cases.TINY,) if given.tiny else CASES:
        attack = cases.attack(case)
        made = timing.Steps.of(attack, attack.initial(jax.random.key(0)), "python")
        folder = given.out / f"trace_{case.network}"
        made.run(STEPS)
        with jax.profiler.trace(str(folder)):
            made.run(STEPS)
        text = made.compiled.as_text()
        (given.out / f"{case.network}.hlo.txt").write_text(text)
        spent = {name: ms / STEPS for name, ms in milliseconds(folder).items()}
        rows = joined(hlo.kernels(text), spent)
        (given.out / f"kernels_{case.network}.json").write_text(json.dumps(rows, indent=1))
        for row in [*by_kind(rows), *rows[:TOP]]:
            given.emit(**steps.told(case), **row)


def milliseconds(folder: Path) -> dict[str, float]:
    """Device time of every HLO instruction in the newest profile; of other kernels by their name.

    On a GPU of the streams alone: other lines of the profile tell the same time again.
    """
    newest = max(folder.glob("plugins/profile/*/*.trace.json.gz"))
    events = json.loads(gzip.decompress(newest.read_bytes()))["traceEvents"]
    named: dict[Any, str] = {}
    for event in events:
        if event.get("name") in ("process_name", "thread_name"):
            named[event["pid"], event.get("tid") or 0] = event["args"]["name"]
    cards = {pid for (pid, tid), name in named.items() if not tid and "/device:GPU" in name}
    found: collections.Counter[str] = collections.Counter()
    for event in events:
        operation = event.get("args", {}).get("hlo_op")
        if cards:
            line = named.get((event.get("pid"), event.get("tid")), "")
            counts = event.get("pid") in cards and line.startswith("Stream")
        else:
            counts = operation is not None
        if counts and "dur" in event:
            found[operation or event["name"]] += event["dur"] / 1e3
    return dict(found)


def joined(kernels: list[hlo.Kernel], spent: dict[str, float]) -> list[dict[str, Any]]:
    """Kernels with their times, slowest first; what the profile alone knows has no bytes."""
    plain = {_plain(name): ms for name, ms in spent.items()}
    rows = []
    for kernel in kernels:
        ms = plain.pop(_plain(kernel.name), None)
        rows.append(_row(kernel.name, kernel.kind, kernel.bytes, ms, kernel.shape, kernel.op_name))
    rows += [_row(name, "in the profile alone", None, ms) for name, ms in plain.items()]
    return sorted(rows, key=lambda row: (-(row["ms"] or 0), -(row["bytes"] or 0)))


def _plain(name: str) -> str:
    """The name as kernels are called, which have no dots."""
    return re.sub(r"[.\-]", "_", name)


def _row(
    name: str,
    kind: str,
    size: int | None,
    ms: float | None,
    shape: str = "",
    op_name: str = "",
    count: int = 1,
) -> dict[str, Any]:
    rate = size / ms * 1e3 if size and ms else None
    told = {"kernel": name, "kind": kind, "count": count, "bytes": size, "ms": ms}
    return {**told, "bytes_per_s": rate, "shape": shape, "op_name": op_name}


def by_kind(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sums of the rows of a kind."""
    found = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        some = [row for row in rows if row["kind"] == kind]
        size, ms = (sum(row[key] or 0 for row in some) for key in ("bytes", "ms"))
        found.append(_row("all", kind, size, ms, count=len(some)))
    return found

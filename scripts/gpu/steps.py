"""Steps of DeepInversion, several in one program and one by one, beside what the card allows."""

from __future__ import annotations

from typing import Any

import jax

from benchmarks import timing
from gpu import cases, hlo
from gpu.cases import Case
from gpu.part import Given

CASES: tuple[tuple[Case, timing.Loop], ...] = (
    (cases.RESNET50, "scan"),
    (cases.MOBILENET_V2, "scan"),
    (cases.in_float32(cases.MOBILENET_V2), "scan"),
    (cases.in_float32(cases.RESNET50), "scan"),
    (cases.RESNET50, "python"),
)
TINY: tuple[tuple[Case, timing.Loop], ...] = ((cases.TINY, "scan"), (cases.TINY, "python"))
CHUNK = 10


def run(given: Given) -> None:
    """One row a case and loop."""
    card = given.card()
    for case, loop in TINY if given.tiny else CASES:
        attack = cases.attack(case)
        steps = timing.Steps.of(attack, attack.initial(jax.random.key(0)), loop, CHUNK)
        spread = timed({"": steps}, 1 if given.tiny else 3)[""]
        given.emit(**told(case), loop=loop, **spread._asdict(), **cost(steps, case, spread, card))


def told(case: Case) -> dict[str, str]:
    """The columns that name a case."""
    return {"case": str(case), "dtype": case.dtype}


def timed(ways: dict[str, timing.Peer], chunks: int) -> dict[str, timing.Spread]:
    """Milliseconds a step, waiting after so many chunks."""
    count = chunks * CHUNK

    def rounds(way: timing.Peer) -> Any:
        return lambda: way.run(count)

    found = timing.alternate({name: rounds(way) for name, way in ways.items()}, seconds=0)
    return {
        name: timing.Spread(each.ms / count, [q / count for q in each.quartiles])
        for name, each in found.items()
    }


def cost(
    steps: timing.Steps, case: Case, spread: timing.Spread, card: dict[str, Any]
) -> dict[str, Any]:
    """What a step moves and computes, and how fast it did."""
    analysis = steps.compiled.cost_analysis()
    kernels = hlo.kernels(steps.compiled.as_text())
    moved, flops = sum(kernel.bytes for kernel in kernels), analysis["flops"]
    floor = max(moved / card["copy_bytes_per_s"], flops / card[f"{case.dtype}_flops_per_s"])
    seconds = spread.ms / 1e3
    return {
        "compile_s": steps.compile_s,
        "kernels": len(kernels),
        "kernel_bytes": moved,
        "bytes": analysis["bytes accessed"],
        "flops": flops,
        "bytes_per_s": moved / seconds,
        "flops_per_s": flops / seconds,
        "floor_ms": floor * 1e3,
        "temp_bytes": steps.compiled.memory_analysis().temp_size_in_bytes,
    }

"""All checks that need a GPU, in nine minutes; one JSON file and one table.

    python scripts/gpu_check.py --out out/gpu
    python scripts/gpu_check.py --out out/gpu --parts steps kernels
    JAX_PLATFORMS=cpu python scripts/gpu_check.py --out out/tiny --tiny

The checkout is enough; jinv need not be installed. Each part is a file in `scripts/gpu`, and runs
in a process of its own: one that crashes takes nothing with it, and rows are written as they come.
Every part has a share of `--seconds`, after which it is ended; what it leaves goes to the next. In
this order, with their shares of 535 seconds:

    card           12  what the other times stand beside
    steps          85  DeepInversion of 84 images
    command        75  `jinv invert` from start to finish, against its steps alone
    switches       100  both positions of every switch in `jinv.backend`; dtypes; layouts
    shadow         25  shadow models to the device, the host and the disk
    kernels        33  of two of the steps: bytes and time of each
    gradients      40  gradient inversion
    strided        15  input gradients of ResNet-50's strided convolutions, against PyTorch
    tests          75  those marked `gpu`
    peers          35  ResNet-50's step against PyTorch, eager
    reconstructor  40  training steps of the published reconstructors, likewise

`--tiny` runs all this in sizes for a CPU. The status is 1 if a part failed, a test among them, but
not if time ran out. The folder holds `gpu_check.json`, `gpu_check.txt` (the table), for each part
its output, `PART.log`, and `kernels_NETWORK.json`. In the JSON:

    seconds             from start to end, and of each part
    parts               one after the other:
      part              its name
      status            "finished", "failed", "out of time" or "skipped", for want of time
      rows              what it found, with these keys:

    case, dtype         what is timed: network, images and pixels; or a layer; or a setting
    ms, quartiles       median and quartiles over rounds, of a step or a layer; of kernels the sum
                        over a step, null without a profile of it

    of card:
      device, cores     as JAX and the system name them
      versions          of Python and packages
      xla_flags         XLA_FLAGS
      copy_bytes_per_s  read and written while an array is copied
      bfloat16_flops_per_s, float32_flops_per_s   of products of large matrices, float32 in TF32
    of steps, some also of gradients:
      loop              "scan": ten steps in one program; "python": one by one
      compile_s         seconds to trace and compile
      kernels           in a step
      kernel_bytes      that these read and write, from shapes; an operand counts whole
      bytes, flops      of a step, as XLA counts
      bytes_per_s       kernel_bytes by ms
      flops_per_s       flops by ms
      floor_ms          kernel_bytes at the speed of copies or flops at that of products, the longer
      temp_bytes        memory beside arguments and results
      ms_a_seed         ms by seeds (gradients)
    of command:
      weights           "package", or "random" where none is installed
      steps             of both phases
      run_s             seconds of the run, as its summary says; seconds: of the process
      compile_s, stepping_s   parts of them, as the summary says
      steps_alone_s     the same steps without what a run does between them, in another process
      stepping_ratio    stepping_s by steps_alone_s
      run_ratio         run_s without compilation by steps_alone_s
    of switches:
      switch            field of `backend.Choices`, or "dtype" or "layout"
      now, best         position on this backend, and the fastest; null where users choose
      verdict           "change" if best is over 3% faster and the quartiles do not meet, or "keep"
      positions         of each: position, ms, quartiles
    of shadow:
      models, bytes_per_model
      device_s, host_s, store_s   seconds a model, to stay on the card, to the host, to disk
      host_bytes_per_s, store_bytes_per_s
    of kernels, slowest first, after sums over every kind:
      kernel            name of the HLO instruction; "all" for a sum
      kind              of the work
      count             kernels in the row
      shape, op_name    of its result; where it comes from in the program
    of strided, reconstructor and peers:
      torch_ms, torch_quartiles, torch_ratio   PyTorch's, and its time by ours (strided)
      peer, peer_ms, peer_quartiles, ratio     likewise; ms and quartiles are ours (the others)
      hours             that a million of our steps take (reconstructor)
      published_hours   that they took on one V100; null of other sizes
    of tests:
      test, outcome     name; "passed", "failed" or "skipped"
      seconds           of it
      message           of a failure, its end
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

SHARES = {
    "card": 12,
    "steps": 85,
    "command": 75,
    "switches": 100,
    "shadow": 25,
    "kernels": 33,
    "gradients": 40,
    "strided": 15,
    "tests": 75,
    "peers": 35,
    "reconstructor": 40,
}
LEAST = 5
"""Seconds without which a part is not begun."""
FLAGS = {
    # Kernels in graphs do not tell a profile where they come from.
    "kernels": "--xla_gpu_enable_command_buffer=",
    # Some tests ask for the same bits twice.
    "tests": "--xla_gpu_exclude_nondeterministic_ops=true",
}
"""XLA's, for a part."""
HIDDEN = ("quartiles", "torch_quartiles", "peer_quartiles", "op_name", "xla_flags", "temp_bytes")
"""What the table leaves to the JSON."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="to write")
    parser.add_argument("--parts", nargs="+", choices=list(SHARES)[1:], metavar="PART")
    parser.add_argument("--seconds", type=float, default=sum(SHARES.values()), help="for all")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU")
    return parser.parse_args(arguments)


def environment(part: str, out: Path) -> dict[str, str]:
    """Of a part's process: the checkout, one compilation cache, memory left to PyTorch."""
    paths = [str(ROOT / "scripts"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    flags = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS.get(part, '')}".strip()
    usual = {
        "JAX_PLATFORMS": "cuda,cpu",
        "JAX_COMPILATION_CACHE_DIR": str(out / "cache"),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    own = {
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
    }
    return usual | dict(os.environ) | own | ({"XLA_FLAGS": flags} if flags else {})


def run_part(part: str, out: Path, tiny: bool, seconds: float) -> dict[str, Any]:
    """Run a part and read its rows."""
    rows = out / f"{part}.jsonl"
    rows.unlink(missing_ok=True)
    start, status = time.perf_counter(), "skipped"
    if seconds >= LEAST:
        command = [sys.executable, "-m", "gpu.part", part, "--out", str(out)]
        with (out / f"{part}.log").open("w") as log:
            process = subprocess.Popen(
                [*command, "--tiny"] if tiny else command,
                cwd=ROOT,
                env=environment(part, out),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status = "failed" if process.wait(seconds) else "finished"
            except subprocess.TimeoutExpired:
                status = "out of time"
            finally:
                end(process)
    lines = rows.read_text().splitlines() if rows.exists() else []
    return {
        "part": part,
        "status": status,
        "seconds": round(time.perf_counter() - start, 1),
        "rows": [json.loads(line) for line in lines if line.endswith("}")],
    }


def end(process: subprocess.Popen) -> None:
    """End a part that runs, and whatever it has started."""
    if process.poll() is None:
        os.killpg(process.pid, 9)
        process.wait()


def table(found: dict[str, Any]) -> str:
    """A part as text: its status, then columns under the keys of its rows."""
    lines = [f"== {found['part']}: {found['status']}, {found['seconds']} s"]
    before: list[str] = []
    for row in found["rows"]:
        names = [name for name in row if name not in HIDDEN]
        cells = [text(row[name]) for name in names]
        widths = [max(len(name), 11) for name in names]
        if names != before:
            lines.append("  ".join(map(str.ljust, names, widths)))
            before = names
        lines.append("  ".join(map(str.ljust, cells, widths)))
    return "\n".join(lines) + "\n"


def text(value: Any) -> str:
    """A value as a cell."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(text, value))
    if isinstance(value, dict):
        return f"{value['position']}: {value['ms']:.4g}"
    return "-" if value is None else str(value)


def write(out: Path, parts: list[dict[str, Any]], seconds: float) -> None:
    """Write what is known so far."""
    for name, content in (
        ("gpu_check.json", json.dumps({"seconds": round(seconds, 1), "parts": parts}, indent=1)),
        ("gpu_check.txt", "\n".join(map(table, parts))),
    ):
        part = out / f"{name}.part"
        part.write_text(content + "\n")
        part.replace(out / name)


def main() -> int:
    """Run the parts; return the exit status."""
    args = parse()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    chosen = ["card", *(part for part in SHARES if part in (args.parts or list(SHARES)[1:]))]
    start, parts, given = time.perf_counter(), [], 0.0
    share = args.seconds / sum(SHARES[part] for part in chosen)
    for part in chosen:
        given += share * SHARES[part]
        parts.append(run_part(part, out, args.tiny, given - (time.perf_counter() - start)))
        write(out, parts, time.perf_counter() - start)
        print(table(parts[-1]), flush=True)
        if parts[-1]["status"] == "failed":
            log = (out / f"{part}.log").read_text()
            print(f"The end of {out / part}.log:\n{log[-3000:]}", flush=True)
        if part == "card" and parts[-1]["status"] != "finished":
            break  # nothing else can tell anything
    if len(parts) > 2:
        print((out / "gpu_check.txt").read_text())
    return int(any(part["status"] == "failed" for part in parts))


if __name__ == "__main__":
    sys.exit(main())

"""Taking turns on a shared machine, and what is written down about it."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jinv import backend, optimise
from jinv.attacks import deepinversion, gradient_inversion

QUIET = 0.1
"""Cores that other processes may use in a round that counts."""


Attack = deepinversion.Attack | gradient_inversion.Attack
Loop = Literal["python", "scan"]


class Peer(Protocol):
    """Something else that does the same work."""

    def run(self, steps: int) -> None:
        """Take so many steps, and wait until they are done."""


def others_seconds() -> float:
    """CPU seconds that other processes have used since the machine started (Linux; else 0)."""
    try:
        user, nice, system, _, _, irq, soft, steal = map(
            int, Path("/proc/stat").read_text().split(maxsplit=9)[1:9]
        )
    except OSError:
        return 0.0
    busy = (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")
    return busy - time.process_time()


@dataclasses.dataclass
class Round:
    """Seconds a step, and how many cores others used meanwhile."""

    ours: float
    peers: dict[str, float]
    others: float


class Steps:
    """Steps of an attack or a training without what `optimise.drive` does between them.

    Attributes:
      compiled: the program, of one step or of a chunk.
      compile_s: seconds to trace and compile it.
    """

    def __init__(
        self,
        step: Callable,
        state: Any,
        data: Any,
        loop: Loop | None = None,
        chunk: int = 10,
    ) -> None:
        """Compile them.

        Args:
          step: `(key, state, data) -> (state, info)`.
          state: before the first; taken over.
          data: that every step is told.
          loop: one program a step, or a chunk; by default as `optimise.drive` would.
          chunk: steps of a scan.
        """
        self._data, self._key, self._state = data, jax.random.key(0), state
        self._chunk = chunk if (loop or backend.choices().loop) == "scan" else 1
        clock, steps = optimise.Clock(), optimise.several(step, self._chunk)
        self.compiled = optimise.compile_step(steps, clock, self._key, self._state, self._data)
        self.compile_s = clock.compiling

    @classmethod
    def of(
        cls,
        attack: Attack,
        images: jax.Array,
        loop: Loop | None = None,
        chunk: int = 10,
        phase: int = 0,
    ) -> Steps:
        """Compile those of a phase of an attack.

        Args:
          attack: whose steps are taken.
          images: initial, lying where the attack wants them; they stay as they are.
          loop, chunk: see `Steps`.
          phase: whose steps.
        """
        chosen = attack.phases[phase]
        state = optimise.enter(chosen, jnp.array(images, copy=True), 0)
        return cls(chosen.step, state, attack.data, loop, chunk)

    def run(self, steps: int) -> None:
        """Take so many steps, a multiple of the chunk, and wait until they are done."""
        infos = []
        for _ in range(steps // self._chunk):
            self._state, info = self.compiled(self._key, self._state, self._data)
            infos.append(info)
        jax.device_get(infos)


def take_turns(ours: Peer, peers: Mapping[str, Peer], repeats: int, steps: int) -> list[Round]:
    """Rounds in which every side takes `steps` steps; stops after `repeats` quiet ones."""
    sides: dict[str, Peer] = {"ours": ours, **peers}
    for side in sides.values():
        side.run(steps)  # warms up
    rounds: list[Round] = []
    while len(quiet(rounds)) < repeats and len(rounds) < 3 * repeats:
        began, before = time.perf_counter(), others_seconds()
        spent = {}
        for name, side in sides.items():
            time.sleep(0.05)  # the other library's threads spin for a while after their work
            start = time.perf_counter()
            side.run(steps)
            spent[name] = (time.perf_counter() - start) / steps
        others = (others_seconds() - before) / (time.perf_counter() - began)
        rounds.append(Round(spent.pop("ours"), spent, others))
    return best(rounds, repeats)


def quiet(rounds: Sequence[Round]) -> list[Round]:
    """Those that other processes left alone."""
    return [r for r in rounds if r.others < QUIET]


def best(rounds: Sequence[Round], repeats: int) -> list[Round]:
    """The quiet ones, or so many of the quietest."""
    found = quiet(rounds)
    if len(found) >= repeats:
        return found
    return sorted(rounds, key=lambda r: r.others)[:repeats]


class Tolerance(NamedTuple):
    """How far two sides may differ.

    Attributes:
      size: of every value and of the gradient's norm, relative.
      direction: of the gradient, length of the difference at length 1.
    """

    size: float
    direction: float


EXACT = Tolerance(1e-6, 1e-6)
"""In float64."""
ROUNDED = {"float32": Tolerance(0.005, 0.1), "bfloat16": Tolerance(0.02, 0.3)}
"""On GPU, where float32 is multiplied in TF32: the rounding of every layer turns the gradient, but
hardly changes its size. A term of 1.1 times its weight is too large for either."""


def agreement(
    what: str,
    ours: tuple[Mapping[str, float], np.ndarray],
    theirs: tuple[Mapping[str, float], np.ndarray],
    tolerance: Tolerance,
) -> dict[str, float]:
    """Differences between two sides' values and gradients; ends the program if one is too large.

    Args:
      what: is compared.
      ours: our values by name, and our gradient.
      theirs: the same.
      tolerance: what is allowed.

    Returns:
      loss_difference, of the value that differs most; norm_difference, of the gradients; and
      direction_difference, the length of what lies between the gradients at length 1.
    """
    (values, gradient), (expected, expected_gradient) = ours, theirs
    if set(values) != set(expected):
        sys.exit(f"{what}: terms {sorted(values)} against {sorted(expected)}")
    norm, expected_norm = np.linalg.norm(gradient), np.linalg.norm(expected_gradient)
    between = gradient / norm - expected_gradient / expected_norm
    found = {
        # NumPy's maximum keeps a NaN, Python's may not.
        "loss_difference": float(np.max([_apart(values[name], expected[name]) for name in values])),
        "norm_difference": float(abs(norm / expected_norm - 1)),
        "direction_difference": float(np.linalg.norm(between)),
    }
    allowed = (tolerance.size, tolerance.size, tolerance.direction)
    if not all(value < most for value, most in zip(found.values(), allowed, strict=True)):
        told = ", ".join(f"{name} {value:.1e}" for name, value in found.items())
        sys.exit(f"{what} does not compute the same: {told}; {values} against {expected}")
    return found


def _apart(value: float, expected: float) -> float:
    """Relative difference; infinite from zero."""
    return abs(value / expected - 1) if expected else float("inf")


def step_mib(attack: Attack) -> float:
    """Memory that XLA plans for an attack's step beside its arguments, in MiB."""
    steps = Steps.of(attack, attack.initial(jax.random.key(0)), "python")
    return steps.compiled.memory_analysis().temp_size_in_bytes / 2**20


def row(case: str, peer: str, rounds: list[Round], **more: Any) -> dict[str, Any]:
    """What the rounds say of one peer."""
    ours = np.array([r.ours for r in rounds])
    peers = np.array([r.peers[peer] for r in rounds])
    return {
        "case": case,
        "peer": peer,
        "device": jax.devices()[0].device_kind,
        "ours_s": _median(ours),
        "peer_s": _median(peers),
        "ratio": _median(peers / ours),
        "ours_quartiles_s": _quartiles(ours),
        "peer_quartiles_s": _quartiles(peers),
        "ratio_quartiles": _quartiles(peers / ours),
        "n": len(rounds),
        "others": _median(np.array([r.others for r in rounds])),
        **more,
    }


def _median(values: Sequence[float] | np.ndarray) -> float:
    return float(np.median(values))


def _quartiles(values: Sequence[float] | np.ndarray) -> list[float]:
    return [float(q) for q in np.quantile(values, (0.25, 0.75))]


class Spread(NamedTuple):
    """Milliseconds of a call over several rounds.

    Attributes:
      ms: median.
      quartiles: lower and upper.
    """

    ms: float
    quartiles: list[float]


def alternate(
    ways: Mapping[str, Callable[[], Any]], rounds: int = 7, seconds: float = 0.03
) -> dict[str, Spread]:
    """Time several ways in turns, after a round that warms up.

    Args:
      ways: name -> a call that starts work, and returns JAX's arrays or has waited itself.
      rounds: of every way.
      seconds: that a round takes at least; its calls are waited for at its end.
    """
    calls = {name: _enough(way, seconds) for name, way in ways.items()}
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            found[name].append(_seconds(way, calls[name]) * 1e3)
    return {name: Spread(_median(each), _quartiles(each)) for name, each in found.items()}


def _enough(way: Callable[[], Any], seconds: float) -> int:
    """Calls that take so many seconds."""
    jax.block_until_ready(way())
    return max(1, round(seconds / min(_seconds(way, 1), _seconds(way, 1))))


def _seconds(way: Callable[[], Any], calls: int) -> float:
    """Seconds a call, of several that are waited for together."""
    start = time.perf_counter()
    for _ in range(calls):
        result = way()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / calls


def copy_rate(mebibytes: int = 256) -> float:
    """Bytes a second that the device reads and writes when it copies an array of this size."""
    values = jnp.zeros(mebibytes * 2**18, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    return 2 * values.nbytes / _best(lambda: copy(values))


def product_rate(dtype: str, side: int) -> float:
    """Floating-point operations a second of a product of two square matrices of noise."""
    a, b = jax.random.normal(jax.random.key(0), (2, side, side)).astype(dtype)
    product = jax.jit(jnp.matmul)
    return 2 * side**3 / _best(lambda: product(a, b))


def _best(way: Callable[[], Any]) -> float:
    """Seconds of a call when it is fastest."""
    calls = _enough(way, 0.02)
    return min(_seconds(way, calls) for _ in range(7))


def machine() -> dict[str, Any]:
    """What the numbers depend on besides the code."""
    import torch

    processor = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(ln.split(": ")[1] for ln in lines if ln.startswith("model name"))
    settings = (
        *("XLA_FLAGS", "GLIBC_TUNABLES", "MALLOC_ARENA_MAX", "LD_PRELOAD"),
        *("OMP_NUM_THREADS", "OMP_WAIT_POLICY"),
    )
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "environment": {name: os.environ[name] for name in settings if name in os.environ},
    }


def versions() -> dict[str, str]:
    """Of Python and of the packages that do the work."""
    packages = (
        "jax",
        "jaxlib",
        "flax",
        "optax",
        "numpy",
        "torch",
        "torchvision",
        "breaching",
        "opacus",
    )
    found = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def write(path: Path, rows: list[dict]) -> None:
    """Write what has been measured so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine(), "versions": versions(), "rows": rows}
    path.write_text(json.dumps(report, indent=2) + "\n")


def chosen(known: Sequence[Any], words: list[str] | None) -> list[Any]:
    """The cases whose names contain all of the words, all cases without words."""
    cases = [case for case in known if all(word in str(case) for word in words or ())]
    if not cases:
        told = " ".join(words or ())
        sys.exit(f"no case has {told!r} in its name; there are: {', '.join(map(str, known))}")
    return cases


def chosen_peers(known: Sequence[str], names: Sequence[str] | None) -> tuple[str, ...]:
    """The peers that are timed here: all on GPU, two on CPU; or those of them with these names."""
    here = known if jax.default_backend() == "gpu" else known[:2]
    unknown = sorted(set(names or ()) - set(here))
    if unknown:
        sys.exit(f"no peer {', '.join(unknown)} here; there are: {', '.join(here)}")
    return tuple(name for name in here if not names or name in names)


def prepare() -> None:
    """Let PyTorch use what JAX uses."""
    import torch

    if jax.default_backend() != "gpu":
        torch.set_num_threads(os.cpu_count() or 1)
        return
    if not torch.cuda.is_available():
        sys.exit("JAX sees a GPU and torch does not: install torch with CUDA, or JAX_PLATFORMS=cpu")
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")  # TF32, as XLA does


def report_rows(
    rows: Iterable[dict[str, Any]], path: Path, before: Sequence[dict[str, Any]] = ()
) -> None:
    """Print every row when it comes, and keep the file complete: what is there before, and rows."""
    print(f"{'case':50}{'peer':19}{'ours [s]':>9}{'peer [s]':>9}{'ratio':>7}{'n':>4}{'others':>8}")
    found: list[dict] = []
    for new in rows:
        found.append(new)
        print(
            f"{new['case']:50}{new['peer']:19}{new['ours_s']:9.3g}{new['peer_s']:9.3g}"
            f"{new['ratio']:7.2f}{new['n']:4}{new['others']:8.2f}",
            flush=True,
        )
        write(path, [*before, *found])
    if any(new["others"] > QUIET for new in found):
        print(
            "Other processes used the machine: PyTorch loses far more time to them than JAX, so "
            "those ratios say little. Measure again when it is idle; with OMP_WAIT_POLICY=passive "
            "PyTorch loses less."
        )

"""Shadow models a second, against PyTorch; where the time goes; and memory."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

from benchmarks import timing, torch_shadow
from jinv import prng
from jinv.shadow import Config, Privacy, generation, make_train, sampling, store
from jinv.shadow.config import make_head

IMAGES = 10_000
"""With features that shadow models are trained on."""
SECONDS = 0.5
"""That a side computes in a round, about."""
SEED = 5000
"""Models of a seed that is delivered, as in the paper."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One setting of arXiv 2505.14323.

    Attributes:
      data: "cifar", D = 1280; or "mnist", D = 256.
      class_size: N = 10 class_size.
      private: DP-SGD.
    """

    data: str
    class_size: int
    private: bool = False

    def __str__(self) -> str:
        return f"{self.data} N={10 * self.class_size}{' DP-SGD' if self.private else ''}"

    @property
    def width(self) -> int:
        """D."""
        return 1280 if self.data == "cifar" else 256

    @property
    def config(self) -> Config:
        """The paper's training."""
        if self.data == "cifar":
            privacy = Privacy(1.48, 1.2)
            epochs, decay, std = 38 + 10 * self.class_size, 1e-4, 2e-4
        else:
            privacy = Privacy(1.82, 4.0)
            epochs, decay, std = 26 + 6 * self.class_size, 1e-5, 2e-3
        return Config(
            epochs=epochs,
            lr=0.01,
            weight_decay=decay,
            init_std=std,
            privacy=privacy if self.private else None,
        )


CASES = (
    *(Case(data, size) for data in ("cifar", "mnist") for size in (1, 4)),
    *(Case(data, 1, private=True) for data in ("cifar", "mnist")),
)


def problem(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Features as a ReLU leaves them, that tell ten classes."""
    rng = np.random.default_rng(0)
    labels = (np.arange(IMAGES) % 10).astype(np.int32)
    centres = rng.normal(size=(10, case.width))
    features = rng.normal(size=(IMAGES, case.width)) + 0.3 * centres[labels]
    return np.maximum(features, 0).astype(np.float32), labels


def check_agreement(case: Case, features: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Relative differences of what training adds to weights, in float64; or ends the program.

    Of private training without its noise, all examples taking part: what is left is clipping.
    """
    config = case.config
    if config.privacy is not None:
        # From zero: on the row-space path private models draw initial weights in their own way.
        config = dataclasses.replace(
            config, privacy=Privacy(0.0, config.privacy.l2_norm_clip, 1.0), init_std=0.0
        )
    sets = sampling.balanced(labels, 0, case.class_size, 1)
    key = jax.random.key(0)
    with jax.enable_x64(True):
        x = jnp.asarray(features[sets.indices[0]], jnp.float64)
        trained = jax.jit(make_train(config))(key, x, sets.labels[0])
        expected = np.asarray(trained.parameters["weight"])
        initial = make_head(config).init(jax.random.split(key, 3)[0], case.width)
        start = np.asarray(initial["weight"])
    tx, ty = torch.tensor(np.asarray(x)), torch.tensor(sets.labels[0]).long()

    def fresh() -> nn.Linear:
        layer = nn.Linear(case.width, config.classes).double()
        layer.weight.data, layer.bias.data = torch.tensor(start), torch.zeros(10).double()
        return layer

    found: dict[str, np.ndarray] = {}
    if config.privacy is not None:
        if torch_shadow.has_opacus():
            found["opacus"] = _numbers(torch_shadow.private(config, tx, ty, fresh()).weight)
    else:
        found["pytorch_loop"] = _numbers(torch_shadow.published(config, tx, ty, fresh()).weight)
        batch = torch_shadow.batched(config, tx[None], ty[None], torch.tensor(start)[None])
        found["pytorch_batched"] = batch[0][0].numpy()
    differences = {}
    for peer, weight in found.items():
        moved = np.linalg.norm(expected - start)
        differences[peer] = float(np.linalg.norm(weight - expected) / moved)
        if not differences[peer] < 1e-5:
            sys.exit(f"{case}: {peer} trains other weights, by {differences[peer]:.1e}")
    return differences


def _numbers(parameter: torch.Tensor) -> np.ndarray:
    return parameter.detach().numpy()


def sides(
    case: Case, features: np.ndarray, labels: np.ndarray
) -> tuple[Callable[[], int], dict[str, Callable[[], int]]]:
    """Ours and the peers: every call trains some models, and says how many."""
    config = case.config
    factory = generation.Factory(
        config, features, 10 * case.class_size, jax.random.key(0), restarts=None
    )
    sets = sampling.balanced(labels, 0, case.class_size, IMAGES // (10 * case.class_size))
    seeds = iter(range(1, 2**31))

    def ours() -> int:
        return len(factory.seed(next(seeds), sets).loss)

    x, y = torch.tensor(features), torch.tensor(labels).long()
    indices = torch.tensor(sets.indices).long()

    def one_by_one(train: Callable[..., object]) -> Callable[[], int]:
        def run() -> int:
            chosen = indices[next(seeds) % len(indices)]
            train(config, x[chosen], y[chosen])
            return 1

        return run

    def batched(models: int) -> Callable[[], int]:
        def run() -> int:
            for some in indices.split(models):
                torch_shadow.batched(config, x[some], y[some])
            return len(indices)

        return run

    if case.private:
        peers = {"opacus": one_by_one(torch_shadow.private)} if torch_shadow.has_opacus() else {}
        return ours, peers
    # As many at once as is fastest here.
    tried = {models: _seconds(batched(models), 0)[0] for models in (16, 64, 256)}
    return ours, {
        "pytorch_loop": one_by_one(torch_shadow.published),
        "pytorch_batched": batched(min(tried, key=lambda models: tried[models])),
    }


def _seconds(run: Callable[[], int], least: float) -> tuple[float, int]:
    """Seconds a model, and models."""
    start, models = time.perf_counter(), 0
    while not models or time.perf_counter() - start < least:
        models += run()
    return (time.perf_counter() - start) / models, models


def take_turns(
    ours: Callable[[], int], peers: Mapping[str, Callable[[], int]], repeats: int
) -> list[timing.Round]:
    """Rounds of about equal time for every side; the quiet ones, or the quietest."""
    rounds: list[timing.Round] = []
    for run in (ours, *peers.values()):
        run()  # compiles, warms up
    while len(timing.quiet(rounds)) < repeats and len(rounds) < 3 * repeats:
        began, before = time.perf_counter(), timing.others_seconds()
        own = _seconds(ours, SECONDS)[0]
        spent = {name: _seconds(run, SECONDS)[0] for name, run in peers.items()}
        others = (timing.others_seconds() - before) / (time.perf_counter() - began)
        rounds.append(timing.Round(own, spent, others))
    return timing.best(rounds, repeats)


def measure(case: Case, repeats: int) -> Iterator[dict[str, Any]]:
    """One case against every peer."""
    features, labels = problem(case)
    differences = check_agreement(case, features, labels)
    ours, peers = sides(case, features, labels)
    if not peers:
        print(f"{case}: opacus is left out: {torch_shadow.OPACUS}")
        return
    rounds = take_turns(ours, peers, repeats)
    floor = 4 * 10 * (case.width + 1) / (timing.copy_rate() / 2)
    for name in peers:
        row = timing.row(str(case), name, rounds, weight_difference=differences[name])
        yield row | {"floor_s": floor, "floor_share": floor / row["ours_s"]}


def numbers(repeats: int) -> Iterator[dict[str, Any]]:
    """Nanoseconds a standard normal number, by every generator."""
    models, size = 256, (10, 1280)

    def drawn(change: Callable[[jax.Array], jax.Array], impl: str) -> Callable[[], object]:
        keys = jax.random.split(jax.random.key(0, impl=impl), models)
        draw = jax.jit(jax.vmap(lambda key: jax.random.normal(change(key), size)))
        return lambda: jax.block_until_ready(draw(keys))

    host = np.random.Generator(np.random.SFC64(0))
    ways: dict[str, Callable[[], object]] = {
        impl: drawn(lambda key: key, impl) for impl in ("threefry2x32", "rbg", "unsafe_rbg")
    }
    if jax.default_backend() == "cpu":
        ways["threefry2x32 written out (ours)"] = drawn(prng.written_out, "threefry2x32")
    ways["NumPy SFC64"] = lambda: host.standard_normal((models, *size), np.float32)
    for name, way in ways.items():
        way()
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            way()
            times.append(time.perf_counter() - start)
        nanoseconds = np.array(times) / (models * size[0] * size[1]) * 1e9
        yield {
            "case": "normal numbers",
            "generator": name,
            "nanoseconds": float(np.median(nanoseconds)),
            "quartiles": np.quantile(nanoseconds, (0.25, 0.75)).tolist(),
        }


def delivery(case: Case, models: int, folder: Path) -> dict[str, Any]:
    """Seconds a model when it stays on the device, comes to the host, and goes to a store.

    The second includes the first, and the third overlaps with the second, as in the command.

    Args:
      case: the setting; in float32.
      models: how many, about: whole seeds of 5000, or one seed.
      folder: for the store, which stays there; a new one.
    """
    features, labels = problem(case)
    examples, count = 10 * case.class_size, min(models, SEED)
    seeds = range(1, 1 + models // count)
    drawn = sampling.balanced(labels, 0, case.class_size, min(count, IMAGES // examples))
    rows = np.arange(count) % len(drawn.indices)  # there are fewer images than the paper's
    sets = sampling.Sets(drawn.indices[rows], drawn.labels[rows])
    factory = generation.Factory(case.config, features, examples, jax.random.key(0))
    told = store.Metadata(factory.layout, count, len(seeds), "float32", {"case": str(case)})
    target = store.Store.create(folder, told)

    def on_device() -> None:
        for seed in seeds:
            jax.block_until_ready(factory.on_device(seed, sets))

    def on_host() -> None:
        for seed in seeds:
            factory.seed(seed, sets)

    def to_disk() -> None:
        with contextlib.ExitStack() as writing:
            for seed in seeds:
                made = factory.seed(seed, sets)
                writing.close()
                writing.callback(target.write(seed - 1, *made))

    total, size = count * len(seeds), told.seed_bytes // count
    found: dict[str, Any] = {"case": str(case), "models": total, "bytes_per_model": size}
    for name, way in (("device_s", on_device), ("host_s", on_host), ("store_s", to_disk)):
        if way is not to_disk:
            way()  # compiles, and takes the host's memory for the first time
        start = time.perf_counter()
        way()
        found[name] = (time.perf_counter() - start) / total
    return found | {f"{n}_bytes_per_s": size / found[f"{n}_s"] for n in ("host", "store")}


_PEAK = """
import sys
sys.path.insert(0, "scripts")
from benchmarks import shadow
shadow.print_peak({models})
"""


def memory() -> Iterator[dict[str, Any]]:
    """Peak memory of a process that makes so many models, in MiB."""
    for models in (1_000, 10_000, 100_000, 1_000_000):
        done = subprocess.run(
            [sys.executable, "-c", _PEAK.format(models=models)],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parents[2],
        )
        peak = json.loads(done.stdout.splitlines()[-1])
        yield {"case": f"memory, {CASES[2]}", "models": models, **peak}


def print_peak(models: int) -> None:
    """Make so many models, 1000 a seed, and print the process's peak memory."""
    case = CASES[2]
    features, labels = problem(case)
    factory = generation.Factory(case.config, features, 10, jax.random.key(0))
    sets = sampling.balanced(labels, 0, 1, 1000)
    start = time.perf_counter()
    for seed in range(models // 1000):
        factory.seed(seed, sets)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"peak_mib": round(peak, 1), "seconds": round(seconds, 2)}))


def run(args: argparse.Namespace) -> None:
    """The `shadow` command."""
    words = args.cases or []
    rows: list[dict[str, Any]] = []
    if not words or "numbers" in words:
        for row in numbers(args.repeats):
            rows.append(row)
            print(f"{row['generator']:34}{row['nanoseconds']:8.2f} ns a number", flush=True)
    if not words or "memory" in words:
        for row in memory():
            rows.append(row)
            print(f"{row['models']:>9} models: peak {row['peak_mib']:.0f} MiB, {row['seconds']} s")
    if "delivery" in words:
        for case in CASES:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(delivery(case, SEED, Path(folder)))
            times = (f"{1e6 * rows[-1][name]:9.2f}" for name in ("device_s", "host_s", "store_s"))
            print(f"{case!s:24}{''.join(times)} us a model: device, host, store", flush=True)
    timing.write(args.out, rows)
    settings = [word for word in words if word not in ("numbers", "memory", "delivery")]
    if words and not settings:
        return
    cases = timing.chosen(CASES, settings)
    found = (row for case in cases for row in measure(case, args.repeats))
    timing.report_rows(found, args.out, rows)

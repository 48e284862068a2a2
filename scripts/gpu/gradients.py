"""Steps of gradient inversion."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from benchmarks import timing
from gpu import cases, steps
from gpu.part import Given
from jinv import models
from jinv.attacks import gradient_inversion
from jinv.federated import evidence


@dataclasses.dataclass(frozen=True)
class Case:
    """The gradient of so many images, and seeds that are reconstructed at once."""

    network: str
    images: int
    size: int
    seeds: int

    def __str__(self) -> str:
        return f"{self.network} {self.images}x{self.size}, {self.seeds} seeds"


CASES = (
    Case("resnet18", 1, 64, 8),
    Case("mobilenet_v2", 1, 224, 1),
    Case("lenet", 1, 28, 8),
)
SEVERAL = Case("resnet18", 2, 64, 8)
TINY = Case("tiny", 2, 16, 2)


def run(given: Given) -> None:
    """One row a case; times are of all seeds."""
    for case in (TINY,) if given.tiny else CASES:
        built = attack(case)
        images = built.initial(jax.random.key(0))
        made = timing.Steps.of(built, images, "scan", steps.CHUNK)
        spread = steps.timed({"": made}, 1 if given.tiny else 3)[""]
        given.emit(
            case=str(case),
            dtype="float32",
            loop="scan",
            **spread._asdict(),
            ms_a_seed=spread.ms / case.seeds,
            compile_s=made.compile_s,
            temp_bytes=made.compiled.memory_analysis().temp_size_in_bytes,
        )


@functools.cache
def attack(case: Case, formed: bool = False) -> gradient_inversion.Attack:
    """GradInversion without a group, on the gradient of noise.

    Args:
      case: what is attacked.
      formed: all gradients, one image after the other.
    """
    net = cases.tiny() if case.network == "tiny" else models.load(case.network, None)
    channels = net.preprocessing.channels
    images = jax.random.normal(jax.random.key(1), (case.images, case.size, case.size, channels))
    labels = list(range(case.images))
    held, _ = evidence.simulate(net, images, labels, statistics="running")
    config = gradient_inversion.Config(steps=100_000, seeds=case.seeds, group=0.0)
    execution = gradient_inversion.Execution(devices=1, images_at_once=1 if formed else None)
    return gradient_inversion.build(config, net, held, labels, size=case.size, execution=execution)


def ten_steps(case: Case, formed: bool) -> Callable[[], Any]:
    """As the switches stand now."""
    built = attack(case, formed)
    made = timing.Steps.of(built, built.initial(jax.random.key(0)), chunk=steps.CHUNK)
    return lambda: made.run(steps.CHUNK)

"""ResNet-50's step beside PyTorch's eager one, with images laid either way, in one process."""

from __future__ import annotations

import jax
from torch import nn

from benchmarks import timing
from benchmarks.inversion import problem
from benchmarks.torch_inversion import SAME, TorchInversion, torch_network, with_statistics
from gpu import cases, steps
from gpu.part import Given


def run(given: Given) -> None:
    """One row a peer. `scripts/benchmark.py` has a compiled one, which takes over a minute."""
    if not given.tiny:
        timing.prepare()
    case = cases.TINY if given.tiny else cases.RESNET50
    attack = cases.attack(case)
    ours = timing.Steps.of(attack, attack.initial(jax.random.key(0)), "scan", steps.CHUNK)
    images, targets = problem(case.batch, case.size)
    bounds = attack.space.black, attack.space.white
    net = with_statistics(tiny()) if given.tiny else torch_network(case.network)
    for name in ("pytorch_channels_last", "pytorch_frozen"):
        rest = (images, targets % 10 if given.tiny else targets, bounds, 100_000, case.dtype)
        peer = TorchInversion(name, [net], [SAME], *rest)
        found = steps.timed({"ours": ours, "peer": peer}, 1 if given.tiny else 3)
        given.emit(
            **steps.told(case),
            peer=name,
            **found["ours"]._asdict(),
            peer_ms=found["peer"].ms,
            peer_quartiles=found["peer"].quartiles,
            ratio=found["peer"].ms / found["ours"].ms,
        )


def tiny() -> nn.Module:
    """For `--tiny`."""
    block = (nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU6())
    other = (nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU6())
    pooled = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    return nn.Sequential(*block, *other, *pooled).eval()

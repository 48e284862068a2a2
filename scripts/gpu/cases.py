"""What is timed: DeepInversion of a network on so many images, as published."""

from __future__ import annotations

import dataclasses
import functools

from flax import nnx
from jax import Array

from jinv import models
from jinv.attacks import deepinversion
from jinv.image import Preprocessing
from jinv.models import layers
from jinv.net import Net
from jinv.objective.terms import Member


@dataclasses.dataclass(frozen=True)
class Case:
    """A network of the zoo, or "tiny", on square images."""

    network: str
    batch: int
    size: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.network} {self.batch}x{self.size}"


RESNET50 = Case("resnet50", 84, 224, "bfloat16")
MOBILENET_V2 = Case("mobilenet_v2", 84, 224, "bfloat16")
TINY = Case("tiny", 2, 16, "bfloat16")


def in_float32(case: Case) -> Case:
    """The same without rounding to bfloat16."""
    return dataclasses.replace(case, dtype="float32")


@functools.cache
def attack(case: Case) -> deepinversion.Attack:
    """One long phase at full resolution; random weights, which take as long as others."""
    net = tiny() if case.network == "tiny" else models.load(case.network, None)
    jitter = min(30, case.size // 4)
    config = deepinversion.Config(phases=(deepinversion.Phase(100_000, jitter=jitter),))
    classes = [i % net.classes for i in range(case.batch)]
    return deepinversion.build(
        config, [Member(net)], classes, size=case.size, compute_dtype=case.dtype
    )


class Tiny(nnx.Module):
    """A convolution, BatchNorm, ReLU6, and a linear layer."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = layers.Conv2d(3, 8, 3, stride=2, padding=1, rngs=rngs)
        self.norm = layers.BatchNorm2d(8)
        self.head = layers.Linear(8, 10, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """(B, H, W, 3) -> logits (B, 10)."""
        return self.head(layers.relu6(self.norm(self.conv(x))).mean((1, 2)))


def tiny() -> Net:
    """For `--tiny`."""
    space = Preprocessing(16, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    return Net.from_nnx(Tiny(nnx.Rngs(0)), space, name="tiny")

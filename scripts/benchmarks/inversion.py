"""One DeepInversion step of one network."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from torch import nn

import weights_convert
from benchmarks import timing
from benchmarks.torch_inversion import (
    JITTER,
    L2,
    LR,
    SAME,
    TV_L2,
    TorchInversion,
    torch_network,
)
from jinv import models, optimise
from jinv.attacks import deepinversion
from jinv.net import Net
from jinv.objective.terms import Member


@dataclasses.dataclass(frozen=True)
class Case:
    """One network on so many square images."""

    network: str
    batch: int
    size: int
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"{self.network} {self.batch}x{self.size} {self.dtype}"


CASES = (
    Case("resnet18", 4, 128),
    Case("resnet50", 4, 128),
    Case("mobilenet_v2", 8, 112),
    Case("mobilenet_v2", 8, 224),
    Case("efficientnet_lite0", 8, 112),
    Case("efficientnet_lite0", 8, 224),
)
GPU_CASES = (*CASES, Case("resnet50", 84, 224, "bfloat16"))


def ported(name: str, net: nn.Module) -> Net:
    """Our network with the torch network's weights."""
    state = {key: value.detach().numpy() for key, value in net.state_dict().items()}
    variables = weights_convert.to_flax(state, models.template(name))
    return dataclasses.replace(
        models.load(name, None), variables=jax.tree.map(jnp.asarray, variables)
    )


def our_attack(
    net: Net, case: Case, targets: np.ndarray, phase: deepinversion.Phase, **changes: Any
) -> deepinversion.Attack:
    """The published ImageNet settings, which are the config's defaults."""
    config = deepinversion.Config(phases=(phase,), lr=LR, tv_l2=TV_L2, l2=L2, **changes)
    return deepinversion.build(
        config, [Member(net)], targets.tolist(), size=case.size, compute_dtype=case.dtype
    )


def our_loss_and_gradient(
    net: Net, case: Case, images: np.ndarray, targets: np.ndarray
) -> tuple[float, np.ndarray]:
    """Of these images, without augmentation: a step of plain descent shows the gradient."""
    rate = 2.0**24  # so large that the images do not round the gradient off
    attack = our_attack(
        net,
        dataclasses.replace(case, dtype=str(images.dtype)) if images.dtype != "float32" else case,
        targets,
        deepinversion.Phase(2, jitter=0, lr=rate),
        optimizer="sgd",
        optimizer_args={},
        schedule="constant",
        warmup=0,
        flip=0.0,
        clip=False,
    )
    (phase,) = attack.phases
    state = optimise.enter(phase, jnp.asarray(images), 0)
    state, info = jax.jit(phase.step)(jax.random.key(0), state, attack.data)
    return float(info.loss), (images - np.asarray(state.images)) / rate


def check_agreement(
    case: Case, peer: str, torch_net: nn.Module, net: Net, images: np.ndarray, targets: np.ndarray
) -> dict[str, float]:
    """Relative differences of loss and gradient; ends the program if the work is not the same.

    In float64 on CPU: in float32 rounding moves a few ReLUs over their kink, which alone changes
    ResNet-50's gradient by 1e-2, on either side. GPUs compute as they will be timed.
    """
    on_cpu = jax.default_backend() == "cpu"
    tolerance = 1e-6 if on_cpu else 0.2 if case.dtype == "bfloat16" else 0.05
    with jax.enable_x64(on_cpu):
        if on_cpu:
            images = images.astype(np.float64)
            torch_net = copy.deepcopy(torch_net).double()
        bounds = net.preprocessing.black, net.preprocessing.white
        side = TorchInversion(peer, [torch_net], [SAME], images, targets, bounds, 2, case.dtype)
        expected, expected_gradient = side.loss_and_gradient()
        loss, gradient = our_loss_and_gradient(net, case, images, targets)
    return timing.agreement(
        f"{case}: {peer}", (loss, gradient), (expected, expected_gradient), tolerance
    )


def measure(case: Case, peers: tuple[str, ...], repeats: int, steps: int) -> Iterator[dict]:
    """One case against every peer."""
    torch_net = torch_network(case.network)
    net = ported(case.network, torch_net)
    images, targets = problem(case.batch, case.size)
    bounds = net.preprocessing.black, net.preprocessing.white
    total = steps * (1 + 3 * repeats)
    sides = {
        name: TorchInversion(name, [torch_net], [SAME], images, targets, bounds, total, case.dtype)
        for name in peers
    }
    differences = {
        name: check_agreement(case, name, torch_net, net, images, targets) for name in peers
    }
    attack = our_attack(net, case, targets, deepinversion.Phase(total, jitter=JITTER))
    rounds = timing.take_turns(attack, jnp.asarray(images), sides, repeats, steps)
    for name, difference in differences.items():
        yield timing.row(str(case), name, rounds, **difference)


def problem(batch: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise (B, H, W, 3), and a class for each image."""
    generator = np.random.default_rng(0)
    images = generator.normal(size=(batch, size, size, 3)).astype(np.float32)
    return images, generator.integers(0, 1000, batch)


def run(args: argparse.Namespace) -> None:
    """The `inversion` command."""
    on_gpu = jax.default_backend() == "gpu"
    peers: tuple[str, ...] = ("pytorch_frozen", "pytorch_published")
    if on_gpu:
        peers = (*peers, "pytorch_compiled")
    cases = timing.chosen(GPU_CASES if on_gpu else CASES, args.cases)
    measured = (measure(case, peers, args.repeats, args.steps) for case in cases)
    timing.report_rows(itertools.chain.from_iterable(measured), args.out)

"""One DeepInversion step of one network."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

from benchmarks import timing
from benchmarks.torch_inversion import (
    JITTER,
    L2,
    LR,
    PEERS,
    SAME,
    TV_L2,
    TorchInversion,
    torch_network,
)
from jinv import models, optimise
from jinv.attacks import deepinversion
from jinv.net import Net
from jinv.objective.terms import Member, term_weights


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
GPU_CASES = (
    *CASES,
    *(
        Case(network, 84, 224, dtype)
        for network in ("resnet50", "mobilenet_v2")
        for dtype in ("bfloat16", "float32")
    ),
)


def ported(name: str, net: nn.Module) -> Net:
    """Our network with the torch network's weights."""
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:  # random ones take longer to draw
        torch.save(net.state_dict(), file)
        file.flush()
        return models.load(name, file.name)


def our_attack(
    net: Net, case: Case, targets: np.ndarray, phase: deepinversion.Phase, **changes: Any
) -> deepinversion.Attack:
    """The published ImageNet settings, which are the config's defaults."""
    config = deepinversion.Config(phases=(phase,), lr=LR, tv_l2=TV_L2, l2=L2, **changes)
    return deepinversion.build(
        config, [Member(net)], targets.tolist(), size=case.size, compute_dtype=case.dtype
    )


class Evaluated(NamedTuple):
    """What both sides say of the initial images, as they are.

    Attributes:
      loss: of all terms.
      terms: name -> value times weight.
      gradient: (B, H, W, C), of the loss.
    """

    loss: float
    terms: dict[str, float]
    gradient: np.ndarray


def our_evaluation(net: Net, case: Case, images: np.ndarray, targets: np.ndarray) -> Evaluated:
    """Without augmentation: a step of plain descent shows the gradient."""
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
    weights = {**term_weights(attack.members[0]), "tv_l2": TV_L2, "l2": L2}
    terms = {name: weights[name] * float(value) for name, value in info.terms.items()}
    return Evaluated(float(info.loss), terms, (images - np.asarray(state.images)) / rate)


def their_evaluation(side: TorchInversion) -> Evaluated:
    """By the objective that is timed."""
    terms, gradient = side.terms_and_gradient()
    return Evaluated(sum(terms.values()), terms, gradient)


def check_agreement(
    what: str, ours: Evaluated, theirs: Evaluated, tolerance: timing.Tolerance
) -> dict[str, float]:
    """Differences between the sides; ends the program if one does not do the work.

    Term by term, so that a small one counts as much as a large one; and what is differentiated must
    be their sum.
    """
    differences = timing.agreement(
        what, (ours.terms, ours.gradient), (theirs.terms, theirs.gradient), tolerance
    )
    if not abs(ours.loss - sum(ours.terms.values())) < 1e-6 * abs(ours.loss):
        sys.exit(f"{what}: our loss {ours.loss} is not the sum of its weighted terms {ours.terms}")
    return differences


def differences(
    case: Case,
    sides: Mapping[str, TorchInversion],
    torch_net: nn.Module,
    net: Net,
    images: np.ndarray,
    targets: np.ndarray,
) -> dict[str, dict[str, float]]:
    """For each peer, `check_agreement` with us.

    On CPU in float64: in float32 rounding moves a few ReLUs over their kink, which alone changes
    ResNet-50's gradient by 1e-2, on either side. GPUs compute as they will be timed, PyTorch by the
    very program, which takes a minute to compile.

    Args:
      case: what is timed.
      sides: the peers that are timed.
      torch_net: their network.
      net: ours, of the same weights.
      images: initial.
      targets: classes.
    """
    if jax.default_backend() == "gpu":
        ours = our_evaluation(net, case, images, targets)
        tolerance = timing.ROUNDED[case.dtype]
        return {
            name: check_agreement(f"{case}: {name}", ours, their_evaluation(side), tolerance)
            for name, side in sides.items()
        }
    found = {}
    with jax.enable_x64(True):
        images = images.astype(np.float64)
        ours = our_evaluation(net, case, images, targets)
        bounds = net.preprocessing.black, net.preprocessing.white
        wide = copy.deepcopy(torch_net).double()
        for name in sides:
            side = TorchInversion(name, [wide], [SAME], images, targets, bounds, 2, "float64")
            what = f"{case}: {name}"
            found[name] = check_agreement(what, ours, their_evaluation(side), timing.EXACT)
    return found


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
    checked = differences(case, sides, torch_net, net, images, targets)
    attack = our_attack(net, case, targets, deepinversion.Phase(total, jitter=JITTER))
    ours = timing.Steps.of(attack, jnp.asarray(images), chunk=steps)
    rounds = timing.take_turns(ours, sides, repeats, steps)
    for name in peers:
        yield timing.row(str(case), name, rounds, **checked[name])


def problem(batch: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise (B, H, W, 3), and a class for each image."""
    generator = np.random.default_rng(0)
    images = generator.normal(size=(batch, size, size, 3)).astype(np.float32)
    return images, generator.integers(0, 1000, batch)


def run(args: argparse.Namespace) -> None:
    """The `inversion` command."""
    peers = timing.chosen_peers(PEERS, args.peers)
    known = GPU_CASES if jax.default_backend() == "gpu" else CASES
    cases = timing.chosen(known, args.cases)
    measured = (measure(case, peers, args.repeats, args.steps) for case in cases)
    timing.report_rows(itertools.chain.from_iterable(measured), args.out)

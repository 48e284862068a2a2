"""One step of gradient inversion, and what comes back after some."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx
from jax import Array
from PIL import Image
from torch import Tensor, nn

import weights_convert
from benchmarks import timing
from benchmarks.inversion import ported
from benchmarks.torch_gradients import (
    CONVNET_POOLED,
    CONVNET_WIDTHS,
    INSTALL,
    LENET_STRIDES,
    Breaching,
    TorchMatching,
    has_breaching,
    network,
    sent,
)
from jinv import image, optimise
from jinv.attacks import gradient_inversion
from jinv.attacks.gradient_inversion import Attack, Config, Execution
from jinv.federated import evidence
from jinv.federated.evidence import Evidence
from jinv.image import Preprocessing
from jinv.models.layers import BatchNorm2d, Conv2d, Linear
from jinv.models.pooling import max_pool
from jinv.net import Net

# What breaching's configuration says, in ours; its Euclidean distance is half the square. The two
# packages' total variations differ: breaching's is a mean of |dx| + |dy|.
RECIPES = {
    "seethroughgradients": Config(
        distance="squared_l2",
        gradient=0.5e-4,
        first_bn_multiplier=10.0,
        noise=0.01,
        group=0.0,
    ),
    "invertinggradients": Config(
        distance="cosine",
        gradient=1.0,
        signed=True,
        warmup=0,
        tv_l2=1e-3,
        l2=0.0,
        batch_norm=0.0,
        noise=0.0,
        group=0.0,
    ),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One network's gradient of so many square images.

    Attributes:
      network: "lenet", "convnet" (both breaching's), or a name of the zoo.
      images: behind the gradient.
      size: of them, in pixels.
      recipe: breaching's name of it.
      seeds: reconstructed at once.
      steps: after which reconstructions are compared; 0 for no comparison.
    """

    network: str
    images: int
    size: int
    recipe: str
    seeds: int = 1
    steps: int = 0

    def __str__(self) -> str:
        several = f" {self.seeds} seeds" if self.seeds > 1 else ""
        return f"{self.network} {self.images}x{self.size} {self.recipe}{several}"


CASES = (
    Case("lenet", 1, 32, "invertinggradients", steps=300),
    Case("lenet", 1, 32, "invertinggradients", seeds=8),
    Case("convnet", 1, 32, "invertinggradients"),
    Case("convnet", 1, 32, "invertinggradients", seeds=8),
    Case("convnet", 1, 32, "seethroughgradients"),
    Case("resnet18", 1, 64, "seethroughgradients", steps=150),
    Case("resnet18", 4, 64, "seethroughgradients"),
    Case("resnet18", 1, 64, "seethroughgradients", seeds=8),
    Case("mobilenet_v2", 1, 112, "seethroughgradients"),
    Case("mobilenet_v2", 1, 112, "seethroughgradients", seeds=8),
    Case("mobilenet_v2", 1, 224, "seethroughgradients"),
)
LEAN: tuple[tuple[Case, dict[str, Any]], ...] = (
    (Case("resnet18", 8, 64, "seethroughgradients"), {"gradients": "formed"}),
    (Case("resnet18", 8, 64, "seethroughgradients"), {"images_at_once": 2}),
    (Case("mobilenet_v2", 4, 224, "seethroughgradients"), {"gradients": "formed"}),
    (Case("mobilenet_v2", 4, 224, "seethroughgradients"), {"images_at_once": 1}),
    (Case("resnet18", 1, 64, "seethroughgradients", seeds=8), {"seeds_at_once": 2}),
)
PHOTOGRAPHS = ("chelsea", "coffee", "astronaut", "rocket")
CIFAR10 = Preprocessing(32, (0.4915, 0.4823, 0.4468), (0.2470, 0.2435, 0.2616))


class ConvNet(nnx.Module):
    """`torch_gradients.convnet`."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        inputs = 3
        for i, outputs in enumerate(CONVNET_WIDTHS):
            setattr(self, f"conv{i}", Conv2d(inputs, outputs, 3, padding=1, bias=True, rngs=rngs))
            setattr(self, f"bn{i}", BatchNorm2d(outputs))
            inputs = outputs
        self.linear = Linear(9 * inputs, 10, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """(B, 32, 32, 3) -> logits (B, 10)."""
        for i in range(len(CONVNET_WIDTHS)):
            x = nnx.relu(getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x)))
            if i in CONVNET_POOLED:
                x = max_pool(x, 3, 3)
        return self.linear(x.transpose(0, 3, 1, 2).reshape(len(x), -1))


class LeNet(nnx.Module):
    """`torch_gradients.lenet`."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        inputs = 3
        for i, stride in enumerate(LENET_STRIDES):
            layer = Conv2d(inputs, 12, 5, stride=stride, padding=2, bias=True, rngs=rngs)
            setattr(self, f"conv{i}", layer)
            inputs = 12
        self.linear = Linear(64 * inputs, 10, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """(B, 32, 32, 3) -> logits (B, 10)."""
        for i in range(len(LENET_STRIDES)):
            x = nnx.sigmoid(getattr(self, f"conv{i}")(x))
        return self.linear(x.transpose(0, 3, 1, 2).reshape(len(x), -1))


SMALL = {"lenet": LeNet, "convnet": ConvNet}


def our_network(name: str, torch_net: nn.Module) -> Net:
    """With the torch network's weights."""
    if name not in SMALL:
        return ported(name, torch_net)
    net = Net.from_nnx(SMALL[name](nnx.Rngs(0)), CIFAR10)
    state = {key: value.numpy() for key, value in torch_net.state_dict().items()}
    variables = weights_convert.to_flax(state, net.variables)
    return dataclasses.replace(net, variables=jax.tree.map(jnp.asarray, variables))


@dataclasses.dataclass(frozen=True)
class Problem:
    """What every side gets.

    Attributes:
      secret: the client's images, normalised.
      labels: theirs.
      sent: the client's gradient.
      initial: (seeds, K, H, W, C).
      space: of the images, at their size.
    """

    secret: np.ndarray
    labels: np.ndarray
    sent: list[Tensor]
    initial: np.ndarray
    space: Preprocessing


def problem(case: Case, torch_net: nn.Module, net: Net, first: int = 0) -> Problem:
    """Photographs from the `first` on, labels as they come."""
    usual = net.preprocessing
    space = Preprocessing(case.size, usual.mean, usual.std, usual.pixel_range)
    names = [PHOTOGRAPHS[(first + i) % len(PHOTOGRAPHS)] for i in range(case.images)]
    secret = image.stack_square([photograph(name) for name in names], space)
    generator = np.random.default_rng(first)
    labels = generator.integers(0, net.classes, case.images)
    initial = generator.normal(size=(case.seeds, *secret.shape)).astype(np.float32)
    return Problem(secret, labels, sent(torch_net, secret, labels), initial, space)


@functools.cache
def photograph(name: str) -> Image.Image:
    """One of scikit-image's."""
    try:
        from skimage import data
    except ImportError:
        sys.exit("photographs are needed: pip install scikit-image")
    return Image.fromarray(getattr(data, name)())


def recipe(case: Case, steps: int) -> Config:
    """The case's, for so many steps."""
    return dataclasses.replace(RECIPES[case.recipe], steps=steps, seeds=case.seeds)


def our_attack(
    config: Config, net: Net, torch_net: nn.Module, given: Problem, **execution: Any
) -> Attack:
    """On the same gradient; `execution` as in `gradient_inversion.Execution`."""
    names = [name for name, _ in torch_net.named_parameters()]
    state = {name: g.cpu().numpy() for name, g in zip(names, given.sent, strict=True)}
    values = weights_convert.to_flax(state, evidence.parameters(net))
    held = Evidence(values, len(given.labels), statistics="running")
    return gradient_inversion.build(
        config,
        net,
        held,
        given.labels.tolist(),
        size=given.space.size,
        execution=Execution(devices=1, **execution),
    )


def our_loss_and_gradient(
    config: Config, net: Net, torch_net: nn.Module, given: Problem
) -> tuple[float, np.ndarray]:
    """Of the initial images: Adam's first moment after one step is a tenth of the gradient."""
    plain = dataclasses.replace(
        config, steps=1, warmup=1, seeds=1, noise=0.0, clip=False, signed=False
    )
    attack = our_attack(plain, net, torch_net, given)
    (phase,) = attack.phases
    state = optimise.enter(phase, jnp.asarray(given.initial[:1]), 0)
    state, info = jax.jit(phase.step)(jax.random.key(0), state, attack.data)
    return float(info.loss), np.asarray(optax.tree.get(state.optimizer, "mu"))[0] / 0.1


def check_agreement(
    case: Case, peer: str, net: Net, torch_net: nn.Module, given: Problem
) -> dict[str, float]:
    """Relative differences of loss and gradient; ends the program if the work is not the same.

    In float64 on CPU. With breaching the distance of gradients alone, as it defines priors of
    images otherwise; with PyTorch all terms, the distance weighted up so that it counts.
    """
    on_cpu = jax.default_backend() == "cpu"
    tolerance = timing.EXACT if on_cpu else timing.Tolerance(0.05, 0.05)
    config = recipe(case, 1)
    with jax.enable_x64(on_cpu):
        if on_cpu:
            torch_net = copy.deepcopy(torch_net).double()
            given = dataclasses.replace(
                given,
                sent=[g.double() for g in given.sent],
                initial=given.initial.astype(np.float64),
            )
            net = dataclasses.replace(net, variables=jax.tree.map(_double, net.variables))
        shared = (torch_net, given.sent, given.initial[0], given.labels, given.space)
        if peer == "breaching":
            config = dataclasses.replace(
                config, tv_l2=0.0, l2=0.0, batch_norm=0.0, first_bn_multiplier=1.0
            )
            side: Breaching | TorchMatching = Breaching(
                case.recipe, *shared, steps=1, matching_alone=True
            )
        else:
            config = dataclasses.replace(config, gradient=1.0)
            side = TorchMatching(config, *shared)
        expected, expected_gradient = side.loss_and_gradient()
        loss, gradient = our_loss_and_gradient(config, net, torch_net, given)
    return timing.agreement(
        f"{case}: {peer}",
        ({"loss": loss}, gradient),
        ({"loss": expected}, expected_gradient),
        tolerance,
    )


def _double(leaf: Array) -> Array:
    wide = jnp.issubdtype(leaf.dtype, jnp.floating)
    return jnp.asarray(np.asarray(leaf), jnp.float64 if wide else leaf.dtype)


class InTurn:
    """Several peers, each of which takes its steps."""

    def __init__(self, peers: Sequence[timing.Peer]) -> None:
        self.peers = peers

    def run(self, steps: int) -> None:
        """Take so many steps of each."""
        for peer in self.peers:
            peer.run(steps)


def measure(case: Case, repeats: int, steps: int) -> Iterator[dict]:
    """One case against every peer; times are of one seed."""
    torch_net = network(case.network)
    net = our_network(case.network, torch_net)
    given = problem(case, torch_net, net)
    steps = max(steps // case.seeds, 1)
    total = steps * (1 + 3 * repeats)
    config = recipe(case, total)
    names = ["pytorch", "breaching"] if has_breaching() else ["pytorch"]
    checked = {name: check_agreement(case, name, net, torch_net, given) for name in names}
    peers: dict[str, timing.Peer] = {}
    for name in names:
        seeds: list[timing.Peer] = []
        for initial in given.initial:
            shared = (torch_net, given.sent, initial, given.labels, given.space)
            if name == "breaching":
                seeds.append(Breaching(case.recipe, *shared, steps=total))
            else:
                seeds.append(TorchMatching(config, *shared))
        peers[name] = InTurn(seeds)
    if case.seeds > 1:
        alone = dataclasses.replace(config, seeds=1)
        one = our_attack(alone, net, torch_net, given)
        peers["single_seeds"] = InTurn(
            [timing.Steps.of(one, jnp.asarray(each[None]), chunk=steps) for each in given.initial]
        )
    attack = our_attack(config, net, torch_net, given)
    ours = timing.Steps.of(attack, jnp.asarray(given.initial), chunk=steps)
    found = timing.take_turns(ours, peers, repeats, steps)
    rounds = [
        timing.Round(r.ours / case.seeds, {k: v / case.seeds for k, v in r.peers.items()}, r.others)
        for r in found
    ]
    for name in peers:
        more = checked.get(name, {})
        if name == "breaching" and case.steps:
            more = more | compare_reconstructions(case, net, torch_net)
        yield timing.row(str(case), name, rounds, **more)


def lean(case: Case, execution: dict[str, Any], repeats: int, steps: int) -> Iterator[dict]:
    """What an option costs in time (ratio above 1: so much slower) and saves in memory."""
    torch_net = network(case.network)
    net = our_network(case.network, torch_net)
    given = problem(case, torch_net, net)
    shared = (recipe(case, steps * (1 + 3 * repeats)), net, torch_net, given)
    attack, other = our_attack(*shared), our_attack(*shared, **execution)
    name = ", ".join(f"{option}={value}" for option, value in execution.items())
    ours, peer = (
        timing.Steps.of(each, jnp.asarray(given.initial), chunk=steps) for each in (attack, other)
    )
    rounds = timing.take_turns(ours, {name: peer}, repeats, steps)
    memory = {"ours_mib": timing.step_mib(attack), "peer_mib": timing.step_mib(other)}
    yield timing.row(f"lean {case}", name, rounds, **memory)


def compare_reconstructions(case: Case, net: Net, torch_net: nn.Module) -> dict[str, float]:
    """Mean PSNR over the photographs in dB, ours and breaching's, after the case's steps."""
    ours, theirs = [], []
    for first in range(len(PHOTOGRAPHS)):
        given = problem(case, torch_net, net, first)
        attack = our_attack(recipe(case, case.steps), net, torch_net, given)
        key = jax.random.key(first)
        state = optimise.run(attack.phases, key, jnp.asarray(given.initial), attack.data)
        ours.append(psnr(np.asarray(state.best_images[0]), given))
        torch.manual_seed(first)
        shared = (torch_net, given.sent, given.initial[0], given.labels, given.space)
        theirs.append(psnr(Breaching(case.recipe, *shared, steps=case.steps).reconstruct(), given))
    return {"psnr_ours": float(np.mean(ours)), "psnr_peer": float(np.mean(theirs))}


def psnr(images: np.ndarray, given: Problem) -> float:
    """-10 log10 of the mean squared error of pixels in [0, 1]."""
    error = (images - given.secret) / given.space.scale
    return float(-10 * np.log10(np.mean(np.square(error))))


def run(args: argparse.Namespace) -> None:
    """The `gradients` command."""
    if not has_breaching():
        print(INSTALL)
    runs = {str(case): functools.partial(measure, case) for case in CASES}
    runs |= {
        f"lean {case} {options}": functools.partial(lean, case, options) for case, options in LEAN
    }
    measured = (
        runs[name](args.repeats, args.steps) for name in timing.chosen(list(runs), args.cases)
    )
    timing.report_rows(itertools.chain.from_iterable(measured), args.out)

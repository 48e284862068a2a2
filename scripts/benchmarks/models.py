"""A network's forward pass, and the gradient of DeepInversion's loss at its images."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import Array
from jax.experimental.compilation_cache import compilation_cache
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import timing
from benchmarks.inversion import ported, problem
from benchmarks.torch_inversion import BATCH_NORM, FIRST_BATCH_NORM, torch_network, torchvision
from jinv.models import registry
from jinv.net import Net
from jinv.objective import terms

NETWORKS = (
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s"),
    *("efficientnet_lite0", "googlenet", "inception_v3", "maxvit_t", "mnasnet1_0", "mobilenet_v2"),
    *("mobilenet_v3_large", "regnet_x_400mf", "regnet_y_400mf", "resnet18", "resnet50"),
    *("resnext50_32x4d", "shufflenet_v2_x1_0", "squeezenet1_1", "vgg11_bn"),
)
"""One of every family or two, where one family has several kinds of block."""
PEER = "pytorch_frozen"


@dataclasses.dataclass(frozen=True)
class Case:
    """One network on so many square images."""

    network: str
    batch: int = 4
    size: int = 112

    def __str__(self) -> str:
        return f"{self.network} {self.batch}x{self.size}"


def case(network: str) -> Case:
    """Of 112 px; MaxViT takes multiples of 224."""
    return Case(network, size=224 if network.startswith("maxvit") else 112)


class Ours:
    """A compiled function of a network's variables and images, called again and again.

    Attributes:
      trace_s: seconds until XLA has the program.
      compile_s: seconds that XLA takes, without its cache.
    """

    def __init__(self, function: Callable, *given: Any) -> None:
        began = time.perf_counter()
        lowered = jax.jit(function).lower(*given)
        traced = time.perf_counter()
        with cold():
            self.compiled = lowered.compile()
        self.trace_s, self.compile_s = traced - began, time.perf_counter() - traced
        self.given = given

    def run(self, steps: int) -> None:
        """Call it so many times."""
        for _ in range(steps):
            jax.block_until_ready(self.compiled(*self.given))


@contextlib.contextmanager
def cold() -> Iterator[None]:
    """Let XLA compile what it may have compiled before."""
    before = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def our_forward(net: Net) -> Callable[[Any, Array], Array]:
    """Variables and images -> logits."""
    return lambda variables, images: net.apply(variables, images).logits


def our_gradient(net: Net) -> Callable[[Any, Array, Array], tuple[dict[str, Array], Array]]:
    """Variables, images and targets -> the weighted terms of their loss, and its gradient."""
    member = terms.Member(net)
    weights = terms.term_weights(member)

    def loss(images: Array, variables: Any, targets: Array) -> tuple[Array, dict[str, Array]]:
        outputs = net.apply(variables, images)
        found = terms.network_terms(member, outputs, variables, targets, "cross_entropy", 1.0)
        found = {name: weights[name] * value for name, value in found.items()}
        return sum(found.values(), jnp.zeros(())), found

    def gradient(variables: Any, images: Array, targets: Array) -> tuple[dict[str, Array], Array]:
        of_images, found = jax.grad(loss, has_aux=True)(images, variables, targets)
        return found, of_images

    return gradient


class Theirs:
    """The same in eager PyTorch, with weights that want no gradient.

    Args:
      net: network in evaluation mode.
      images: (B, H, W, C).
      targets: (B,) classes.
    """

    def __init__(self, net: nn.Module, images: np.ndarray, targets: np.ndarray) -> None:
        self.device = torch.device("cuda" if jax.default_backend() == "gpu" else "cpu")
        self.net = net.to(self.device).requires_grad_(False)
        nchw = torch.tensor(images.transpose(0, 3, 1, 2).copy(), device=self.device)
        self.images, self.targets = nchw, torch.tensor(targets, device=self.device)

    def forward(self) -> Tensor:
        """Logits."""
        with torch.inference_mode():
            return self.net(self.images)

    def gradient(self) -> tuple[dict[str, Tensor], Tensor]:
        """The weighted terms of the loss, and its gradient (B, C, H, W)."""
        priors: list[Tensor] = []

        def match(norm: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
            var, mean = torch.var_mean(inputs[0], (0, 2, 3), correction=0)
            apart = torch.norm(norm.running_var - var, 2), torch.norm(norm.running_mean - mean, 2)
            priors.append(sum(apart))  # type: ignore[arg-type]

        norms = [module for module in self.net.modules() if isinstance(module, nn.BatchNorm2d)]
        hooks = [norm.register_forward_hook(match) for norm in norms]
        images = self.images.detach().requires_grad_()
        found = {"label": functional.cross_entropy(self.net(images), self.targets)}
        for hook in hooks:
            hook.remove()
        if priors:
            priors[0] = FIRST_BATCH_NORM * priors[0]
            found["batch_norm"] = BATCH_NORM * torch.stack(priors).sum()
        (gradient,) = torch.autograd.grad(torch.stack(list(found.values())).sum(), images)
        return found, gradient


class Calls:
    """A peer's function, called again and again."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function = function

    def run(self, steps: int) -> None:
        """Call it so many times."""
        for _ in range(steps):
            self.function()
        if jax.default_backend() == "gpu":
            torch.cuda.synchronize()


def their_network(case: Case) -> nn.Module:
    """Random weights, with which every block has its part in the result."""
    net = torch_network(case.network, case.size)
    for name, parameter in net.named_parameters():
        if name.endswith("layer_scale"):  # ConvNeXt's begin at 1e-6: blocks would hardly count
            parameter.data.fill_(1.0)
    return net


def measure(case: Case, repeats: int, steps: int) -> Iterator[dict]:
    """One network: both programs agree with PyTorch, then all take turns."""
    torch_net = their_network(case)
    net = ported(case.network, torch_net)
    images, targets = problem(case.batch, case.size)
    theirs = Theirs(torch_net, images, targets)
    given = net.variables, jnp.asarray(images), jnp.asarray(targets)
    forward = Ours(our_forward(net), *given[:2])
    gradient = Ours(our_gradient(net), *given)
    checked = check(case, forward.compiled(*given[:2]), gradient.compiled(*given), theirs)
    for what, ours, function in (
        ("forward", forward, theirs.forward),
        ("gradient", gradient, theirs.gradient),
    ):
        rounds = timing.take_turns(ours, {PEER: Calls(function)}, repeats, steps)
        yield timing.row(
            f"{case} {what}",
            PEER,
            rounds,
            **checked[what],
            trace_s=ours.trace_s,
            compile_s=ours.compile_s,
        )


def check(
    case: Case, logits: Array, found: tuple[dict[str, Array], Array], theirs: Theirs
) -> dict[str, dict[str, float]]:
    """Differences between the sides, of what is timed; ends the program if one is too large.

    Args:
      case: what is timed.
      logits: ours.
      found: our terms and gradient.
      theirs: the other side.
    """
    values, gradient = theirs.gradient()
    pairs = {
        "forward": (_logits(np.asarray(logits)), _logits(theirs.forward().cpu().numpy())),
        "gradient": (
            ({name: float(value) for name, value in found[0].items()}, np.asarray(found[1])),
            (
                {name: value.item() for name, value in values.items()},
                gradient.permute(0, 2, 3, 1).cpu().numpy(),
            ),
        ),
    }
    return {
        what: timing.agreement(f"{case} {what}: {PEER}", *pair, timing.ROUNDED["float32"])
        for what, pair in pairs.items()
    }


def _logits(values: np.ndarray) -> tuple[dict[str, float], np.ndarray]:
    return {"mean_size": float(np.abs(values).mean())}, values


def chosen(names: Sequence[str] | None) -> tuple[str, ...]:
    """The names, if PyTorch has the networks too; `NETWORKS` without names."""
    theirs = torchvision().models
    known = [name for name in registry.zoo() if name in NETWORKS or hasattr(theirs, name)]
    unknown = sorted(set(names or ()) - set(known))
    if unknown:
        sys.exit(f"no network {', '.join(unknown)} on both sides; there are: {', '.join(known)}")
    return tuple(names or NETWORKS)


def run(args: argparse.Namespace) -> None:
    """The `models` command."""
    cases = [case(name) for name in chosen(args.networks)]
    rows = (row for each in cases for row in measure(each, args.repeats, args.steps))
    timing.report_rows(rows, args.out)

"""Gradient inversion in PyTorch: the package `breaching`, and the same as lean as one can write it.

`breaching` 0.1.2 (github.com/JonasGeiping/breaching) is what people run. What `Breaching.run` times
is the body of its own loop, `OptimizationBasedAttacker._run_trial`, around its own closure,
optimiser and schedule; `Breaching.reconstruct` is its public method.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import io
import math
import types
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import weights_convert
from benchmarks.torch_inversion import torch_network, torchvision
from jinv import models
from jinv.attacks.gradient_inversion import Config
from jinv.image import Preprocessing

INSTALL = (
    "breaching is not installed; its rows are left out. To have them:\n"
    "  pip install --no-deps breaching==0.1.2 lpips && pip install hydra-core scipy tqdm"
)

CONVNET_WIDTHS = (64, 128, 128, 256, 256, 256, 256, 256)
CONVNET_POOLED = (5, 7)
"""Convolutions after which the ConvNet takes maxima of 3 x 3."""

LENET_STRIDES = (2, 2, 1)


def convnet() -> nn.Module:
    """The ConvNet that breaching's case of a single small image attacks: 32 px, 10 classes."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    inputs = 3
    for i, outputs in enumerate(CONVNET_WIDTHS):
        layers[f"conv{i}"] = nn.Conv2d(inputs, outputs, 3, padding=1)
        layers[f"bn{i}"] = nn.BatchNorm2d(outputs)
        layers[f"relu{i}"] = nn.ReLU()
        if i in CONVNET_POOLED:
            layers[f"pool{i}"] = nn.MaxPool2d(3)
        inputs = outputs
    layers["flatten"] = nn.Flatten()
    layers["linear"] = nn.Linear(9 * inputs, 10)
    return nn.Sequential(layers)


def lenet() -> nn.Module:
    """The LeNet of Deep Leakage from Gradients, under breaching's name `lenet_zhu`: 32 px."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    inputs = 3
    for i, stride in enumerate(LENET_STRIDES):
        layers[f"conv{i}"] = nn.Conv2d(inputs, 12, 5, stride, padding=2)
        layers[f"sigmoid{i}"] = nn.Sigmoid()
        inputs = 12
    layers["flatten"] = nn.Flatten()
    layers["linear"] = nn.Linear(64 * inputs, 10)
    net = nn.Sequential(layers)
    for parameter in net.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    return net


def network(name: str) -> nn.Module:
    """In evaluation mode: MobileNetV2 with its weights, others with random ones."""
    if name in SMALL:
        torch.manual_seed(0)
        return SMALL[name]().eval()
    net = torch_network(name)
    if name == "mobilenet_v2":
        state = weights_convert.read(models.packaged_weights(name))
        net.load_state_dict({key: torch.tensor(value) for key, value in state.items()})
    return net


SMALL = {"lenet": lenet, "convnet": convnet}


def nchw(images: np.ndarray) -> Tensor:
    """(B, H, W, C) array -> (B, C, H, W) tensor on the device at hand."""
    return torch.tensor(images.transpose(0, 3, 1, 2).copy(), device=device())


def device() -> torch.device:
    """The one that JAX uses."""
    return torch.device("cuda" if jax.default_backend() == "gpu" else "cpu")


def sent(net: nn.Module, images: np.ndarray, labels: np.ndarray) -> list[Tensor]:
    """The gradient that a client with these normalised images sends."""
    net = copy.deepcopy(net).to(device())
    loss = functional.cross_entropy(net(nchw(images)), torch.tensor(labels, device=device()))
    return list(torch.autograd.grad(loss, list(net.parameters())))


class TorchMatching:
    """The objective and steps of our `Config`, for one seed.

    Args:
      config: the mathematics; distances "squared_l2" and "cosine".
      net: in evaluation mode; left as it is.
      wanted: gradients that were sent, of every parameter.
      images: (B, H, W, C), initial.
      labels: (B,) classes.
      space: whose bounds clip.
    """

    def __init__(
        self,
        config: Config,
        net: nn.Module,
        wanted: Sequence[Tensor],
        images: np.ndarray,
        labels: np.ndarray,
        space: Preprocessing,
    ) -> None:
        self.config = config
        self.net = copy.deepcopy(net).to(device())
        self.parameters = list(self.net.parameters())
        self.terms: list[Tensor] = []
        if config.batch_norm:
            for module in self.net.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.register_forward_hook(self._match)
        self.wanted = [g.to(device()) for g in wanted]
        self.images = nchw(images).requires_grad_()
        self.labels = torch.tensor(labels, device=device())
        self.low, self.high = (
            torch.tensor(bound, dtype=self.images.dtype, device=device())[:, None, None]
            for bound in (space.black, space.white)
        )
        self.best, self.best_loss = self.images.detach().clone(), float("inf")
        self.optimiser = torch.optim.Adam([self.images], lr=config.lr)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimiser, self._rate)

    def _match(self, norm: nn.BatchNorm2d, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        var, mean = torch.var_mean(inputs[0], (0, 2, 3), correction=0)
        self.terms.append(torch.norm(norm.running_var - var) + torch.norm(norm.running_mean - mean))

    def _rate(self, step: int) -> float:
        warmup, steps = self.config.warmup, self.config.steps
        if step < warmup:
            return (step + 1) / warmup
        return (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1))) / 2

    def objective(self) -> Tensor:
        """Weighted sum that our step minimises."""
        config, x = self.config, self.images
        self.terms.clear()
        loss = functional.cross_entropy(self.net(x), self.labels)
        found = torch.autograd.grad(loss, self.parameters, create_graph=True)
        total = config.gradient * self._distance(found)
        if self.terms:
            first, *others = self.terms
            prior = config.first_bn_multiplier * first + torch.stack(others).sum()
            total = total + config.batch_norm * prior
        if config.tv_l2:
            total = total + config.tv_l2 * (
                torch.norm(x[:, :, :, :-1] - x[:, :, :, 1:])
                + torch.norm(x[:, :, :-1] - x[:, :, 1:])
                + torch.norm(x[:, :, 1:, :-1] - x[:, :, :-1, 1:])
                + torch.norm(x[:, :, :-1, :-1] - x[:, :, 1:, 1:])
            )
        if config.l2:
            total = total + config.l2 * x.flatten(1).norm(dim=1).mean()
        return total

    def _distance(self, found: Sequence[Tensor]) -> Tensor:
        pairs = list(zip(found, self.wanted, strict=True))
        if self.config.distance == "squared_l2":
            return torch.stack([(a - b).square().sum() for a, b in pairs]).sum()
        product = torch.stack([(a * b).sum() for a, b in pairs]).sum()
        ours = torch.stack([a.square().sum() for a, _ in pairs]).sum()
        theirs = torch.stack([b.square().sum() for _, b in pairs]).sum()
        return 1 - product / (ours.sqrt() * theirs.sqrt())

    def loss_and_gradient(self) -> tuple[float, np.ndarray]:
        """Of the initial images; gradient (B, H, W, C)."""
        loss = self.objective()
        (gradient,) = torch.autograd.grad(loss, [self.images])
        return loss.item(), gradient.permute(0, 2, 3, 1).cpu().numpy()

    def run(self, steps: int) -> None:
        """Take so many steps."""
        for _ in range(steps):
            loss = self.objective()
            (gradient,) = torch.autograd.grad(loss, [self.images])
            self.images.grad = gradient.sign_() if self.config.signed else gradient
            if loss.item() < self.best_loss:
                self.best_loss = loss.item()
                self.best = self.images.detach().clone()
            rate = self.optimiser.param_groups[0]["lr"]
            self.optimiser.step()
            self.schedule.step()
            with torch.no_grad():
                if self.config.noise:
                    kick = torch.randn_like(self.images)
                    self.images.add_(kick, alpha=self.config.noise * rate)
                if self.config.clip:
                    self.images.copy_(self.images.clamp(self.low, self.high))
        _wait()


def _wait() -> None:
    if device().type == "cuda":
        torch.cuda.synchronize()


def has_breaching() -> bool:
    """Whether the package is installed."""
    return importlib.util.find_spec("breaching") is not None


class Breaching:
    """One trial of the package's attack, with its published configuration.

    Args:
      attack: name of the configuration.
      net: in evaluation mode; left as it is.
      wanted: gradients that were sent, of every parameter.
      images: (B, H, W, C), initial.
      labels: (B,) classes.
      space: of the images.
      steps: of its schedule; the configuration's is for 20000 and more.
      matching_alone: without priors, noise and signs, to compare distances.
    """

    def __init__(
        self,
        attack: str,
        net: nn.Module,
        wanted: Sequence[Tensor],
        images: np.ndarray,
        labels: np.ndarray,
        space: Preprocessing,
        steps: int,
        *,
        matching_alone: bool = False,
    ) -> None:
        torchvision()
        breaching = importlib.import_module("breaching")
        # It says what it does, and how it uses Hydra is no news.
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = breaching.get_attack_config(attack)
        config.optim.max_iterations = steps
        if images.dtype == np.float64:
            config.impl.dtype = "double"
        if matching_alone:
            config.optim.signed, config.optim.langevin_noise = None, 0.0
            config.regularization = None
        loss = torch.jit.script(nn.CrossEntropyLoss())
        dtype = getattr(torch, config.impl.dtype)
        self.attacker = breaching.attacks.prepare_attack(
            net, loss, config, {"dtype": dtype, "device": device()}
        )
        shape = (images.shape[3], *images.shape[1:3])
        metadata = types.SimpleNamespace(
            shape=shape, mean=space.mean, std=space.std, modality="vision"
        )
        self.payload = [
            {
                "parameters": list(net.parameters()),
                "buffers": list(net.buffers()),
                "metadata": metadata,
            }
        ]
        told = {
            "num_data_points": len(images),
            "labels": torch.tensor(labels, device=device()),
            "local_hyperparams": None,
        }
        self.shared = [{"gradients": list(wanted), "buffers": None, "metadata": told}]
        self.initial = nchw(images)
        self._begin()

    def _begin(self) -> None:
        """What `reconstruct` and `_run_trial` do before the loop."""
        attacker = self.attacker
        self.models, self.labels, self.stats = attacker.prepare_attack(self.payload, self.shared)
        for prior in attacker.regularizers:
            prior.initialize(self.models, self.shared, self.labels)
        attacker.objective.initialize(attacker.loss_fn, attacker.cfg.impl, None)
        self.candidate = attacker._initialize_data(list(self.initial.shape))
        self.candidate.data = self.initial.clone()
        self.best = self.candidate.detach().clone()
        self.least = torch.as_tensor(float("inf"), **attacker.setup)
        self.optimiser, self.schedule = attacker._init_optimizer([self.candidate])
        self.step = 0

    def _closure(self) -> Any:
        return self.attacker._compute_objective(
            self.candidate, self.labels, self.models, self.optimiser, self.shared, self.step
        )

    def loss_and_gradient(self) -> tuple[float, np.ndarray]:
        """Of the initial images; gradient (B, H, W, C)."""
        loss = self._closure()()
        assert self.candidate.grad is not None
        return loss.item(), self.candidate.grad.permute(0, 2, 3, 1).cpu().numpy()

    def run(self, steps: int) -> None:
        """Take so many steps: the body of `_run_trial`'s loop, but for its log lines."""
        attacker, candidate = self.attacker, self.candidate
        for _ in range(steps):
            value = self.optimiser.step(self._closure())
            self.schedule.step()
            with torch.no_grad():
                if attacker.cfg.optim.boxed:
                    candidate.data = torch.max(
                        torch.min(candidate, (1 - attacker.dm) / attacker.ds),
                        -attacker.dm / attacker.ds,
                    )
                if value < self.least:
                    self.least = value.detach()
                    self.best = candidate.detach().clone()
            if not torch.isfinite(value):
                raise ArithmeticError("breaching's loss is not finite")
            self.stats["Trial_0_Val"].append(value.item())
            self.step += 1
        _wait()

    def reconstruct(self) -> np.ndarray:
        """Its public method, with all its steps: (B, H, W, C)."""
        found, _ = self.attacker.reconstruct(self.payload, self.shared, {}, self.initial)
        return found["data"].permute(0, 2, 3, 1).cpu().numpy()

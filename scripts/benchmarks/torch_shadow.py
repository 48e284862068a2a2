"""Shadow models as one trains them in PyTorch: one by one, by the batch, and with opacus."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from jinv.shadow import Config

OPACUS = "pip install opacus"


def has_opacus() -> bool:
    """Whether the package is installed."""
    return importlib.util.find_spec("opacus") is not None


def _fresh(config: Config, width: int) -> nn.Linear:
    layer = nn.Linear(width, config.classes)
    nn.init.normal_(layer.weight, std=config.init_std)
    nn.init.zeros_(layer.bias)
    return layer


def published(config: Config, x: Tensor, y: Tensor, start: nn.Linear | None = None) -> nn.Linear:
    """One model in the usual way: DataLoader, autograd, SGD."""
    layer = start or _fresh(config, x.shape[1])
    loader = DataLoader(TensorDataset(x, y), batch_size=len(x), shuffle=True)
    optimiser = torch.optim.SGD(
        layer.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay
    )
    for _ in range(config.epochs):
        for features, labels in loader:
            optimiser.zero_grad()
            functional.cross_entropy(layer(features), labels).backward()
            optimiser.step()
    return layer


@torch.inference_mode()
def batched(
    config: Config, x: Tensor, y: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Models (S) at once on x (S, N, D), y (S, N): batched products, gradients by hand, in place.

    Returns:
      Weights (S, classes, D) and biases (S, 1, classes).
    """
    models, examples, width = x.shape
    if weight is None:
        weight = torch.empty(models, config.classes, width).normal_(std=config.init_std)
    bias = torch.zeros(models, 1, config.classes, dtype=x.dtype)
    target = functional.one_hot(y, config.classes).to(x.dtype)
    keep = 1 - config.lr * config.weight_decay
    for _ in range(config.epochs):
        z = torch.baddbmm(bias, x, weight.transpose(1, 2))
        step = torch.softmax(z, -1).sub_(target).mul_(-config.lr / examples)
        # weight = keep weight - lr G' X, in one call.
        torch.baddbmm(weight, step.transpose(1, 2), x, beta=keep, out=weight)
        bias.mul_(keep).add_(step.sum(1, keepdim=True))
    return weight, bias


def private(config: Config, x: Tensor, y: Tensor, start: nn.Linear | None = None) -> nn.Linear:
    """One model with DP-SGD by opacus, in one batch: it samples with q = 1 / batches = 1."""
    from opacus import PrivacyEngine

    assert config.privacy is not None
    layer = start or _fresh(config, x.shape[1])
    optimiser = torch.optim.SGD(
        layer.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay
    )
    layer, optimiser, loader = PrivacyEngine(accountant="rdp").make_private(
        module=layer,
        optimizer=optimiser,
        data_loader=DataLoader(TensorDataset(x, y), batch_size=len(x)),
        noise_multiplier=config.privacy.sigma,
        max_grad_norm=config.privacy.l2_norm_clip,
    )
    for _ in range(config.epochs):
        for features, labels in loader:
            optimiser.zero_grad()
            functional.cross_entropy(layer(features), labels).backward()
            optimiser.step()
    return layer._module

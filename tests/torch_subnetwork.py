"""A subnetwork in torch, written from the paper and the format of its checkpoints: a reference."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Chosen(torch.autograd.Function):
    """1 for the scores of highest rank; the gradient passes."""

    @staticmethod
    def forward(ctx: Any, magnitude: Tensor, kept: float) -> Tensor:
        del ctx
        rank = torch.argsort(torch.argsort(magnitude.flatten(), stable=True))
        return (rank >= int((1 - kept) * rank.numel())).reshape(magnitude.shape).float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        del ctx
        return gradients[0], None


class MaskedConv(nn.Conv2d):
    """A convolution without bias, of whose weights a share stays."""

    def __init__(self, *sizes: int, kept: float, **options: int) -> None:
        super().__init__(*sizes, bias=False, **options)
        inputs = self.weight[0].numel()
        self.weight.data = self.weight.data.sign() * math.sqrt(2 / inputs)
        self.weight.requires_grad = False
        self.scores = nn.Parameter(torch.empty_like(self.weight))
        nn.init.kaiming_uniform_(self.scores, a=math.sqrt(5))
        self.kept = kept

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * Chosen.apply(self.scores.abs(), self.kept)
        return functional.conv2d(x, weight, None, self.stride, self.padding)


def norm(width: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, affine=False)


class Block(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int, kept: float) -> None:
        super().__init__()
        self.conv1 = MaskedConv(inputs, width, 3, stride, 1, kept=kept)
        self.bn1 = norm(width)
        self.conv2 = MaskedConv(width, width, 3, 1, 1, kept=kept)
        self.bn2 = norm(width)
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut = nn.Sequential(
                MaskedConv(inputs, width, 1, stride, kept=kept), norm(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.shortcut(x)).relu()


class ResNet(nn.Module):
    """Two blocks; the classifier is a 1x1 convolution."""

    def __init__(self, kept: float, widths: tuple[int, int] = (16, 24), classes: int = 10) -> None:
        super().__init__()
        self.conv1 = MaskedConv(3, widths[0], 3, 1, 1, kept=kept)
        self.bn1 = norm(widths[0])
        self.layer1 = nn.Sequential(Block(widths[0], widths[0], 1, kept))
        self.layer2 = nn.Sequential(Block(widths[0], widths[1], 2, kept))
        self.linear = MaskedConv(widths[1], classes, 1, kept=kept)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        return self.linear(self.layer2(self.layer1(x)).mean((2, 3), keepdim=True)).flatten(1)

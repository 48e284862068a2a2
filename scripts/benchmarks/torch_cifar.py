"""CIFAR ResNets, and what condensation does to images, as one writes them in PyTorch; no JAX."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

RATIO = (3 / 4, 4 / 3)
"""Least and greatest width / height of a part, torchvision's."""

Box = tuple[int, int, int, int]
"""Top, left, height, width."""


class Block(nn.Module):
    """Two 3x3 convolutions; the shortcut is a 1x1 convolution, or subsampling and zeros."""

    def __init__(self, inputs: int, width: int, stride: int, projection: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        self.zeros = 0
        if stride > 1 or inputs != width:
            if projection:
                convolution = nn.Conv2d(inputs, width, 1, stride, bias=False)
                self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(width))
            else:
                self.zeros = (width - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, width, H / stride, W / stride)."""
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.zeros:
            x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.zeros, self.zeros))
        return functional.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """A 3x3 stem and stages of which every one but the first halves the image."""

    def __init__(
        self, depths: Sequence[int], widths: Sequence[int], projection: bool, classes: int
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        inputs, self.stages = widths[0], []
        for number, (depth, width) in enumerate(zip(depths, widths, strict=True), 1):
            blocks = []
            for i in range(depth):
                stride = 2 if i == 0 and number > 1 else 1
                blocks.append(Block(inputs, width, stride, projection))
                inputs = width
            self.stages.append(f"layer{number}")
            self.add_module(self.stages[-1], nn.Sequential(*blocks))
        self.linear = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> logits (B, classes)."""
        x = functional.relu(self.bn1(self.conv1(x)))
        for stage in self.stages:
            x = getattr(self, stage)(x)
        return self.linear(x.mean((2, 3)))


NETWORKS = {
    "resnet20_cifar": ((3, 3, 3), (16, 32, 64), False),
    "resnet18_cifar": ((2, 2, 2, 2), (64, 128, 256, 512), True),
    "resnet18_cifar_slim": ((2, 2, 2, 2), (16, 32, 64, 128), True),
}
"""Depths, widths, and whether shortcuts are convolutions."""


def network(name: str, classes: int = 10) -> ResNet:
    """Return one of `NETWORKS`, random, with the names of the shared CIFAR code."""
    net = ResNet(*NETWORKS[name], classes)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net


# --- one part for a batch -------------------------------------------------------------------------


def random_box(height: int, width: int, scale: tuple[float, float]) -> Box:
    """Draw a part as torchvision's RandomResizedCrop does."""
    for _ in range(10):
        area = height * width * random.uniform(*scale)
        aspect = math.exp(random.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return random.randint(0, height - h), random.randint(0, width - w), h, w
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def resized(images: Tensor, box: Box) -> Tensor:
    """Return a part of images (B, C, H, W) at their size, as torchvision's resized_crop."""
    top, left, height, width = box
    part = images[:, :, top : top + height, left : left + width]
    size = images.shape[2], images.shape[3]
    return functional.interpolate(part, size, mode="bilinear", antialias=True)


# --- a part for every image -----------------------------------------------------------------------


def random_boxes(
    count: int, height: int, width: int, scale: tuple[float, float], device: torch.device
) -> Tensor:
    """Draw `random_box` for every image, all at once: (count, 4)."""

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(count, 10, device=device).uniform_(low, high)

    area = height * width * uniform(*scale)
    aspect = uniform(math.log(RATIO[0]), math.log(RATIO[1])).exp()
    sides = torch.stack([(area / aspect).sqrt(), (area * aspect).sqrt()]).round()
    limits = torch.tensor([height, width], device=device)
    fits = ((sides > 0) & (sides <= limits[:, None, None])).all(0)
    first = fits.float().argmax(1)
    side = min(height, width)
    chosen = sides[:, torch.arange(count, device=device), first].T
    chosen = torch.where(fits.any(1)[:, None], chosen, torch.tensor(float(side), device=device))
    free = limits - chosen
    place = (torch.rand(count, 2, device=device) * (free + 1)).floor()
    place = torch.where(fits.any(1)[:, None], place, (free / 2).floor())
    return torch.cat([place, chosen], 1)


def _taps(start: Tensor, length: Tensor, count: int) -> Tensor:
    """Weights (B, count, count) of an axis' pixels in the pixels of its enlarged part."""
    pixel = torch.arange(count, device=start.device)
    scale = (length / count)[:, None]
    at = ((pixel + 0.5) * scale - 0.5)[:, :, None]
    of = (pixel - start[:, None])[:, None, :]
    weights = (1 - (at - of).abs()).clamp(min=0)  # a part is never larger than the image
    weights = torch.where((of >= 0) & (of < length[:, None, None]), weights, 0)
    return weights / weights.sum(2, keepdim=True)


def all_resized(images: Tensor, boxes: Tensor) -> Tensor:
    """Return every image's own part of floats (B, C, H, W) at their size, by two products."""
    rows = _taps(boxes[:, 0], boxes[:, 2], images.shape[2]).to(images.dtype)
    columns = _taps(boxes[:, 1], boxes[:, 3], images.shape[3]).to(images.dtype)
    return rows[:, None] @ images @ columns[:, None].transpose(2, 3)


def augmented(images: Tensor, scale: tuple[float, float]) -> Tensor:
    """Crop and mirror every image of bytes (B, C, H, W) for itself; bytes."""
    boxes = random_boxes(len(images), *images.shape[2:], scale, images.device)
    seen = all_resized(images.float(), boxes)
    mirrored = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(mirrored, seen.flip(3), seen).round().to(torch.uint8)


def cutmix(images: Tensor, alpha: float = 1.0) -> Tensor:
    """Paste a box of every image's partner into it, at one place for the batch; in place."""
    height, width = images.shape[2:]
    side = math.sqrt(1 - random.betavariate(alpha, alpha))
    half_h, half_w = int(height * side) // 2, int(width * side) // 2
    y, x = random.randrange(height), random.randrange(width)
    rows = slice(max(y - half_h, 0), min(y + half_h, height))
    columns = slice(max(x - half_w, 0), min(x + half_w, width))
    order = torch.randperm(len(images), device=images.device)
    images[:, :, rows, columns] = images[order][:, :, rows, columns]
    return images


def divergence(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """KL of softened classes, the batch's mean, without T^2."""
    return functional.kl_div(
        functional.log_softmax(student / temperature, 1),
        functional.softmax(teacher / temperature, 1),
        reduction="batchmean",
    )

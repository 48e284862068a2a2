"""Dataset condensation as one writes it in PyTorch: a step of recovery, and one of a student."""

from __future__ import annotations

import copy
import random
from typing import NamedTuple

import jax
import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import torch_cifar
from benchmarks.torch_cifar import Box
from benchmarks.torch_inversion import (
    SAME,
    TorchInversion,
    torch_network,
    torchvision,
    with_statistics,
)

SYNTHESIS_PEERS = ("pytorch_frozen", "pytorch_published")
STUDENT_PEERS = ("pytorch_batched", "pytorch_transforms")
"""See `scripts/benchmark.py`."""


def teacher(name: str, size: int) -> nn.Module:
    """Return a network in evaluation mode, random, with statistics of images of this size."""
    if name not in torch_cifar.NETWORKS:
        return torch_network(name, size)
    torch.manual_seed(0)
    return with_statistics(torch_cifar.network(name).eval(), size)


class Drawn(NamedTuple):
    """What is random in a step.

    Attributes:
      box: the part that is seen, None for all.
      shifts: of rows and columns.
      flip: whether it is mirrored.
    """

    box: Box | None
    shifts: tuple[int, int]
    flip: bool


class TorchSynthesis(TorchInversion):
    """SRe2L's recovery: cross-entropy and BatchNorm prior, no prior of images; the last are kept.

    Its authors want no gradient of the weights either. As published, moments are taken as in
    DeepInversion's code, and every step waits for its loss and may copy the images.

    Args:
      peer: one of `SYNTHESIS_PEERS`.
      net: network in evaluation mode.
      images: (B, H, W, C), initial.
      targets: (B,) classes.
      bounds: black and white of each channel.
      steps: of the learning rate's cosine.
      dtype: "bfloat16" for autocast.
      jitter: least and greatest shift.
      scale: shares of the area of a random part, None without one.
      flip: whether half of the steps see mirrored images.
    """

    def __init__(
        self,
        peer: str,
        net: nn.Module,
        images: np.ndarray,
        targets: np.ndarray,
        bounds: tuple[np.ndarray, np.ndarray],
        steps: int,
        dtype: str,
        *,
        jitter: tuple[int, int],
        scale: tuple[float, float] | None,
        flip: bool,
    ) -> None:
        super().__init__(peer, [net], [SAME], images, targets, bounds, steps, dtype)
        self.nets[0].requires_grad_(False)
        self.jitter, self.scale, self.flip = jitter, scale, flip

    def plain_objective(self, x: Tensor) -> Tensor:
        """Label loss and BatchNorm prior, weighted."""
        return self._of_one(self.nets[0], None, x)

    def seen(self, drawn: Drawn) -> Tensor:
        """The images as a step sees them."""
        seen = self.images if drawn.box is None else torch_cifar.resized(self.images, drawn.box)
        seen = torch.roll(seen, drawn.shifts, (2, 3))
        return torch.flip(seen, (3,)) if drawn.flip else seen

    def terms_and_gradient_of(self, drawn: Drawn) -> tuple[dict[str, float], np.ndarray]:
        """Weighted terms and gradient (B, H, W, C) of the initial images, by what is timed."""
        label, batch_norm = self.objective(self.seen(drawn))
        (gradient,) = torch.autograd.grad(label + batch_norm, self.images)
        values = {"label": label.item(), "batch_norm": batch_norm.item()}
        return values, gradient.permute(0, 2, 3, 1).cpu().numpy()

    def _draw(self) -> Drawn:
        height, width = self.images.shape[2:]
        box = None if self.scale is None else torch_cifar.random_box(height, width, self.scale)
        shifts = random.randint(*self.jitter), random.randint(*self.jitter)
        return Drawn(box, shifts, self.flip and random.random() < 0.5)

    def run(self, steps: int) -> None:
        """Take so many steps."""
        for _ in range(steps):
            self.optimiser.zero_grad()
            loss = self.objective(self.seen(self._draw())).sum()
            loss.backward()
            self.optimiser.step()
            self.schedule.step()
            with torch.no_grad():
                self.images.copy_(torch.maximum(torch.minimum(self.images, self.high), self.low))
            if self.published and loss.item() < self.best_loss:
                self.best_loss = loss.item()
                self.best = self.images.detach().clone()
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class TorchStudent:
    """A student's training on a teacher's softened classes of random views.

    Args:
      peer: one of `STUDENT_PEERS`.
      student: random; taken over.
      teacher: in evaluation mode.
      images: bytes (N, H, W, C).
      space: mean and standard deviation of every channel.
      batch: images a step.
      steps: of the learning rate's cosine.
      lr, weight_decay: AdamW's.
      temperature: of the softmax.
      scale: shares of the area of a random part.
    """

    def __init__(
        self,
        peer: str,
        student: nn.Module,
        teacher: nn.Module,
        images: np.ndarray,
        space: tuple[np.ndarray, np.ndarray],
        *,
        batch: int,
        steps: int,
        lr: float,
        weight_decay: float,
        temperature: float,
        scale: tuple[float, float],
    ) -> None:
        self.device = torch.device("cuda" if jax.default_backend() == "gpu" else "cpu")
        self.student = student.to(self.device).train()
        self.teacher = copy.deepcopy(teacher).to(self.device).requires_grad_(False)
        self.dtype = next(student.parameters()).dtype
        self.images = torch.tensor(images.transpose(0, 3, 1, 2).copy(), device=self.device)
        self.mean, self.std = (
            torch.tensor(values, dtype=self.dtype, device=self.device)[:, None, None]
            for values in space
        )
        self.batch, self.temperature, self.scale = batch, temperature, scale
        self.optimiser = torch.optim.AdamW(
            self.student.parameters(), lr=lr, weight_decay=weight_decay
        )
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimiser, steps)
        self.transform = None
        if peer == "pytorch_transforms":
            self.transform = self._transforms()
        self.order = torch.randperm(len(self.images))

    def _transforms(self) -> nn.Module:
        torchvision()
        from torchvision import transforms

        size = list(self.images.shape[2:])
        parts = transforms.RandomResizedCrop(size, self.scale, antialias=True)
        return nn.Sequential(parts, transforms.RandomHorizontalFlip())

    def augmented(self, images: torch.Tensor) -> torch.Tensor:
        """Crop and mirror every image of bytes (B, C, H, W) for itself."""
        if self.transform is None:
            return torch_cifar.augmented(images, self.scale)
        return torch.stack([self.transform(image) for image in images])

    def objective(self, pixels: Tensor) -> Tensor:
        """The loss of pixels (B, C, H, W) in [0, 1]."""
        seen = (pixels - self.mean) / self.std
        with torch.no_grad():
            told = self.teacher(seen)
        return torch_cifar.divergence(told, self.student(seen), self.temperature)

    def loss_and_gradient(self, pixels: np.ndarray) -> tuple[float, dict[str, np.ndarray]]:
        """Return the loss of pixels (B, H, W, C), and the gradient of every parameter."""
        self.optimiser.zero_grad()
        nchw = torch.tensor(pixels.transpose(0, 3, 1, 2).copy(), device=self.device)
        loss = self.objective(nchw.to(self.dtype))
        loss.backward()
        found = {name: p.grad.cpu().numpy() for name, p in self.student.named_parameters()}
        return loss.item(), found

    def _next(self) -> Tensor:
        """The next images of an epoch's order."""
        if len(self.order) < self.batch:
            self.order = torch.randperm(len(self.images))
        chosen, self.order = self.order[: self.batch], self.order[self.batch :]
        return self.images[chosen.to(self.device)]

    def run(self, steps: int) -> None:
        """Take so many steps."""
        losses = []
        for _ in range(steps):
            pixels = self.augmented(self._next()).to(self.dtype) / 255
            loss = self.objective(torch_cifar.cutmix(pixels))
            self.optimiser.zero_grad()
            loss.backward()
            self.optimiser.step()
            self.schedule.step()
            losses.append(loss.detach())
        torch.stack(losses).tolist()

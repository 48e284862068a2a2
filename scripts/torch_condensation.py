"""Condense a network's data set in PyTorch alone, and train a student on it: a reference for ours.

    python scripts/torch_condensation.py out/teacher --out out/torch
    python scripts/torch_condensation.py out/teacher --images out/synthetic/train --out out/torch

Nothing of jinv is used. The teacher is what `jinv pretrain` leaves in a folder: a CIFAR ResNet,
trained on FashionMNIST. Images are recovered as `preset: sre2l_cifar100` does it: cross-entropy
plus 0.01 times the BatchNorm prior, whose first layer counts 10 times; Adam at 0.25 with betas 0.5
and 0.9 and a cosine to 0; batches rolled by 0 to 4 pixels and mirrored with probability --mirrored
(the authors' code for CIFAR does not mirror: 0); clipped; the last images are kept, as bytes. They
are written to OUT/train/CCC/NNN.png. With --images a folder of that kind is read instead.

The student, random, learns the teacher's softened classes of random parts (8 to 100% of the area),
mirrored with probability 1/2 and mixed by CutMix: KL at T = 20 without T^2, AdamW at 1e-3 with
weight decay 0.01 and a cosine to 0. OUT/summary.json has the accuracy on all test images of
FashionMNIST and the seconds. torch, numpy, pillow and safetensors are needed.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import random
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import torch_cifar

LR, BETAS, BATCH_NORM, FIRST, SHIFT = 0.25, (0.5, 0.9), 0.01, 10.0, 4
STUDENT_LR, WEIGHT_DECAY, TEMPERATURE, PARTS = 1e-3, 0.01, 20.0, (0.08, 1.0)


class Teacher:
    """A trained network in evaluation mode, and what its images are normalised by.

    Attributes:
      net: the network.
      mean, std: (3, 1, 1).
      size: of its images.
      classes: how many.
    """

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        summary = json.loads((folder / "summary.json").read_text())
        space = summary["preprocessing"]
        self.classes, self.size = len(summary["classes"]), int(space["size"])
        self.mean, self.std = (
            torch.tensor(space[k], device=device)[:, None, None] for k in ("mean", "std")
        )
        self.net = torch_cifar.network(summary["model"], self.classes)
        self.net.load_state_dict(load_file(folder / "weights.safetensors"))
        self.net.eval().requires_grad_(False).to(device)

    def normalised(self, pixels: Tensor) -> Tensor:
        """Pixels (B, C, H, W) in [0, 1] as the network takes them."""
        return (pixels - self.mean) / self.std


def recover(teacher: Teacher, per_class: int, steps: int, mirrored: float) -> tuple[Tensor, Tensor]:
    """Return images as bytes (N, 3, H, W) and their classes, all of them optimised together."""
    targets = torch.arange(teacher.classes, device=teacher.mean.device).repeat(per_class)
    shape = (len(targets), 3, teacher.size, teacher.size)
    images = torch.randn(shape).to(teacher.mean.device).requires_grad_()
    optimiser = torch.optim.Adam([images], LR, BETAS)
    black = torch.zeros_like(teacher.mean)
    low, high = teacher.normalised(black), teacher.normalised(black + 1)
    distances: list[Tensor] = []

    def compare(norm: nn.BatchNorm2d, inputs: tuple[Tensor], _: Tensor) -> None:
        mean = inputs[0].mean((0, 2, 3))
        var = inputs[0].var((0, 2, 3), unbiased=False)
        apart = (var - norm.running_var).norm() + (mean - norm.running_mean).norm()
        distances.append(apart)

    norms = [module for module in teacher.net.modules() if isinstance(module, nn.BatchNorm2d)]
    hooks = [norm.register_forward_hook(compare) for norm in norms]
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = LR * (1 + math.cos(math.pi * step / steps)) / 2
        shifts = random.randint(0, SHIFT), random.randint(0, SHIFT)
        seen = torch.roll(images, shifts, (2, 3))
        if random.random() < mirrored:
            seen = seen.flip(3)
        distances.clear()
        label = functional.cross_entropy(teacher.net(seen), targets)
        prior = FIRST * distances[0] + torch.stack(distances[1:]).sum()
        loss = label + BATCH_NORM * prior
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            images.copy_(images.maximum(low).minimum(high))
        if step % max(1, steps // 10) == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.4f}, of classes {label.item():.4f}", flush=True)
    for hook in hooks:
        hook.remove()
    pixels = images.detach() * teacher.std + teacher.mean
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8), targets


def write(folder: Path, images: Tensor, targets: Tensor) -> None:
    """Write train/CCC/NNN.png."""
    for i, (image, target) in enumerate(zip(images, targets.tolist(), strict=True)):
        place = folder / "train" / f"{target:03d}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(place / f"{i:03d}.png")


def read(folder: Path) -> Tensor:
    """Return the images of a folder of classes as bytes (N, 3, H, W); students need no labels."""
    files = sorted(folder.glob("*/*.png"))
    if not files:
        raise SystemExit(f"{folder} holds no CLASS/FILE.png")
    images = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def train(teacher: Teacher, student: nn.Module, images: Tensor, batch: int, epochs: int) -> None:
    """Train a student; every epoch drops the images that fill no batch."""
    per_epoch = len(images) // batch
    if not per_epoch:
        raise SystemExit(f"{len(images)} images fill no batch of {batch}")
    optimiser = torch.optim.AdamW(student.parameters(), STUDENT_LR, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * per_epoch)
    student.train()
    for epoch in range(epochs):
        order = torch.randperm(len(images)).to(images.device)
        for i in range(per_epoch):
            chosen = images[order[i * batch : (i + 1) * batch]]
            pixels = torch_cifar.augmented(chosen, PARTS) / 255
            seen = teacher.normalised(torch_cifar.cutmix(pixels))
            loss = torch_cifar.divergence(teacher.net(seen), student(seen), TEMPERATURE)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        if epoch % max(1, epochs // 10) == 0 or epoch == epochs - 1:
            print(f"epoch {epoch}: loss {loss.item():.5f}", flush=True)
    student.eval()


def fashion_mnist(folder: Path) -> tuple[Tensor, Tensor]:
    """Return the test images as pixels (N, 3, 28, 28) in [0, 1], and their classes."""
    with gzip.open(folder / "t10k-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)
    with gzip.open(folder / "t10k-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    pixels = torch.tensor(images / np.float32(255)).expand(-1, 3, -1, -1)
    return pixels, torch.tensor(labels.astype(np.int64))


@torch.no_grad()
def accuracy(teacher: Teacher, net: nn.Module, pixels: Tensor, labels: Tensor) -> float:
    """Return the share of images that a network gives their class."""
    pairs = zip(pixels.split(500), labels.split(500), strict=True)
    right = [(net(teacher.normalised(x)).argmax(1) == y).sum().item() for x, y in pairs]
    return sum(right) / len(labels)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("teacher", type=Path, help="folder of jinv pretrain")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--images", type=Path, help="train on these instead of recovering some")
    parser.add_argument("--per-class", type=int, default=10)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--mirrored", type=float, default=0.0)
    parser.add_argument("--student", default="resnet20_cifar", choices=torch_cifar.NETWORKS)
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="PyTorch's name of it")
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    args = parser.parse_args(arguments)
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    teacher = Teacher(args.teacher, args.device)
    test = [part.to(args.device) for part in fashion_mnist(args.data)]
    began = time.perf_counter()
    if args.images is None:
        images, targets = recover(teacher, args.per_class, args.steps, args.mirrored)
        write(args.out, images, targets)
    else:
        images = read(args.images).to(args.device)
    recovered = time.perf_counter()
    student = torch_cifar.network(args.student, teacher.classes).to(args.device)
    train(teacher, student, images, args.batch, args.epochs)
    trained = time.perf_counter()
    summary = {
        "images": len(images),
        "teacher_accuracy": accuracy(teacher, teacher.net, *test),
        "test_accuracy": accuracy(teacher, student, *test),
        "recovery_seconds": round(recovered - began, 3),
        "training_seconds": round(trained - recovered, 3),
    }
    (args.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()

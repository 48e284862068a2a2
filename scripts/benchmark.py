"""Measure jinv against what people run today.

    python scripts/benchmark.py inversion --out inversion.json
    python scripts/benchmark.py inversion --out one.json --cases mobilenet_v2 --repeats 15

`inversion` times one DeepInversion step: frozen network, BatchNorm prior, cross-entropy, TV_2 and
L2 priors, jitter and flip, Adam, clipping. Ours is the step that `jinv.optimise.run` runs. Peers,
all with the same weights:

    pytorch_frozen     eager, weights that want no gradient, moments by `torch.var_mean`
    pytorch_published  eager, as the published code: it also computes the weights' gradients
    pytorch_compiled   `torch.compile` of the frozen one, channels last; on GPU only

Before timing, both sides must give the same loss and the same gradient of the images (on CPU in
float64, to 1e-6). Then rounds
of `--steps` steps each take turns; rounds in which other processes used the machine are repeated
(up to three times as many), and the quietest count.
A GPU adds ResNet-50 on 84 images of 224 px in bfloat16. The JSON file holds

    machine    processor, cores, device, environment variables that matter
    versions   of Python and the packages
    rows       for every case and peer:
      case, peer, device
      ours_s, peer_s      median seconds a step
      ratio               median over rounds of peer_s / ours_s: above 1, jinv is faster
      ours_quartiles_s, peer_quartiles_s, ratio_quartiles
      n                   rounds
      others              cores that other processes kept busy, median over rounds
      loss_difference, gradient_difference   relative, between the sides, before timing

and the rows are printed as a table. torch and torchvision are needed:
`pip install torch torchvision`.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import importlib
import importlib.metadata
import json
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import weights_convert
from jinv import models, optimise
from jinv.attacks import deepinversion
from jinv.net import Net
from jinv.objective import Member

try:
    import torch
    from torch import Tensor, nn
    from torch.nn import functional
except ImportError:
    sys.exit("the benchmark compares with PyTorch, which is not installed: pip install torch")

QUIET = 0.1
"""Cores that other processes may use in a round that counts."""

LR, BETAS, JITTER = 0.25, (0.5, 0.9), 30
BATCH_NORM, FIRST_BATCH_NORM, TV_L2, L2 = 0.01, 10.0, 1e-4, 1e-5


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


# --- the torch side ----------------------------------------------------------------------------


class SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's SAME padding."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, I, H, W) -> (B, O, ceil(H / stride), ceil(W / stride))."""
        pads = []
        for size in (x.shape[3], x.shape[2]):
            kernel, stride = self.kernel_size[0], self.stride[0]
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        x = functional.pad(x, pads) if any(pads) else x
        return functional.conv2d(x, self.weight, None, self.stride, groups=self.groups)


def _convolution(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
) -> SameConv2d:
    return SameConv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)


class LiteBlock(nn.Module):
    """EfficientNet-Lite's inverted residual."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.expands = expansion > 1
        if self.expands:
            self._expand_conv = _convolution(inputs, inner, 1)
            self._bn0 = nn.BatchNorm2d(inner, eps=1e-3)
        self._depthwise_conv = _convolution(inner, inner, kernel, stride, inner)
        self._bn1 = nn.BatchNorm2d(inner, eps=1e-3)
        self._project_conv = _convolution(inner, outputs, 1)
        self._bn2 = nn.BatchNorm2d(outputs, eps=1e-3)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H', W')."""
        y = functional.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = functional.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0, under the names of its published files."""

    # repeats, kernel, stride of the first, expansion, channels
    stages = (
        (1, 3, 1, 1, 16),
        (2, 3, 2, 6, 24),
        (2, 5, 2, 6, 40),
        (3, 3, 2, 6, 80),
        (3, 5, 1, 6, 112),
        (4, 5, 2, 6, 192),
        (1, 3, 1, 6, 320),
    )

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = _convolution(3, 32, 3, 2)
        self._bn0 = nn.BatchNorm2d(32, eps=1e-3)
        blocks, inputs = [], 32
        for repeats, kernel, stride, expansion, outputs in self.stages:
            for i in range(repeats):
                blocks.append(LiteBlock(inputs, outputs, kernel, 1 if i else stride, expansion))
                inputs = outputs
        self._blocks = nn.Sequential(*blocks)
        self._conv_head = _convolution(inputs, 1280, 1)
        self._bn1 = nn.BatchNorm2d(1280, eps=1e-3)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> logits (B, 1000)."""
        x = functional.relu6(self._bn0(self._conv_stem(x)))
        x = functional.relu6(self._bn1(self._conv_head(self._blocks(x))))
        return self._fc(x.mean((2, 3)))


def torch_network(name: str) -> nn.Module:
    """Network with random weights and BatchNorm statistics."""
    torch.manual_seed(0)
    if name == "efficientnet_lite0":
        net: nn.Module = EfficientNetLite0()
    else:
        net = _torchvision_models()[name]()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return net.eval()


def _torchvision_models() -> dict[str, Callable[[], nn.Module]]:
    try:
        torchvision = importlib.import_module("torchvision")
    except ModuleNotFoundError:
        sys.exit("torchvision is not installed: pip install --no-deps torchvision")
    except RuntimeError:
        # Its compiled operators do not fit this torch. Its classifiers use none of them, but it
        # will not be imported unless these two are declared.
        for name in ("nms", "qnms"):
            signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            _OPERATORS.define(name + signature)
        torchvision = importlib.import_module("torchvision")
    return {
        name: getattr(torchvision.models, name) for name in ("resnet18", "resnet50", "mobilenet_v2")
    }


_OPERATORS = torch.library.Library("torchvision", "FRAGMENT")  # declarations live as long as it


class TorchInversion:
    """DeepInversion as one writes it in PyTorch.

    Args:
      peer: "pytorch_frozen", "pytorch_published" or "pytorch_compiled".
      net: network in evaluation mode; left as it is.
      images: (B, H, W, C), initial.
      targets: (B,) classes.
      bounds: black and white of each channel.
      steps: of the learning rate's cosine.
      dtype: "bfloat16" for autocast.
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
    ) -> None:
        self.device = torch.device("cuda" if jax.default_backend() == "gpu" else "cpu")
        self.published = peer == "pytorch_published"
        self.dtype = dtype
        compiled = peer == "pytorch_compiled"
        layout = torch.channels_last if compiled else torch.contiguous_format
        self.net = copy.deepcopy(net).to(self.device)
        self.net.to(memory_format=layout)  # type: ignore[call-overload]
        self.net.requires_grad_(self.published)
        self.terms: list[Tensor] = []
        for module in self.net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_hook(self._match)
        nchw = torch.tensor(images.transpose(0, 3, 1, 2).copy(), device=self.device)
        self.images = nchw.to(memory_format=layout).requires_grad_()
        self.targets = torch.tensor(targets, device=self.device)
        self.low, self.high = (
            torch.tensor(b, dtype=torch.float32, device=self.device)[:, None, None] for b in bounds
        )
        self.best, self.best_loss = self.images.detach().clone(), float("inf")
        self.optimiser = torch.optim.Adam([self.images], lr=LR, betas=BETAS)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimiser, steps)
        self.objective = torch.compile(self.plain_objective) if compiled else self.plain_objective

    def _match(self, norm: nn.BatchNorm2d, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        running_mean, running_var = norm.running_mean, norm.running_var
        assert running_mean is not None
        assert running_var is not None
        x = inputs[0].to(running_mean.dtype)
        if self.published:
            mean = x.mean([0, 2, 3])
            columns = x.permute(1, 0, 2, 3).contiguous().view(x.shape[1], -1)
            var = columns.var(1, unbiased=False)
        else:
            var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        self.terms.append(torch.norm(running_var - var, 2) + torch.norm(running_mean - mean, 2))

    def plain_objective(self, x: Tensor) -> Tensor:
        """The loss that one differentiates."""
        self.terms.clear()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bfloat16"):
            logits = self.net(x)
        first, *others = self.terms
        self.terms.clear()
        batch_norm = FIRST_BATCH_NORM * first + torch.stack(others).sum()
        variation = (
            torch.norm(x[:, :, :, :-1] - x[:, :, :, 1:])
            + torch.norm(x[:, :, :-1] - x[:, :, 1:])
            + torch.norm(x[:, :, 1:, :-1] - x[:, :, :-1, 1:])
            + torch.norm(x[:, :, :-1, :-1] - x[:, :, 1:, 1:])
        )
        l2 = torch.norm(x.reshape(len(x), -1), dim=1).mean()
        label = functional.cross_entropy(logits.to(x.dtype), self.targets)
        return label + BATCH_NORM * batch_norm + TV_L2 * variation + L2 * l2

    def loss_and_gradient(self) -> tuple[float, np.ndarray]:
        """Of the initial images, as they are; gradient (B, H, W, C)."""
        loss = self.objective(self.images)
        (gradient,) = torch.autograd.grad(loss, self.images)
        return loss.item(), gradient.permute(0, 2, 3, 1).cpu().numpy()

    def run(self, steps: int) -> None:
        """Take so many steps."""
        for _ in range(steps):
            shifts = (random.randint(-JITTER, JITTER), random.randint(-JITTER, JITTER))
            seen = torch.roll(self.images, shifts, (2, 3))
            if random.random() < 0.5:
                seen = torch.flip(seen, (3,))
            self.optimiser.zero_grad()
            self.net.zero_grad()
            loss = self.objective(seen)
            loss.backward()
            if loss.item() < self.best_loss:
                self.best_loss = loss.item()
                self.best = self.images.detach().clone()
            self.optimiser.step()
            self.schedule.step()
            with torch.no_grad():
                self.images.copy_(torch.maximum(torch.minimum(self.images, self.high), self.low))
        if self.device.type == "cuda":
            torch.cuda.synchronize()


# --- our side ----------------------------------------------------------------------------------


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
) -> tuple[float, float]:
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
        side = TorchInversion(peer, torch_net, images, targets, bounds, 2, case.dtype)
        expected, expected_gradient = side.loss_and_gradient()
        loss, gradient = our_loss_and_gradient(net, case, images, targets)
    loss_difference = abs(loss - expected) / abs(expected)
    gradient_difference = float(
        np.linalg.norm(gradient - expected_gradient) / np.linalg.norm(expected_gradient)
    )
    if not (loss_difference < tolerance and gradient_difference < tolerance):
        sys.exit(
            f"{case}: {peer} does not compute the same: loss {loss} against {expected}, "
            f"gradients differ by {gradient_difference:.1e}"
        )
    return loss_difference, gradient_difference


# --- measuring ---------------------------------------------------------------------------------


def others_seconds() -> float:
    """CPU seconds that other processes have used since the machine started (Linux; else 0)."""
    try:
        user, nice, system, _, _, irq, soft, steal = map(
            int, Path("/proc/stat").read_text().split(maxsplit=9)[1:9]
        )
    except OSError:
        return 0.0
    busy = (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")
    return busy - time.process_time()


@dataclasses.dataclass
class Round:
    """Seconds a step, and how many cores others used meanwhile."""

    ours: float
    peers: dict[str, float]
    others: float


def take_turns(
    attack: deepinversion.Attack,
    images: np.ndarray,
    peers: dict[str, TorchInversion],
    repeats: int,
    steps: int,
) -> list[Round]:
    """Rounds in which every side takes `steps` steps; stops after `repeats` quiet ones.

    Ours runs in `optimise.run`, the peers in its callback, whose time `run` does not count.
    """
    rounds: list[Round] = []
    clock = optimise.Clock()
    began: tuple[float, float, float] | None = None

    def callback(chunk: optimise.Chunk) -> None:
        nonlocal began
        ours = clock.stepping
        spent = {}
        for name, peer in peers.items():
            time.sleep(0.05)  # the other library's threads spin for a while after their work
            start = time.perf_counter()
            peer.run(steps)
            spent[name] = (time.perf_counter() - start) / steps
        if began is not None:  # the first round warms up
            ours_before, time_before, others_before = began
            others = (others_seconds() - others_before) / (time.perf_counter() - time_before)
            rounds.append(Round((ours - ours_before) / steps, spent, others))
        time.sleep(0.05)
        began = ours, time.perf_counter(), others_seconds()

    def enough() -> bool:
        return sum(map(_quiet, rounds)) >= repeats

    optimise.run(
        attack.phases,
        jax.random.key(0),
        jnp.asarray(images),
        attack.data,
        callback=callback,
        chunk=steps,
        clock=clock,
        should_stop=enough,
    )
    if enough():
        return [r for r in rounds if _quiet(r)]
    return sorted(rounds, key=lambda r: r.others)[:repeats]


def _quiet(r: Round) -> bool:
    return r.others < QUIET


def inversion_rows(case: Case, peers: tuple[str, ...], repeats: int, steps: int) -> Iterator[dict]:
    """Measure one case against every peer."""
    torch_net = torch_network(case.network)
    net = ported(case.network, torch_net)
    generator = np.random.default_rng(0)
    shape = (case.batch, case.size, case.size, 3)
    images = generator.normal(size=shape).astype(np.float32)
    targets = generator.integers(0, 1000, case.batch)
    bounds = net.preprocessing.black, net.preprocessing.white
    total = steps * (1 + 3 * repeats)
    sides = {
        name: TorchInversion(name, torch_net, images, targets, bounds, total, case.dtype)
        for name in peers
    }
    differences = {
        name: check_agreement(case, name, torch_net, net, images, targets) for name in peers
    }
    attack = our_attack(net, case, targets, deepinversion.Phase(total, jitter=JITTER))
    rounds = take_turns(attack, images, sides, repeats, steps)
    our_times = np.array([r.ours for r in rounds])
    for name, (loss_difference, gradient_difference) in differences.items():
        peer_times = np.array([r.peers[name] for r in rounds])
        yield {
            "case": str(case),
            "peer": name,
            "device": jax.devices()[0].device_kind,
            "ours_s": _median(our_times),
            "peer_s": _median(peer_times),
            "ratio": _median(peer_times / our_times),
            "ours_quartiles_s": _quartiles(our_times),
            "peer_quartiles_s": _quartiles(peer_times),
            "ratio_quartiles": _quartiles(peer_times / our_times),
            "n": len(rounds),
            "others": _median(np.array([r.others for r in rounds])),
            "loss_difference": loss_difference,
            "gradient_difference": gradient_difference,
        }


def _median(values: np.ndarray) -> float:
    return float(np.median(values))


def _quartiles(values: np.ndarray) -> list[float]:
    return [float(q) for q in np.quantile(values, (0.25, 0.75))]


def machine() -> dict[str, Any]:
    """What the numbers depend on besides the code."""
    processor = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(ln.split(": ")[1] for ln in lines if ln.startswith("model name"))
    settings = ("XLA_FLAGS", "GLIBC_TUNABLES", "OMP_NUM_THREADS", "MALLOC_ARENA_MAX", "LD_PRELOAD")
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "environment": {name: os.environ[name] for name in settings if name in os.environ},
    }


def versions() -> dict[str, str]:
    """Of Python and of the packages that do the work."""
    packages = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "torchvision")
    found = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def write(path: Path, rows: list[dict]) -> None:
    """Write what has been measured so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine(), "versions": versions(), "rows": rows}
    path.write_text(json.dumps(report, indent=2) + "\n")


# --- commands ----------------------------------------------------------------------------------


def inversion(args: argparse.Namespace) -> None:
    """Run the `inversion` command."""
    on_gpu = jax.default_backend() == "gpu"
    if on_gpu and not torch.cuda.is_available():
        sys.exit("JAX sees a GPU and torch does not: install torch with CUDA, or JAX_PLATFORMS=cpu")
    peers: tuple[str, ...] = ("pytorch_frozen", "pytorch_published")
    if on_gpu:
        peers = (*peers, "pytorch_compiled")
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")  # TF32, as XLA does
    else:
        torch.set_num_threads(os.cpu_count() or 1)
    known = GPU_CASES if on_gpu else CASES
    cases = [c for c in known if not args.cases or any(word in str(c) for word in args.cases)]
    if not cases:
        sys.exit(f"no case matches; there are: {', '.join(map(str, known))}")
    print(f"{'case':34}{'peer':19}{'ours [s]':>9}{'peer [s]':>9}{'ratio':>7}{'n':>4}{'others':>8}")
    rows: list[dict] = []
    for case in cases:
        for row in inversion_rows(case, peers, args.repeats, args.steps):
            rows.append(row)
            print(
                f"{row['case']:34}{row['peer']:19}{row['ours_s']:9.4f}{row['peer_s']:9.4f}"
                f"{row['ratio']:7.2f}{row['n']:4}{row['others']:8.2f}",
                flush=True,
            )
        write(args.out, rows)
    if any(row["others"] > QUIET for row in rows):
        print(
            "Other processes used the machine: PyTorch loses far more time to them than JAX, so "
            "those ratios say little. Measure again when it is idle."
        )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("inversion", help="one DeepInversion step against PyTorch")
    command.set_defaults(run=inversion)
    command.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON to write")
    command.add_argument("--cases", nargs="+", metavar="WORD", help="only cases containing one")
    command.add_argument("--repeats", type=int, default=9, metavar="N", help="rounds, at least 7")
    command.add_argument("--steps", type=int, default=3, metavar="N", help="steps in a round")
    args = parser.parse_args(arguments)
    if args.repeats < 7 or args.steps < 1:
        parser.error("medians need at least 7 rounds of at least one step")
    return args


if __name__ == "__main__":
    options = parse()
    options.run(options)

"""DeepInversion as one writes it in PyTorch, and the networks for it."""

from __future__ import annotations

import copy
import importlib
import random
import sys
from collections.abc import Sequence
from types import ModuleType

import jax
import numpy as np

try:
    import torch
    from torch import Tensor, nn
    from torch.nn import functional
except ImportError:
    sys.exit("the benchmark compares with PyTorch, which is not installed: pip install torch")

LR, BETAS, JITTER = 0.25, (0.5, 0.9), 30
BATCH_NORM, FIRST_BATCH_NORM, TV_L2, L2 = 0.01, 10.0, 1e-4, 1e-5
SAME = (np.ones(3), np.zeros(3))
"""The view of a network that takes images as they are."""


PEERS = ("pytorch_frozen", "pytorch_published", "pytorch_channels_last", "pytorch_compiled")
"""See `scripts/benchmark.py`; the last two on GPU only."""

TERMS = ("label", "batch_norm", "tv_l2", "l2")


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


def torch_network(name: str, size: int = 64) -> nn.Module:
    """Network with random weights and the BatchNorm statistics that belong to them.

    Its statistics are those of images of this size.
    """
    torch.manual_seed(0)
    if name == "efficientnet_lite0":
        net: nn.Module = EfficientNetLite0()
    else:
        # Those that take a minute to draw are drawn like the others.
        quick = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        net = getattr(torchvision().models, name)(**quick)
    return with_statistics(net.eval(), size)


def with_statistics(net: nn.Module, size: int = 64) -> nn.Module:
    """Give every BatchNorm layer running statistics near those of noise that passes through.

    Near, so that the prior has something to do; layer after layer, so that activations keep their
    size however deep the network is. Most of them lie above ReLU's kink: a gradient of a random
    network that crosses it everywhere is decided by rounding in bfloat16, on any side.
    """
    generator = torch.Generator().manual_seed(0)

    def measure(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        var, mean = torch.var_mean(inputs[0], (0, 2, 3), correction=0)
        shift = 0.3 * torch.randn(mean.shape, generator=generator)
        norm.running_mean.copy_(mean + var.sqrt() * shift)
        norm.bias.fill_(3.0)
        norm.running_var.copy_(var * (0.5 + torch.rand(var.shape, generator=generator)))

    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(measure) for norm in norms]
    with torch.no_grad():
        net(torch.randn(8, 3, size, size, generator=generator))
    for hook in hooks:
        hook.remove()
    return net


def torchvision() -> ModuleType:
    """The package, also beside a torch that its compiled operators do not fit."""
    try:
        return importlib.import_module("torchvision")
    except ModuleNotFoundError:
        sys.exit("torchvision is not installed: pip install --no-deps torchvision")
    except RuntimeError:
        # Its classifiers use none of the operators, but it will not be imported unless these two
        # are declared.
        for name in ("nms", "qnms"):
            signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            _OPERATORS.define(name + signature)
        return importlib.import_module("torchvision")


_OPERATORS = torch.library.Library("torchvision", "FRAGMENT")  # declarations live as long as it


class TorchInversion:
    """DeepInversion as one writes it in PyTorch.

    Args:
      peer: one of `PEERS`.
      nets: networks in evaluation mode; left as they are.
      views: for each, (gain, shift) by channel that turn images into what it takes.
      images: (B, H, W, C), initial.
      targets: (B,) classes.
      bounds: black and white of each channel.
      steps: of the learning rate's cosine.
      dtype: "bfloat16" for autocast.
    """

    def __init__(
        self,
        peer: str,
        nets: Sequence[nn.Module],
        views: Sequence[tuple[np.ndarray, np.ndarray]],
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
        last = compiled or peer == "pytorch_channels_last"
        layout = torch.channels_last if last else torch.contiguous_format
        self.nets = [copy.deepcopy(net).to(self.device) for net in nets]
        self.terms: list[Tensor] = []
        for net in self.nets:
            net.to(memory_format=layout)  # type: ignore[call-overload]
            net.requires_grad_(self.published)
            for module in net.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.register_forward_hook(self._match)
        nchw = torch.tensor(images.transpose(0, 3, 1, 2).copy(), device=self.device)
        self.images = nchw.to(memory_format=layout).requires_grad_()
        self.targets = torch.tensor(targets, device=self.device)
        self.low, self.high = map(self._by_channel, bounds)
        self.views = [
            None if np.all(view[0] == 1) and np.all(view[1] == 0) else self._pair(view)
            for view in views
        ]
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

    def _by_channel(self, values: np.ndarray) -> Tensor:
        return torch.tensor(values, dtype=self.images.dtype, device=self.device)[:, None, None]

    def _pair(self, view: tuple[np.ndarray, np.ndarray]) -> tuple[Tensor, Tensor]:
        return self._by_channel(view[0]), self._by_channel(view[1])

    def _of_one(self, net: nn.Module, view: tuple[Tensor, Tensor] | None, x: Tensor) -> Tensor:
        """One network's label loss and BatchNorm prior, (2,), weighted."""
        self.terms.clear()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bfloat16"):
            logits = net(x if view is None else x * view[0] + view[1])
        first, *others = self.terms
        self.terms.clear()
        batch_norm = FIRST_BATCH_NORM * first + torch.stack(others).sum()
        label = functional.cross_entropy(logits.to(x.dtype), self.targets)
        return torch.stack([label, BATCH_NORM * batch_norm])

    def plain_objective(self, x: Tensor) -> Tensor:
        """The weighted `TERMS`, whose sum one differentiates."""
        pairs = zip(self.nets, self.views, strict=True)
        networks = torch.stack([self._of_one(net, view, x) for net, view in pairs]).sum(0)
        variation = (
            torch.norm(x[:, :, :, :-1] - x[:, :, :, 1:])
            + torch.norm(x[:, :, :-1] - x[:, :, 1:])
            + torch.norm(x[:, :, 1:, :-1] - x[:, :, :-1, 1:])
            + torch.norm(x[:, :, :-1, :-1] - x[:, :, 1:, 1:])
        )
        l2 = torch.norm(x.reshape(len(x), -1), dim=1).mean()
        return torch.cat([networks, torch.stack([TV_L2 * variation, L2 * l2])])

    def _seen(self, shifts: tuple[int, int]) -> Tensor:
        """The images as a step sees them, which decides how they lie in memory."""
        return torch.roll(self.images, shifts, (2, 3))

    def terms_and_gradient(self) -> tuple[dict[str, float], np.ndarray]:
        """Weighted terms and gradient (B, H, W, C) of the initial images, by what is timed."""
        terms = self.objective(self._seen((0, 0)))
        (gradient,) = torch.autograd.grad(terms.sum(), self.images)
        values = dict(zip(TERMS, terms.tolist(), strict=True))
        return values, gradient.permute(0, 2, 3, 1).cpu().numpy()

    def run(self, steps: int) -> None:
        """Take so many steps."""
        for _ in range(steps):
            shifts = (random.randint(-JITTER, JITTER), random.randint(-JITTER, JITTER))
            seen = self._seen(shifts)
            if random.random() < 0.5:
                seen = torch.flip(seen, (3,))
            self.optimiser.zero_grad()
            for net in self.nets:
                net.zero_grad()
            loss = self.objective(seen).sum()
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

"""Independent torch implementations of the zoo's networks, to compare with.

Written from the descriptions of the published files, not from `jinv.models`: tables are spelled
out, padding is explicit, nothing is shared with the code under test.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

Hook = Callable[[nn.BatchNorm2d, tuple[Tensor]], None]

# --- EfficientNet-Lite -------------------------------------------------------------------------

# A stage's repeats, kernel, stride of the first block, expansion, channels: one table a variant.
LITE: dict[str, tuple[tuple[int, int, int, int, int], ...]] = {
    "efficientnet_lite0": (
        (1, 3, 1, 1, 16),
        (2, 3, 2, 6, 24),
        (2, 5, 2, 6, 40),
        (3, 3, 2, 6, 80),
        (3, 5, 1, 6, 112),
        (4, 5, 2, 6, 192),
        (1, 3, 1, 6, 320),
    ),
    "efficientnet_lite1": (
        (1, 3, 1, 1, 16),
        (3, 3, 2, 6, 24),
        (3, 5, 2, 6, 40),
        (4, 3, 2, 6, 80),
        (4, 5, 1, 6, 112),
        (5, 5, 2, 6, 192),
        (1, 3, 1, 6, 320),
    ),
    "efficientnet_lite2": (
        (1, 3, 1, 1, 16),
        (3, 3, 2, 6, 24),
        (3, 5, 2, 6, 48),
        (4, 3, 2, 6, 88),
        (4, 5, 1, 6, 120),
        (5, 5, 2, 6, 208),
        (1, 3, 1, 6, 352),
    ),
}


class SameConv2d(nn.Conv2d):
    """TensorFlow's SAME: output ceil(size / stride), the odd pixel at the bottom and right."""

    def forward(self, x: Tensor) -> Tensor:
        pads: list[int] = []
        for axis in (3, 2):  # functional.pad wants the last axis first
            size, kernel, stride = x.shape[axis], self.kernel_size[axis - 2], self.stride[axis - 2]
            total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        x = functional.pad(x, pads)
        return functional.conv2d(x, self.weight, self.bias, self.stride, groups=self.groups)


def _lite_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class LiteBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        if expansion > 1:
            self._expand_conv = nn.Conv2d(inputs, inner, 1, bias=False)
            self._bn0 = _lite_norm(inner)
        self._depthwise_conv = SameConv2d(
            inner, inner, kernel, stride=stride, groups=inner, bias=False
        )
        self._bn1 = _lite_norm(inner)
        self._project_conv = nn.Conv2d(inner, outputs, 1, bias=False)
        self._bn2 = _lite_norm(outputs)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = x
        if hasattr(self, "_expand_conv"):
            y = functional.relu6(self._bn0(self._expand_conv(y)))
        y = functional.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return y + x if self.residual else y


class EfficientNetLite(nn.Module):
    def __init__(self, variant: str, classes: int = 1000) -> None:
        super().__init__()
        self._conv_stem = SameConv2d(3, 32, 3, stride=2, bias=False)
        self._bn0 = _lite_norm(32)
        blocks, inputs = [], 32
        for repeats, kernel, stride, expansion, outputs in LITE[variant]:
            for i in range(repeats):
                blocks.append(
                    LiteBlock(inputs, outputs, kernel, stride if i == 0 else 1, expansion)
                )
                inputs = outputs
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = nn.Conv2d(inputs, 1280, 1, bias=False)
        self._bn1 = _lite_norm(1280)
        self._fc = nn.Linear(1280, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        x = functional.relu6(self._bn1(self._conv_head(x)))
        return self._fc(functional.adaptive_avg_pool2d(x, 1).flatten(1))


# --- ResNets for CIFAR -------------------------------------------------------------------------


class CifarBlock(nn.Module):
    """Basic block; option B: 1x1 convolution shortcut, option A: subsample and pad with zeros."""

    def __init__(self, inputs: int, outputs: int, stride: int, option: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, stride=1, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Sequential()
        if stride != 1 or inputs != outputs:
            if option == "B":
                self.shortcut = nn.Sequential(
                    nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False),
                    nn.BatchNorm2d(outputs),
                )
            else:
                self.shortcut = OptionA(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return functional.relu(y + self.shortcut(x))


class OptionA(nn.Module):
    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, x: Tensor) -> Tensor:
        quarter = self.outputs // 4
        return functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, quarter, quarter), "constant", 0)


class CifarResNet(nn.Module):
    def __init__(
        self, depths: Sequence[int], widths: Sequence[int], option: str, classes: int = 10
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, stride=1, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        inputs = widths[0]
        self.layers: list[str] = []
        for stage, (depth, width) in enumerate(zip(depths, widths, strict=True), 1):
            blocks = []
            for stride in [1 if stage == 1 else 2] + [1] * (depth - 1):
                blocks.append(CifarBlock(inputs, width, stride, option))
                inputs = width
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
            self.layers.append(f"layer{stage}")
        self.linear = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        for layer in self.layers:
            x = getattr(self, layer)(x)
        return self.linear(functional.avg_pool2d(x, x.shape[2:]).flatten(1))


class WideBlock(nn.Module):
    """Pre-activation; the shortcut starts after the first ReLU where it is a convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, stride=1, padding=1, bias=False)
        self.equal = inputs == outputs
        if not self.equal:
            self.convShortcut = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.equal:
            x = functional.relu(self.bn1(x))
            y = self.conv2(functional.relu(self.bn2(self.conv1(x))))
            return self.convShortcut(x) + y
        y = functional.relu(self.bn1(x))
        return x + self.conv2(functional.relu(self.bn2(self.conv1(y))))


# Blocks of a stage, and the channels of the three.
WIDE = {
    "wrn_16_1": (2, (16, 32, 64)),
    "wrn_16_2": (2, (32, 64, 128)),
    "wrn_40_1": (6, (16, 32, 64)),
    "wrn_40_2": (6, (32, 64, 128)),
    "wrn_28_10": (4, (160, 320, 640)),
}


class WideResNet(nn.Module):
    """wresnet.py, for 32 px images; others are averaged over all that is left of them."""

    def __init__(self, name: str, classes: int = 10) -> None:
        super().__init__()
        depth, widths = WIDE[name]
        self.conv1 = nn.Conv2d(3, 16, 3, stride=1, padding=1, bias=False)
        inputs = 16
        for number, width in enumerate(widths, 1):
            stage = nn.Module()
            blocks = []
            for i in range(depth):
                blocks.append(WideBlock(inputs, width, 2 if number > 1 and i == 0 else 1))
                inputs = width
            stage.layer = nn.Sequential(*blocks)
            self.add_module(f"block{number}", stage)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for stage in (self.block1, self.block2, self.block3):
            x = stage.layer(x)
        x = functional.relu(self.bn1(x))
        return self.fc(functional.avg_pool2d(x, x.shape[2:]).flatten(1))


class LeNet(nn.Module):
    """The authors' of Deep Leakage from Gradients, for one gray image of 28 px."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 12, 5, padding=2, stride=2),
            nn.Sigmoid(),
            nn.Conv2d(12, 12, 5, padding=2, stride=2),
            nn.Sigmoid(),
            nn.Conv2d(12, 12, 5, padding=2, stride=1),
            nn.Sigmoid(),
        )
        self.fc = nn.Sequential(nn.Linear(588, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).flatten(1))


class VGGSmall(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((1, 32), (32, 64), (64, 128)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
            layers += [nn.Conv2d(outputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Linear(2048, 256), nn.ReLU(), nn.Linear(256, 26))

    def forward(self, x: Tensor) -> Tensor:
        x = functional.adaptive_avg_pool2d(self.features(x), 4)
        return self.classifier(x.flatten(1))


# --- any network of the zoo --------------------------------------------------------------------


def build(name: str) -> nn.Module:
    """The torch network of this registry name: shapes, no numbers."""
    with torch.device("meta"):
        if name in LITE:
            return EfficientNetLite(name)
        if name == "lenet":
            return LeNet()
        if name == "vgg_small":
            return VGGSmall()
        if name == "resnet18_cifar":
            return CifarResNet((2, 2, 2, 2), (64, 128, 256, 512), "B")
        if name == "resnet18_cifar_slim":
            return CifarResNet((2, 2, 2, 2), (16, 32, 64, 128), "B")
        if name == "resnet34_cifar":
            return CifarResNet((3, 4, 6, 3), (64, 128, 256, 512), "B")
        if name == "resnet20_cifar":
            return CifarResNet((3, 3, 3), (16, 32, 64), "A")
        if name in WIDE:
            return WideResNet(name)
        return _torchvision(name)


# Those with auxiliary heads also warn of how they will draw weights some day.
_AUXILIARY = {"aux_logits": True, "init_weights": False}
ARGUMENTS = {"googlenet": _AUXILIARY, "inception_v3": _AUXILIARY}


def _torchvision(name: str, **arguments: Any) -> nn.Module:
    import torchvision

    if not name.startswith("regnet"):
        chosen = {**ARGUMENTS.get(name, {}), **arguments}
        return torchvision.models.get_model(name, weights=None, **chosen)
    # It computes its widths with tensors.
    blocks = torchvision.models.regnet.BlockParams
    compute = blocks.from_init_params

    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        with torch.device("cpu"):
            return compute(*args, **kwargs)

    with mock.patch.object(blocks, "from_init_params", on_cpu):
        return torchvision.models.get_model(name, weights=None, **arguments)


@torch.no_grad()
def random_network(name: str, images: np.ndarray, seed: int = 0) -> nn.Module:
    """Network in inference mode whose every tensor is random, and whose signal neither dies
    nor explodes: each BatchNorm's running statistics are those of its input for `images`,
    disturbed. Variances are about 0.01, so that eps shows in the fourth digit; scales are small,
    so that rounding errors do not grow exponentially with depth. Without BatchNorm layers they
    are those of He's initialisation.
    """
    generator = torch.Generator().manual_seed(seed)
    return randomise(name, build(name).to_empty(device="cpu").eval(), images, generator)


@torch.no_grad()
def randomise(
    name: str, model: nn.Module, images: np.ndarray, generator: torch.Generator
) -> nn.Module:
    """Fill an empty network, see `random_network`."""
    gain = 0.1 if any(isinstance(m, nn.BatchNorm2d) for m in model.modules()) else 1
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_in = module.weight[0].numel()
            module.weight.normal_(0, gain * math.sqrt(2 / fan_in), generator=generator)
            if module.bias is not None:
                module.bias.normal_(0, 0.1, generator=generator)
        elif isinstance(module, nn.Linear):
            module.weight.normal_(0, math.sqrt(2 / module.in_features), generator=generator)
            if module.bias is not None:
                module.bias.normal_(generator=generator)
        elif isinstance(module, nn.LayerNorm):
            module.weight.uniform_(0.5, 1.5, generator=generator)
            module.bias.normal_(0, 0.3, generator=generator)
        elif isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.05, 0.35, generator=generator)
            if name in LITE or name.startswith("mobilenet"):
                module.weight[::8] *= 8  # so that ReLU6 reaches 6, and hard swish both ends
            module.bias.normal_(0, 0.3, generator=generator)
            # An auxiliary head's layers see nothing.
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            module.num_batches_tracked.random_(1, 2**31 - 1, generator=generator)

    for key, value in model.state_dict(keep_vars=True).items():
        if key.endswith("layer_scale"):
            value.normal_(0, 0.3, generator=generator)
        elif key.endswith("relative_position_bias_table"):
            value.normal_(generator=generator)
        elif key.endswith("relative_position_index"):
            from torchvision.models.maxvit import _get_relative_position_index

            side = math.isqrt(len(value))
            value.copy_(_get_relative_position_index(side, side))

    def calibrate(module: nn.BatchNorm2d, inputs: tuple[Tensor]) -> None:
        mean, var = _moments(inputs[0])
        noise = torch.empty_like(mean).normal_(0, 0.3, generator=generator)
        module.running_mean.copy_(mean + var.sqrt() * noise)
        module.running_var.copy_(var * noise.uniform_(0.5, 1.5, generator=generator))

    _with_hooks(model, images, calibrate)
    return model


class Reference(NamedTuple):
    """Logits (B, classes), and (mean, biased variance) of every BatchNorm's input in call order.

    The features are the input of the last linear layer, None without one.
    """

    logits: np.ndarray
    features: np.ndarray | None
    moments: list[tuple[np.ndarray, np.ndarray]]
    statistics: list[tuple[np.ndarray, np.ndarray]]


@torch.no_grad()
def forward(model: nn.Module, images: np.ndarray) -> Reference:
    """Inference on images (B, H, W, 3)."""
    moments, statistics = [], []

    def look(module: nn.BatchNorm2d, inputs: tuple[Tensor]) -> None:
        mean, var = _moments(inputs[0])
        moments.append((mean.numpy(), var.numpy()))
        statistics.append((module.running_mean.numpy(), module.running_var.numpy()))

    inputs: list[np.ndarray] = []
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    handles = [
        m.register_forward_pre_hook(lambda _, x: inputs.append(x[0].numpy())) for m in linear
    ]
    logits = _with_hooks(model.eval(), images, look)
    for handle in handles:
        handle.remove()
    return Reference(logits.numpy(), inputs[-1] if inputs else None, moments, statistics)


def gradient(model: nn.Module, images: np.ndarray, labels: list[int]) -> np.ndarray:
    """Gradient of DeepInversion's loss at images (B, H, W, 3).

    Cross-entropy plus 0.1 times sum_l |mean_l - running_mean_l| + |var_l - running_var_l|.
    """
    x = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).requires_grad_()
    distances: list[Tensor] = []

    def look(module: nn.BatchNorm2d, inputs: tuple[Tensor]) -> None:
        mean, var = _moments(inputs[0])
        distances.append((mean - module.running_mean).norm() + (var - module.running_var).norm())

    model.eval().requires_grad_(False)
    logits = _with_hooks(model, x, look)
    loss = functional.cross_entropy(logits, torch.tensor(labels)) + 0.1 * sum(distances)
    loss.backward()
    assert x.grad is not None
    return x.grad.numpy().transpose(0, 2, 3, 1)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)


def _with_hooks(model: nn.Module, images: np.ndarray | Tensor, hook: Hook) -> Tensor:
    """What the model says of images (B, H, W, C), or of a tensor (B, C, H, W)."""
    if not isinstance(images, Tensor):
        images = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    handles = [norm.register_forward_pre_hook(hook) for norm in norms]
    try:
        return model(images)
    finally:
        for handle in handles:
            handle.remove()


def state_arrays(model: nn.Module) -> dict[str, np.ndarray]:
    """The state_dict as NumPy arrays."""
    return {key: tensor.numpy() for key, tensor in model.state_dict().items()}


def parameters(model: nn.Module) -> int:
    """Number of trained numbers."""
    return sum(parameter.numel() for parameter in model.parameters())

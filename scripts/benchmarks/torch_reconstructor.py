"""The reconstructor of arXiv 2505.14323 and its training as one writes them in PyTorch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from jinv.reconstruct.network import Config

PEERS = ("pytorch", "pytorch_channels_last", "pytorch_compiled")
"""See `scripts/benchmark.py`; the last on GPU only."""


def lean(peer: str) -> bool:
    """Whether a peer's network is."""
    return peer != "pytorch"


class Problem(NamedTuple):
    """Shadow models in memory, and the images that they were trained on.

    Attributes:
      images: (M, H, W, C) bytes.
      labels: (M,) classes.
      weights: (S, P) of the shadow models.
      indices: (S, N) which images each was trained on: as many of every class.
      mean, std: (P,) of the weights.
    """

    images: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    indices: np.ndarray
    mean: np.ndarray
    std: np.ndarray


class Block(nn.Module):
    """BatchNorm, ReLU, twice the size, conv3, BatchNorm, ReLU, conv3, beside twice the size, conv1.

    Args:
      inputs, outputs: channels.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.ReLU(),
            nn.Upsample(scale_factor=2, mode="nearest"),
            nn.Conv2d(inputs, outputs, 3, padding=1),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1),
        )
        self.bypass = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(inputs, outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, 2 H, 2 W)."""
        return self.main(x) + self.bypass(x)


class Product(nn.Module):
    """The same as a transposed convolution of one pixel to 4 x 4, for which CPUs have no kernel.

    Args:
      inputs, outputs: channels.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        like = nn.ConvTranspose2d(inputs, outputs, 4)
        self.weight = nn.Parameter(like.weight.detach().permute(0, 2, 3, 1).flatten(1))
        self.bias = like.bias

    def forward(self, z: Tensor) -> Tensor:
        """(B, inputs, 1, 1) -> (B, outputs, 4, 4), in memory with channels last."""
        y = (z.flatten(1) @ self.weight).view(len(z), 4, 4, -1)
        return (y + self.bias.to(y.dtype)).permute(0, 3, 1, 2)


class Network(nn.Module):
    """As the paper says it: a transposed convolution of one pixel, then residual blocks.

    Args:
      config: of our network, for its sizes alone.
      lean: a product first.
    """

    def __init__(self, config: Config, lean: bool = False) -> None:
        super().__init__()
        g, more = config.width, config.size // 64
        widths = [4 * g, 2 * g, g, g] + more * [g]
        inputs = config.inputs + (config.classes or 0)
        self.model = nn.Sequential(
            Product(inputs, widths[0]) if lean else nn.ConvTranspose2d(inputs, widths[0], 4),
            *(Block(inputs, outputs) for inputs, outputs in itertools.pairwise(widths)),
            nn.BatchNorm2d(g),
            nn.ReLU(),
            nn.Conv2d(g, config.channels, 3, padding=1),
            nn.Tanh(),
        )

    def forward(self, z: Tensor) -> Tensor:
        """(B, inputs + classes) -> (B, channels, size, size)."""
        return self.model(z[:, :, None, None])


def paired(
    net: Network, variables: Mapping[Any, Any]
) -> Iterator[tuple[nn.Module, str, Tensor, np.ndarray]]:
    """Yield layer, name, tensor and ours in its order of axes, one after the other as in PyTorch.

    Args:
      net: PyTorch's.
      variables: ours, or a tree of its parameters alone, such as their gradient.
    """
    for layer, ours in _layers(net, variables):
        for name, tensor in layer.state_dict(keep_vars=True).items():
            if name not in ours:
                continue
            array = np.asarray(ours[name])
            if name == "weight" and isinstance(layer, nn.ConvTranspose2d):
                array = array.reshape(len(array), 4, 4, -1).transpose(0, 3, 1, 2)
            elif array.ndim == 4:
                array = array.transpose(3, 2, 0, 1)
            yield layer, name, tensor, array


def _layers(net: Network, variables: Mapping[Any, Any]) -> Iterator[tuple[nn.Module, Mapping]]:
    model: Any = net.model
    yield model[0], variables["first"]
    for i, block in variables["blocks"].items():
        theirs = model[1 + i]
        yield theirs.main[0], block["bn1"]
        yield theirs.main[3], block["conv1"]
        yield theirs.main[4], block["bn2"]
        yield theirs.main[6], block["conv2"]
        yield theirs.bypass[1], block["bypass"]
    yield model[-4], variables["bn"]
    yield model[-2], variables["conv"]


def network(config: Config, variables: Mapping[Any, Any], lean: bool = False) -> Network:
    """Return the network with our variables, of their type.

    Args:
      config: of our network.
      variables: ours.
      lean: see `Network`.
    """
    with torch.device("meta"):
        net = Network(config, lean)
    dtype = torch.from_numpy(np.array(variables["first"]["bias"])).dtype
    net = net.to(dtype).to_empty(device="cpu")
    for _, _, tensor, array in paired(net, variables):
        tensor.data.copy_(torch.from_numpy(np.array(array)))
    return net


class TorchTraining:
    """Training on shadow models in memory: loss 0.5 (MSE + MAE), softmin, Adam.

    Args:
      peer: one of `PEERS`.
      net: with initial parameters; taken over.
      problem: what it learns from.
      classes: that it is told the image's of.
      batch: shadow models a step.
      lr: of Adam.
      alpha: of the softmin over the images of a class.
      dtype: "bfloat16" for autocast.
    """

    def __init__(
        self,
        peer: str,
        net: Network,
        problem: Problem,
        *,
        classes: int,
        batch: int,
        lr: float,
        alpha: float,
        dtype: str,
    ) -> None:
        self.device = torch.device("cuda" if jax.default_backend() == "gpu" else "cpu")
        self.classes, self.batch, self.alpha, self.dtype = classes, batch, alpha, dtype
        compiled = peer == "pytorch_compiled"
        last = compiled or peer == "pytorch_channels_last"
        layout = torch.channels_last if last else torch.contiguous_format
        self.net = net.to(self.device).to(memory_format=layout).train()  # type: ignore[call-overload]
        self.type = next(net.parameters()).dtype
        self.images = self._put(problem.images.transpose(0, 3, 1, 2).copy())
        self.labels = self._put(problem.labels).long()
        self.weights = self._put(problem.weights).to(self.type)
        self.indices = self._put(problem.indices).long()
        self.mean, self.std = (self._put(x).to(self.type) for x in (problem.mean, problem.std))
        self.of_each_class = problem.indices.shape[1] // classes
        self.optimiser = torch.optim.Adam(net.parameters(), lr, fused=compiled or None)
        self.objective = torch.compile(self.plain_objective) if compiled else self.plain_objective
        self.row = 0

    def _put(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def plain_objective(self, z: Tensor, truth: Tensor) -> Tensor:
        """The loss of (B, inputs + classes) against (B, K, C, H, W), any of K images each."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bfloat16"):
            found = self.net(z)
        apart = found.to(self.type)[:, None] - truth
        each = 0.5 * (apart.square().mean((2, 3, 4)) + apart.abs().mean((2, 3, 4)))
        return (torch.softmax(-self.alpha * each, 1) * each).sum(1).mean()

    def given(self, drawn: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the next step's loss takes.

        Args:
          drawn: (B,) which image of its set gives a shadow model its class.
        """
        rows = slice(self.row, self.row + self.batch)
        indices = self.indices[rows]
        classes = self.labels[indices]
        labels = classes.gather(1, drawn[:, None])
        same = (classes == labels).float().topk(self.of_each_class, 1).indices
        truth = self.images[indices.gather(1, same)].to(self.type) / 127.5 - 1
        x = (self.weights[rows] - self.mean) / self.std
        told = functional.one_hot(labels[:, 0], self.classes)
        return torch.cat([x, told.to(x.dtype)], 1), truth

    def loss_and_gradient(self, drawn: np.ndarray) -> tuple[float, Iterator[np.ndarray]]:
        """Return the loss of the next step, by what is timed, and gradients as a lean one has them.

        Args:
          drawn: see `given`.
        """
        self.optimiser.zero_grad()
        loss = self.objective(*self.given(self._put(drawn).long()))
        loss.backward()
        return loss.item(), self._gradients()

    def _gradients(self) -> Iterator[np.ndarray]:
        for layer in self.net.modules():
            for parameter in layer.parameters(recurse=False):
                assert parameter.grad is not None
                gradient = parameter.grad
                if isinstance(layer, nn.ConvTranspose2d) and gradient.ndim == 4:
                    gradient = gradient.permute(0, 2, 3, 1)
                yield gradient.cpu().numpy()

    def run(self, steps: int) -> None:
        """Take so many steps; after the last shadow models, again on these."""
        losses = []
        for _ in range(steps):
            drawn = torch.randint(self.indices.shape[1], (self.batch,), device=self.device)
            self.optimiser.zero_grad()
            loss = self.objective(*self.given(drawn))
            loss.backward()
            self.optimiser.step()
            losses.append(loss.detach())
            self.row = min(self.row + self.batch, len(self.weights) - self.batch)
        torch.stack(losses).tolist()

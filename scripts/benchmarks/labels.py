"""Which labels every method restores from gradients of trained networks."""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from PIL import Image

from benchmarks import timing
from benchmarks.gradients import PHOTOGRAPHS, photograph
from jinv import data, image
from jinv.federated import evidence, labels
from jinv.federated.evidence import Evidence
from jinv.models.network import Network
from jinv.net import Net

VICTIM = Path("out/victims/resnet18_slim")
Batch = tuple[Array, list[int]]


@dataclasses.dataclass(frozen=True)
class Case:
    """Batches of one size through one network.

    Attributes:
      network: name in the zoo.
      images: in a batch.
      training: the network's mode.
    """

    network: str
    images: int
    training: bool

    def __str__(self) -> str:
        return f"{self.network} {self.images} {'train' if self.training else 'eval'}"


CASES = tuple(
    Case(network, images, training)
    for network in ("mobilenet_v2", "efficientnet_lite0", "resnet18_cifar_slim")
    for training in (False, True)
    for images in (8, 32, 64)
)


def crops(net: Net, count: int, generator: np.random.Generator) -> Batch:
    """Random squares of photographs; a crop's class is what the network says of it."""
    squares = []
    size = net.preprocessing.height
    for name in generator.choice(PHOTOGRAPHS, count):
        picture = photograph(name)
        side = int(min(picture.size) * generator.uniform(0.3, 1))
        left, top = (int(generator.integers(length - side + 1)) for length in picture.size)
        kept = int(size / (size + 32) * side)  # the margin of `image.centre_crop`, small or large
        left, top = left + (side - kept + 1) // 2, top + (side - kept + 1) // 2
        square = picture.crop((left, top, left + kept, top + kept))
        squares.append(square.resize((size, size), Image.Resampling.BICUBIC))
    images = jnp.asarray(image.stack_square(squares, net.preprocessing))
    return images, net(images).logits.argmax(-1).tolist()


@functools.cache
def _load(network: Network) -> Net:
    return network.load()


@functools.cache
def _garments() -> data.Dataset:
    return data.fashion_mnist("test")


def garments(net: Net, count: int, generator: np.random.Generator) -> Batch:
    """FashionMNIST's test images with their own classes."""
    everything = _garments()
    drawn = everything.take(generator.permutation(len(everything))[:count])
    gray = jnp.asarray(drawn.images / np.float32(255))
    pixels = jnp.repeat(gray, net.preprocessing.channels, -1)
    return image.normalise(pixels, net.preprocessing), drawn.labels.tolist()


def last(tree: Any, classes: int) -> dict[Any, Any]:
    """The leaves with so many outputs, where they are."""
    kept = {key: last(v, classes) if isinstance(v, dict) else v for key, v in tree.items()}
    return {k: v for k, v in kept.items() if (v if isinstance(v, dict) else v.shape[-1] == classes)}


def measure(case: Case, net: Net, draw: Callable[..., Batch], batches: int) -> Iterator[dict]:
    """Means over the batches, a row for every method."""
    scores: dict[str, list[dict[str, float]]] = {method: [] for method in labels.METHODS}

    @jax.jit
    def sent(variables: Any, images: Array, one_hot: Array) -> Any:
        """The gradient of the last layer; XLA leaves out the others'."""
        return last(
            evidence.observed(net, variables, images, one_hot, training=case.training), net.classes
        )

    for seed in range(batches):
        images, classes = draw(net, case.images, np.random.default_rng(seed))
        values = sent(net.variables, images, jax.nn.one_hot(jnp.asarray(classes), net.classes))
        head = labels.head_of(net, Evidence(jax.device_get(values), len(classes)))
        truth = np.bincount(classes, minlength=net.classes)
        for method in labels.METHODS:
            scores[method].append(labels.scores(labels.restore(head, method), truth))
    for method, found in scores.items():
        means = {name: float(np.mean([score[name] for score in found])) for name in found[0]}
        yield {"case": str(case), "method": method, "batches": batches, **means}


def run(args: argparse.Namespace) -> None:
    """The `labels` command."""
    print(f"{'case':32}{'method':10}{'accuracy':>9}{'precision':>10}{'recall':>8}{'exact':>7}")
    rows: list[dict] = []
    for case in timing.chosen(CASES, args.cases):
        if case.network != "resnet18_cifar_slim":
            net, draw = _load(Network(case.network)), crops
        elif VICTIM.exists():
            net, draw = _load(Network(case.network, weights=str(VICTIM))), garments
        else:
            print(f"{case}: left out, train it with scripts/pretrain.py into {VICTIM}")
            continue
        for row in measure(case, net, draw, args.repeats):
            rows.append(row)
            values = "".join(
                f"{row[name]:{width}.2f}"
                for name, width in (("accuracy", 9), ("precision", 10), ("recall", 8), ("exact", 7))
            )
            print(f"{row['case']:32}{row['method']:10}{values}", flush=True)
            timing.write(args.out, rows)

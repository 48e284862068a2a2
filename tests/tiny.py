"""Small networks that several test files share: compiled in a fraction of a second."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jinv import optimise
from jinv.image import Preprocessing
from jinv.net import Net
from jinv.optimise import State

SPACE = Preprocessing(size=16, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
OTHER_SPACE = Preprocessing(
    size=12, mean=(127.0, 120.0, 110.0), std=(128.0, 130.0, 126.0), pixel_range=(0.0, 255.0)
)
GRAY = Preprocessing(size=16, mean=(0.45,), std=(0.25,))


class Tiny(nnx.Module):
    """3x3 convolution, BatchNorm, ReLU for every width (stride 2 from the second on), linear."""

    def __init__(
        self, channels: int, widths: Sequence[int], classes: int, *, rngs: nnx.Rngs
    ) -> None:
        ends = (channels, *widths)
        self.convs = nnx.List(
            [
                nnx.Conv(
                    ends[i], ends[i + 1], (3, 3), strides=1 if i == 0 else 2, padding=1, rngs=rngs
                )
                for i in range(len(widths))
            ]
        )
        # Without momentum a pass in training mode leaves that batch's statistics.
        self.norms = nnx.List([nnx.BatchNorm(width, momentum=0.0, rngs=rngs) for width in widths])
        self.head = nnx.Linear(widths[-1], classes, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = jax.nn.relu(norm(conv(x)))
        return self.head(x.mean((1, 2)))


def network(
    seed: int = 0,
    space: Preprocessing = SPACE,
    *,
    widths: Sequence[int] = (6, 8),
    classes: int = 7,
    name: str = "tiny",
    seen: Array | np.ndarray | None = None,
) -> Net:
    """A `Tiny` with random weights.

    Its running statistics are exactly those of the batch `seen`; without one they are those of
    noise, disturbed, so that no layer's moments match. Logits spread over several units.
    """
    model = Tiny(space.channels, widths, classes, rngs=nnx.Rngs(seed))
    rng = np.random.default_rng(seed)
    for norm, width in zip(model.norms, widths, strict=True):
        norm.scale[...] = jnp.asarray(rng.uniform(0.5, 1.5, width), jnp.float32)
        norm.bias[...] = jnp.asarray(rng.normal(0, 0.3, width), jnp.float32)
    model.head.kernel[...] = model.head.kernel[...] * 4
    model.train()
    model(noise((8, 16, 16, space.channels), seed) if seen is None else jnp.asarray(seen))
    if seen is None:
        for norm, width in zip(model.norms, widths, strict=True):
            shift = np.sqrt(norm.var[...]) * rng.normal(0, 0.4, width)
            norm.mean[...] = jnp.asarray(norm.mean[...] + shift, jnp.float32)
            norm.var[...] = jnp.asarray(norm.var[...] * rng.uniform(0.5, 1.5, width), jnp.float32)
    return Net.from_nnx(model, space, name=name)


def featureless() -> Net:
    """A network that ends in no linear layer."""
    net = network()

    def apply(variables: Any, images: Array) -> Any:
        return net.apply(variables, images)._replace(features=None)

    return dataclasses.replace(net, apply=apply, head=None)


def two_classes() -> Net:
    """A teacher of two classes."""
    space = dataclasses.replace(SPACE, size=28)
    return network(seed=4, classes=2, space=space)


def noise(shape: tuple[int, ...], seed: int = 0) -> Array:
    """Standard normal, float32."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def run(attack: Any, *, key: int = 1, noise: int = 0) -> tuple[State, dict[str, np.ndarray]]:
    """An attack's last state, and every metric at every step."""
    found: list[dict[str, np.ndarray]] = []
    state = optimise.run(
        attack.phases,
        jax.random.key(key),
        attack.initial(jax.random.key(noise)),
        attack.data,
        callback=lambda chunk: found.append(chunk.metrics),
    )
    return state, {name: np.concatenate([f[name] for f in found]) for name in found[0]}

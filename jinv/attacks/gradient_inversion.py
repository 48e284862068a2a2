"""GradInversion: a client's batch out of its gradient (arXiv 2104.07586).

L(x) = a_G D(g(x), g*) + a_tv TV_2(x) + a_l2 R_l2(x) + a_bn R_bn(x) + a_group ||x - consensus||_2

where g(x) is the gradient that the client would have sent for images x and the restored labels, and
g* the one it sent. Several seeds of the whole batch are optimised at once and pull each other to
their consensus. Inverting Gradients (cosine distance, signed steps) and DLG are settings of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.sharding import PartitionSpec

from jinv import evidence as evidences
from jinv import image, optimise, parallel, priors
from jinv.attacks import registration
from jinv.evidence import Evidence
from jinv.net import Net
from jinv.objective import weigh

Distance = Literal["l2", "squared_l2", "cosine"]


@dataclasses.dataclass(frozen=True)
class Config:
    """What defines the mathematics. Defaults: the published ImageNet settings.

    Attributes:
      steps: number of steps.
      lr: learning rate of Adam, after `warmup` linear steps falling to 0 along a cosine.
      warmup: steps.
      signed: Adam sees the sign of the gradient only (Inverting Gradients).
      distance: of gradients. "l2": sum_l ||g_l - g*_l||_2; "squared_l2": of the squares; "cosine":
        1 - <g, g*> / (||g|| ||g*||) over all layers.
      gradient: weight of the distance; 0 leaves the other terms alone (the BN-only ablation).
      layers: factor of each layer by the beginning of its name, such as {"fc": 0}; 1 for others.
      tv_l2, l2: weights of the image priors.
      batch_norm: weight of the BatchNorm prior, against what the evidence knows of moments.
      first_bn_multiplier: further weight of the first BatchNorm layer.
      seeds: candidates of the batch that are optimised at once.
      group: weight of each candidate's distance to the consensus.
      group_from: step from which there is a consensus, every `group_every` steps renewed.
      group_every: steps.
      noise: Langevin noise: after a step of rate lr(t), lr(t) * noise * N(0, I) is added.
      clip: clip each channel to the range of valid pixels after each step.
      init_std: standard deviation of the initial noise, in normalised units.
    """

    steps: int = 20000
    lr: float = 0.1
    warmup: int = 50
    signed: bool = False
    distance: Distance = "l2"
    gradient: float = 1e-3
    layers: Mapping[str, float] = dataclasses.field(default_factory=dict)
    tv_l2: float = 1e-4
    l2: float = 1e-6
    batch_norm: float = 0.1
    first_bn_multiplier: float = 1.0
    seeds: int = 8
    group: float = 0.01
    group_from: int = 5000
    group_every: int = 100
    noise: float = 0.2
    clip: bool = True
    init_std: float = 1.0

    def __post_init__(self) -> None:
        for name in ("steps", "seeds", "group_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        choices = get_args(Distance)
        if self.distance not in choices:
            raise ValueError(f"distance is one of {', '.join(choices)}, not {self.distance!r}")


def gradient_distance(
    found: evidences.Parameters,
    wanted: evidences.Parameters,
    kind: Distance = "l2",
    layers: Mapping[str, float] | None = None,
) -> Array:
    """D(g, g*) over trees of the same structure; `layers` as in `Config`."""
    paths = [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(wanted)]
    factors = [_factor(path, layers or {}) for path in paths]
    pairs = [
        (factor, a, b)
        for factor, a, b in zip(
            factors, jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True
        )
        if factor
    ]
    if kind == "l2":
        return sum((f * priors.norm(a - b) for f, a, b in pairs), jnp.zeros(()))
    if kind == "squared_l2":
        return sum((f * jnp.square(a - b).sum() for f, a, b in pairs), jnp.zeros(()))
    if kind == "cosine":
        product = sum((f * (a * b).sum() for f, a, b in pairs), jnp.zeros(()))
        ours = sum((f * jnp.square(a).sum() for f, a, _ in pairs), jnp.zeros(()))
        theirs = sum((f * jnp.square(b).sum() for f, _, b in pairs), jnp.zeros(()))
        return 1 - product / jnp.maximum(jnp.sqrt(ours) * jnp.sqrt(theirs), 1e-30)
    raise ValueError(f"no distance of gradients is called {kind!r}")


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(str(getattr(key, "key", key)) for key in path)


def _factor(name: str, layers: Mapping[str, float]) -> float:
    """Of the longest beginning that fits."""
    fitting = [begin for begin in layers if name == begin or name.startswith(f"{begin}.")]
    return layers[max(fitting, key=len)] if fitting else 1.0


class Data(NamedTuple):
    """Arrays that the steps read.

    Attributes:
      variables: the network's, before.
      wanted: the evidence's values.
      moments: what is known of every BatchNorm layer's, () if nothing.
      labels: (K, C), one-hot.
    """

    variables: Any
    wanted: Any
    moments: Any
    labels: Array


@dataclasses.dataclass(frozen=True)
class Attack:
    """A built attack: give `images`, `data` and `phases` to `optimise.run`.

    Attributes:
      phases: one.
      data: what its steps read.
      initial: `key -> images` (seeds, K, H, W, C), Gaussian noise.
    """

    phases: tuple[optimise.Phase, ...]
    data: Data
    initial: Callable[[Array], Array]


Register = Callable[[Array, Array], Array]
"""(images, reference), both (G, K, H, W, C) -> the images moved onto the reference."""


def build(
    config: Config,
    net: Net,
    evidence: Evidence,
    labels: Sequence[int],
    *,
    size: int | tuple[int, int] | None = None,
    register: Register | None = registration.to_reference,
    devices: int | None = None,
) -> Attack:
    """GradInversion of this evidence.

    Args:
      config: the mathematics.
      net: the victim's network as it was before.
      evidence: what it sent.
      labels: K classes, as `labels.restore` finds them.
      size: of the images; defaults to the network's.
      register: moves candidates onto their mean before the consensus is taken; None for the
        plain mean.
      devices: that share the seeds evenly; by default as many as can.

    Raises:
      ValueError: what does not fit together.
    """
    evidence.check(net)
    chosen = np.asarray(labels)
    if chosen.shape != (evidence.images,) or chosen.min() < 0 or chosen.max() >= net.classes:
        raise ValueError(
            f"{evidence.images} labels from 0 to {net.classes - 1} are needed, not {list(labels)}"
        )
    moments = _known_moments(config, net, evidence)
    space = net.preprocessing
    height, width = (
        (space.size,) * 2 if size is None else (size, size) if isinstance(size, int) else size
    )
    shape = (config.seeds, evidence.images, height, width, space.channels)
    mesh = _mesh(config.seeds, devices)

    def initial(key: Array) -> Array:
        noise = config.init_std * jax.random.normal(key, shape)
        return parallel.put(mesh, PartitionSpec(parallel.BATCH), noise)

    def project(images: Array) -> Array:
        return image.clip(images, space) if config.clip else images

    rate = optimise.warm_cosine(config.lr, config.warmup, config.steps)
    optimiser = optax.adam(rate)
    if config.signed:
        optimiser = optax.chain(optax.stateless(lambda g, _: jnp.sign(g)), optimiser)
    grouped = config.seeds > 1 and config.group > 0

    def remember(step: Array, images: Array, consensus: Array) -> Array:
        renewed = (step >= config.group_from) & (
            (step - config.group_from) % config.group_every == 0
        )
        return lax.cond(renewed, lambda: _consensus(images, register), lambda: consensus)

    def enter(images: Array, step: Any) -> optimise.State:
        memory = jnp.zeros(shape[1:]) if grouped else ()
        return optimise.init(images, optimiser, step, candidates=True, memory=memory)

    step = optimise.make_step(
        _loss(config, net, evidence, grouped),
        optimiser,
        project=project,
        noise=(lambda t: config.noise * rate(t)) if config.noise else None,
        remember=remember if grouped else None,
    )
    data = Data(net.variables, evidence.values, moments, jax.nn.one_hot(chosen, net.classes))
    data = parallel.put(mesh, PartitionSpec(), data)
    phase = optimise.Phase(f"{config.seeds} x {evidence.images} images", config.steps, enter, step)
    return Attack((phase,), data, initial)


def _mesh(seeds: int, devices: int | None) -> jax.sharding.Mesh:
    available = parallel.devices(devices)
    even = max(n for n in range(1, len(available) + 1) if seeds % n == 0)
    if devices is not None and even < devices:
        raise ValueError(f"{seeds} seeds cannot be shared evenly by {devices} devices: use {even}")
    parallel.check_all_take_part(available[:even])
    return parallel.mesh(parallel.BATCH, available[:even])


def _known_moments(config: Config, net: Net, evidence: Evidence) -> Any:
    if not config.batch_norm or not net.statistics or evidence.statistics == "none":
        return ()
    return net.running_moments() if evidence.moments is None else evidence.moments


def _consensus(images: Array, register: Register | None) -> Array:
    """Mean over candidates (G, K, H, W, C), each moved onto the plain mean first."""
    mean = images.mean(0)
    if register is None:
        return mean
    return register(images, jnp.broadcast_to(mean, images.shape)).mean(0)


def _loss(config: Config, net: Net, evidence: Evidence, grouped: bool) -> optimise.LossFn:
    """The objective of every candidate: (key, (G, K, H, W, C), data) -> ((G,), mean terms)."""

    def of_one(images: Array, consensus: Array | None, ready: Array, data: Data) -> Any:
        weights: dict[str, float] = {}
        values: dict[str, Array] = {}
        if config.gradient:
            found = evidences.observed(
                net,
                data.variables,
                images,
                data.labels,
                training=evidence.training,
                local=evidence.local,
            )
            weights["gradient"] = config.gradient
            values["gradient"] = gradient_distance(
                found, data.wanted, config.distance, config.layers
            )
        if data.moments:
            weights["batch_norm"] = config.batch_norm
            values["batch_norm"] = priors.batch_norm(
                net.mode(evidence.training)(data.variables, images).moments,
                data.moments,
                first_multiplier=config.first_bn_multiplier,
            )
        if config.tv_l2:
            weights["tv_l2"], values["tv_l2"] = config.tv_l2, priors.total_variation_l2(images)
        if config.l2:
            weights["l2"], values["l2"] = config.l2, priors.l2(images)
        if consensus is not None:
            weights["group"] = config.group
            values["group"] = jnp.where(ready, priors.norm(images - consensus), 0)
        return weigh(values, weights), values

    def loss(key: Array, images: Array, data: Any) -> tuple[Array, dict[str, Array]]:
        del key
        consensus, ready = None, jnp.zeros((), bool)
        if grouped:
            data, consensus = data
            ready = jnp.any(consensus != 0)  # zeros until the first one is formed
        losses, values = jax.vmap(of_one, in_axes=(0, None, None, None))(
            images, consensus, ready, data
        )
        return losses, {name: value.mean() for name, value in values.items()}

    return loss

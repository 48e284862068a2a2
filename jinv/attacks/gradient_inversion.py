"""GradInversion: a client's batch out of its gradient (arXiv 2104.07586).

L(x) = a_G D(g(x), g*) + a_tv TV(x) + a_l2 R_l2(x) + a_bn R_bn(x) + a_group ||x - consensus||_2

where g(x) is the gradient that the client would have sent for images x and the restored labels, and
g* the one it sent. Several seeds of the whole batch are optimised at once and pull each other to
their consensus. Inverting Gradients (arXiv 2003.14053: cosine distance, signed steps) and DLG
(arXiv 1906.08935: L-BFGS, labels optimised with the images) are settings of it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec

from jinv import checks, image, optimise, parallel
from jinv.federated import defences, registration
from jinv.federated import evidence as evidences
from jinv.federated.defences import Defence
from jinv.federated.evidence import Evidence
from jinv.net import Net
from jinv.objective import gradient_matching, priors
from jinv.objective.gradient_matching import Match
from jinv.objective.terms import weigh

Distance = Literal["l2", "squared_l2", "cosine"]
Optimizer = Literal["adam", "lbfgs"]
SEEDS, IMAGES = "seeds", "images"


@dataclasses.dataclass(frozen=True)
class Config:
    """What defines the mathematics. Defaults: the published ImageNet settings.

    Attributes:
      steps: number of steps.
      lr: learning rate, after `warmup` linear steps falling to 0 along a cosine. L-BFGS has none.
      warmup: steps.
      optimizer: "adam", or "lbfgs" for every seed alone.
      signed: Adam sees the sign of the gradient only (Inverting Gradients).
      distance: of gradients. "l2": sum_l ||g_l - g*_l||_2; "squared_l2": of the squares; "cosine":
        1 - <g, g*> / (||g|| ||g*||) over all layers.
      gradient: weight of the distance; 0 leaves the other terms alone (the BN-only ablation).
      layers: factor of each layer by the beginning of its name, such as {"fc": 0}; 1 for others.
      tv_l2, tv_l1, l2: weights of the image priors.
      batch_norm: weight of the BatchNorm prior, against what the evidence knows of moments.
      first_bn_multiplier: further weight of the first BatchNorm layer.
      seeds: candidates of the batch that are optimised at once.
      group: weight of each candidate's distance to the consensus; 0 for independent restarts.
      group_from: step from which there is a consensus, every `group_every` steps renewed.
      group_every: steps.
      noise: Langevin noise: after a step of rate lr(t), lr(t) * noise * N(0, I) is added.
      clip: clip each channel to the range of valid pixels after each step.
      init_std: standard deviation of the initial noise, in normalised units.
    """

    steps: int = 20000
    lr: float = 0.1
    warmup: int = 50
    optimizer: Optimizer = "adam"
    signed: bool = False
    distance: Distance = "l2"
    gradient: float = 1e-3
    layers: Mapping[str, float] = dataclasses.field(default_factory=dict)
    tv_l2: float = 1e-4
    tv_l1: float = 0.0
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
        checks.words(self)
        if self.optimizer == "lbfgs":
            if self.signed or self.noise:
                raise ValueError("L-BFGS goes with neither signed steps nor noise: set noise: 0")
            checks.unused(self, "L-BFGS searches for the length of its steps", "lr", "warmup")
        if not self.gradient:
            checks.unused(self, "the gradient weighs 0", "distance", "layers")
        if not self.batch_norm:
            checks.unused(self, "batch_norm is 0", "first_bn_multiplier")
        if self.seeds == 1 and self.group:
            checks.unused(self, "one seed has no consensus", "group")
        if not self.grouped:
            checks.unused(self, "there is no consensus", "group_from", "group_every")

    @property
    def grouped(self) -> bool:
        """Whether candidates are pulled to a consensus."""
        return self.seeds > 1 and self.group > 0

    def without_gradient(self) -> Config:
        """The BN-only ablation: one seed of the same attack, without the gradient.

        L-BFGS, which needs the gradient's accuracy, becomes Adam.
        """
        plain = Config()
        idle = ("distance", "layers", "group_from", "group_every")
        changes: dict[str, Any] = {name: getattr(plain, name) for name in idle}
        if self.optimizer == "lbfgs":
            changes["optimizer"] = "adam"
        return dataclasses.replace(self, gradient=0.0, seeds=1, group=0.0, **changes)


_ALONE: dict[str, Any] = {"seeds": 1, "group": 0.0, "noise": 0.0, "l2": 0.0, "batch_norm": 0.0}

PRESETS = {
    "gradinversion": Config(),
    "inverting_gradients": Config(
        steps=24000,
        warmup=0,
        signed=True,
        distance="cosine",
        gradient=1.0,
        tv_l2=0.0,
        tv_l1=0.2,
        **_ALONE,
    ),
    "dlg": Config(
        steps=300,
        optimizer="lbfgs",
        distance="squared_l2",
        gradient=1.0,
        tv_l2=0.0,
        clip=False,
        **_ALONE,
    ),
}


@dataclasses.dataclass(frozen=True)
class Execution:
    """How it is computed; no value depends on it beyond rounding.

    Attributes:
      devices: that share seeds and images; by default as many as can.
      seeds_at_once: candidates whose gradients are computed at the same time; fewer need less
        memory. By default all, but one where gradients are formed on a CPU: local steps, a
        defence, `images_at_once`. Convolutions are slow there with a kernel for every seed.
      images_at_once: take the gradient so many images at a time, twice, in the memory of those;
        for victims in evaluation mode.
      gradients: "auto" does not form the large ones (see `jinv.objective.gradient_matching`);
        "formed" forms all.
    """

    devices: int | None = None
    seeds_at_once: int | None = None
    images_at_once: int | None = None
    gradients: gradient_matching.Form = "auto"

    def __post_init__(self) -> None:
        checks.words(self)
        for name in ("seeds_at_once", "images_at_once"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")


def gradient_distance(
    found: evidences.Parameters,
    wanted: evidences.Parameters,
    kind: Distance = "l2",
    layers: Mapping[str, float] | None = None,
) -> Array:
    """D(g, g*) over trees of the same structure; `layers` as in `Config`."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    matches = [gradient_matching.between(a, b) for a, b in pairs]
    return _distance(matches, _factors(wanted, layers or {}), kind)


def _distance(matches: Sequence[Match | None], factors: Sequence[float], kind: Distance) -> Array:
    pairs = [(f, m) for f, m in zip(factors, matches, strict=True) if f and m is not None]

    def total(of: Callable[[Match], Array]) -> Array:
        return _sum(jnp.stack([f * of(m) for f, m in pairs]))

    if kind == "l2":
        return total(lambda m: priors.root(m.difference))
    if kind == "squared_l2":
        return total(lambda m: m.difference)
    if kind == "cosine":
        lengths = jnp.sqrt(total(lambda m: m.own)) * jnp.sqrt(total(lambda m: m.wanted))
        return 1 - total(lambda m: m.product) / jnp.maximum(lengths, 1e-30)
    raise ValueError(f"no distance of gradients is called {kind!r}")


@jax.custom_jvp
def _sum(values: Array) -> Array:
    """Of one number a layer.

    XLA would turn a plain sum into a chain of additions, and repeat that for every pixel whose
    gradient it scales: MobileNetV2's cosine distance took 8 times as long. Sorting stops it.
    """
    return jnp.sort(values).sum()


_sum.defjvp(lambda values, tangents: (_sum(*values), jnp.sum(*tangents)))


def _factors(tree: Any, layers: Mapping[str, float]) -> list[float]:
    """Of every leaf: that of the longest beginning of its name that is given."""

    def factor(path: tuple[Any, ...]) -> float:
        name = ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)
        fitting = [begin for begin in layers if name == begin or name.startswith(f"{begin}.")]
        return layers[max(fitting, key=len)] if fitting else 1.0

    return [factor(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


class Data(NamedTuple):
    """Arrays that the steps read.

    Attributes:
      variables: the network's, before.
      wanted: the evidence's values.
      moments: what is known of every BatchNorm layer's, () if nothing.
      labels: (G, K, C), one-hot; () if they are optimised.
    """

    variables: Any
    wanted: Any
    moments: Any
    labels: Any


class Candidates(NamedTuple):
    """What is optimised where labels are not known.

    Attributes:
      images: (G, K, H, W, C).
      labels: (G, K, classes), logits whose softmax is the label.
    """

    images: Array
    labels: Array


@dataclasses.dataclass(frozen=True)
class Attack:
    """A built attack: give `initial(key)`, `data` and `phases` to `optimise.run`.

    Attributes:
      phases: one.
      data: what its steps read.
      initial: `key -> (seeds, K, H, W, C)` Gaussian noise, `Candidates` if labels are optimised.
      distances: compiled, `(the same, data) -> (seeds,)` distances of gradients, to choose by.
      mesh: the devices, by (seeds, images).
      space: what the images are normalised for.
    """

    phases: tuple[optimise.Phase, ...]
    data: Data
    initial: Callable[[Array], Any]
    distances: Callable[[Any, Data], Array]
    mesh: Mesh
    space: image.Preprocessing


def build(
    config: Config,
    net: Net,
    evidence: Evidence,
    labels: Sequence[int] | Sequence[Sequence[int]] | None,
    *,
    size: int | tuple[int, int] | None = None,
    space: image.Preprocessing | None = None,
    register: registration.Register | None = registration.to_reference,
    defence: Defence | None = None,
    execution: Execution | None = None,
) -> Attack:
    """GradInversion of this evidence.

    Args:
      config: the mathematics.
      net: the victim's network as it was before.
      evidence: what it sent.
      labels: K classes, as `labels.restore` finds them, or K for every seed; None to optimise them
        with the images.
      size: of the images; defaults to the network's.
      space: what the images are normalised for while they are optimised, such as the network's
        own made `gray()`; defaults to the network's.
      register: moves candidates onto their mean before the consensus is taken; None for the
        plain mean.
      defence: what the client did to its gradient, if the attacker knows: found gradients are
        compared as that client would have sent them.
      execution: devices and memory.

    Raises:
      ValueError: what does not fit together.
    """
    execution = execution or Execution()
    evidence.check(net)
    count = evidence.images
    chosen = None if labels is None else np.asarray(labels)
    if chosen is not None and (
        chosen.shape not in ((count,), (config.seeds, count))
        or chosen.min() < 0
        or chosen.max() >= net.classes
    ):
        raise ValueError(f"{count} labels from 0 to {net.classes - 1} are needed, not {labels}")
    if execution.images_at_once and (evidence.training or evidence.local):
        raise ValueError(
            "images_at_once needs a gradient whose images do not act on each other: neither a "
            "victim in training mode nor local steps"
        )
    space = space or net.preprocessing
    height, width = (
        (net.preprocessing.size,) * 2
        if size is None
        else (size, size)
        if isinstance(size, int)
        else size
    )
    shape = (config.seeds, count, height, width, space.channels)
    mesh = _mesh(config.seeds, count, execution)

    def initial(key: Array) -> Any:
        noise = config.init_std * jax.random.normal(key, shape)
        laid = parallel.put(mesh, PartitionSpec(SEEDS, IMAGES), noise)
        if chosen is not None:
            return laid
        logits = jax.random.normal(jax.random.fold_in(key, 1), (*shape[:2], net.classes))
        return Candidates(laid, parallel.put(mesh, PartitionSpec(SEEDS, IMAGES), logits))

    def project(found: Any) -> Any:
        if not config.clip:
            return found
        if isinstance(found, Candidates):
            return found._replace(images=image.clip(found.images, space))
        return image.clip(found, space)

    rate = optimise.warm_cosine(config.lr, config.warmup, config.steps)
    grouped = config.grouped

    def remember(step: Array, found: Any, consensus: Array) -> tuple[Array, Array]:
        images = found.images if isinstance(found, Candidates) else found
        renewed = (step >= config.group_from) & (
            (step - config.group_from) % config.group_every == 0
        )
        now = lax.cond(renewed, lambda: _consensus(images, register), lambda: consensus)
        return now, renewed

    optimizer = _optimizer(config, rate)

    def enter(images: Any, step: Any) -> optimise.State:
        memory = jnp.zeros(shape[1:]) if grouped else ()
        return optimise.init(images, optimizer, step, candidates=True, memory=memory)

    moments: Any = ()
    if config.batch_norm and net.statistics and evidence.statistics != "none":
        moments = net.running_moments() if evidence.moments is None else evidence.moments
    if config.gradient and not any(_factors(evidence.values, config.layers)):
        raise ValueError("every layer's factor is 0: set gradient: 0 to leave the gradient out")
    if not config.gradient and not moments:
        raise ValueError(
            "nothing ties the images to the evidence: the gradient weighs 0 and no moments of "
            "BatchNorm layers are known or weighed"
        )
    one_hot: Any = ()
    if chosen is not None:
        of_seeds = np.broadcast_to(chosen, (config.seeds, count))
        one_hot = jax.nn.one_hot(of_seeds, net.classes)
    data = Data(net.variables, evidence.values, moments, one_hot)
    objective = _Objective(config, net, evidence, space, defence, execution, mesh)
    step = optimise.make_step(
        objective.grouped if grouped else objective.alone,
        optimizer,
        project=project,
        noise=(lambda t: config.noise * rate(t)) if config.noise else None,
        remember=remember if grouped else None,
        line_search=config.optimizer == "lbfgs",
    )
    return Attack(
        (optimise.Phase(f"{config.seeds} x {count} images", config.steps, enter, step),),
        parallel.put(mesh, PartitionSpec(), data),
        initial,
        jax.jit(objective.distances),
        mesh,
        space,
    )


def _optimizer(config: Config, rate: optax.Schedule) -> optax.GradientTransformation:
    if config.optimizer == "lbfgs":
        return optimise.each_candidate(optax.lbfgs())
    adam = optax.adam(rate)
    if config.signed:
        return optax.chain(optax.stateless(lambda g, _: jax.tree.map(jnp.sign, g)), adam)
    return adam


def _mesh(seeds: int, images: int, execution: Execution) -> Mesh:
    """Seeds over as many devices as share them evenly, then images."""
    available = parallel.devices(execution.devices)
    together = execution.seeds_at_once or seeds
    if seeds % together:
        raise ValueError(f"{seeds} seeds cannot be taken {together} at once: not a multiple")
    by_seeds = math.gcd(together, len(available))
    by_images = math.gcd(images, len(available) // by_seeds)
    even = by_seeds * by_images
    if execution.devices is not None and even < execution.devices:
        raise ValueError(
            f"{together} seeds of {images} images cannot be shared evenly by {execution.devices} "
            f"devices: use {even}"
        )
    parallel.check_all_take_part(available[:even])
    return parallel.mesh({SEEDS: by_seeds, IMAGES: by_images}, available[:even])


def _consensus(images: Array, register: registration.Register | None) -> Array:
    """Mean over candidates (G, K, H, W, C), each moved onto the plain mean first."""
    mean = images.mean(0)
    if register is None:
        return mean
    return register(images, jnp.broadcast_to(mean, images.shape)).mean(0)


class _Objective:
    """L(x) of every candidate."""

    def __init__(
        self,
        config: Config,
        net: Net,
        evidence: Evidence,
        space: image.Preprocessing,
        defence: Defence | None,
        execution: Execution,
        mesh: Mesh,
    ) -> None:
        self.config = config
        self.net = net
        self.evidence = evidence
        self.space = space
        self.defence = None if defence == Defence() else defence
        self.execution = execution
        self.factors = _factors(evidence.values, config.layers)
        formed = evidence.local or self.defence or execution.images_at_once
        one_by_one = formed and jax.default_backend() == "cpu" and mesh.size == 1
        self.seeds_at_once = execution.seeds_at_once or (1 if one_by_one else config.seeds)

    def alone(self, key: Array, found: Any, data: Data) -> tuple[Array, dict[str, Array]]:
        """An `optimise.LossFn`: (G,) losses, mean terms."""
        del key
        return self._of_all(lambda x, y: self._loss(x, y, data, None), found, data)

    def grouped(
        self, key: Array, found: Any, remembered: optimise.Remembered
    ) -> tuple[Array, dict[str, Array]]:
        """The same with a memory: the consensus."""
        del key
        data, consensus = remembered
        return self._of_all(lambda x, y: self._loss(x, y, data, consensus), found, data)

    def distances(self, found: Any, data: Data) -> Array:
        """D(g(x), g*) of every candidate."""
        return self._map(lambda x, y: self._matched(x, y, data)[0], found, data)

    def _of_all(self, of_one: Callable, found: Any, data: Data) -> tuple[Array, dict[str, Array]]:
        losses, values = self._map(of_one, found, data)
        return losses, {name: value.mean() for name, value in values.items()}

    def _map(self, of_one: Callable, found: Any, data: Data) -> Any:
        """`of_one(images, labels)` of every candidate."""
        if isinstance(found, Candidates):
            found, labels = found.images, jax.nn.softmax(found.labels)
        else:
            labels = data.labels
        seeds = self.seeds_at_once
        if seeds >= self.config.seeds:
            return jax.vmap(of_one)(found, labels)
        return lax.map(lambda one: of_one(*one), (found, labels), batch_size=seeds)

    def _loss(
        self, images: Array, labels: Array, data: Data, consensus: Array | None
    ) -> tuple[Array, dict[str, Array]]:
        config = self.config
        weights: dict[str, float] = {}
        values: dict[str, Array] = {}
        seen = None
        if config.gradient:
            weights["gradient"] = config.gradient
            values["gradient"], seen = self._matched(images, labels, data)
        if data.moments:
            if seen is None:
                given = image.convert(images, self.space, self.net.preprocessing)
                seen = self.net.mode(self.evidence.training)(data.variables, given).moments
            weights["batch_norm"] = config.batch_norm
            values["batch_norm"] = priors.batch_norm(
                seen, data.moments, first_multiplier=config.first_bn_multiplier
            )
        for name, prior in _PRIORS.items():
            weight = getattr(config, name)
            if weight:
                weights[name], values[name] = weight, prior(images)
        if consensus is not None:
            ready = jnp.any(consensus != 0)  # zeros until the first one is formed
            weights["group"] = config.group
            values["group"] = jnp.where(ready, priors.norm(images - consensus), 0)
        return weigh(values, weights), values

    def _matched(self, images: Array, labels: Array, data: Data) -> tuple[Array, Any]:
        """D(g(x), g*), and the moments of BatchNorm layers if they came with it."""
        net, evidence = self.net, self.evidence
        images = image.convert(images, self.space, net.preprocessing)
        at_once = self.execution.images_at_once
        if evidence.local is None and at_once is None and self.defence is None:

            def loss(parameters: Any, inputs: Any) -> tuple[Array, Any]:
                variables = evidences.with_parameters(data.variables, parameters)
                images, labels = inputs
                return evidences.loss_and_moments(net, variables, images, labels, evidence.training)

            matches, seen = gradient_matching.compare(
                loss,
                evidences.parameters(net, data.variables),
                data.wanted,
                (images, labels),
                form=self.execution.gradients,
                chosen=[bool(factor) for factor in self.factors],
            )
            return _distance(matches, self.factors, self.config.distance), seen
        found: evidences.Parameters = evidences.observed(
            net,
            data.variables,
            images,
            labels,
            training=evidence.training,
            local=evidence.local,
            at_once=at_once,
        )
        if self.defence is not None:
            found = defences.as_sent(self.defence, found, data.wanted)
        pairs = zip(jax.tree.leaves(found), jax.tree.leaves(data.wanted), strict=True)
        matches = [gradient_matching.between(*pair) for pair in pairs]
        return _distance(matches, self.factors, self.config.distance), None


_PRIORS: dict[str, Callable[[Array], Array]] = {
    "tv_l2": priors.total_variation_l2,
    "tv_l1": priors.total_variation_l1,
    "l2": priors.l2,
}

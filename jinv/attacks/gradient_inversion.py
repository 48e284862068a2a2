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
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec

from jinv import backend, checks, image, optimise, parallel, schedules
from jinv.checks import Count, Natural, NotNegative, Positive, Share
from jinv.federated import defences, registration
from jinv.federated import evidence as evidences
from jinv.federated import layers as layer_names
from jinv.federated.defences import Defence
from jinv.federated.evidence import Circumstances, Evidence
from jinv.net import Net, as_parameters, check_net, check_size
from jinv.objective import gradient_matching, microbatch, priors
from jinv.objective.terms import (
    ExtraTerms,
    ImageTerm,
    check_kind,
    image_terms,
    tell_without_statistics,
    weigh,
)

SEEDS, IMAGES = "seeds", "images"

_TAKEN = ("loss", "gradient", "batch_norm", "group", "step", "phase")
"""Names in metrics that an extra term cannot have."""


@checks.todays_keywords
@dataclasses.dataclass(frozen=True)
class Config:
    """What defines the mathematics. Defaults: the published ImageNet settings.

    Attributes:
      steps: number of steps.
      lr: learning rate; L-BFGS, which searches along its steps, has none.
      schedule: one of `schedules.SCHEDULES` without a plateau: "cosine" to `lr_floor` after
        `warmup` linear steps; "constant" after the same warm-up.
      warmup: steps.
      lr_floor: share of the learning rate that the cosine ends at.
      optimizer: one of `schedules.OPTIMIZERS`, or of optax by its name; "lbfgs" has a line search
        for every seed alone.
      optimizer_args: its keyword arguments other than the learning rate.
      signed: the optimizer sees the sign of the gradient only (Inverting Gradients).
      distance: of gradients, one of `gradient_matching.DISTANCES`. "l2": sum_l ||g_l - g*_l||_2;
        "squared_l2": of the squares; "cosine": 1 - <g, g*> / (||g|| ||g*||) over all layers.
      gradient: weight of the distance; 0 leaves the other terms alone (the BN-only ablation).
      layers: factor of each layer by the beginning of its name, such as {"fc": 0}; 1 for others.
        Names are the network's own, those of the zoo torch's: `layer4.0.conv1`. The longest counts.
      tv_l2, tv_l1, l2: weights of the image priors.
      batch_norm: weight of the BatchNorm prior, against what the evidence knows of moments.
      first_bn_multiplier: further weight of the first BatchNorm layer.
      bn_weighting: see `priors.batch_norm`.
      seeds: candidates of the batch that are optimised at once.
      group: weight of each candidate's distance to the consensus; 0 for independent restarts.
      group_from: step from which there is a consensus, every `group_every` steps renewed.
      group_every: steps.
      noise: Langevin noise: after a step of rate lr(t), lr(t) * noise * N(0, I) is added.
      clip: clip each channel to the range of valid pixels after each step.
      init_std: standard deviation of the initial noise, in normalised units.
    """

    steps: Count = 20000
    lr: Positive = 0.1
    schedule: schedules.ScheduleName = "cosine"
    warmup: Natural = 50
    lr_floor: Share = 0.0
    optimizer: schedules.OptimizerName = "adam"
    optimizer_args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    signed: bool = False
    distance: gradient_matching.DistanceName = "l2"
    gradient: NotNegative = 1e-3
    layers: Mapping[str, NotNegative] = dataclasses.field(default_factory=dict)
    tv_l2: NotNegative = 1e-4
    tv_l1: NotNegative = 0.0
    l2: NotNegative = 1e-6
    batch_norm: NotNegative = 0.1
    first_bn_multiplier: NotNegative = 1.0
    bn_weighting: priors.LayerWeighting = "published"
    seeds: Count = 8
    group: NotNegative = 0.01
    group_from: Natural = 5000
    group_every: Count = 100
    noise: NotNegative = 0.2
    clip: bool = True
    init_std: NotNegative = 1.0

    def __post_init__(self) -> None:
        checks.fields(self)
        schedules.check_optimizer(self.optimizer, self.optimizer_args)
        schedules.check_schedule(self)
        self._check_unused()

    def _check_unused(self) -> None:
        if self.searches:
            if self.signed or self.noise:
                raise ValueError("L-BFGS goes with neither signed steps nor noise: set noise: 0")
            reason = "L-BFGS searches for the length of its steps"
            checks.unused(self, reason, "lr", "schedule", "warmup", "lr_floor")
        if not self.gradient:
            checks.unused(self, "the gradient weighs 0", "distance", "layers")
        if not self.batch_norm:
            checks.unused(self, "batch_norm is 0", "first_bn_multiplier", "bn_weighting")
        if self.seeds == 1 and self.group:
            checks.unused(self, "one seed has no consensus", "group")
        if not self.grouped:
            checks.unused(self, "there is no consensus", "group_from", "group_every")

    @property
    def searches(self) -> bool:
        """Say whether the optimizer has a line search."""
        return self.optimizer == schedules.LBFGS

    @property
    def grouped(self) -> bool:
        """Say whether candidates are pulled to a consensus."""
        return self.seeds > 1 and self.group > 0

    def without_gradient(self) -> Config:
        """Make the BN-only ablation: one seed of the same attack, without the gradient.

        L-BFGS becomes Adam with its default rate.
        """
        plain = Config()
        idle = ("distance", "layers", "group_from", "group_every")
        changes: dict[str, Any] = {name: getattr(plain, name) for name in idle}
        if self.searches:
            changes |= {"optimizer": plain.optimizer, "optimizer_args": plain.optimizer_args}
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

    devices: Count | None = None
    seeds_at_once: Count | None = None
    images_at_once: Count | None = None
    gradients: gradient_matching.Form = "auto"

    def __post_init__(self) -> None:
        checks.fields(self)

    def for_one_seed(self, images: int) -> Execution:
        """Return how one seed of so many images is computed without the gradient.

        It has no more of the devices than can share its images evenly.
        """
        devices = self.devices
        if devices is not None:
            devices = max(n for n in range(1, devices + 1) if images % n == 0)
        return dataclasses.replace(self, devices=devices, seeds_at_once=None, images_at_once=None)


def gradient_distance(
    found: evidences.Parameters,
    wanted: evidences.Parameters,
    kind: str = "l2",
    layers: Mapping[str, float] | None = None,
) -> Array:
    """Compute D(g, g*) over two trees of the same structure.

    Args:
      found: g.
      wanted: g*.
      kind: one of `gradient_matching.DISTANCES`.
      layers: as in `Config`.

    Raises:
      ValueError: no distance has this name.
    """
    return gradient_matching.distance(kind, _factors(wanted, layers or {}), _matches(found, wanted))


def _matches(found: Any, wanted: Any) -> list[gradient_matching.Match]:
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    return [gradient_matching.between(*pair) for pair in pairs]


def _factors(tree: Any, layers: Mapping[str, float]) -> list[float]:
    """Every leaf's factor: that of the longest beginning of its name that is given, else 1."""
    names = [
        ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]
    for begin in layers:
        if not any(layer_names.begins(name, begin) for name in names):
            raise ValueError(f"layers: {layer_names.no_layer(begin, names)}")

    def factor(name: str) -> float:
        fitting = [begin for begin in layers if layer_names.begins(name, begin)]
        return layers[max(fitting, key=len)] if fitting else 1.0

    return list(map(factor, names))


Labels = Sequence[int] | Sequence[Sequence[int]] | None
"""K classes, or K for every seed; None where they are optimised."""


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
      config: the mathematics.
      net: the victim's network.
      circumstances: of the evidence that the program fits.
    """

    phases: tuple[optimise.Phase, ...]
    data: Data
    initial: Callable[[Array], Any]
    distances: Callable[[Any, Data], Array]
    mesh: Mesh
    space: image.Preprocessing
    config: Config
    net: Net
    circumstances: Circumstances

    def shown(self, found: Any) -> Array:
        """Pick the images (K, H, W, C) a person looks at, in `space`: the first candidate's."""
        return _images(found)[0]

    def with_evidence(self, evidence: Evidence, labels: Labels) -> Attack:
        """Aim the same program at other evidence; nothing is compiled again.

        Args:
          evidence: of the same network, come about in the same circumstances.
          labels: as in `build`.

        Raises:
          ValueError: evidence or labels that the program does not fit.
        """
        _check_evidence(evidence)
        evidence = evidence.fitted(self.net)
        if evidence.circumstances != self.circumstances:
            raise ValueError(
                f"the attack fits {self.circumstances}; the evidence is of {evidence.circumstances}"
            )
        structures: list[Any] = [
            jax.tree.structure(values) for values in (evidence.values, self.data.wanted)
        ]
        if structures[0] != structures[1]:
            raise ValueError("the attack compares other layers than those of this evidence")
        joint = isinstance(self.data.labels, tuple)
        if (labels is None) != joint:
            raise ValueError(f"labels are {'optimised' if joint else 'known'} in this attack")
        data = _data(self.config, self.net, evidence, labels)._replace(variables=())
        data = parallel.put(self.mesh, PartitionSpec(), data)
        return dataclasses.replace(self, data=data._replace(variables=self.data.variables))


def build(
    config: Config,
    net: Net,
    evidence: Evidence,
    labels: Labels,
    *,
    size: int | tuple[int, int] | None = None,
    space: image.Preprocessing | None = None,
    register: registration.Register | None = registration.to_reference,
    defence: Defence | None = None,
    extra_terms: ExtraTerms = MappingProxyType({}),
    execution: Execution | None = None,
) -> Attack:
    """Build GradInversion of this evidence.

    Args:
      config: the mathematics.
      net: the victim's network as it was before.
      evidence: what it sent.
      labels: K classes, as `labels.as_list` lists restored ones, or K for every seed; None to
        optimise them with the images.
      size: of the images; defaults to the network's.
      space: what the images are normalised for while they are optimised, such as the network's
        own made `gray()`; defaults to the network's.
      register: moves candidates onto their mean before the consensus is taken; None for the
        plain mean.
      defence: what the client did to its gradient, if the attacker knows: found gradients are
        compared as that client would have sent them.
      extra_terms: name -> (weight, function) of your own terms: one candidate's images
        (K, H, W, C) in `space` -> scalar, differentiable. A term that needs a network closes over
        it.
      execution: devices and memory.

    Raises:
      ValueError: what does not fit together.
    """
    execution = Execution() if execution is None else execution
    _check_kinds(config, net, evidence, space, register, defence, execution)
    evidence = evidence.fitted(net)
    data = _data(config, net, evidence, labels)
    _check(config, evidence, data, execution)
    if config.grouped and config.group_from >= config.steps:
        warnings.warn(
            f"the {config.seeds} seeds are independent: their consensus begins at step "
            f"{config.group_from} (group_from), after the last of {config.steps} steps",
            stacklevel=2,
        )
    if config.batch_norm:
        tell_without_statistics(net, config.batch_norm)
    space = space or net.preprocessing
    height, width = image.sides(net.preprocessing.size if size is None else size)
    check_size(net, (height, width))
    shape = (config.seeds, evidence.images, height, width, space.channels)
    mesh = _mesh(config.seeds, evidence.images, execution)
    objective = _Objective(
        config=config,
        net=net,
        circumstances=evidence.circumstances,
        space=space,
        defence=None if defence == Defence() else defence,
        terms=_terms(config, extra_terms, shape[1:]),
        factors=_factors(data.wanted, config.layers),
        execution=execution,
        on_one_device=mesh.size == 1,
    )
    return Attack(
        (_phase(config, objective, shape, register),),
        parallel.put(mesh, PartitionSpec(), data),
        _initial(config, shape, mesh, net.classes if labels is None else None),
        jax.jit(objective.distances),
        mesh,
        space,
        config,
        net,
        evidence.circumstances,
    )


def _check_kinds(
    config: Any, net: Any, evidence: Any, space: Any, register: Any, defence: Any, execution: Any
) -> None:
    """Refuse arguments of `build` of another kind, with what is likely meant."""
    check_kind("config", config, Config)
    check_net("net", net)
    _check_evidence(evidence)
    if space is not None:
        image.check_space("space", space)
    if register is not None and not callable(register):
        named = isinstance(register, str) and register in registration.REGISTRATIONS
        raise ValueError(
            f"register must be a function of (images, reference), not {register!r}: give "
            f"jinv.federated.registration.REGISTRATIONS[{repr(register) if named else '...'}]"
            + ("" if named else f", there are {', '.join(registration.REGISTRATIONS)}")
        )
    if defence is not None:
        check_kind("defence", defence, Defence)
    check_kind("execution", execution, Execution)


def _check_evidence(evidence: Any) -> None:
    if isinstance(evidence, tuple):
        raise ValueError(
            "evidence is a tuple: `simulate` returns the evidence and the secret behind it, give "
            "the first"
        )
    check_kind(
        "evidence",
        evidence,
        Evidence,
        "make it of a gradient with Evidence(values, images=K), or of arrays under torch's names "
        "with jinv.federated.evidence.from_state",
    )


def _data(config: Config, net: Net, evidence: Evidence, labels: Labels) -> Data:
    """Collect what the steps read, not yet on the devices."""
    moments: Any = ()
    if config.batch_norm and net.statistics and evidence.statistics != "none":
        moments = net.running_moments() if evidence.moments is None else evidence.moments
    one_hot: Any = ()
    if labels is not None:
        count = evidence.images
        needed = f"{count} labels from 0 to {net.classes - 1} are needed"
        try:
            chosen = evidences.as_classes(net, labels)
        except ValueError as error:
            raise ValueError(f"{needed}: {error}") from None
        if chosen.shape not in ((count,), (config.seeds, count)):
            raise ValueError(
                f"{needed}, one an image, or as many for each of the {config.seeds} seeds, not "
                f"labels of shape {chosen.shape}"
            )
        of_seeds = np.broadcast_to(chosen, (config.seeds, count))
        one_hot = jax.nn.one_hot(of_seeds, net.classes)
    return Data(net.variables, as_parameters(net, evidence.values), moments, one_hot)


def _check(config: Config, evidence: Evidence, data: Data, execution: Execution) -> None:
    if execution.images_at_once and (evidence.training or evidence.local):
        raise ValueError(
            "images_at_once needs a gradient whose images do not act on each other: neither a "
            "victim in training mode nor local steps"
        )
    microbatch.check_even(evidence.images, execution.images_at_once or evidence.images)
    if config.gradient and not any(_factors(data.wanted, config.layers)):
        raise ValueError("every layer's factor is 0: set gradient: 0 to leave the gradient out")
    if config.gradient and not any(map(np.any, jax.tree.leaves(evidence.values))):
        raise ValueError("every value of the evidence is 0: there is nothing to invert")
    if not config.gradient and not data.moments:
        raise ValueError(
            "nothing ties the images to the evidence: the gradient weighs 0 and no moments of "
            "BatchNorm layers are known or weighed"
        )


def _terms(
    config: Config, extra_terms: ExtraTerms, shape: tuple[int, ...]
) -> dict[str, tuple[float, ImageTerm]]:
    """Choose the terms of one candidate's images (K, H, W, C) that weigh something."""
    weights = {"tv_l2": config.tv_l2, "tv_l1": config.tv_l1, "l2": config.l2}
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    return image_terms(weights, extra_terms, [images], _TAKEN)


def _initial(
    config: Config, shape: tuple[int, ...], mesh: Mesh, classes: int | None
) -> Callable[[Array], Any]:
    """Make `key -> noise`, with labels of so many classes where they are optimised."""
    spread = PartitionSpec(SEEDS, IMAGES)

    def initial(key: Array) -> Any:
        noise = config.init_std * jax.random.normal(key, shape)
        laid = parallel.put(mesh, spread, noise)
        if classes is None:
            return laid
        logits = jax.random.normal(jax.random.fold_in(key, 1), (*shape[:2], classes))
        return Candidates(laid, parallel.put(mesh, spread, logits))

    return initial


def _phase(
    config: Config,
    objective: _Objective,
    shape: tuple[int, ...],
    register: registration.Register | None,
) -> optimise.Phase:
    """Make the program."""
    rate = schedules.SCHEDULES[config.schedule].rate(
        config.lr, config.warmup, config.steps, config.lr_floor
    )
    optimizer = make_optimizer(config, rate)

    def enter(images: Any, step: Any) -> optimise.State:
        memory = jnp.zeros(shape[1:]) if config.grouped else ()
        return optimise.init(images, optimizer, step, candidates=True, memory=memory)

    def project(found: Any) -> Any:
        if not config.clip:
            return found
        if isinstance(found, Candidates):
            return found._replace(images=image.clip(found.images, objective.space))
        return image.clip(found, objective.space)

    step = optimise.make_step(
        objective.grouped if config.grouped else objective.alone,
        optimizer,
        project=project,
        noise=(lambda t: config.noise * rate(t)) if config.noise else None,
        remember=_remember(config, register) if config.grouped else None,
        line_search=config.searches,
    )
    return optimise.Phase(f"{shape[0]} x {shape[1]} images", config.steps, enter, step)


def _remember(config: Config, register: registration.Register | None) -> optimise.Remember:
    """Make what renews the consensus every so many steps."""

    def remember(step: Array, found: Any, consensus: Array) -> tuple[Array, Array]:
        renewed = (step >= config.group_from) & (
            (step - config.group_from) % config.group_every == 0
        )
        images = _images(found)
        now = lax.cond(renewed, lambda: _consensus(images, register), lambda: consensus)
        return now, renewed

    return remember


def make_optimizer(config: Config, rate: optax.Schedule) -> optax.GradientTransformation:
    """Make the config's optimizer.

    Raises:
      ValueError: one that refuses the config's arguments.
    """
    arguments = config.optimizer_args
    if config.searches:
        return optimise.each_candidate(schedules.make_optimizer(config.optimizer, None, arguments))
    optimizer = schedules.make_optimizer(config.optimizer, rate, arguments)
    if config.signed:
        return optax.chain(optax.stateless(lambda g, _: jax.tree.map(jnp.sign, g)), optimizer)
    return optimizer


def _images(found: Any) -> Any:
    """The candidates' images (G, K, H, W, C)."""
    return found.images if isinstance(found, Candidates) else found


def _mesh(seeds: int, images: int, execution: Execution) -> Mesh:
    """Spread seeds over as many devices as share them evenly, then images."""
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
    """Average candidates (G, K, H, W, C), each moved onto the plain mean first."""
    mean = images.mean(0)
    if register is None:
        return mean
    return register(images, jnp.broadcast_to(mean, images.shape)).mean(0)


@dataclasses.dataclass(frozen=True, eq=False)
class _Objective:
    """L(x) of every candidate.

    Attributes:
      config: the mathematics.
      net: the victim's network.
      circumstances: of the evidence.
      space: of the images.
      defence: what the client is known to have done, None for nothing.
      terms: image terms by name, with their weights.
      factors: of every layer in the distance of gradients.
      execution: devices and memory.
      on_one_device: whether there is no more than one.
    """

    config: Config
    net: Net
    circumstances: Circumstances
    space: image.Preprocessing
    defence: Defence | None
    terms: Mapping[str, tuple[float, ImageTerm]]
    factors: Sequence[float]
    execution: Execution
    on_one_device: bool

    @property
    def seeds_at_once(self) -> int:
        """How many candidates' gradients are computed at the same time, see `Execution`."""
        formed = self.circumstances.local or self.defence or self.execution.images_at_once
        in_turn = backend.choices().seeds == "in_turn" and formed and self.on_one_device
        return self.execution.seeds_at_once or (1 if in_turn else self.config.seeds)

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
                seen = self.net.mode(self.circumstances.training)(data.variables, given).moments
            weights["batch_norm"] = config.batch_norm
            values["batch_norm"] = priors.batch_norm(
                seen,
                data.moments,
                first_multiplier=config.first_bn_multiplier,
                weighting=config.bn_weighting,
            )
        for name, (weight, term) in self.terms.items():
            weights[name], values[name] = weight, term(images)
        if consensus is not None:
            ready = jnp.any(consensus != 0)  # zeros until the first one is formed
            weights["group"] = config.group
            values["group"] = jnp.where(ready, priors.norm(images - consensus), 0)
        return weigh(values, weights), values

    def _matched(self, images: Array, labels: Array, data: Data) -> tuple[Array, Any]:
        """D(g(x), g*), and the moments of BatchNorm layers if they came with it."""
        images = image.convert(images, self.space, self.net.preprocessing)
        formed = self.circumstances.local or self.defence or self.execution.images_at_once
        if formed:
            matches, seen = _matches(self._sent(images, labels, data), data.wanted), None
        else:
            matches, seen = self._compared(images, labels, data)
        return gradient_matching.distance(self.config.distance, self.factors, matches), seen

    def _compared(self, images: Array, labels: Array, data: Data) -> tuple[Any, Any]:
        """Every layer's match without forming large gradients, and the moments on the way."""
        net, training = self.net, self.circumstances.training

        def loss(parameters: Any, inputs: Any) -> tuple[Array, Any]:
            variables = evidences.with_parameters(data.variables, parameters)
            images, labels = inputs
            return evidences.loss_and_moments(net, variables, images, labels, training)

        return gradient_matching.compare(
            loss,
            evidences.within(evidences.parameters(net, data.variables), data.wanted),
            data.wanted,
            (images, labels),
            form=self.execution.gradients,
            chosen=[bool(factor) for factor in self.factors],
        )

    def _sent(self, images: Array, labels: Array, data: Data) -> evidences.Parameters:
        """What the client would have sent, defended as far as is known."""
        found: evidences.Parameters = evidences.observed(
            self.net,
            data.variables,
            images,
            labels,
            training=self.circumstances.training,
            local=self.circumstances.local,
            at_once=self.execution.images_at_once,
            trained=data.wanted,
        )
        return found if self.defence is None else defences.as_sent(self.defence, found, data.wanted)

"""DeepInversion and Adaptive DeepInversion (arXiv 1912.08795).

Images are optimised until a frozen network takes them for given classes *and* its BatchNorm
layers see the statistics they saw in training. With a competitor network the images are also
pushed to where the two disagree. Several networks may share the objective: see `ensemble`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec
from jax.typing import ArrayLike

from jinv import backend, calls, checks, image, optimise, parallel, schedules
from jinv.checks import Count, Natural, NotNegative, Positive, PositiveShare, Share, Some
from jinv.image import Preprocessing
from jinv.net import Net, Outputs, check_net
from jinv.objective import ensemble, microbatch, priors
from jinv.objective.terms import (
    ExtraTerms,
    ImageTerm,
    LabelLoss,
    Member,
    check_kind,
    image_terms,
    network_terms,
    tell_without_statistics,
    term_weights,
)

HAND_PICKED = (
    *(1, 933, 946, 980, 25, 63, 92, 94, 107, 985, 151, 154, 207, 250, 270, 277, 283, 292, 294),
    *(309, 311, 325, 340, 360, 386, 402, 403, 409, 530, 440, 468, 417, 590, 670, 817, 762, 920),
    *(949, 963, 967, 574, 487),
)
"""ImageNet classes that the authors chose for their figures."""

IMAGENET_CLASSES = 1000

_TAKEN = ("loss", "label", "batch_norm", "adaptive", "step", "phase")
"""Names in metrics that an extra term cannot have."""


Shift = Annotated[int, checks.Range(-4096, 4096)]
"""Pixels that images are rolled by."""


@dataclasses.dataclass(frozen=True)
class Crop:
    """A random part of the images that a step sees, enlarged to their size.

    Attributes:
      scale: least and greatest share of the area.
      ratio: least and greatest width / height.
      easy_to_hard: the least share falls from the greatest one to its value with a cosine over the
        phase (CDA).
      per_image: every image has a part of its own; else one draw counts for the batch, as
        published.
    """

    scale: tuple[PositiveShare, PositiveShare] = (0.08, 1.0)
    ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    easy_to_hard: bool = False
    per_image: bool = False

    def __post_init__(self) -> None:
        checks.fields(self)
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            if low > high:
                raise checks.FieldError(
                    name, f" must be the least and the greatest, not {low, high}"
                )


@dataclasses.dataclass(frozen=True)
class Phase:
    """Steps at one resolution.

    Attributes:
      steps: number of steps; the optimizer and its schedule start anew with each phase.
      downscale: the networks see images smaller by this factor.
      jitter: largest shift in pixels of what the networks see; each axis is rolled by a
        uniform integer in [-jitter, jitter]. Two numbers are the least and the largest shift.
      tv_l2: weight of TV_2 in this phase, if another than the config's.
      lr: learning rate of this phase, if another than the config's.
    """

    steps: Count
    downscale: Count = 1
    jitter: Natural | tuple[Shift, Shift] = 30
    tv_l2: NotNegative | None = None
    lr: Positive | None = None

    def __post_init__(self) -> None:
        checks.fields(self)
        if isinstance(self.jitter, tuple) and self.jitter[0] > self.jitter[1]:
            raise checks.FieldError(
                "jitter", f" must be the least and the largest shift, not {self.jitter}"
            )


_FAST_ADAM = {"b1": 0.5, "b2": 0.9, "eps": 1e-8}


@dataclasses.dataclass(frozen=True)
class Config:
    """What defines the mathematics. Defaults: the published ImageNet command.

    Attributes:
      phases: resolutions from coarse to fine.
      coarse: what a phase with `downscale` optimises. "pooled": full-resolution pixels seen
        through average pooling, as published; what pooling cannot see stays initial noise.
        "small": pixels at that resolution, enlarged bilinearly for the next phase.
      lr: learning rate.
      optimizer: one of `schedules.OPTIMIZERS`, or of optax by its name.
      optimizer_args: its keyword arguments other than the learning rate; by default the published
        ones of "adam", and none for an optimizer that has not these.
      schedule: one of `schedules.SCHEDULES`: "cosine" to `lr_floor` after `warmup` linear steps;
        "constant" after the same warm-up; "plateau": the rate times `plateau_factor` whenever
        `plateau_patience` percent of the phase's steps bring no better loss.
      warmup: steps.
      lr_floor: share of the learning rate that the cosine ends at. The last steps of a decay to 0
        carve detail that the inverted network alone believes: other networks recognise images
        better that were kept moving.
      plateau_patience: percent of the phase's steps.
      plateau_factor: of the learning rate.
      early_stop: end a phase after this percent of its steps without a loss better by 10%;
        None for never.
      label_loss: "cross_entropy" or "target_logit" (minus the mean target logit).
      temperature: of the cross-entropy.
      tv_l2: weight of TV_2, the sum of norms of neighbour differences.
      tv_l1: weight of TV_1, the sum of means of absolute neighbour differences.
      tv_per_image: divide TV_2 by the batch size.
      l2: weight of the mean norm of the images.
      adaptive: weight of R_adi; needs a competitor.
      adaptive_temperature: of the two softmaxes that R_adi compares.
      crop: what part of the images a step sees; all of them by default.
      flip: probability of mirroring the batch in a step.
      keep: which images are the result: the "best", those of the lowest loss in the last phase; or
        the "last", which is better with `crop`, where the lowest loss tells of a lucky part.
      clip: clip each channel to the range of valid pixels after each step.
      init_std: standard deviation of the initial noise, in normalised units.
    """

    phases: Annotated[tuple[Phase, ...], Some()] = (
        Phase(2000, downscale=2, jitter=15),
        Phase(1000),
    )
    coarse: Literal["pooled", "small"] = "pooled"
    lr: Positive = 0.25
    optimizer: schedules.OptimizerName = "adam"
    optimizer_args: Mapping[str, Any] = dataclasses.field(default_factory=lambda: dict(_FAST_ADAM))
    schedule: schedules.ScheduleName = "cosine"
    warmup: Natural = 100
    lr_floor: Share = 0.0
    plateau_patience: Positive = 5.0
    plateau_factor: PositiveShare = 0.5
    early_stop: Positive | None = None
    label_loss: LabelLoss = "cross_entropy"
    temperature: Positive = 1.0
    tv_l2: NotNegative = 1e-4
    tv_l1: NotNegative = 0.0
    tv_per_image: bool = False
    l2: NotNegative = 1e-5
    adaptive: NotNegative = 0.0
    adaptive_temperature: Positive = 3.0
    crop: Crop | None = None
    flip: Share = 0.5
    keep: optimise.Keep = "best"
    clip: bool = True
    init_std: NotNegative = 1.0

    def __post_init__(self) -> None:
        if self.optimizer_args == _FAST_ADAM and not schedules.takes(self.optimizer, "b1"):
            object.__setattr__(self, "optimizer_args", {})
        checks.fields(self)
        if self.optimizer == schedules.LBFGS:
            raise ValueError(
                "L-BFGS searches along each step, but these images are rolled and mirrored at "
                "random from step to step: take another optimizer"
            )
        schedules.check_optimizer(self.optimizer, self.optimizer_args)
        schedules.check_schedule(self)
        self._check_unused()

    def _check_unused(self) -> None:
        if self.label_loss == "target_logit":
            checks.unused(self, "label_loss is 'target_logit'", "temperature")
        if not self.adaptive:
            checks.unused(self, "adaptive is 0", "adaptive_temperature")
        if self.coarse == "small" and self.phases[-1].downscale > 1:
            raise checks.FieldError(
                "coarse",
                ": 'small' leaves the images as small as their last phase: end with a phase of "
                "downscale: 1",
            )
        if all(phase.downscale == 1 for phase in self.phases):
            checks.unused(self, "no phase has a downscale", "coarse")
        weights = [self.tv_l2 if phase.tv_l2 is None else phase.tv_l2 for phase in self.phases]
        if not any(weights):
            checks.unused(self, "tv_l2 is 0", "tv_per_image")


class Data(NamedTuple):
    """Arrays that the steps read, lying where they are needed.

    Attributes:
      networks: variables of the networks, as `joint.build` arranged them.
      targets: (B,) class indices.
    """

    networks: Any
    targets: Array


@dataclasses.dataclass(frozen=True)
class Attack:
    """A built attack: give `initial(key)`, `data` and `phases` to `optimise.run`.

    Attributes:
      phases: the program.
      data: what its steps read.
      space: normalisation of the images being optimised.
      initial: `key -> images`, Gaussian noise at the first phase's resolution.
      placement: the devices, and what each of them computes.
      members: the networks in the objective.
    """

    phases: tuple[optimise.Phase, ...]
    data: Data
    space: Preprocessing
    initial: Callable[[Array], Array]
    placement: ensemble.Placement
    members: tuple[Member, ...]

    @property
    def mesh(self) -> Mesh:
        """The devices that take part."""
        return self.placement.mesh

    def shown(self, found: Array) -> Array:
        """Pick the images (B, H, W, C) a person looks at, in `space`: all that are optimised."""
        return found

    def with_targets(self, targets: Array | Sequence[int]) -> Attack:
        """Aim the same program at other classes, as many as before; nothing is compiled again.

        Args:
          targets: one class an image.

        Raises:
          ValueError: another number of classes, or one that a network does not know.
        """
        array = _checked_targets(targets, self.members)
        if array.shape != self.data.targets.shape:
            raise ValueError(
                f"the attack is of {len(self.data.targets)} images; {len(array)} targets given"
            )
        data = self.data._replace(targets=_laid(self.placement, array))
        return dataclasses.replace(self, data=data)

    def with_competitor(self, variables: Any) -> Attack:
        """Let the same program compete with the same network of other weights.

        Args:
          variables: of the competitor.

        Raises:
          ValueError: there is none, or the networks are spread over the devices.
        """
        if self.placement.kind != "data":
            raise ValueError(
                "a competitor that changes needs every network on every device: "
                "execution.placement 'data'"
            )
        first, *others = self.data.networks
        if first.rival is None:
            raise ValueError("the attack was built without a competitor")
        laid = parallel.put(self.mesh, PartitionSpec(), variables)
        data = self.data._replace(networks=(first._replace(rival=laid), *others))
        return dataclasses.replace(self, data=data)


def build(
    config: Config,
    members: Sequence[Member],
    targets: Array | Sequence[int],
    *,
    size: int | tuple[int, int] | None = None,
    space: Preprocessing | None = None,
    competitor: Net | None = None,
    extra_terms: ExtraTerms = MappingProxyType({}),
    compute_dtype: jnp.dtype | str = jnp.float32,
    execution: ensemble.Execution = ensemble.Execution(),
) -> Attack:
    """Build DeepInversion of one network, or of several at once, for these classes.

    L = sum_networks [a_label L_label + a_bn R_bn] + a_tv2 TV_2 + a_tv1 TV_1 + a_l2 R_l2
        + a_adi R_adi + sum_extra a f, on images pooled, rolled and mirrored at random.

    The first network sees the images as they are. A network of another input size sees them
    resampled by the ratio of the two sizes, each axis by its own.

    Args:
      config: the mathematics.
      members: networks in the objective; the first is the teacher of R_adi.
      targets: one class an image; the batch is as large as this.
      size: of the final images; defaults to the first network's.
      space: normalisation the images live in, which scales the learning rate and the priors;
        defaults to the first network's. A one-channel space inverts gray images.
      competitor: fixed network for R_adi.
      extra_terms: name -> (weight, function) of your own terms: images (B, H, W, C) in `space`,
        as the networks see them in the step -> scalar, differentiable. A term that needs a network
        closes over it.
      compute_dtype: of the networks' arithmetic; moments, losses and pixels stay float32.
      execution: devices, and how the networks share them; changes no value beyond rounding.

    Raises:
      ValueError: what does not fit together.
    """
    check_kind("config", config, Config)
    members = _checked_members(members)
    if competitor is not None:
        check_net("competitor", competitor)
    if space is not None:
        image.check_space("space", space)
    check_kind("execution", execution, ensemble.Execution)
    _check_objective(config, members, competitor)
    space = space or members[0].net.preprocessing
    _check_networks([member.net for member in members], competitor, space)
    array = _checked_targets(targets, members)
    microbatch.check_even(len(array), min(execution.images_at_once or len(array), len(array)))
    usual = members[0].net.preprocessing.size
    canvas = _canvas(config, len(array), usual if size is None else size, space)
    dtype = _checked_dtype(compute_dtype)
    parts = _parts(config, members, competitor, canvas, dtype, execution)
    for member in members:
        if member.weights.batch_norm:
            tell_without_statistics(member.net, member.weights.batch_norm)
    placement = ensemble.place(parts, len(array), execution)
    evaluate, networks = ensemble.build(parts, placement, execution)

    def initial(key: Array) -> Array:
        noise = config.init_std * jax.random.normal(key, canvas.optimised(config, config.phases[0]))
        return _laid(placement, noise)

    starts = itertools.accumulate((phase.steps for phase in config.phases), initial=0)
    return Attack(
        tuple(
            _phase(config, phase, start, canvas, extra_terms, evaluate)
            for phase, start in zip(config.phases, starts, strict=False)
        ),
        Data(networks, _laid(placement, array)),
        space,
        initial,
        placement,
        tuple(members),
    )


class _Variables(NamedTuple):
    """What the terms of one network read."""

    own: Any
    rival: Any
    class_moments: Any


class _Canvas(NamedTuple):
    """The final images."""

    images: int
    height: int
    width: int
    space: Preprocessing

    def shape(self, factor: int) -> tuple[int, int, int, int]:
        """(B, H, W, C) of the images made smaller by a factor."""
        return self.images, self.height // factor, self.width // factor, self.space.channels

    def seen(self, phase: Phase) -> jax.ShapeDtypeStruct:
        """What the first network sees in a phase."""
        return jax.ShapeDtypeStruct(self.shape(phase.downscale), jnp.float32)

    def optimised(self, config: Config, phase: Phase) -> tuple[int, int, int, int]:
        """(B, H, W, C) of what a phase optimises."""
        return self.shape(phase.downscale if config.coarse == "small" else 1)


def _canvas(
    config: Config, count: int, size: int | tuple[int, int], space: Preprocessing
) -> _Canvas:
    height, width = image.sides(size)
    for phase in config.phases:
        if height % phase.downscale or width % phase.downscale:
            raise ValueError(f"{height} x {width} images cannot be downscaled by {phase.downscale}")
    return _Canvas(count, height, width, space)


def _laid(placement: ensemble.Placement, batch: Array) -> Array:
    """Lay an array with one entry an image on the devices."""
    return parallel.put(placement.mesh, placement.batch, batch)


def _parts(
    config: Config,
    members: Sequence[Member],
    competitor: Net | None,
    canvas: _Canvas,
    dtype: jnp.dtype,
    execution: ensemble.Execution,
) -> list[ensemble.Part]:
    """Make every network's share of the objective, and try it on the images of every phase."""
    shapes = list(dict.fromkeys(canvas.seen(phase) for phase in config.phases))
    classes = jax.ShapeDtypeStruct((canvas.images,), jnp.int32)
    reference = members[0].net.preprocessing
    parts = []
    for i, member in enumerate(members):
        rival = competitor if i == 0 else None
        terms, weights = _terms(config, member, rival, reference, canvas.space, dtype, execution)
        rivals = None if rival is None else rival.variables
        variables = _Variables(member.net.variables, rivals, member.class_moments)
        example = (shapes[-1], classes)
        parts.append(ensemble.Part(member.net.name, terms, weights, variables, example))
        for shape in shapes:
            jax.eval_shape(terms, variables, shape, classes)  # do the networks take it?
    return parts


def _phase(
    config: Config,
    phase: Phase,
    start: int,
    canvas: _Canvas,
    extra_terms: ExtraTerms,
    evaluate: ensemble.Evaluate,
) -> optimise.Phase:
    """Make one phase of the program, which begins after `start` steps."""
    tv_l2 = config.tv_l2 if phase.tv_l2 is None else phase.tv_l2
    weights = {"tv_l2": tv_l2, "tv_l1": config.tv_l1, "l2": config.l2}
    terms = image_terms(weights, extra_terms, [canvas.seen(phase)], _TAKEN)
    optimizer = make_optimizer(config, phase)
    resolution = canvas.optimised(config, phase)[1:3]

    harder = config.crop is not None and config.crop.easy_to_hard

    def enter(images: Array, step: Any) -> optimise.State:
        memory = jnp.zeros(()) if harder else ()
        return optimise.init(image.resize(images, resolution), optimizer, step, memory=memory)

    def progress(step: Array, images: Array, memory: Array) -> tuple[Array, Array]:
        return jnp.float32((step - start) / phase.steps), jnp.zeros((), bool)

    def project(images: Array) -> Array:
        return image.clip(images, canvas.space) if config.clip else images

    stop = None
    if config.early_stop is not None:
        stop = optimise.EarlyStop(_percent(config.early_stop, phase.steps))
    loss = _loss(config, phase, terms, evaluate)
    _, height, width, _ = canvas.shape(phase.downscale)
    return optimise.Phase(
        f"{height} x {width} px",
        phase.steps,
        enter,
        optimise.make_step(
            loss,
            optimizer,
            project=project,
            early_stop=stop,
            remember=progress if harder else None,
            keep=config.keep,
        ),
        cost=1 / phase.downscale**2,
    )


def _terms(
    config: Config,
    member: Member,
    competitor: Net | None,
    reference: Preprocessing,
    space: Preprocessing,
    dtype: jnp.dtype,
    execution: ensemble.Execution,
) -> tuple[Callable[[_Variables, Array, Array], dict[str, Array]], dict[str, float]]:
    """Make one network's terms, R_adi among them if it has a competitor, with their weights."""
    at_once = execution.images_at_once or 0

    def outputs(net: Net, variables: Any, images: Array) -> Outputs:
        own = net.preprocessing
        height = round(images.shape[1] * (own.height / reference.height))
        width = round(images.shape[2] * (own.width / reference.width))
        images = image.resize(images, (height, width))
        inputs = image.convert(images, space, net.preprocessing).astype(dtype)
        few = 0 < at_once < len(images)
        with calls.in_words(net.name, inputs.shape):
            apply = net.apply
            if backend.choices().remat:
                apply = jax.checkpoint(apply, policy=_is_product)
            return (microbatch.in_turns(apply, at_once) if few else apply)(variables, inputs)

    def terms(variables: _Variables, images: Array, targets: Array) -> dict[str, Array]:
        own, rival, table = variables
        found = outputs(member.net, own, images)
        values = network_terms(
            member, found, own, targets, config.label_loss, config.temperature, table
        )
        if competitor is not None:
            other = outputs(competitor, rival, images).logits
            temperature = config.adaptive_temperature
            values["adaptive"] = priors.disagreement(found.logits, other, temperature)
        return values

    weights = term_weights(member)
    if competitor is not None:
        weights["adaptive"] = config.adaptive
    if not weights:
        raise ValueError(
            f"{member.net.name} adds nothing to the objective: its label and batch_norm terms "
            "weigh 0, or it has no BatchNorm layers"
        )
    return terms, weights


def _is_product(primitive: Any, *_: Any, **__: Any) -> bool:
    """Say whether a remat policy keeps what this primitive computes: convolutions and products."""
    return primitive in (lax.conv_general_dilated_p, lax.dot_general_p)


def _loss(
    config: Config,
    phase: Phase,
    terms: Mapping[str, tuple[float, ImageTerm]],
    evaluate: ensemble.Evaluate,
) -> optimise.LossFn:
    """The objective of one phase as `(key, images, data) -> (loss, terms)`."""
    factor = phase.downscale if config.coarse == "pooled" else 1

    def loss(
        key: Array, images: Array, told: Data | optimise.Remembered
    ) -> tuple[Array, dict[str, Array]]:
        data, progress = told if isinstance(told, optimise.Remembered) else (told, 1.0)
        seen = augment(key, images, factor, phase.jitter, config.flip, config.crop, progress)
        total, values = evaluate(data.networks, seen, data.targets)
        for name, (weight, term) in terms.items():
            share = len(images) if name == "tv_l2" and config.tv_per_image else 1
            values[name] = term(seen) / share
            total = total + weight * values[name]
        return total, values

    return loss


def augment(
    key: Array,
    images: Array,
    downscale: int,
    jitter: int | tuple[int, int],
    flip: float,
    crop: Crop | None = None,
    progress: ArrayLike = 1.0,
) -> Array:
    """Pool, crop, roll and perhaps mirror the images into what the networks see in a step.

    Args:
      key: of everything random.
      images: (B, H, W, C).
      downscale: factor of the average pooling.
      jitter: largest roll in pixels along each axis, or least and largest.
      flip: probability of mirroring the batch.
      crop: which part is seen.
      progress: share of the phase's steps that are done, for a crop that grows harder.

    Returns:
      (B, H / downscale, W / downscale, C).
    """
    shift_key, flip_key = jax.random.split(key)
    images = image.downscale(images, downscale) if downscale > 1 else images
    if crop is not None:
        images = _cropped(jax.random.fold_in(key, _CROPS), images, crop, progress)
    images = image.jitter(shift_key, images, jitter) if jitter else images
    return image.flip(flip_key, images, flip) if flip else images


_CROPS = 2
"""Number of the crop's key among a step's."""


def _cropped(key: Array, images: Array, crop: Crop, progress: ArrayLike) -> Array:
    least, greatest = crop.scale
    low: ArrayLike = least
    if crop.easy_to_hard:
        low = least + (greatest - least) * (1 + jnp.cos(jnp.pi * progress)) / 2
    keys = jax.random.split(key, len(images) if crop.per_image else 1)
    draw = functools.partial(
        image.random_box,
        size=(images.shape[1], images.shape[2]),
        scale=(low, greatest),
        ratio=crop.ratio,
    )
    return image.resized_crop(images, jax.vmap(draw)(keys))


def make_optimizer(config: Config, phase: Phase) -> optax.GradientTransformation:
    """Make the phase's optimizer with its learning-rate schedule.

    Raises:
      ValueError: no such optimizer, or one that refuses the config's arguments.
    """
    lr = config.lr if phase.lr is None else phase.lr
    schedule = schedules.SCHEDULES[config.schedule]
    rate = schedule.rate(lr, config.warmup, phase.steps, config.lr_floor)
    optimizer = schedules.make_optimizer(config.optimizer, rate, config.optimizer_args)
    if config.schedule != schedules.PLATEAU:
        return optimizer
    plateau = optax.contrib.reduce_on_plateau(
        factor=config.plateau_factor, patience=_percent(config.plateau_patience, phase.steps)
    )
    return optax.chain(optimizer, plateau)


def _percent(percent: float, steps: int) -> int:
    return max(1, round(steps * percent / 100))


def _checked_members(members: Any) -> list[Member]:
    """Return the members as a list; anything else is refused with what to write."""
    if isinstance(members, Member | Net):
        inner = "member" if isinstance(members, Member) else "jinv.Member(net)"
        raise ValueError(f"members are a list, also of one network: [{inner}]")
    try:
        found = list(members)
    except TypeError:
        raise ValueError(f"members are a list of jinv.Member, not {members!r}") from None
    for i, member in enumerate(found):
        if isinstance(member, Net):
            raise ValueError(f"members[{i}] is the Net {member.name}: wrap it, jinv.Member(net)")
        check_kind(f"members[{i}]", member, Member, "wrap a network, jinv.Member(net)")
    return found


def _checked_dtype(given: Any) -> np.dtype:
    try:
        dtype = jnp.dtype(given)
        if given is not None and jnp.issubdtype(dtype, jnp.floating):
            return dtype
    except TypeError:
        pass
    raise ValueError(
        f"compute_dtype must be a floating-point type, such as 'float32' or 'bfloat16', not "
        f"{given!r}"
    )


def _check_objective(config: Config, members: Sequence[Member], competitor: Net | None) -> None:
    if not members:
        raise ValueError("an attack needs at least one network")
    if not any(member.weights.label for member in members):
        checks.unused(config, "the networks' label terms weigh 0", "label_loss", "temperature")
    if (config.adaptive != 0) != (competitor is not None):
        raise ValueError("R_adi needs both a weight (adaptive) and a competitor network")


def _check_networks(nets: Sequence[Net], competitor: Net | None, space: Preprocessing) -> None:
    names = [net.name for net in nets]
    for name in names:
        if names.count(name) > 1:  # their terms would be taken for each other's
            raise ValueError(
                f"two networks in the objective are called {name}: "
                "give one another name with dataclasses.replace(net, name=...)"
            )
    if competitor is not None and competitor.classes != nets[0].classes:
        raise ValueError(
            f"the competitor {competitor.name} has {competitor.classes} classes, "
            f"the teacher {nets[0].name} has {nets[0].classes}"
        )
    for net in (*nets, *(() if competitor is None else (competitor,))):
        if space.channels not in (1, net.preprocessing.channels):
            raise ValueError(
                f"{space.channels}-channel images cannot be shown to {net.name}, a network of "
                f"{net.preprocessing.channels} channels"
            )


def _checked_targets(targets: Array | Sequence[int], members: Sequence[Member]) -> Array:
    array = np.asarray(targets)
    if array.ndim != 1 or array.size == 0 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError("targets must be a non-empty list of class numbers")
    for member in members:
        if array.min() < 0 or array.max() >= member.net.classes:
            raise ValueError(
                f"targets run from {array.min()} to {array.max()}, but {member.net.name} has "
                f"classes 0 to {member.net.classes - 1}"
            )
        if member.class_moments is not None and array.min() != array.max():
            raise ValueError(
                f"the statistics of {member.net.name} are those of single classes: give one class "
                "to all images of a batch"
            )
    return jnp.asarray(array, jnp.int32)


def choose_targets(
    labels: Literal["hand-picked", "random"] | Sequence[int],
    count: int,
    classes: int,
    key: Array,
) -> list[int]:
    """Choose classes for `count` images: the authors', uniformly random, or given ones in turn.

    Args:
      labels: "hand-picked", "random", or a list.
      count: how many images.
      classes: how many classes the network has.
      key: of the random ones.

    Raises:
      ValueError: no images, no labels, or hand-picked ones for a network not of ImageNet.
    """
    if count < 1:
        raise ValueError(f"at least one image is needed, not {count}")
    if labels == "random":
        return [int(c) for c in jax.random.randint(key, (count,), 0, classes)]
    if labels == "hand-picked":
        if classes != IMAGENET_CLASSES:
            raise ValueError(
                f"the hand-picked classes are ImageNet's 1000; this network has {classes}: "
                "use random labels or a list"
            )
        labels = HAND_PICKED
    if isinstance(labels, str) or not labels:
        raise ValueError(f"labels are 'hand-picked', 'random' or a list, not {labels!r}")
    return [int(labels[i % len(labels)]) for i in range(count)]


_CONDENSED = Config(
    phases=(Phase(4000, jitter=(0, 32)),),
    warmup=0,
    tv_l2=0.0,
    l2=0.0,
    crop=Crop(),
    keep="last",
)

_SLOW_ADAM = {"b1": 0.9, "b2": 0.999, "eps": 1e-8}

PRESETS: dict[str, Config] = {
    "setting0": Config(),
    "setting1": Config(phases=(Phase(2000),)),
    "setting2": Config(phases=(Phase(20000),), optimizer_args=_SLOW_ADAM, clip=False),
    "cifar10": Config(
        phases=(Phase(2000, jitter=2),),
        lr=0.05,
        optimizer_args=_SLOW_ADAM,
        tv_l2=2.5e-5,
        l2=0.0,
        clip=False,
    ),
    "student": Config(
        phases=(Phase(20000),),
        lr=0.2,
        schedule="plateau",
        warmup=0,
        early_stop=15.0,
        tv_l2=8e-3,
        tv_per_image=True,
    ),
    "sre2l": _CONDENSED,
    "sre2l_tiny_imagenet": dataclasses.replace(_CONDENSED, phases=(Phase(4000, jitter=4),), lr=0.1),
    "sre2l_cifar100": dataclasses.replace(
        _CONDENSED, phases=(Phase(1000, jitter=(0, 4)),), crop=None, flip=0.0
    ),
    "cda": dataclasses.replace(_CONDENSED, crop=Crop(easy_to_hard=True)),
}
"""The authors' settings 0, 1, 2 and CIFAR-10's; the student re-implementation's; those of dataset
condensation: SRe2L (arXiv 2306.13092) for ImageNet, Tiny-ImageNet (whose network's `batch_norm`
weighs 1) and CIFAR-100, and CDA (arXiv 2311.18838)."""

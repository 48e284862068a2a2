"""The one pixel-optimisation loop: `State`, `Info`, `init`, `step`, and `run`.

`init` and `step` are pure; they never jit, print or read files. `run` is the one place with jit
and the loop: chunks of steps on the device, of each of which a callback on the host is told while
the device is at work on the next.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jinv import backend
from jinv.image import Preprocessing

Data = Any
"""A tree of arrays that stay as they are during the run: variables, targets."""

Images = Any
"""An array, or a tree of arrays that are optimised together."""

LossFn = Callable[[Array, Images, Data], tuple[Array, Mapping[str, Array]]]
"""(key, images, data) -> (loss, {term: raw value}).

The loss is a scalar, or (G,) for images (G, ...) that are G independent candidates.
"""


class Remembered(NamedTuple):
    """What a loss gets for data if its step keeps a memory."""

    data: Data
    memory: Any


Remember = Callable[[Array, Images, Any], tuple[Any, Array]]
"""(step, images, memory) -> (the memory that this step's loss sees, whether it is a new one).

Losses under two memories do not compare, so a new one begins the search for the best images anew.
"""

Project = Callable[[Images], Images]

Keep = Literal["best", "last"]


class State(NamedTuple):
    """What the next step needs.

    Attributes:
      images: (B, H, W, C) being optimised, or (G, B, H, W, C) for G candidates; also a tree of
        arrays (G, ...), such as images with their labels.
      optimizer: optax state.
      step: steps done since the run began, over all phases.
      best_images: the images that had the lowest loss of this phase; or the last ones, see
        `make_step`.
      best_loss: their loss, () or (G,): every candidate has its own best images.
      reference_loss: the loss that early stopping last counted as progress.
      stale: steps since then.
      memory: what the step keeps for later ones besides.
    """

    images: Images
    optimizer: optax.OptState
    step: Array
    best_images: Images
    best_loss: Array
    reference_loss: Array
    stale: Array
    memory: Any = ()


class Info(NamedTuple):
    """What a person reads of one step: before the update.

    Attributes:
      loss: weighted sum; the mean over candidates.
      terms: raw values by name, in the objective's order.
      stopped: early stopping had ended the phase before this step; nothing was changed.
    """

    loss: Array
    terms: Mapping[str, Array]
    stopped: Array


Step = Callable[[Array, State, Data], tuple[State, Info]]


class NonFiniteError(ArithmeticError):
    """The loss became NaN or infinite; the best images before it are kept.

    Attributes:
      term: first term of the objective that was not finite, "loss" if each was.
      step: number of the step, counted from 0 over all phases.
    """

    def __init__(self, term: str, step: int) -> None:
        super().__init__(
            f"the loss is not finite at step {step}; the first term to blame is {term!r}. "
            "Lower the learning rate or that term's weight, or compute in float32"
        )
        self.term = term
        self.step = step


@dataclasses.dataclass(frozen=True)
class EarlyStop:
    """Stop after `patience` steps without a loss below `(1 - improvement)` of the last such."""

    patience: int
    improvement: float = 0.1


def warm_cosine(lr: float, warmup: int, steps: int, floor: float = 0.0) -> optax.Schedule:
    """Return the schedule lr (t + 1) / warmup, then a cosine from lr to floor * lr.

    Args:
      lr: highest learning rate.
      warmup: linear steps.
      steps: all of them, after which the cosine ends.
      floor: share of the learning rate that it ends at.
    """
    warmup = min(warmup, steps)

    def schedule(step: Any) -> Array:
        ramp = (step + 1) / max(warmup, 1)
        cosine = (1 + jnp.cos(jnp.pi * (step - warmup) / max(steps - warmup, 1))) / 2
        return lr * jnp.where(step < warmup, ramp, floor + (1 - floor) * cosine)

    return schedule


def init(
    images: Images,
    optimizer: optax.GradientTransformation,
    step: int | Array = 0,
    *,
    candidates: bool = False,
    memory: Any = (),
) -> State:
    """Return the state before the first step of a phase.

    Args:
      images: to begin with.
      optimizer: any optax transformation.
      step: steps done before, in other phases.
      candidates: whether the loss is (G,), of images (G, ...).
      memory: what the step keeps for later ones.
    """
    count = jax.tree.leaves(images)[0].shape[:1]
    return State(
        images=images,
        optimizer=optimizer.init(images),
        step=jnp.asarray(step, jnp.int32),
        best_images=jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), images),
        best_loss=jnp.full(count if candidates else (), jnp.inf, jnp.float32),
        reference_loss=jnp.full((), jnp.inf, jnp.float32),
        stale=jnp.zeros((), jnp.int32),
        memory=memory,
    )


def make_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    project: Project = lambda images: images,
    early_stop: EarlyStop | None = None,
    noise: Callable[[Array], Array] | None = None,
    remember: Remember | None = None,
    line_search: bool = False,
    keep: Keep = "best",
) -> Step:
    """One gradient step on images.

    Randomness of step t comes from `fold_in(key, t)` alone, so a resumed run draws what an
    uninterrupted one would.

    Args:
      loss_fn: differentiated with respect to its images.
      optimizer: any optax transformation; it is told the loss as `value`.
      project: applied to the updated images, such as clipping to the valid range.
      early_stop: leave the state as it is once it says so.
      noise: step -> standard deviation of Gaussian noise added to the updated images (Langevin).
      remember: keeps a memory from step to step; the loss gets `Remembered` data.
      line_search: the optimizer is one of `each_candidate`; it is also told every candidate's loss
        as `values`, and how to find these at other images as `values_fn`.
      keep: which images a phase leaves: the "best", or the "last". Where what the loss sees is
        drawn anew in every step, its lowest value tells of a lucky draw.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def step(key: Array, state: State, data: Data) -> tuple[State, Info]:
        key = jax.random.fold_in(key, state.step)
        memory, best_loss = state.memory, state.best_loss
        if remember is not None:
            memory, renewed = remember(state.step, state.images, memory)
            best_loss = jnp.where(renewed, jnp.inf, best_loss)
            data = Remembered(data, memory)
        losses, terms, gradient = _differentiated(loss_fn, key, state.images, data)
        loss = losses.mean()
        told: dict[str, Any] = {"value": loss}
        if line_search:
            told["values"] = losses
            told["values_fn"] = lambda images: loss_fn(key, images, data)[0]
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.images, **told)
        images = optax.apply_updates(state.images, updates)
        if noise is not None:
            kick = optax.tree.random_like(jax.random.fold_in(key, 1), images)
            images = optax.tree.add_scale(images, noise(state.step), kick)
        images = project(images)
        finite = jnp.isfinite(losses)
        better = finite & (losses < best_loss) if keep == "best" else finite
        kept = state.images if keep == "best" else images
        progress = loss < _threshold(state.reference_loss, early_stop)
        new = State(
            images=images,
            optimizer=optimizer_state,
            step=state.step + 1,
            best_images=_where(better, kept, state.best_images),
            best_loss=jnp.where(better, losses, best_loss),
            reference_loss=jnp.where(progress, loss, state.reference_loss),
            stale=jnp.where(progress, 0, state.stale + 1),
            memory=memory,
        )
        if early_stop is None:
            return new, Info(loss, terms, jnp.zeros((), bool))
        stopped = state.stale >= early_stop.patience
        new = jax.tree.map(lambda old, now: jnp.where(stopped, old, now), state, new)
        return new, Info(loss, terms, stopped)

    return step


def _differentiated(
    loss_fn: LossFn, key: Array, images: Images, data: Data
) -> tuple[Array, Mapping[str, Array], Images]:
    """Losses, terms in the objective's order, and the gradient of the losses' sum by the images."""

    def ordered(images: Images) -> tuple[Array, tuple[Array, Mapping[str, Array]]]:
        losses, terms = loss_fn(key, images, data)
        # JAX sorts the keys of plain dicts.
        return losses.sum(), (losses, collections.OrderedDict(terms))

    (_, (losses, terms)), gradient = jax.value_and_grad(ordered, has_aux=True)(images)
    return losses, terms, gradient


def _where(chosen: Array, images: Images, others: Images) -> Images:
    """For every candidate its images or the others; `chosen` is () or (G,)."""

    def one(now: Array, before: Array) -> Array:
        wide = chosen.reshape(chosen.shape + (1,) * (now.ndim - chosen.ndim))
        return jnp.where(wide, now, before)

    return jax.tree.map(one, images, others)


def each_candidate(
    optimizer: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer with a line search, such as L-BFGS, for every candidate alone."""

    def update(
        gradient: Images,
        state: Any,
        images: Images = None,
        *,
        values: Array,
        values_fn: Callable[[Images], Array],
        **others: Any,
    ) -> tuple[Images, Any]:
        del others

        def one(gradient: Images, state: Any, images: Images, value: Array) -> tuple[Images, Any]:
            def value_fn(images: Images) -> Array:
                return values_fn(jax.tree.map(lambda leaf: leaf[None], images))[0]

            return optimizer.update(
                gradient, state, images, value=value, grad=gradient, value_fn=value_fn
            )

        return jax.vmap(one)(gradient, state, images, values)

    return optax.GradientTransformationExtraArgs(jax.vmap(optimizer.init), update)


def _threshold(reference: Array, early_stop: EarlyStop | None) -> Array:
    """The loss that counts as progress: below the reference by a share of its size."""
    if early_stop is None:
        return reference
    margin = jnp.where(jnp.isfinite(reference), early_stop.improvement * jnp.abs(reference), 0)
    return reference - margin


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of steps with one program: one resolution, one optimizer.

    Attributes:
      name: for logs.
      steps: number of steps.
      enter: `(images, step) -> State`, from the images the phase before has left.
      step: `(key, state, data) -> (State, Info)`.
      cost: of a step relative to those of other phases, for estimates of the time left.
    """

    name: str
    steps: int
    enter: Callable[[Images, Any], State]
    step: Step
    cost: float = 1.0


class Attack(Protocol):
    """What a run needs of an attack, whatever the evidence."""

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases to go through, see `run`."""
        ...

    @property
    def data(self) -> Data:
        """What every step is told."""
        ...

    @property
    def space(self) -> Preprocessing:
        """What the images are normalised for while they are optimised."""
        ...

    @property
    def mesh(self) -> Mesh:
        """The devices that share the images."""
        ...

    def initial(self, key: Array) -> Images:
        """Draw the images that the first phase enters with."""
        ...

    def shown(self, found: Images) -> Array | np.ndarray:
        """Return those of the found images that a person looks at, (N, H, W, C), normalised."""
        ...


@dataclasses.dataclass(frozen=True)
class Chunk:
    """What a callback is told after some steps.

    Attributes:
      phase: index of the phase.
      start: number of the first step told here, over all phases.
      metrics: "loss" and every term -> (n,) values of the n steps.
      state: after those steps, and the callback may keep it; None where it was not wanted.
      stopped: early stopping has ended the phase.
      finite: the loss was finite at every step up to the state.
    """

    phase: int
    start: int
    metrics: dict[str, np.ndarray]
    state: Any
    stopped: bool
    finite: bool = True


@dataclasses.dataclass
class Clock:
    """Seconds of a run, by what they went into.

    Attributes:
      compiling: programs.
      stepping: as long as the device had steps to work on, whatever the host did meanwhile.
      steps: how many.
    """

    compiling: float = 0.0
    stepping: float = 0.0
    steps: int = 0


Loop = Literal["auto", "scan", "python"]

LOOK = 1.0
"""Seconds between two looks of the host at the device, if the number of steps is left open."""

_TOGETHER = 50
"""Steps between two looks of several processes, whose clocks need not agree."""

_SCANNED = 10
"""Steps of a scan at most: more save nothing, and delay Ctrl-C."""


def run(
    phases: tuple[Phase, ...],
    key: Array,
    images: Images,
    data: Data,
    *,
    callback: Callable[[Chunk], None] = lambda chunk: None,
    chunk: int | None = None,
    marks: Sequence[int] = (),
    loop: Loop = "auto",
    resume: tuple[int, State] | None = None,
    clock: Clock | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    wanted: Callable[[int], bool] = lambda done: True,
) -> State:
    """Run the phases one after the other; returns the last phase's state.

    Each phase starts from the best images of the one before. The result does not depend on
    `chunk`, `marks`, `loop` or on where a run was cut and resumed. A second run of the same phases,
    on arrays that lie alike, compiles nothing.

    Args:
      phases: at least one.
      key: of the run.
      images: initial images of the first phase (ignored when resuming). Steps take over the
        buffers of their state: neither these nor the resumed state can be read later.
      data: passed to every step.
      callback: called after every chunk, and so at least once a phase, while the first steps of the
        next chunk run.
      chunk: steps between callbacks; None for about a second's.
      marks: a chunk also ends wherever the number of steps, over all phases, is a multiple of one.
      loop: "scan" makes one program of several steps, as many as divide chunk, marks and phases
        evenly; "python" dispatches step by step, which is twice as fast on CPU, where XLA runs
        convolutions inside loops on one thread. "auto" takes what `backend.choices` says.
      resume: (phase, state after a chunk) of an earlier run.
      clock: told where the time went.
      should_stop: asked between programs, of several processes between chunks; once it is true the
        loop calls back a last time and returns.
      wanted: number of steps at a chunk's end -> whether the callback reads the state there. While
        the next steps run it takes a copy.

    Raises:
      NonFiniteError: after the callback has seen the chunk's finite steps.
      ValueError: phases, images, chunk or loop that cannot be run.
    """
    if not isinstance(phases, Sequence) or not all(isinstance(phase, Phase) for phase in phases):
        raise ValueError(
            "phases are a list of optimise.Phase, such as attack.phases, not "
            f"{type(phases).__name__}"
        )
    if not phases:
        raise ValueError("nothing to run: no phases")
    if loop not in get_args(Loop):
        raise ValueError(f"loop must be one of {', '.join(get_args(Loop))}, not {loop!r}")
    clock = clock or Clock()
    first, state = 0, cast(Any, None)
    if resume is not None:
        first, state = resume[0], _arrays(resume[1])
    before = sum(phase.steps for phase in phases[:first])
    looks = Looks(callback, chunk, tuple(marks), clock, should_stop, wanted)
    for index in range(first, len(phases)):
        phase = phases[index]
        if state is None:
            _check_images(images)
            state = enter(phase, _arrays(images), before)
        before += phase.steps
        state, ended = drive(
            phase.step, key, state, lambda step: data, before, looks, loop=loop, phase=index
        )
        if not ended:
            return state
        if index + 1 < len(phases):
            # A copy, which the next phase takes over: a callback may keep this state.
            images, state = jax.tree.map(jnp.copy, state.best_images), None
    assert state is not None
    return state


def _arrays(tree: Any) -> Any:
    """The same of JAX's arrays; of NumPy's a copy, which the steps may take over."""
    return jax.tree.map(lambda x: x if isinstance(x, jax.Array) else jnp.array(x), tree)


def _check_images(images: Images) -> None:
    leaves = jax.tree.leaves(images)
    wrong = [leaf for leaf in leaves if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating)]
    if wrong or not leaves:
        found = jnp.result_type(wrong[0]) if wrong else "nothing"
        raise ValueError(
            f"images to optimise are floating-point numbers, not {found}: start from "
            "attack.initial(key), or from pixels by jinv.image.normalise"
        )


def enter(phase: Phase, images: Images, step: int) -> State:
    """State at the start of a phase, spread over the devices that `images` are spread over."""
    shardings = _shardings(phase, images)
    if jax.tree.leaves(images)[0].is_fully_addressable:
        return jax.device_put(phase.enter(images, step), shardings)
    # Arrays that other hosts hold parts of are made by one program of all.
    return jax.jit(phase.enter, out_shardings=shardings)(images, step)


def abstract_state(phase: Phase, images: Images) -> State:
    """Shapes, types and shardings of a phase's states, to restore a checkpoint into."""
    shapes = jax.eval_shape(lambda x: phase.enter(x, 0), images)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        _shardings(phase, images),
    )


def _shardings(phase: Phase, images: Images) -> State:
    """Arrays of the images' shapes lie as the images do; the rest is on every device."""
    shapes = jax.eval_shape(lambda x: phase.enter(x, 0), images)
    pairs = zip(jax.tree.leaves(shapes.images), jax.tree.leaves(images), strict=True)
    lie = {entered.shape: leaf.sharding for entered, leaf in pairs}
    one = next(iter(lie.values()))
    rest = NamedSharding(one.mesh, PartitionSpec()) if isinstance(one, NamedSharding) else one
    return jax.tree.map(lambda leaf: lie.get(leaf.shape, rest), shapes)


@dataclasses.dataclass
class Looks:
    """When the host looks at the device, and what for; see `run`.

    Raises:
      ValueError: a chunk without steps, or marks that are no numbers of steps.
    """

    callback: Callable[[Chunk], None]
    chunk: int | None = None
    marks: tuple[int, ...] = ()
    clock: Clock = dataclasses.field(default_factory=Clock)
    should_stop: Callable[[], bool] = lambda: False
    wanted: Callable[[int], bool] = lambda done: True

    def __post_init__(self) -> None:
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"a chunk needs at least one step, not {self.chunk}")
        if any(mark < 1 for mark in self.marks):
            raise ValueError(f"marks are numbers of steps from 1 on, not {list(self.marks)}")
        self.last = time.perf_counter()

    def due(self, steps: int, done: int, end: int) -> bool:
        """Return whether a chunk ends here.

        Args:
          steps: of the chunk so far.
          done: number of steps over all phases.
          end: this number at the phase's end.
        """
        if self.chunk is None and jax.process_count() == 1:
            enough = time.perf_counter() - self.last >= LOOK
        else:
            enough = steps >= (self.chunk or _TOGETHER)
        return done >= end or enough or any(done % mark == 0 for mark in self.marks)

    def even(self, done: int, end: int) -> int:
        """Return the largest number of steps, `_SCANNED` at most, that fits between all looks."""
        common = math.gcd(done, end, *self.marks, *([] if self.chunk is None else [self.chunk]))
        return max(n for n in range(1, _SCANNED + 1) if common % n == 0)


@dataclasses.dataclass
class _Steps:
    """A chunk that was handed to the device and is not told yet.

    Attributes:
      start: number of its first step, over all phases.
      infos: of its programs.
      state: after it.
      wanted: whether the callback reads it.
    """

    start: int
    infos: list[Info]
    state: Any
    wanted: bool

    def fetch(self) -> Info:
        """Return the infos of all steps as NumPy arrays, once they are there."""
        found = jax.device_get(self.infos)
        return jax.tree.map(lambda *parts: np.concatenate([*map(np.atleast_1d, parts)]), *found)


S = TypeVar("S", bound=Any)


def drive(
    step: Callable[[Array, S, Data], tuple[S, Info]],
    key: Array,
    state: S,
    data: Callable[[int], Data],
    end: int,
    looks: Looks,
    *,
    loop: Loop = "auto",
    phase: int = 0,
) -> tuple[S, bool]:
    """Take steps until there are `end` of them; the loop of every optimisation and training.

    Args:
      step: `(key, state, data) -> (state, info)`, pure; compiled once.
      key: of all steps.
      state: its `step` is the number of steps done; taken over.
      data: number of a step -> what it is told; asked for in order, while the device works. In a
        scan all steps are told what the first is.
      end: number of steps.
      looks: when to call back, and when to stop.
      loop: see `run`.
      phase: number that the callback is told.

    Returns:
      The state, and whether the steps were taken to the end, or to an early stop.

    Raises:
      NonFiniteError: after the callback has seen the chunk's finite steps.
    """
    clock, done = looks.clock, int(state.step)
    if done >= end:
        return state, True
    if loop == "auto":
        loop = backend.choices().loop
    length = looks.even(done, end) if loop == "scan" else 1
    given = data(done)
    program = _program(step, length, clock, key, state, given)
    # Several processes have to agree on a stop, which is too slow for every program.
    alone = jax.process_count() == 1
    start, infos, stop = done, [], False
    told: _Steps | None = None
    since = time.perf_counter()  # the device has been at work
    while True:
        ahead = done < end and not stop
        if ahead:
            if told is not None:
                # The next program takes over the memory of this state.
                told.state = jax.tree.map(jnp.copy, told.state) if told.wanted else None
            state, info = program(key, state, given)
            done += length
            infos.append(info)
            given = data(done) if done < end else None
        if told is not None:
            metrics, stopped, blame = _read(told)
            now = time.perf_counter()
            clock.stepping += now - since
            clock.steps += len(metrics["loss"])
            since = now
            if told.state is None and (stopped or blame is not None):
                # An early stop has left it as it was, and what is not finite the best images.
                told.state = state
            if blame is not None:
                finite = {name: series[: blame[0]] for name, series in metrics.items()}
                looks.callback(
                    Chunk(phase, told.start, finite, told.state, stopped=False, finite=False)
                )
                raise NonFiniteError(blame[1], told.start + blame[0])
            looks.callback(Chunk(phase, told.start, metrics, told.state, stopped))
            if not ahead or info.loss.is_ready():
                since = time.perf_counter()  # it waited for the callback
            told = None
            if stopped or not ahead:
                # Steps that were handed over since have changed nothing if it stopped early.
                return state, not (stop or looks.should_stop())
        if len(infos) > 1:
            # The device has its next program and is at most one ahead of Ctrl-C.
            jax.block_until_ready(infos[-2])
        due = looks.due(done - start, done, end)
        if alone or due:
            stop = looks.should_stop()
        if due or stop:
            told, start, infos = _Steps(start, infos, state, looks.wanted(done)), done, []
            looks.last = time.perf_counter()


def _read(steps: _Steps) -> tuple[dict[str, np.ndarray], bool, tuple[int, str] | None]:
    """Metrics up to an early stop, whether there was one, and what `_first_non_finite` blames."""
    infos: Any = steps.fetch()  # of NumPy arrays
    stopped = infos.stopped
    count = int(np.argmax(stopped)) if stopped.any() else len(stopped)
    values = {"loss": infos.loss, **infos.terms}
    metrics = {name: series[:count] for name, series in values.items()}
    return metrics, bool(stopped.any()), _first_non_finite(metrics)


def _first_non_finite(metrics: Mapping[str, np.ndarray]) -> tuple[int, str] | None:
    bad = ~np.isfinite(metrics["loss"])
    if not bad.any():
        return None
    step = int(np.argmax(bad))
    terms = (n for n, v in metrics.items() if n != "loss" and not np.isfinite(v[step]))
    return step, next(terms, "loss")


def several(step: Callable, length: int) -> Callable:
    """Return so many steps as one, with their infos one after the other; of one step, itself."""
    if length == 1:
        return step

    def steps(key: Array, state: Any, data: Data) -> tuple[Any, Info]:
        return lax.scan(lambda s, _: step(key, s, data), state, length=length)

    return steps


_ARITHMETIC = ("jax_enable_x64", "jax_default_matmul_precision")

# A program lives as long as the step that it is compiled from, and so as the attack.
_PROGRAMS: weakref.WeakKeyDictionary[Callable, dict[Any, Callable]] = weakref.WeakKeyDictionary()


def _program(step: Callable, length: int, clock: Clock, *args: Any) -> Any:
    """`compile_step` of so many steps, or what it gave for arguments like these."""
    known = _PROGRAMS.setdefault(step, {})
    leaves, structure = jax.tree.flatten(args)
    abstract = tuple((jax.typeof(leaf), getattr(leaf, "sharding", None)) for leaf in leaves)
    settings = tuple(getattr(jax.config, name) for name in _ARITHMETIC)
    wanted = (length, structure, abstract, settings, backend.choices())
    if wanted not in known:
        known[wanted] = compile_step(several(step, length), clock, *args)
    return known[wanted]


def compile_step(function: Callable, clock: Clock, *args: Any) -> Callable:
    """Compile `(key, state, ...) -> (state, info)` for these arguments; calls take states over."""
    began = time.perf_counter()
    # The state must come out lying as it went in: the next call takes nothing else.
    state = jax.tree.map(lambda leaf: leaf.sharding, args[1])
    jitted = jax.jit(function, donate_argnums=1, out_shardings=(state, None))
    compiled = jitted.lower(*args).compile()
    clock.compiling += time.perf_counter() - began
    return compiled

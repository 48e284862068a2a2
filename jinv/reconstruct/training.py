"""Training of a reconstructor on shadow models, made as they are needed or read from a store.

Shadow models come a seed at a time, and stay on the device. A step takes the next few of them and
the images that these were trained on; which ones is decided by the number of the step alone. So
training on models that are made anew equals training on the same seeds of a store.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jinv import checks, optimise, parallel
from jinv.checks import Count, Natural, Positive, PositiveShare, Share, ShareBelowOne
from jinv.net import Variables, with_parameters
from jinv.reconstruct import network
from jinv.reconstruct.losses import ALPHA, Perceptual, set_loss
from jinv.reconstruct.network import Reconstructor
from jinv.reconstruct.normalisation import Normalisation
from jinv.shadow.generation import Factory
from jinv.shadow.sampling import Sets
from jinv.shadow.store import Store

_BATCH = PartitionSpec(parallel.BATCH)


@dataclasses.dataclass(frozen=True)
class Config:
    """The mathematics of a training run. Defaults: as published.

    Attributes:
      steps: how many.
      batch: shadow models a step, an image of each.
      lr: learning rate of Adam: it rises linearly for `warmup` steps and falls to `lr_floor` times
        as much with a cosine.
      warmup: in steps.
      lr_floor: share of the learning rate at the end; 1 keeps it.
      alpha: sharpness of the softmin over the images that a reconstruction may be of.
      average: weight of what was before in the running average of parameters that is kept beside
        them; 0 for none.
      statistics_momentum: weight of a batch in BatchNorm's running statistics, torch's `momentum`.
    """

    steps: Count = 1_000_000
    batch: Count = 32
    lr: Positive = 2e-4
    warmup: Natural = 0
    lr_floor: Share = 1.0
    alpha: Positive = ALPHA
    average: ShareBelowOne = 0.0
    statistics_momentum: PositiveShare = 0.1

    def __post_init__(self) -> None:
        checks.fields(self)


class State(NamedTuple):
    """What the next step needs.

    Attributes:
      variables: of the reconstructor: parameters, running statistics, counters.
      optimizer: optax state of the parameters.
      average: running average of the parameters; empty without one.
      step: steps done.
    """

    variables: Variables
    optimizer: optax.OptState
    average: dict[Any, Any]
    step: Array


class Population(NamedTuple):
    """The images that shadow models are trained on, on the device.

    Attributes:
      images: (M, size, size, channels) bytes, as the reconstructor makes them.
      labels: (M,) classes.
    """

    images: Array
    labels: Array


class Shadows(NamedTuple):
    """The shadow models of a seed, on the device.

    Attributes:
      weights: (S, P).
      indices: (S, N) which images each was trained on.
      first: number of the step that takes the first of them.
    """

    weights: Array
    indices: Array
    first: Array


Step = Callable[[Array, State, tuple[Population, Shadows]], tuple[State, optimise.Info]]
"""(key, state, (population, shadows)) -> (state, info).

The info tells of the batch before the update: `loss`, and the term "mse", the mean of the least
squared error against the images that each reconstruction may be of.
"""


class Source(Protocol):
    """Where shadow models come from, or single features in their place.

    Attributes:
      seconds: that the host waited for them.
    """

    seconds: float

    @property
    def sets(self) -> int:
        """How many a seed has."""
        ...

    def __call__(self, seed: int) -> tuple[Array | np.ndarray, np.ndarray]:
        """Return weights (S, P) and indices (S, N) of a seed."""
        ...


@dataclasses.dataclass
class Made:
    """Shadow models that are made when they are asked for, and never twice.

    Attributes:
      factory: makes them.
      draw: seed -> training sets.
      sets: how many a seed has.
      shown: how many of the first examples of a set are to be reconstructed; None for all.
      seconds: that the host waited for them.
    """

    factory: Factory
    draw: Callable[[int], Sets]
    sets: int
    shown: int | None = None
    seconds: float = 0.0

    def __call__(self, seed: int) -> tuple[Array, np.ndarray]:
        """Return weights, which have not left the device, and indices of a seed."""
        began = time.perf_counter()
        drawn = self.draw(seed)
        weights = self.factory.on_device(seed, drawn).weights
        self.seconds += time.perf_counter() - began
        return weights, drawn.indices[:, : self.shown]


@dataclasses.dataclass
class Stored:
    """Shadow models of a store, again from its first seed after the last.

    The seed that follows is read while training uses the one before.

    Attributes:
      store: with all its seeds.
      draw: seed -> training sets.
      shown: how many of the first examples of a set are to be reconstructed; None for all.
      seconds: that the host waited for them.
    """

    store: Store
    draw: Callable[[int], Sets]
    shown: int | None = None
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self._reader = ThreadPoolExecutor(1)
        self._coming: tuple[int, Future[tuple[np.ndarray, np.ndarray]]] | None = None

    @property
    def sets(self) -> int:
        """How many a seed has."""
        return self.store.metadata.sets

    def __call__(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Return weights and indices of a seed."""
        began = time.perf_counter()
        coming, self._coming = self._coming, None
        if coming is None or coming[0] != seed:
            coming = seed, self._reader.submit(self._read, seed)
        found = coming[1].result()
        self._coming = seed + 1, self._reader.submit(self._read, seed + 1)
        self.seconds += time.perf_counter() - began
        return found

    def _read(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        seed %= self.store.metadata.seeds
        return self.store.read(seed), self.draw(seed).indices[:, : self.shown]


def batches(source: Source, config: Config) -> int:
    """Return the number of steps that a seed is enough for.

    Raises:
      ValueError: for none.
    """
    found = source.sets // config.batch
    if not found:
        raise ValueError(
            f"seeds of {source.sets} shadow models fill no batch of {config.batch}: lower "
            "reconstructor.batch"
        )
    return found


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Return Adam with the config's schedule."""
    return optax.adam(optimise.warm_cosine(config.lr, config.warmup, config.steps, config.lr_floor))


def init(reconstructor: Reconstructor, config: Config, key: Array) -> State:
    """Return the state before the first step.

    Args:
      reconstructor: what is trained.
      config: how.
      key: of the initial parameters.
    """
    variables = reconstructor.init(key)
    parameters = network.parameters(variables)
    average = jax.tree.map(jnp.copy, parameters) if config.average else {}
    optimizer = make_optimizer(config).init(parameters)
    return State(variables, optimizer, average, jnp.zeros((), jnp.int32))


def make_step(
    reconstructor: Reconstructor,
    config: Config,
    normalisation: Normalisation,
    *,
    perceptual: Perceptual | None = None,
    mesh: Mesh | None = None,
) -> Step:
    """Return one step on the next shadow models.

    Where the reconstructor is told a class, it is that of an image drawn from the set; otherwise
    all images of the set count. Randomness of step t comes from `fold_in(key, t)` alone.

    Args:
      reconstructor: what is trained.
      config: how.
      normalisation: of the weights that it is given.
      perceptual: LPIPS, which adds to the loss.
      mesh: of the devices that share a batch; one device by default.
    """
    optimizer = make_optimizer(config)
    told = reconstructor.config.classes is not None

    def shared(x: Array) -> Array:
        if mesh is None:
            return x
        return lax.with_sharding_constraint(x, NamedSharding(mesh, _BATCH))

    def step(
        key: Array, state: State, data: tuple[Population, Shadows]
    ) -> tuple[State, optimise.Info]:
        population, shadows = data
        row = (state.step - shadows.first) * config.batch
        weights, indices = (
            shared(lax.dynamic_slice_in_dim(of_all, row, config.batch))
            for of_all in (shadows.weights, shadows.indices)
        )
        sets = population.images[indices] / 127.5 - 1
        labels = members = None
        if told:
            classes = population.labels[indices]
            drawn = jax.random.randint(
                jax.random.fold_in(key, state.step), (config.batch,), 0, classes.shape[1]
            )
            labels = jnp.take_along_axis(classes, drawn[:, None], 1)[:, 0]
            members = classes == labels[:, None]
        x = normalisation.normalised(weights.astype(jnp.promote_types(weights.dtype, jnp.float32)))
        before = network.parameters(state.variables)

        def loss(parameters: Any) -> tuple[Array, tuple[Array, Any]]:
            variables = with_parameters(state.variables, parameters)
            found, moments = reconstructor.train_apply(variables, x, labels)
            errors = set_loss(found, sets, members, alpha=config.alpha, perceptual=perceptual)
            apart = jnp.square(found[:, None] - sets).mean((-3, -2, -1))
            if members is not None:
                apart = jnp.where(members, apart, jnp.inf)
            return errors.mean(), (apart.min(1).mean(), moments)

        (value, (mse, moments)), gradient = jax.value_and_grad(loss, has_aux=True)(before)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, before)
        now = optax.apply_updates(before, updates)
        variables = reconstructor.with_statistics(
            with_parameters(state.variables, now),
            moments,
            config.batch,
            config.statistics_momentum,
        )
        average = state.average
        if config.average:
            average = optax.incremental_update(now, average, 1 - config.average)
        state = State(variables, optimizer_state, average, state.step + 1)
        return state, optimise.Info(value, {"mse": mse}, jnp.zeros((), bool))

    return step


def averaged(state: State) -> Variables:
    """Return the variables with the averaged parameters, if there are any."""
    return with_parameters(state.variables, state.average) if state.average else state.variables


def population(images: np.ndarray, labels: np.ndarray, mesh: Mesh) -> Population:
    """Lay images and labels out on all devices of a mesh.

    Raises:
      ValueError: images are no bytes, or there are not as many labels.
    """
    if images.dtype != np.uint8 or len(images) != len(labels):
        raise ValueError(
            f"a population is of bytes with a label each, not {images.dtype} {images.shape} and "
            f"{labels.shape}"
        )
    found = images, np.asarray(labels, np.int32)
    return Population(*parallel.put(mesh, PartitionSpec(), found))


def run(
    reconstructor: Reconstructor,
    config: Config,
    normalisation: Normalisation,
    key: Array,
    population: Population,
    source: Source,
    *,
    mesh: Mesh,
    state: State | None = None,
    perceptual: Perceptual | None = None,
    callback: Callable[[optimise.Chunk], None] = lambda chunk: None,
    marks: tuple[int, ...] = (),
    should_stop: Callable[[], bool] = lambda: False,
    wanted: Callable[[int], bool] = lambda done: True,
    clock: optimise.Clock | None = None,
    loop: optimise.Loop = "auto",
) -> State:
    """Train; returns the last state. The result does not depend on where a run was cut.

    Args:
      reconstructor: what is trained.
      config: how.
      normalisation: of the weights that it is given.
      key: of the run.
      population: the images that shadow models are trained on.
      source: of the shadow models: `Made` or `Stored`.
      mesh: of the devices that share a batch, see `jinv.training.batch_mesh`.
      state: to go on from; taken over.
      perceptual: LPIPS, which adds to the loss.
      callback: see `optimise.run`.
      marks: numbers of steps at whose multiples it is called besides.
      should_stop, wanted: see `optimise.run`.
      clock: told where the time went.
      loop: see `optimise.run`.

    Raises:
      ValueError: a seed has fewer shadow models than a batch, or the weights are not what the
        reconstructor takes.
      optimise.NonFiniteError: after the callback has seen the finite steps.
    """
    each = batches(source, config)
    if len(normalisation.varying) != reconstructor.config.inputs:
        raise ValueError(
            f"the reconstructor takes {reconstructor.config.inputs} numbers, but "
            f"{len(normalisation.varying)} coordinates of the heads vary"
        )
    init_key, step_key = jax.random.split(key)
    if state is None:
        state = parallel.put(mesh, PartitionSpec(), init(reconstructor, config, init_key))
    held: tuple[int, Shadows] | None = None

    def data(step: int) -> tuple[Population, Shadows]:
        nonlocal held
        seed = step // each
        if held is None or held[0] != seed:
            weights, indices = source(seed)
            first = np.asarray(seed * each, np.int32)
            found = Shadows(weights, np.asarray(indices, np.int32), first)  # type: ignore[arg-type]
            held = seed, _laid(mesh, found)
        return population, held[1]

    looks = optimise.Looks(
        callback, None, (each, *marks), clock or optimise.Clock(), should_stop, wanted
    )
    step = make_step(reconstructor, config, normalisation, perceptual=perceptual, mesh=mesh)
    return optimise.drive(step, step_key, state, data, config.steps, looks, loop=loop)[0]


def _laid(mesh: Mesh, shadows: Shadows) -> Shadows:
    """Lay a seed out on all devices; what is there already stays where it is."""
    every = NamedSharding(mesh, PartitionSpec())
    if every.is_fully_addressable:
        return jax.device_put(shadows, every)
    return parallel.put(mesh, PartitionSpec(), jax.tree.map(np.asarray, shadows))


def abstract_state(reconstructor: Reconstructor, config: Config, mesh: Mesh) -> State:
    """Return shapes, types and shardings of a run's states, to restore a checkpoint into."""
    every = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=every),
        jax.eval_shape(lambda key: init(reconstructor, config, key), jax.random.key(0)),
    )


def reconstruct(
    reconstructor: Reconstructor,
    variables: Variables,
    normalised: Array | np.ndarray,
    labels: Array | np.ndarray | None = None,
    *,
    batch: int = 256,
) -> np.ndarray:
    """Return the images (n, size, size, channels) in [-1, 1] of normalised weights.

    Args:
      reconstructor: trained.
      variables: its variables, such as `averaged(state)`.
      normalised: (n, inputs).
      labels: (n,) the class of each, if it is told one.
      batch: how many at once.
    """
    count = len(normalised)
    found = []
    for start in range(0, count, batch):
        # The last batch runs the same program.
        rows = np.arange(start, start + batch) % count
        told = None if labels is None else jnp.asarray(np.asarray(labels)[rows], jnp.int32)
        images = reconstructor.compiled(variables, jnp.asarray(normalised)[rows], told)
        found.append(np.asarray(images)[: count - start])
    return np.concatenate(found)

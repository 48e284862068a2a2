"""Many shadow models in one program, shared by the devices; seed after seed."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Annotated, Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jinv import checks, optimise, parallel
from jinv.checks import Count, Positive, Range
from jinv.prng import written_out
from jinv.shadow.config import Config, Shadow, Train, make_head
from jinv.shadow.heads import Parameters
from jinv.shadow.sampling import Sets
from jinv.shadow.store import Dtype, Layout
from jinv.shadow.training import make_train, unsuitable

SHADOWS = "shadows"
Generate = Callable[[Array, Array, Array, Array, Array], Shadow]
"""(key, features (M, D), positions (S,), indices (S, N), labels (S, N)) -> S shadow models."""

_CPU_BYTES, _OTHER_BYTES = 2**22, 2**30
"""For the weights, features and noise of the models that are trained at once, a device: what a
core's caches hold (twice as fast as eight times as many), or enough to keep a GPU busy. A GPU needs
about five times as much (not measured): its program's own arrays, the chunk before, the seed's
models."""
_LINE = 64
"""Bytes that an array's start must be a multiple of for JAX to use it on a CPU as it lies."""


def make_generate(train: Train, mesh: Mesh | None = None) -> Generate:
    """Return a compiled function that trains S shadow models at once.

    Its memory grows with S. The shadow at position p of a seed draws from `fold_in(key, p)`, where
    the key is that seed's. So it does not depend on which others are trained with it, except for
    rounding.

    Args:
      train: of one, see `make_train`.
      mesh: devices along `SHADOWS` that share S evenly; one device by default.
    """
    return jax.jit(_of_many(train, mesh))


def _of_many(train: Train, mesh: Mesh | None) -> Generate:
    def one(key: Array, features: Array, position: Array, chosen: Array, labels: Array) -> Shadow:
        return train(jax.random.fold_in(written_out(key), position), features[chosen], labels)

    many = jax.vmap(one, (None, None, 0, 0, 0))
    if mesh is not None:
        every, shared = PartitionSpec(), PartitionSpec(SHADOWS)
        # check_vma: constants that a loop starts from would have to be marked as varying.
        many = jax.shard_map(
            many,
            mesh=mesh,
            in_specs=(every, every, shared, shared, shared),
            out_specs=shared,
            check_vma=False,
        )
    return many


@dataclasses.dataclass(frozen=True)
class Execution:
    """How shadow models are trained; nothing here changes them, but for rounding.

    Attributes:
      chunk: models at once; by default as many as fill 4 MiB on CPU, a GiB elsewhere.
      devices: how many of this process's; all by default.
    """

    chunk: Count | None = None
    devices: Count | None = None

    def __post_init__(self) -> None:
        checks.fields(self)


@dataclasses.dataclass(frozen=True)
class Restarts:
    """Training again, from other initial weights, what has not learned its examples.

    Attributes:
      loss: a mean loss on the training set below this is low enough.
      most: trainings of a shadow at most; the last one is kept.
    """

    loss: Positive = 0.05
    most: Annotated[int, Range(1, 2**16 - 1)] = 100

    def __post_init__(self) -> None:
        checks.fields(self)


class DivergedError(optimise.NonFiniteError):
    """No shadow model has a finite loss."""

    def __init__(self, models: int) -> None:
        ArithmeticError.__init__(
            self,
            f"all {models} models diverged: no loss is a finite number. Lower training.lr (or "
            "training.init_std, training.pos_weight), and begin again with --overwrite",
        )


A = TypeVar("A")


class Made(NamedTuple, Generic[A]):
    """Some shadow models of a seed, as arrays of NumPy or on the device.

    Attributes:
      weights: (S, P) parameters, see `Layout`.
      loss: (S,) mean over the training set.
      attempts: (S,) trainings.
    """

    weights: A
    loss: A
    attempts: A


Watch = Callable[[np.ndarray], None]
"""Is shown the losses of every chunk of a seed's first trainings, and may raise."""


def _unwatched(loss: np.ndarray) -> None: ...


class Factory:
    """Makes the shadow models of a seed, in this process, with memory for a chunk of them.

    `on_device` leaves them where they are made; `seed` brings them to the host.

    Attributes:
      layout: of their weights.
      chunk: models at once, at most.

    Args:
      config: how they are trained.
      features: (M, D) of all images.
      examples: N, of a training set.
      key: with a seed's number folded in, that seed's.
      dtype: of the weights.
      restarts: which of them are trained again; None for none.
      execution: devices and chunk.

    Raises:
      ValueError: the devices cannot share a chunk evenly.
    """

    def __init__(
        self,
        config: Config,
        features: np.ndarray,
        examples: int,
        key: Array,
        *,
        dtype: Dtype = "float32",
        restarts: Restarts | None = None,
        execution: Execution = Execution(),
    ) -> None:
        devices = jax.local_devices()
        if (execution.devices or 1) > len(devices):
            raise ValueError(f"{execution.devices} devices asked for; there are {len(devices)}")
        devices = devices[: execution.devices]
        self._on_cpu = devices[0].platform == "cpu"
        self.mesh = parallel.mesh(SHADOWS, devices)
        self.key = key
        self.restarts = restarts
        self._dtype = jnp.dtype(dtype)
        head, width = make_head(config), features.shape[1]
        self.layout = Layout.of(jax.eval_shape(lambda: head.init(jax.random.key(0), width)))
        if execution.chunk is None:
            budget = _CPU_BYTES if self._on_cpu else _OTHER_BYTES
            numbers = self.layout.size + examples * width
            if config.privacy is not None:  # every example's gradient, or the noise of all steps
                ordinary = unsuitable(config, head)
                hidden = self.layout.size // width
                numbers += examples * (
                    self.layout.size if ordinary else config.steps(examples) * hidden
                )
            self.chunk = max(1, budget // (4 * numbers)) * len(devices)
        else:
            self.chunk = execution.chunk
        if self.chunk % len(devices):
            raise ValueError(
                f"a chunk of {self.chunk} models is not shared evenly by {len(devices)}"
            )
        # On a CPU a chunk is small and its size decides about rounding; a seed may end in a part of
        # one. On a GPU it may be larger than a seed, and what is beyond would be trained in vain.
        self._even = execution.chunk is None and not self._on_cpu
        self._every = NamedSharding(self.mesh, PartitionSpec())
        self._features = jax.device_put(np.asarray(features, np.float32), self._every)
        generate = _of_many(make_train(config), self.mesh)

        def made(*args: Any) -> tuple[Parameters, Array]:
            found = generate(*args)
            return {n: p.astype(dtype) for n, p in found.parameters.items()}, found.loss

        self._generate = jax.jit(made)

    def at_once(self, models: int) -> int:
        """Return how many are trained at once, of so many: at most `chunk`."""
        if not self._even:
            return self.chunk
        devices = self.mesh.size
        each = math.ceil(models / max(1, math.ceil(models / self.chunk)))
        return math.ceil(each / devices) * devices

    def seed(self, seed: int, sets: Sets, see: Watch = _unwatched) -> Made[np.ndarray]:
        """Return all shadow models of a seed as arrays of NumPy, in the host's memory.

        A GPU's weights are read-only and lie in pinned memory, of which XLA has 64 GiB or what
        XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB says: keep a copy of what you collect over many seeds.
        """
        whole, loss, attempts = self._made(seed, sets, see)
        return Made(whole.on_host(), loss, attempts)

    def on_device(self, seed: int, sets: Sets, see: Watch = _unwatched) -> Made[Array]:
        """Return all shadow models of a seed as JAX arrays; each device has them all.

        Only their losses pass through the host.
        """
        whole, *told = self._made(seed, sets, see)
        return Made(whole.on_device(), *jax.device_put(told, self._every))

    def _made(
        self, seed: int, sets: Sets, see: Watch
    ) -> tuple[_OnHost | _OnDevice, np.ndarray, np.ndarray]:
        """The models of a seed: weights, losses and attempts."""
        key, count = jax.random.fold_in(self.key, seed), len(sets.indices)
        kind = _OnHost if self._on_cpu else _OnDevice
        whole = kind(count, self.layout, self._dtype, self._every)
        loss, attempts = np.empty(count, np.float32), np.ones(count, np.uint16)
        self._train(key, sets, np.arange(count), whole, loss, see)
        restarts = self.restarts or Restarts(most=1)
        for attempt in range(2, restarts.most + 1):
            failed = np.flatnonzero(~(loss < restarts.loss))
            if not len(failed):
                break
            attempts[failed] = attempt
            # No position among the sets is as large.
            again = jax.random.fold_in(key, 2**31 + attempt)
            self._train(again, sets, failed, whole, loss, _unwatched)
        return whole, loss, attempts

    def _train(
        self,
        key: Array,
        sets: Sets,
        places: np.ndarray,
        whole: _OnHost | _OnDevice,
        loss: np.ndarray,
        see: Watch,
    ) -> None:
        """Train the sets at these places, chunk by chunk, into `whole` and `loss`."""
        size = self.at_once(len(sets.indices))
        before: tuple[np.ndarray, tuple[Parameters, Array]] | None = None
        for start in (*range(0, len(places), size), None):
            running = None
            if start is not None:  # the devices work on this chunk while the host takes the last
                some = places[start : start + size]
                running = some, self._start(key, sets, some, size)
            if before is not None:
                taken, (parameters, found) = before
                whole.put(taken, parameters)
                loss[taken] = np.asarray(found)[: len(taken)]
                see(loss[taken])
            before = running

    def _start(
        self, key: Array, sets: Sets, places: np.ndarray, size: int
    ) -> tuple[Parameters, Array]:
        # Always a whole chunk: one program.
        filled = np.resize(places, size).astype(np.int32)
        return self._generate(
            key, self._features, filled, sets.indices[filled], sets.labels[filled]
        )


class _OnHost:
    """A seed's weights where they are made, if that is a CPU: one copy, from chunk to seed."""

    def __init__(self, count: int, layout: Layout, dtype: np.dtype, sharding: NamedSharding):
        numbers = count * layout.size
        memory = np.empty(numbers * dtype.itemsize + _LINE, np.uint8)
        start = -memory.ctypes.data % _LINE
        own = memory[start : start + numbers * dtype.itemsize]
        self._weights = own.view(dtype).reshape(count, layout.size)
        self._layout = layout
        self._sharding = sharding

    def put(self, places: np.ndarray, parameters: Parameters) -> None:
        """Take the first of a chunk's models as those at `places`, in ascending order."""
        first, last = places[0], places[-1]
        # A slice, where it is one, is copied faster.
        at = slice(first, last + 1) if last - first + 1 == len(places) else places
        for name, part in self._layout.slices():
            values = np.asarray(parameters[name])[: len(places)]
            self._weights[at, part] = values.reshape(len(places), -1)

    def on_host(self) -> np.ndarray:
        return self._weights

    def on_device(self) -> Array:
        return jax.device_put(self._weights, self._sharding, may_alias=True)


class _OnDevice:
    """A seed's weights where the device has memory of its own.

    A seed's models are put together there and cross the bus once, at the end, into pinned memory
    that XLA lends and takes back. NumPy sees them there: the host copies no byte, and pages are new
    in the first seeds only. Chunks that came one by one would overlap with the next one's training,
    but the host would have to put them together, more slowly than the bus brings them.

    All this is reasoned from the sources of JAX and XLA, and not measured on a GPU yet.
    """

    def __init__(self, count: int, layout: Layout, dtype: np.dtype, sharding: NamedSharding):
        self._weights = jnp.zeros((count, layout.size), dtype, device=sharding)
        self._layout = layout
        self._sharding = sharding

    def put(self, places: np.ndarray, parameters: Parameters) -> None:
        models, count = len(self._weights), len(next(iter(parameters.values())))
        rows = np.arange(models, models + count, dtype=np.int32)  # none: these are left out
        rows[: len(places)] = places
        self._weights = _with_rows(self._weights, rows, parameters, self._layout, self._sharding)

    def on_host(self) -> np.ndarray:
        """The weights in pinned memory, or a copy where the backend has none.

        `np.asarray` of what lies on the device copies it into new pages: a GB a second on an H200,
        whose bus brings fifty.
        """
        one = self._weights.addressable_data(0)  # of devices that have the same
        if "pinned_host" in _memories(next(iter(one.devices()))):
            one = jax.device_put(one, one.sharding.with_memory_kind("pinned_host"))
        return np.asarray(one)

    def on_device(self) -> Array:
        return self._weights


def _memories(device: jax.Device) -> set[str]:
    return {memory.kind for memory in device.addressable_memories()}


@functools.partial(jax.jit, static_argnames=("layout", "sharding"), donate_argnames="weights")
def _with_rows(
    weights: Array, rows: Array, parameters: Parameters, layout: Layout, sharding: NamedSharding
) -> Array:
    """Return weights (S, P) with a chunk's parameters in these rows, but for rows from S on."""
    parts = [parameters[name].reshape(len(rows), -1) for name, _ in layout.slices()]
    packed = jnp.concatenate(parts, 1)
    filled = weights.at[rows].set(packed, mode="drop", unique_indices=True)
    return jax.lax.with_sharding_constraint(filled, sharding)

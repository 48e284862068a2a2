"""Many shadow models in one program, shared by the devices; seed after seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

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
core's caches hold (twice as fast as eight times as many), or enough to keep a GPU busy."""


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


class Made(NamedTuple):
    """Some shadow models of a seed.

    Attributes:
      weights: (S, P) parameters, see `Layout`.
      loss: (S,) mean over the training set.
      attempts: (S,) trainings.
    """

    weights: np.ndarray
    loss: np.ndarray
    attempts: np.ndarray


class Factory:
    """Makes the shadow models of a seed, in this process, with memory for a chunk of them.

    Attributes:
      layout: of their weights.
      chunk: models at once.

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
        self.mesh = parallel.mesh(SHADOWS, devices)
        self.key = key
        self.restarts = restarts
        self._dtype = jnp.dtype(dtype)
        head, width = make_head(config), features.shape[1]
        self.layout = Layout.of(jax.eval_shape(lambda: head.init(jax.random.key(0), width)))
        if execution.chunk is None:
            budget = _CPU_BYTES if devices[0].platform == "cpu" else _OTHER_BYTES
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
        every = NamedSharding(self.mesh, PartitionSpec())
        self._features = jax.device_put(np.asarray(features, np.float32), every)
        generate = _of_many(make_train(config), self.mesh)

        def made(*args: Any) -> tuple[Parameters, Array]:
            found = generate(*args)
            return {n: p.astype(dtype) for n, p in found.parameters.items()}, found.loss

        self._generate = jax.jit(made)

    def seed(self, seed: int, sets: Sets, see: Callable[[Made], None] = lambda made: None) -> Made:
        """All shadow models of a seed; `see` is shown every chunk, and may raise."""
        key, count = jax.random.fold_in(self.key, seed), len(sets.indices)
        found = Made(
            np.empty((count, self.layout.size), self._dtype),
            np.empty(count, np.float32),
            np.ones(count, np.uint16),
        )
        self._train(key, sets, np.arange(count), found, see)
        if self.restarts is None:
            return found
        for attempt in range(2, self.restarts.most + 1):
            failed = np.flatnonzero(~(found.loss < self.restarts.loss))
            if not len(failed):
                break
            found.attempts[failed] = attempt
            # No position among the sets is as large.
            again = jax.random.fold_in(key, 2**31 + attempt)
            self._train(again, sets, failed, found, lambda made: None)
        return found

    def _train(
        self, key: Array, sets: Sets, places: np.ndarray, found: Made, see: Callable[[Made], None]
    ) -> None:
        """Train the sets at these places, chunk by chunk, into `found`."""
        before: tuple[np.ndarray, tuple[Parameters, Array]] | None = None
        for start in (*range(0, len(places), self.chunk), None):
            running = None
            if start is not None:  # the devices work on this chunk while the host takes the last
                some = places[start : start + self.chunk]
                running = some, self._start(key, sets, some)
            if before is not None:
                taken, (parameters, loss) = before
                first, last = taken[0], taken[-1]
                # A slice, where it is one, is copied faster.
                at = slice(first, last + 1) if last - first + 1 == len(taken) else taken
                found.loss[at] = np.asarray(loss)[: len(taken)]
                for name, part in self.layout.slices():
                    values = np.asarray(parameters[name])[: len(taken)]
                    found.weights[at, part] = values.reshape(len(taken), -1)
                see(Made(found.weights[at], found.loss[at], found.attempts[at]))
            before = running

    def _start(self, key: Array, sets: Sets, places: np.ndarray) -> tuple[Parameters, Array]:
        # Always a whole chunk: one program.
        filled = np.resize(places, self.chunk).astype(np.int32)
        return self._generate(
            key, self._features, filled, sets.indices[filled], sets.labels[filled]
        )

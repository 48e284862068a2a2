"""Many shadow models in one program, shared by the devices."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from jinv.prng import written_out
from jinv.shadow.config import Shadow, Train

SHADOWS = "shadows"
Generate = Callable[[Array, Array, Array, Array, Array], Shadow]
"""(key, features (M, D), positions (S,), indices (S, N), labels (S, N)) -> S shadow models."""


def make_generate(train: Train, mesh: Mesh | None = None) -> Generate:
    """A compiled function that trains S shadow models at once, memory in proportion to S.

    The shadow at position p of a seed draws from `fold_in(key, p)`, where the key is that seed's:
    it is the same in whatever company it is trained, but for rounding.

    Args:
      train: of one, see `make_train`.
      mesh: devices along `SHADOWS` that share S evenly; one device by default.
    """

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
    return jax.jit(many)

"""jax.random's own numbers, drawn faster on CPU.

XLA's CPU compiler gets JAX's Threefry as a loop over its rounds and makes a pass over memory of
each. Written out, all rounds become one loop over the numbers, into which what is done with them is
fused: normal numbers take a quarter of the time and are the same. On GPUs, JAX writes Threefry out
itself, and the numbers are the same there, too: a key alone decides them. (JAX's generators "rbg"
and "unsafe_rbg" give other numbers on other backends, and under `vmap`.)
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend import random

from jinv import backend

_THREEFRY = random.threefry_prng_impl
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def written_out(key: Array) -> Array:
    """The same key, for `jax.random`'s functions to draw the same numbers faster on CPU.

    Keys of other generators than JAX's default, and all keys on other backends, come back as they
    are.
    """
    plain = str(jax.random.key_impl(key)) == "threefry2x32"
    partitionable = jax.config.jax_threefry_partitionable  # type: ignore[attr-defined]
    if backend.choices().threefry == "jax" or not plain or not partitionable:
        return key
    return jax.random.wrap_key_data(jax.random.key_data(key), impl=_WRITTEN_OUT)


def _threefry(key: Array, x0: Array, x1: Array) -> tuple[Array, Array]:
    """Threefry-2x32 with 20 rounds (Salmon et al., SC 2011) of counters x0, x1."""
    keys = (key[0], key[1], key[0] ^ key[1] ^ np.uint32(_PARITY))
    x0, x1 = x0 + keys[0], x1 + keys[1]
    for i in range(5):
        for rotation in _ROTATIONS[i % 2]:
            x0 = x0 + x1
            x1 = (x1 << np.uint32(rotation)) | (x1 >> np.uint32(32 - rotation))
            x1 = x0 ^ x1
        x0 = x0 + keys[(i + 1) % 3]
        x1 = x1 + keys[(i + 2) % 3] + np.uint32(i + 1)
    return x0, x1


def _random_bits(key: Array, bit_width: int, shape: tuple[int, ...]) -> Array:
    size = math.prod(shape)
    if bit_width != 32 or size >= 2**32:
        return _THREEFRY.random_bits(key, bit_width, shape)
    counters = jnp.arange(size, dtype=jnp.uint32).reshape(shape)
    x0, x1 = _threefry(key, jnp.zeros_like(counters), counters)
    return x0 ^ x1


_WRITTEN_OUT = random.define_prng_impl(
    key_shape=_THREEFRY.key_shape,
    seed=_THREEFRY.seed,
    split=_THREEFRY.split,
    random_bits=_random_bits,
    fold_in=_THREEFRY.fold_in,
    name="threefry2x32_written_out",
    tag="fry",
)

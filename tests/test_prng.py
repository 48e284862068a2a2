"""Numbers drawn by Threefry written out are those of jax.random."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from jinv import backend
from jinv.prng import written_out

KEY = jax.random.key(2024)


@pytest.fixture(autouse=True)
def switched_on() -> Iterator[None]:
    """Also on a GPU, which has no use for it."""
    with backend.choose(threefry="written_out"):
        yield


@pytest.mark.gpu
@pytest.mark.parametrize(
    "draw",
    [
        lambda key: jax.random.bits(key, (3, 5)),
        lambda key: jax.random.bits(key, (7,), "uint8"),
        lambda key: jax.random.normal(key, (10, 129)),
        lambda key: jax.random.normal(key, ()),
        lambda key: jax.random.uniform(jax.random.fold_in(key, 7), (11,), jnp.bfloat16),
        lambda key: jax.random.bernoulli(jax.random.split(key, 3)[1], 0.3, (50,)),
        lambda key: jax.random.permutation(key, 100),
    ],
    ids=["bits", "bytes", "normal", "scalar", "uniform", "bernoulli", "permutation"],
)
def test_the_numbers_are_those_of_jax_random(draw: Callable[[Array], Array]) -> None:
    assert jax.random.key_impl(written_out(KEY)) != jax.random.key_impl(KEY)
    for compiled in (draw, jax.jit(draw)):
        np.testing.assert_array_equal(compiled(written_out(KEY)), compiled(KEY))


def test_in_double_precision_too() -> None:
    with jax.enable_x64(True):
        found, expected = (jax.random.normal(key, (9,)) for key in (written_out(KEY), KEY))
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, expected)


def test_every_model_of_a_batch_has_its_own() -> None:
    keys = jax.random.split(KEY, 4)

    def draw(change: Callable[[Array], Array]) -> Array:
        return jax.jit(jax.vmap(lambda key: jax.random.normal(change(key), (6, 8))))(keys)

    np.testing.assert_array_equal(draw(written_out), draw(lambda key: key))


def test_other_generators_are_left_alone() -> None:
    key = jax.random.key(1, impl="rbg")
    assert jax.random.key_impl(written_out(key)) == jax.random.key_impl(key)

"""Every form of convolution equals XLA's own, values and derivatives; pooling equals torch's."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax import Array

from jinv.models import convolution, layers
from jinv.net import batch_moments

# Odd, even and non-square sizes; each is larger than no kernel's padding allows.
SIZES = [(7, 10), (8, 5), (6, 6), (9, 7)]
CASES = [
    pytest.param(kernel, stride, padding, size, id=f"{kernel}-{stride}-{padding}-{size}")
    for (kernel, stride, padding), size in zip(
        itertools.product((1, 3, 5, 7), (1, 2), (0, 1, 2, 3, "SAME")),
        itertools.cycle(SIZES),
        strict=False,
    )
    if padding == "SAME" or min(size) + 2 * padding >= kernel
]
GROUPS = {"dense": (1, 3, 4), "groups": (4, 8, 4), "depthwise": (5, 5, 5)}
"""(groups, inputs, outputs)"""


@pytest.fixture
def wide() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def _draw(shape: tuple[int, ...], seed: int, dtype: str = "float64") -> Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def _operands(kernel: int, size: tuple[int, int], kind: str, dtype: str) -> tuple[Array, Array]:
    groups, inputs, outputs = GROUPS[kind]
    x = _draw((2, *size, inputs), 0, dtype)
    return x, _draw((kernel, kernel, inputs // groups, outputs), 1, dtype)


def _forms(kernel: int, kind: str, padding: convolution.Padding) -> dict[str, Callable]:
    """The CPU forms that may stand for this convolution, besides what `on_cpu` takes."""
    forms = {"on_cpu": convolution.on_cpu}
    if kind == "dense":
        forms["unfolded"] = lambda x, w, stride, pads, _: convolution.unfolded(x, w, stride, pads)
    if kind == "dense" and kernel == 1 and padding in (0, "SAME"):
        forms["pointwise"] = lambda x, w, stride, _pads, _: convolution.pointwise(x, w, stride)
    return forms


def _derivatives(form: Callable, x: Array, w: Array, stride: int, pads: tuple, groups: int) -> dict:
    """Value, both gradients, and gradients of a function of both gradients."""

    def loss(x: Array, w: Array) -> tuple[Array, Array]:
        y = form(x, w, stride, pads, groups)
        # Neither linear nor quadratic, and different at each output.
        return (jnp.sin(y) * jnp.cos(jnp.arange(y.size)).reshape(y.shape)).sum(), y

    def match(x: Array, w: Array) -> Array:
        dx, dw = jax.grad(lambda *a: loss(*a)[0], (0, 1))(x, w)
        return (jnp.tanh(dx) ** 2).sum() + (jnp.tanh(dw) ** 2).sum()

    @jax.jit
    def all_of_it(x: Array, w: Array) -> tuple:
        (_, y), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(x, w)
        return y, gradients, jax.grad(match, (0, 1))(x, w)

    y, (dx, dw), (dx2, dw2) = all_of_it(x, w)
    return {"y": y, "dx": dx, "dw": dw, "second dx": dx2, "second dw": dw2}


@pytest.mark.parametrize("kind", GROUPS)
@pytest.mark.parametrize(("kernel", "stride", "padding", "size"), CASES)
def test_cpu_forms_equal_xla(
    wide: None,
    kernel: int,
    stride: int,
    padding: convolution.Padding,
    size: tuple[int, int],
    kind: str,
) -> None:
    x, w = _operands(kernel, size, kind, "float64")
    pads = convolution._pads(size, (kernel, kernel), stride, padding)
    groups = GROUPS[kind][0]
    expected = _derivatives(convolution.direct, x, w, stride, pads, groups)
    for name, form in _forms(kernel, kind, padding).items():
        found = _derivatives(form, x, w, stride, pads, groups)
        for part, value in expected.items():
            np.testing.assert_allclose(
                found[part], value, rtol=1e-9, atol=1e-9, err_msg=f"{name}: {part}"
            )

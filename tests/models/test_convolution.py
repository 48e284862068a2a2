"""Every form of convolution equals XLA's own, values and derivatives; pooling equals torch's."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax import Array

from jinv import backend
from jinv.models import convolution, layers, pooling
from jinv.net import batch_moments

SIZES = [(7, 10), (8, 5), (6, 6), (9, 7)]
PADDINGS: tuple[convolution.Padding, ...] = (0, 1, 2, 3, "SAME")
GRID: list[tuple[int, int, convolution.Padding, tuple[int, int]]] = [
    (kernel, stride, padding, size)
    for (kernel, stride, padding), size in zip(
        itertools.product((1, 3, 5, 7), (1, 2), PADDINGS),
        itertools.cycle(SIZES),
        strict=False,
    )
    if padding == "SAME" or min(size) + 2 * padding >= kernel
]
KINDS: dict[str, tuple[int, int, int]] = {
    "dense": (1, 3, 4),
    "grouped": (4, 8, 4),
    "depthwise": (5, 5, 5),
}
"""(groups, inputs, outputs)"""

Form = Callable[[Array, Array], Array]


@pytest.fixture
def wide() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def _draw(shape: tuple[int, ...], seed: int, dtype: str = "float64") -> Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def _operands(
    kernel: int, size: tuple[int, int], kind: str, dtype: str = "float64"
) -> tuple[Array, Array]:
    groups, inputs, outputs = KINDS[kind]
    x = _draw((2, *size, inputs), 0, dtype)
    return x, _draw((kernel, kernel, inputs // groups, outputs), 1, dtype)


def _forms(
    kernel: int, stride: int, padding: convolution.Padding, size: tuple[int, int], kind: str
) -> dict[str, Form]:
    """XLA's own convolution first, then the forms that stand for it."""
    groups = KINDS[kind][0]
    pads = convolution._pads(size, (kernel, kernel), stride, padding)
    forms: dict[str, Form] = {
        "direct": lambda x, w: convolution.direct(x, w, stride, pads, groups),
    }
    if kind == "dense":
        forms["ours"] = lambda x, w: convolution.unfolded(x, w, stride, pads)
        if kernel == 1 and not any(map(any, pads)):
            forms["pointwise"] = lambda x, w: convolution.pointwise(x, w, stride)
        if stride > 1:
            forms["folded"] = lambda x, w: convolution.folded(x, w, stride, pads)
    elif kind == "depthwise":
        forms["ours"] = lambda x, w: convolution.depthwise(x, w, stride, pads)
    else:
        forms["ours"] = lambda x, w: convolution.split(x, w, stride, pads, groups)
    return forms


def _assert_equal(found: dict[str, tuple], tolerance: float) -> None:
    reference = found.pop("direct")
    for name, values in found.items():
        for i, (value, expected) in enumerate(zip(values, reference, strict=True)):
            assert value.dtype == expected.dtype
            np.testing.assert_allclose(
                np.asarray(value, np.float64),
                np.asarray(expected, np.float64),
                rtol=tolerance,
                atol=tolerance,
                err_msg=f"{name}, value {i}",
            )


def _value_and_gradients(form: Form, x: Array, w: Array) -> tuple[Array, ...]:
    y, transposed = jax.vjp(form, x, w)
    return (y, *transposed(jnp.cos(jnp.arange(y.size)).reshape(y.shape).astype(y.dtype)))


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "size", "kind"),
    # Compiling one costs half a second: a third of the grid for groups, whose parts are dense.
    [(*case, k) for i, case in enumerate(GRID) for k in KINDS if k != "grouped" or i % 3 == 0],
)
def test_forms_and_their_gradients_equal_xla(
    wide: None,
    kernel: int,
    stride: int,
    padding: convolution.Padding,
    size: tuple[int, int],
    kind: str,
) -> None:
    forms = _forms(kernel, stride, padding, size, kind)
    operands = _operands(kernel, size, kind)

    @jax.jit
    def found(x: Array, w: Array) -> dict[str, tuple]:
        return {name: _value_and_gradients(form, x, w) for name, form in forms.items()}

    _assert_equal(found(*operands), 1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [(1, 2, 0), (3, 1, 1), pytest.param(5, 2, "SAME", marks=pytest.mark.gpu)],
)
def test_gradients_of_gradients_equal_xla(
    wide: None, kernel: int, stride: int, padding: convolution.Padding, kind: str
) -> None:
    """As GradInversion takes them: through the gradient with respect to weights (and images)."""
    size = (6, 7)
    forms = _forms(kernel, stride, padding, size, kind)
    operands = _operands(kernel, size, kind)

    def match(form: Form, x: Array, w: Array) -> Array:
        gradients = jax.grad(lambda x, w: jnp.sin(form(x, w)).sum(), (0, 1))(x, w)
        return sum((jnp.tanh(g).sum() for g in gradients), jnp.zeros(()))

    @jax.jit
    def found(x: Array, w: Array) -> dict[str, tuple]:
        return {
            name: jax.grad(lambda x, w, form=form: match(form, x, w), (0, 1))(x, w)
            for name, form in forms.items()
        }

    _assert_equal(found(*operands), 1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.15)])
@pytest.mark.parametrize("kind", KINDS)
def test_narrow_types(kind: str, dtype: str, tolerance: float) -> None:
    forms = _forms(3, 2, 1, (7, 6), kind)
    x, w = _operands(3, (7, 6), kind, dtype)

    @jax.jit
    def found(x: Array, w: Array) -> dict[str, tuple]:
        return {name: _value_and_gradients(form, x, w) for name, form in forms.items()}

    _assert_equal(found(x, w), tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_vmap_over_images_and_weights(wide: None, kind: str) -> None:
    form = _forms(3, 2, 1, (7, 6), kind)["ours"]
    x, w = _operands(3, (7, 6), kind)
    x, w = jnp.stack([x, 2 * x, -x]), jnp.stack([w, w + 1, 3 * w])
    one = jax.jit(lambda x, w: _value_and_gradients(form, x, w))
    each = [one(*pair) for pair in zip(x, w, strict=True)]
    together = jax.jit(jax.vmap(lambda x, w: _value_and_gradients(form, x, w)))(x, w)
    for i, found in enumerate(together):
        np.testing.assert_allclose(found, jnp.stack([values[i] for values in each]), rtol=1e-10)


@pytest.mark.parametrize(
    ("groups", "inputs", "outputs", "parts"),
    [(6, 48, 12, 2), (26, 208, 208, 13), (5, 40, 10, 5), (2, 32, 4, 2), (4, 4, 8, 1)],
)
def test_narrow_groups_are_convolved_together(
    groups: int, inputs: int, outputs: int, parts: int
) -> None:
    """As many as divide their number and have 32 channels at most; values and gradients stay."""
    x = _draw((2, 6, 5, inputs), 0, "float32")
    w = _draw((3, 3, inputs // groups, outputs), 1, "float32")
    pads = ((1, 1), (1, 1))

    @jax.jit
    def found(x: Array, w: Array) -> dict[str, tuple]:
        return {
            name: _value_and_gradients(lambda x, w, form=form: form(x, w, 2, pads, groups), x, w)
            for name, form in {"direct": convolution.direct, "ours": convolution.split}.items()
        }

    program = str(jax.make_jaxpr(lambda x: convolution.split(x, w, 2, pads, groups))(x))
    assert program.count("conv_general_dilated[") == parts
    _assert_equal(found(x, w), 1e-4)


@pytest.mark.parametrize(
    ("switch", "ours", "kind", "kernel", "stride"),
    [
        ("depthwise", "slices", "depthwise", 3, 1),
        ("grouped", "split", "grouped", 3, 1),
        ("pointwise", "product", "dense", 1, 1),
        ("strided", "unfolded", "grouped", 3, 2),
        ("strided", "unfolded", "dense", 3, 1),
    ],
)
def test_every_form_has_its_switch(
    switch: str, ours: str, kind: str, kernel: int, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the number of XLA's convolutions in the program; a switch leaves other kinds alone."""
    monkeypatch.setattr(convolution, "_NARROW", 0)  # groups are not joined: one each
    x, w = _operands(kernel, (1, 2) if kernel == 3 else (8, 8), kind, "float32")
    groups = KINDS[kind][0]

    def convolutions(**switches: Any) -> int:
        def form(x: Array) -> Array:
            return convolution.convolve(x, w, stride=stride, padding=kernel // 2, groups=groups)

        usual = {field.name: "convolution" for field in dataclasses.fields(backend.Choices)[:4]}
        with backend.choose(**usual | switches):
            return str(jax.make_jaxpr(form)(x)).count("conv_general_dilated[")

    assert convolutions() == 1
    expected = {"slices": 0, "split": 4, "product": 0, "unfolded": 0 if kind == "dense" else 1}
    assert convolutions(**{switch: ours}) == expected[ours]


@pytest.mark.parametrize(("channels", "strides"), [(3, 1), (8, 2)])
def test_few_strided_channels_are_folded(channels: int, strides: int) -> None:
    """A convolution of blocks has stride 1."""
    x, w = _draw((2, 9, 8, channels), 0, "float32"), _draw((3, 3, channels, 4), 1, "float32")
    with backend.choose(stem="folded", strided="convolution"):
        program = str(jax.make_jaxpr(lambda x: convolution.convolve(x, w, stride=2, padding=1))(x))
    assert f"window_strides=({strides}, {strides})" in program


PADS = [((1, 1), (1, 1)), ((1, 0), (0, 1)), ((0, 0), (2, 3))]


@pytest.mark.parametrize("pads", PADS)
def test_products_give_the_gradient_of_the_weights(wide: None, pads: convolution.Pads) -> None:
    x, w = _draw((2, 7, 6, 3), 0), _draw((3, 2, 3, 4), 1)
    forms: dict[str, Form] = {
        "xla": lambda x, w: convolution.direct(x, w, 1, pads, 1),
        "ours": lambda x, w: convolution.by_products(x, w, pads),
    }
    found = {name: jax.jit(functools.partial(_learned, form))(x, w) for name, form in forms.items()}
    for ours, theirs in zip(found["ours"], found["xla"], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)


def _learned(form: Form, x: Array, w: Array) -> tuple[Array, Array, Array]:
    y, pull = jax.vjp(form, x, w)
    return (y, *pull(jnp.sin(y)))


@pytest.mark.parametrize(
    ("size", "channels", "switch", "convolutions"),
    [
        (16, 16, "products", 2),
        (16, 16, "convolution", 3),
        (15, 16, "products", 3),
        (16, 15, "products", 3),
    ],
)
def test_weights_of_wide_large_maps_are_learned_by_products(
    size: int, channels: int, switch: str, convolutions: int
) -> None:
    x, w = _draw((1, size, size, 16), 0, "float32"), _draw((3, 3, 16, channels), 1, "float32")

    def form(x: Array, w: Array) -> Array:
        return convolution.learned(x, w, ((1, 1), (1, 1)))

    with backend.choose(weights=switch):
        program = str(jax.make_jaxpr(functools.partial(_learned, form))(x, w))
    assert program.count("conv_general_dilated[") == convolutions


def test_weights_are_learned_in_parts_of_many_images(
    wide: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and derivatives of both modes and second order are XLA's."""
    monkeypatch.setattr(convolution, "_PART", 2)
    x, w = _draw((5, 6, 5, 3), 0), _draw((3, 3, 3, 4), 1)
    pads = ((1, 1), (1, 0))

    def all_of(form: Form) -> tuple[Any, ...]:
        def loss(x: Array, w: Array) -> Array:
            return jnp.sin(form(x, w)).sum()

        def slope(x: Array, w: Array) -> Array:
            gradients = jax.grad(loss, (0, 1))(x, w)
            return sum((jnp.cos(each).sum() for each in gradients), jnp.zeros(()))

        forward = jax.jvp(form, (x, w), (jnp.cos(x), jnp.cos(w)))
        return *_learned(form, x, w), *forward, *jax.grad(slope, (0, 1))(x, w)

    ours = jax.jit(lambda: all_of(lambda x, w: convolution.in_parts(x, w, 1, pads)))()
    theirs = jax.jit(lambda: all_of(lambda x, w: convolution.direct(x, w, 1, pads, 1)))()
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("images", "switch", "learned", "convolutions"),
    [
        (33, "in_parts", "both", 5),  # forward, images, three parts
        (33, "together", "both", 3),
        (16, "in_parts", "both", 3),
        (33, "in_parts", "images", 2),  # nothing is added for attacks
    ],
)
def test_parts_of_images_have_their_switch(
    images: int, switch: str, learned: str, convolutions: int
) -> None:
    x, w = _draw((images, 8, 8, 3), 0, "float32"), _draw((3, 3, 3, 4), 1, "float32")

    def loss(x: Array, w: Array) -> Array:
        return jnp.sin(convolution.convolve(x, w, padding=1)).sum()

    with backend.choose(images=switch, strided="convolution"):
        gradient = jax.grad(loss, (0, 1) if learned == "both" else 0)
        program = jax.jit(gradient).lower(x, w).as_text()
    assert program.count("stablehlo.convolution") == convolutions


# Moments


@pytest.mark.parametrize("shape", [(4, 9, 7, 5), (3, 2, 2, 8), (64, 3), (2, 65, 64, 3)])
@pytest.mark.parametrize("mean_over_std", [0, 1, 30, 300])
def test_moments_equal_numpy_in_float64(shape: tuple[int, ...], mean_over_std: float) -> None:
    x = np.asarray(_draw(shape, 2, "float32") + np.float32(mean_over_std))
    axes = tuple(range(x.ndim - 1))
    moments = jax.jit(batch_moments)(x)
    wide_x = x.astype(np.float64)
    np.testing.assert_allclose(moments.mean, wide_x.mean(axes), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(moments.var, wide_x.var(axes), rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("off", [0, 0.5, 10])
def test_moments_in_one_pass_round_relative_to_the_distance_from_the_running_mean(
    off: float,
) -> None:
    """And not to the mean itself, which is 300 standard deviations here."""
    x = np.asarray(_draw((4, 9, 7, 5), 2, "float32") + np.float32(300))
    with backend.choose(moments="one_pass"):
        moments = jax.jit(batch_moments, static_argnums=1)(x, -1, near=np.full(5, 300 + off))
    wide_x = x.astype(np.float64)
    np.testing.assert_allclose(moments.mean, wide_x.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(moments.var, wide_x.var((0, 1, 2)), rtol=3e-6 * (1 + off**2))


@pytest.mark.parametrize("pass_", ["one_pass", "two_passes"])
def test_moments_take_as_many_passes_as_the_switch_says(pass_: str) -> None:
    """Two sums either way; in one pass none of them waits for the other."""
    with backend.choose(moments=pass_):
        compiled = jax.jit(lambda x: batch_moments(x, near=jnp.zeros(5))).lower(jnp.ones((4, 5)))
    waits = "one_pass" if "stablehlo.maximum" in compiled.as_text() else "two_passes"
    assert waits == pass_


def test_variance_of_a_constant_is_zero() -> None:
    moments = jax.jit(batch_moments)(jnp.full((4, 8, 8, 3), 1000.0))
    np.testing.assert_allclose(moments.var, 0, atol=1e-6)


@pytest.mark.gpu
def test_gradient_of_moments_equals_plain_ones(wide: None) -> None:
    def plain(x: Array) -> tuple[Array, Array]:
        mean = x.mean((0, 1, 2))
        return mean, ((x - mean) ** 2).mean((0, 1, 2))

    def loss(moments: Callable, x: Array) -> Array:
        mean, var = moments(x)
        return jnp.linalg.norm(mean - 0.3) + jnp.linalg.norm(var - 0.7)

    @jax.jit
    def derivatives(x: Array) -> dict[str, tuple]:
        found = {}
        near = functools.partial(batch_moments, near=jnp.full(6, 4.0))
        for name, moments in {"direct": plain, "ours": batch_moments, "near": near}.items():
            first = jax.grad(functools.partial(loss, moments))
            second = jax.grad(lambda x, first=first: jnp.sin(first(x)).sum())(x)
            tangents = jax.jvp(lambda x, m=moments: tuple(m(x)), (x,), (jnp.cos(x),))[1]
            found[name] = (first(x), second, *tangents)
        return found

    with backend.choose(moments="one_pass"):
        _assert_equal(derivatives(_draw((3, 4, 5, 6), 3) + 5), 1e-9)


def test_float32_gradient_of_the_variance_far_from_zero() -> None:
    x = _draw((8, 14, 14, 4), 4, "float32") + 30
    found = jax.jit(jax.grad(lambda x: batch_moments(x).var.sum()))(x)
    wide_x = np.asarray(x, np.float64)
    expected = 2 * (wide_x - wide_x.mean((0, 1, 2))) / (8 * 14 * 14)
    assert np.linalg.norm(found - expected) < 1e-4 * np.linalg.norm(expected)


def test_moments_of_bfloat16_are_float32() -> None:
    moments = batch_moments(jnp.ones((2, 3, 3, 4), jnp.bfloat16))
    assert moments.mean.dtype == moments.var.dtype == jnp.float32


# Pooling and activation, against torch


def _against_torch(
    ours: Callable[[Array], Array], theirs: Callable[[torch.Tensor], torch.Tensor], x: np.ndarray
) -> None:
    images = torch.tensor(x.transpose(0, 3, 1, 2).copy(), requires_grad=True)
    expected = theirs(images)
    y, transposed = jax.vjp(ours, jnp.asarray(x))
    np.testing.assert_allclose(y, expected.detach().permute(0, 2, 3, 1), rtol=1e-5, atol=1e-6)
    dy = np.random.default_rng(9).normal(size=y.shape).astype(x.dtype)
    expected.backward(torch.tensor(dy.transpose(0, 3, 1, 2).copy()))
    assert images.grad is not None
    (found,) = transposed(jnp.asarray(dy))
    np.testing.assert_allclose(found, images.grad.permute(0, 2, 3, 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("size", [(8, 8), (9, 7), (5, 6)])
@pytest.mark.parametrize(("window", "stride", "padding"), [(3, 2, 1), (2, 2, 0), (3, 1, 1)])
def test_max_pool(
    window: int, stride: int, padding: int, size: tuple[int, int], ties: bool
) -> None:
    x = np.asarray(_draw((2, *size, 3), 5, "float32"))
    _against_torch(
        lambda x: pooling.max_pool(x, window, stride, padding),
        lambda x: torch.nn.functional.max_pool2d(x, window, stride, padding),
        np.round(x).clip(0) if ties else x,
    )


def test_max_pool_passes_nan_on() -> None:
    x = jnp.zeros((1, 4, 4, 1)).at[0, 1, 2, 0].set(jnp.nan)
    assert jnp.isnan(pooling.max_pool(x, 2, 2)).sum() == 1


@pytest.mark.parametrize("size", [(7, 7), (4, 4), (3, 10), (14, 9)])
def test_adaptive_average_pool(size: tuple[int, int]) -> None:
    _against_torch(
        lambda x: pooling.adaptive_average_pool(x, 7),
        lambda x: torch.nn.functional.adaptive_avg_pool2d(x, 7),
        np.asarray(_draw((2, *size, 3), 6, "float32")),
    )


def test_relu6_and_its_gradient_at_the_kinks() -> None:
    x = np.asarray([-1, 0, 1, 5, 6, 7], np.float32).reshape(1, 2, 3, 1)
    _against_torch(layers.relu6, torch.nn.functional.relu6, x)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gelu(dtype: str) -> None:
    """In bfloat16 it is rounded once, from float32."""
    x = np.linspace(-9, 9, 1801, dtype=np.float32).reshape(1, 1, 1801, 1)
    x = np.asarray(jnp.asarray(x, dtype).astype(jnp.float32))
    if dtype == "float32":
        _against_torch(layers.gelu, torch.nn.functional.gelu, x)
    expected = torch.nn.functional.gelu(torch.tensor(x).double()).numpy()
    found = layers.gelu(jnp.asarray(x, dtype))
    assert found.dtype == dtype
    np.testing.assert_allclose(
        np.asarray(found, np.float64),
        expected,
        rtol=1e-5 if dtype == "float32" else 2**-8,
        atol=2e-6,
    )


def test_derivatives_of_gelu_equal_jax(wide: None) -> None:
    plain = functools.partial(jax.nn.gelu, approximate=False)

    @jax.jit
    def found(x: Array) -> dict[str, tuple]:
        return {
            name: _derivatives(f, x) for name, f in {"direct": plain, "ours": layers.gelu}.items()
        }

    _assert_equal(found(_draw((50,), 7) * 3), 1e-9)


def _derivatives(function: Callable[[Array], Array], x: Array) -> tuple[Array, ...]:
    """First and second in reverse mode, and the second in forward mode."""
    first = jax.grad(lambda x: jnp.sin(function(x)).sum())
    second = jax.grad(lambda x: jnp.cos(first(x)).sum())
    return first(x), second(x), jax.jvp(first, (x,), (jnp.cos(x),))[1]

"""What BatchNorm layers see: along their own axis, wherever and however they are called.

The right values are NumPy's, of inputs that are computed here without `Net`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax import Array

from jinv.image import Preprocessing
from jinv.net import Net, batch_moments

SIDE = 6
SPACE = Preprocessing(size=SIDE)
IMAGES = np.random.default_rng(0).normal(0.5, 1, (4, SIDE, SIDE, 3)).astype(np.float32)


class Around(nnx.Module):
    """A layer on a function of the images, and logits of the mean of what it returns."""

    def __init__(self, layer: Any, before: Callable[[Array], Array]) -> None:
        self.layer = layer
        self.before = before

    def __call__(self, x: Array, **call: Any) -> Array:
        return self.layer(self.before(x), **call).reshape(len(x), -1)[:, :3]


class AroundLinen(linen.Module):
    """The same in Linen."""

    layer: Any
    before: Callable[[Array], Array]

    @linen.compact
    def __call__(self, x: Array, **call: Any) -> Array:
        return self.layer(self.before(x), **call).reshape(len(x), -1)[:, :3]


def nchw(x: Any) -> Any:
    return x.transpose(0, 3, 1, 2)


def as_wide(x: Any) -> Any:
    """As many channels as columns: what fits the wrong axis by chance."""
    return jnp.concatenate([x, 2 * x + 1], -1)


def wide_nchw(x: Any) -> Any:
    return nchw(as_wide(x))


def vectors(x: Any) -> Any:
    return x.mean((1, 2))


def tokens(x: Any) -> Any:
    """(B, C, T)."""
    return x.reshape(len(x), -1, 3).transpose(0, 2, 1)


LAYOUTS: dict[str, tuple[Callable[[Any], Any], int, int]] = {
    "channels last": (as_wide, -1, 6),
    "channels first": (nchw, 1, 3),
    "channels first, as many as columns": (wide_nchw, 1, 6),
    "counted from the end": (wide_nchw, -3, 6),
    "vectors": (vectors, 1, 3),
    "tokens": (tokens, 1, 3),
    "rows": (as_wide, 1, 6),
}


def expected(x: Any, axes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    x = np.asarray(x, np.float64)
    others = tuple(i for i in range(x.ndim) if i not in {a % x.ndim for a in axes})
    return x.mean(others), x.var(others)


def check(net: Net, inputs: Any, axes: tuple[int, ...]) -> None:
    (found,) = net.apply(net.variables, jnp.asarray(IMAGES)).moments
    (running,) = net.running_moments()
    mean, var = expected(inputs, axes)
    assert found.mean.shape == running.mean.shape
    np.testing.assert_allclose(np.ravel(found.mean), np.ravel(mean), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.ravel(found.var), np.ravel(var), rtol=1e-4)
    assert net.counts is not None
    assert net.counts(IMAGES.shape) == (np.size(inputs) // mean.size,)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_moments_are_along_the_layers_own_axis(layout: str) -> None:
    before, axis, width = LAYOUTS[layout]
    layer = nnx.BatchNorm(width, axis=axis, rngs=nnx.Rngs(0))
    check(Net.from_nnx(Around(layer, before), SPACE), before(IMAGES), (axis,))
    module = AroundLinen(linen.BatchNorm(use_running_average=True, axis=axis), before)
    variables = module.init(jax.random.key(0), IMAGES)
    check(Net.from_linen(module, variables, SPACE), before(IMAGES), (axis,))


def test_a_layer_may_have_several_axes() -> None:
    for axes in ((1, 3), (-1, 1)):
        module = AroundLinen(linen.BatchNorm(use_running_average=True, axis=axes), as_wide)
        variables = module.init(jax.random.key(0), IMAGES)
        check(Net.from_linen(module, variables, SPACE), as_wide(IMAGES), axes)
    layer = nnx.BatchNorm(SIDE * 6, axis=(1, 3), rngs=nnx.Rngs(0))  # type: ignore[arg-type]
    check(Net.from_nnx(Around(layer, as_wide), SPACE), as_wide(IMAGES), (1, 3))


def test_training_mode_normalises_along_the_same_axis() -> None:
    """Against the layer itself, in training mode."""
    model = Around(nnx.BatchNorm(6, axis=1, rngs=nnx.Rngs(0)), wide_nchw)
    net = Net.from_nnx(model, SPACE)
    found = net.mode(training=True)(net.variables, jnp.asarray(IMAGES))
    model.train()
    np.testing.assert_allclose(found.logits, model(jnp.asarray(IMAGES)), rtol=1e-4, atol=1e-5)
    mean, _ = expected(wide_nchw(IMAGES), (1,))
    np.testing.assert_allclose(found.moments[0].mean, mean, rtol=1e-4, atol=1e-5)


# --- layers of the user's own ---------------------------------------------------------------------


class Own(nnx.Module):
    """Running statistics of a shape, and what else a user's layer has."""

    def __init__(self, shape: tuple[int, ...], **attributes: Any) -> None:
        self.running_mean = nnx.BatchStat(jnp.zeros(shape))
        self.running_var = nnx.BatchStat(jnp.ones(shape))
        for name, value in attributes.items():
            setattr(self, name, value)

    def __call__(self, x: Array) -> Array:
        return x


@pytest.mark.parametrize(
    ("layer", "before", "axis"),
    [
        (Own((6,)), as_wide, -1),
        (Own((6,), axis=1), wide_nchw, 1),
        (Own((6,), channel_axis=-3), wide_nchw, 1),
        (Own((1, 6, 1, 1)), wide_nchw, 1),
        (Own((1, 1, 1, 6)), as_wide, 3),
        (Own((3,), axis="batch"), lambda x: x, -1),
    ],
)
def test_the_axis_of_an_own_layer_is_the_one_it_names(
    layer: Own, before: Callable[[Any], Any], axis: int
) -> None:
    check(Net.from_nnx(Around(layer, before), SPACE), before(IMAGES), (axis,))


def test_an_own_layer_whose_statistics_do_not_fit_is_refused() -> None:
    message = r"Around: the BatchNorm layer layer has running statistics \(3,\).*`channel_axis`"
    with pytest.raises(ValueError, match=message):
        Net.from_nnx(Around(Own((3,)), nchw), SPACE)
    with pytest.raises(ValueError, match=message):
        Net.from_nnx(Around(Own((3,), axis=2), nchw), SPACE)


def test_a_layer_without_running_statistics_is_no_batch_norm() -> None:
    layer = Own((3,))
    layer.running_mean = layer.running_var = None  # type: ignore[assignment]
    assert Net.from_nnx(Around(layer, lambda x: x), SPACE).statistics == ()


class OwnLinen(linen.Module):
    """A user's BatchNorm in Linen, channels first."""

    channel_axis: int = 1

    @linen.compact
    def __call__(self, x: Array) -> Array:
        mean = self.variable("batch_stats", "running_mean", jnp.zeros, (6,))
        var = self.variable("batch_stats", "running_var", jnp.ones, (6,))
        weight = self.param("weight", linen.initializers.ones, (6,))
        mean, var, weight = (v[:, None, None] for v in (mean.value, var.value, weight))
        return (x - mean) / jnp.sqrt(var) * weight


def test_an_own_layer_in_linen_is_found() -> None:
    module = AroundLinen(OwnLinen(), wide_nchw)
    net = Net.from_linen(module, module.init(jax.random.key(0), IMAGES), SPACE)
    check(net, wide_nchw(IMAGES), (1,))


class First(nnx.BatchNorm):
    """A user's subclass that takes channels first and hands them on last."""

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Array:
        return nchw(super().__call__(x.transpose(0, 2, 3, 1) + 1, *args, **kwargs))


class FirstLinen(linen.BatchNorm):
    """The same in Linen."""

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Array:
        return nchw(super().__call__(x.transpose(0, 2, 3, 1) + 1, *args, **kwargs))


class Replaced(nnx.BatchNorm):
    """A user's subclass that does it all by itself."""

    def __call__(self, x: Array) -> Array:  # type: ignore[override]
        return (x - self.mean[...]) / jnp.sqrt(self.var[...])


def test_of_a_subclass_it_is_flaxs_layer_that_tells() -> None:
    """Its running statistics are of what that sees; it tells once."""
    net = Net.from_nnx(Around(First(6, rngs=nnx.Rngs(0)), wide_nchw), SPACE)
    check(net, as_wide(IMAGES) + 1, (-1,))
    module = AroundLinen(FirstLinen(use_running_average=True), wide_nchw)
    net = Net.from_linen(module, module.init(jax.random.key(0), IMAGES), SPACE)
    check(net, as_wide(IMAGES) + 1, (-1,))
    check(
        Net.from_nnx(Around(Replaced(6, rngs=nnx.Rngs(0)), as_wide), SPACE), as_wide(IMAGES), (3,)
    )


class Flattening(nnx.Linear):
    """A linear layer of pictures."""

    def __call__(self, inputs: Array) -> Array:  # type: ignore[override]
        return super().__call__(inputs.reshape(len(inputs), -1))


def test_features_are_what_flaxs_linear_layer_sees() -> None:
    layer = Flattening(SIDE * SIDE * 3, 3, rngs=nnx.Rngs(0))
    net = Net.from_nnx(Around(layer, lambda x: x), SPACE)
    features = net.apply(net.variables, jnp.asarray(IMAGES)).features
    np.testing.assert_array_equal(features, IMAGES.reshape(4, -1))


# --- masks, devices, options ----------------------------------------------------------------------

MASK = np.arange(SIDE) % 2 == 0


def test_a_mask_leaves_out_what_it_hides() -> None:
    mask = jnp.asarray(MASK)[None, :, None, None]
    model = Around(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), lambda x: x)
    module = AroundLinen(linen.BatchNorm(use_running_average=True), lambda x: x)
    variables = module.init(jax.random.key(0), IMAGES)
    mean, var = expected(IMAGES[:, MASK], (-1,))
    for net in (
        Net.from_nnx(model, SPACE, mask=mask),
        Net.from_linen(module, variables, SPACE, mask=mask),
    ):
        (found,) = net.apply(net.variables, jnp.asarray(IMAGES)).moments
        np.testing.assert_allclose(found.mean, mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.var, var, rtol=1e-4)
        assert net.counts is not None
        with pytest.raises(ValueError, match="a mask: how many values"):
            net.counts(IMAGES.shape)


OPTIONS: dict[str, dict[str, Any]] = {
    "mean over devices": {"axis_name": "devices"},
    "groups of devices": {"axis_name": "devices", "axis_index_groups": [[0, 1]]},
    "accurate variance": {"use_fast_variance": False},
    "neither scale nor shift": {"use_scale": False, "use_bias": False},
    "momentum": {"momentum": 0.1},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_both_modes_of_a_layer_with_options(option: str) -> None:
    """One client is one device: the mean over devices is the batch's own."""
    options = OPTIONS[option]
    plain = {k: v for k, v in options.items() if not k.startswith("axis")}
    nnx_net = Net.from_nnx(Around(nnx.BatchNorm(6, rngs=nnx.Rngs(0), **options), as_wide), SPACE)

    class Switched(linen.Module):
        @linen.compact
        def __call__(self, x: Array, train: bool) -> Array:
            layer = linen.BatchNorm(use_running_average=not train, **options)
            return layer(as_wide(x)).reshape(len(x), -1)[:, :3]

    variables = Switched().init(jax.random.key(0), IMAGES, train=False)
    images = jnp.asarray(IMAGES)
    for training in (False, True):
        reference = Around(nnx.BatchNorm(6, rngs=nnx.Rngs(0), **plain), as_wide)
        reference.set_attributes(use_running_average=not training)
        logits = reference(images)
        for net in (nnx_net, Net.from_linen(Switched(), variables, SPACE)):
            found = net.mode(training)(net.variables, images)
            np.testing.assert_allclose(found.logits, logits, rtol=1e-4, atol=1e-5)
            mean, _ = expected(as_wide(IMAGES), (-1,))
            np.testing.assert_allclose(found.moments[0].mean, mean, rtol=1e-4, atol=1e-5)


def test_a_layer_that_is_never_called_has_no_say() -> None:
    class Idle(Around):
        def __init__(self) -> None:
            super().__init__(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), lambda x: x)
            self.idle = nnx.BatchNorm(9, rngs=nnx.Rngs(0))

    net = Net.from_nnx(Idle(), SPACE)
    assert net.statistics == ((("layer", "mean"), ("layer", "var")),)


def test_normalising_by_the_batch_in_inference_mode_is_refused() -> None:
    message = r"layer normalises with the batch's own moments in inference mode"
    layer = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=f"Around: .*{message}"):
        Net.from_nnx(Around(layer, lambda x: x), SPACE, use_running_average=False)
    module = AroundLinen(linen.BatchNorm(use_running_average=False), lambda x: x)
    with pytest.raises(ValueError, match=f"AroundLinen: .*{message}"):
        Net.from_linen(module, module.init(jax.random.key(0), IMAGES), SPACE)


def test_moments_of_axes_and_their_gradients() -> None:
    """Against JAX's own rule, with and without a mask."""
    x = jnp.asarray(IMAGES)

    def total(moments: Any) -> Array:
        return (jnp.sin(moments[0]) + moments[1] ** 2).sum()

    for axis, others in ((1, (0, 2, 3)), (-1, (0, 1, 2)), ((0, 2), (1, 3))):
        ours = jax.grad(lambda x, axis=axis: total(batch_moments(x, axis)))(x)
        theirs = jax.grad(lambda x, o=others: total((x.mean(o), x.var(o))))(x)
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-6)

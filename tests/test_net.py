"""`Net`: users' own networks, Flax NNX and Linen, as attacks see them.

What a BatchNorm's input is, is computed here layer by layer, never with `Net`.
"""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax import Array

import weights_convert
from jinv import models
from jinv.attacks import gradient_inversion
from jinv.federated import evidence, labels
from jinv.image import Preprocessing
from jinv.net import Moments, Net, Outputs, batch_moments, parameters, with_parameters

SPACE = Preprocessing(size=8)
SHAPE = (5, 8, 8, 3)


# Names run backwards against the order of calls; `m_norm` is called twice.
class Own(nnx.Module):
    """A user's network: two convolutions, three BatchNorm calls, dropout, two linear layers."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.z_conv = nnx.Conv(3, 6, (3, 3), rngs=rngs)
        self.y_norm = nnx.BatchNorm(6, rngs=rngs)
        self.m_norm = nnx.BatchNorm(6, rngs=rngs)
        self.d_conv = nnx.Conv(6, 6, (3, 3), strides=2, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.c_hidden = nnx.Linear(6, 10, rngs=rngs)
        self.a_head = nnx.Linear(10, 4, rngs=rngs)

    def __call__(self, x: Array, scale: float = 1.0) -> Array:
        x = nnx.relu(self.y_norm(self.z_conv(x)))
        x = nnx.relu(self.m_norm(x))
        x = nnx.relu(self.m_norm(self.d_conv(x)))
        x = self.dropout(x.mean((1, 2)))
        return scale * self.a_head(nnx.tanh(self.c_hidden(x)))


class OwnLinen(linen.Module):
    """The same in Linen."""

    @linen.compact
    def __call__(self, x: Array, train: bool, scale: float = 1.0) -> Array:
        twice = linen.BatchNorm(use_running_average=not train, name="m_norm")
        x = linen.Conv(6, (3, 3), name="z_conv")(x)
        x = linen.relu(linen.BatchNorm(use_running_average=not train, name="y_norm")(x))
        x = linen.relu(twice(x))
        x = linen.relu(twice(linen.Conv(6, (3, 3), strides=2, name="d_conv")(x)))
        x = linen.Dropout(0.5, deterministic=not train)(x.mean((1, 2)))
        x = linen.tanh(linen.Dense(10, name="c_hidden")(x))
        return scale * linen.Dense(4, name="a_head")(x)


def by_hand(model: Own, x: Array, scale: float = 1.0) -> tuple[Array, Array, list[Array]]:
    """Logits, features and the inputs of the BatchNorm calls, from the layers one by one."""

    def normalised(norm: nnx.BatchNorm, x: Array) -> Array:
        """(x - running mean) / sqrt(running var + eps), scaled and shifted."""
        x = (x - norm.mean[...]) / jnp.sqrt(norm.var[...] + 1e-5)
        return jnp.maximum(x * norm.scale[...] + norm.bias[...], 0)

    first = model.z_conv(x)
    second = normalised(model.y_norm, first)
    third = model.d_conv(normalised(model.m_norm, second))
    pooled = normalised(model.m_norm, third).mean((1, 2))
    features = jnp.tanh(model.c_hidden(pooled))
    return scale * model.a_head(features), features, [first, second, third]


def numpy_moments(x: Array) -> tuple[np.ndarray, np.ndarray]:
    """Mean and biased variance of each channel, in float64."""
    rows = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    return rows.mean(0), ((rows - rows.mean(0)) ** 2).mean(0)


def own_model(seed: int = 0) -> Own:
    """`Own` in training mode, with random running statistics, scales and shifts."""
    model = Own(nnx.Rngs(seed))
    rng = np.random.default_rng(seed)
    for norm in (model.y_norm, model.m_norm):
        norm.mean[...] = jnp.asarray(rng.normal(size=6), jnp.float32)
        norm.var[...] = jnp.asarray(rng.uniform(0.5, 1.5, 6), jnp.float32)
        norm.scale[...] = jnp.asarray(rng.uniform(0.5, 1.5, 6), jnp.float32)
        norm.bias[...] = jnp.asarray(rng.normal(size=6), jnp.float32)
    model.train()
    return model


def linen_variables(model: Own) -> dict[str, Any]:
    """The weights of an `Own` for `OwnLinen`."""
    state = nnx.to_pure_dict(nnx.state(model, (nnx.Param, nnx.BatchStat)))
    params = {
        name: {key: value for key, value in layer.items() if key not in ("mean", "var")}
        for name, layer in state.items()
    }
    stats = {
        name: {"mean": state[name]["mean"], "var": state[name]["var"]}
        for name in ("y_norm", "m_norm")
    }
    return {"params": params, "batch_stats": stats}


def batch(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Array:
    return jnp.asarray(np.random.default_rng(seed).normal(0.3, 1, shape), jnp.float32)


def from_nnx(model: Own, **call: Any) -> Net:
    return Net.from_nnx(model, SPACE, **call)


def from_linen(model: Own, **call: Any) -> Net:
    return Net.from_linen(OwnLinen(), linen_variables(model), SPACE, train=False, **call)


BOTH = pytest.mark.parametrize("make", [from_nnx, from_linen])
Make = Callable[..., Net]


@BOTH
def test_logits_features_and_moments_are_the_networks_own(make: Make) -> None:
    model = own_model()
    images = batch()
    logits, features, inputs = by_hand(model, images)
    found = make(model)(images)
    assert isinstance(found, Outputs)
    np.testing.assert_allclose(found.logits, logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.features, features, rtol=1e-4, atol=1e-5)
    # Three calls of two layers: forward order, the shared layer twice.
    assert len(found.moments) == 3
    for ours, seen in zip(found.moments, inputs, strict=True):
        mean, var = numpy_moments(seen)
        np.testing.assert_allclose(ours.mean, mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(ours.var, var, rtol=1e-4, atol=1e-5)


def test_logits_equal_flax_inference_output() -> None:
    model = own_model()
    images = batch()
    nnx_net, linen_net = from_nnx(model), from_linen(model)
    nnx_logits = nnx_net.apply(nnx_net.variables, images).logits
    linen_logits = linen_net.apply(linen_net.variables, images).logits
    expected = OwnLinen().apply(linen_variables(model), images, train=False)
    np.testing.assert_array_equal(linen_logits, expected)
    model.eval()
    np.testing.assert_array_equal(nnx_logits, model(images))


@BOTH
def test_name_classes_and_preprocessing(make: Make) -> None:
    net = make(own_model())
    assert net.name in ("Own", "OwnLinen")
    assert (net.classes, net.preprocessing) == (4, SPACE)
    assert make(own_model(), name="mine").name == "mine"


@BOTH
def test_call_arguments_reach_the_network(make: Make) -> None:
    model = own_model()
    logits, _, _ = by_hand(model, batch(), scale=3.0)
    np.testing.assert_allclose(make(model, scale=3.0)(batch()).logits, logits, rtol=1e-4, atol=1e-5)


def test_the_head_is_the_last_linear_layer_called() -> None:
    """Not the last by name; in Linen among the parameters."""
    assert from_nnx(own_model()).head == ("a_head",)
    assert from_linen(own_model()).head == ("params", "a_head")
    lenet = models.load("lenet", None)
    assert lenet.head == ("fc", 0)
    assert lenet.variables["fc"][0].keys() == {"weight", "bias"}


@BOTH
def test_running_moments_are_in_the_order_of_moments(make: Make) -> None:
    model = own_model()
    net = make(model)
    for found, norm in zip(
        net.running_moments(), (model.y_norm, model.m_norm, model.m_norm), strict=True
    ):
        assert isinstance(found, Moments)
        np.testing.assert_array_equal(found.mean, norm.mean[...])
        np.testing.assert_array_equal(found.var, norm.var[...])
    doubled = jax.tree.map(lambda leaf: 2 * leaf, net.variables)
    other = net.running_moments(doubled)
    np.testing.assert_array_equal(other[1].var, 2 * model.m_norm.var[...])


@BOTH
def test_jit_equals_eager_and_compiles_once(make: Make) -> None:
    net = make(own_model())
    traces = 0

    def apply(variables: Any, images: Array) -> Outputs:
        nonlocal traces
        traces += 1
        return net.apply(variables, images)

    jitted = jax.jit(apply)
    for seed in (1, 2):
        found, expected = jitted(net.variables, batch(seed)), net(batch(seed))
        for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert traces == 1


def scalar(logits: Array, features: Array, moments: list[tuple[Array, Array]]) -> Array:
    """Something that depends on everything a network returns."""
    total = (logits**2).sum() + jnp.sin(features).sum()
    for i, (mean, var) in enumerate(moments):
        total += (i + 1) * (jnp.sin(3 * mean).sum() + (var**2).sum())
    return total


@BOTH
def test_gradient_by_images_goes_through_everything(make: Make) -> None:
    model = own_model()
    net = make(model)

    def expected(images: Array) -> Array:
        logits, features, inputs = by_hand(model, images)
        pairs = [(x.mean((0, 1, 2)), x.var((0, 1, 2))) for x in inputs]
        return scalar(logits, features, pairs)

    def found(images: Array) -> Array:
        out = net(images)
        return scalar(out.logits, out.features, list(out.moments))

    images = batch()
    np.testing.assert_allclose(
        jax.grad(found)(images), jax.grad(expected)(images), rtol=1e-3, atol=1e-4
    )


@BOTH
def test_gradient_by_variables(make: Make) -> None:
    """Federated attacks differentiate by the weights: head bias of sum of logits is the batch."""
    net = make(own_model())

    def loss(variables: Any) -> Array:
        return net.apply(variables, batch()).logits.sum()

    gradient = jax.grad(loss)(net.variables)
    params = gradient.get("params", gradient)
    np.testing.assert_allclose(params["a_head"]["bias"], np.full(4, SHAPE[0]), rtol=1e-6)
    assert float(jnp.abs(params["z_conv"]["kernel"]).sum()) > 0


@BOTH
def test_vmap_over_networks_and_batches(make: Make) -> None:
    nets = [make(own_model(seed)) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(net.variables for net in nets))
    images = jnp.stack([batch(seed) for seed in range(3)])
    found = jax.vmap(nets[0].apply)(stacked, images)
    for i, net in enumerate(nets):
        ours = jax.tree.leaves(jax.tree.map(lambda leaf, i=i: leaf[i], found))
        for one, theirs in zip(ours, jax.tree.leaves(net(images[i])), strict=True):
            np.testing.assert_allclose(one, theirs, rtol=1e-4, atol=1e-5)


@BOTH
def test_variables_are_numbers_only(make: Make) -> None:
    """Dropout's random keys would break gradients, sums and checkpoints of the variables."""
    leaves = jax.tree.leaves(make(own_model()).variables)
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.float32)}


@BOTH
def test_apply_is_pure(make: Make) -> None:
    """Called twice it says the same, and nothing in `variables` moves."""
    net = make(own_model())
    before = jax.tree.map(lambda leaf: leaf.copy(), net.variables)
    first, other, second = net(batch(1)), net(batch(2)), net(batch(1))
    for one, two in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(one, two)
    assert not np.array_equal(first.logits, other.logits)
    assert_trees_equal(before, net.variables)


def is_number(leaf: Any) -> bool:
    return not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def assert_trees_equal(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, two in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if is_number(one):
            np.testing.assert_array_equal(one, two)
        else:
            np.testing.assert_array_equal(jax.random.key_data(one), jax.random.key_data(two))


def test_users_model_stays_as_it_was_and_trains_on() -> None:
    model = own_model()
    before = jax.tree.map(lambda leaf: leaf, nnx.to_pure_dict(nnx.state(model)))
    net = Net.from_nnx(model, SPACE)
    frozen = net(batch()).logits
    net.apply(net.variables, batch())
    assert_trees_equal(before, nnx.to_pure_dict(nnx.state(model)))
    assert type(model.y_norm) is nnx.BatchNorm
    assert type(model.a_head) is nnx.Linear
    assert not model.y_norm.use_running_average
    assert not model.dropout.deterministic

    # Training goes on: batch statistics enter the running ones, and dropout drops.
    model(batch())
    mean, _ = numpy_moments(model.z_conv(batch()))
    momentum = model.y_norm.momentum
    expected = momentum * before["y_norm"]["mean"] + (1 - momentum) * mean
    np.testing.assert_allclose(model.y_norm.mean[...], expected, rtol=1e-4, atol=1e-5)
    # And the Net keeps the network that it was given.
    np.testing.assert_array_equal(net(batch()).logits, frozen)


def test_two_nets_of_one_model_do_not_mix() -> None:
    model = own_model()
    first = Net.from_nnx(model, SPACE)
    model.a_head.bias[...] = model.a_head.bias[...] + 1
    second = Net.from_nnx(model, SPACE)
    one, two = first(batch()), second(batch())
    np.testing.assert_allclose(two.logits - one.logits, np.ones((SHAPE[0], 4)), rtol=1e-4)
    assert len(one.moments) == len(two.moments) == 3


@BOTH
def test_bfloat16_images_give_float32_moments_and_logits(make: Make) -> None:
    found = make(own_model())(batch().astype(jnp.bfloat16))
    assert found.logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(found.moments)} == {jnp.dtype(jnp.float32)}


def test_moments_of_a_bfloat16_network_are_computed_in_float32() -> None:
    """Summed in bfloat16, the mean of 40960 ones stays far below one."""

    class Half(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.norm = nnx.BatchNorm(3, dtype=jnp.bfloat16, rngs=rngs)
            self.head = nnx.Linear(3, 2, dtype=jnp.bfloat16, rngs=rngs)

        def __call__(self, x: Array) -> Array:
            return self.head(self.norm(x).mean((1, 2)))

    images = (batch(shape=(10, 64, 64, 3)) + 100).astype(jnp.bfloat16)
    found = Net.from_nnx(Half(nnx.Rngs(0)), SPACE)(images)
    assert found.features is not None
    assert found.features.dtype == jnp.bfloat16
    assert found.logits.dtype == found.moments[0].var.dtype == jnp.float32
    mean, var = numpy_moments(images.astype(jnp.float32))
    np.testing.assert_allclose(found.moments[0].mean, mean, rtol=1e-5)
    np.testing.assert_allclose(found.moments[0].var, var, rtol=1e-4)


def test_variance_survives_a_large_mean() -> None:
    """E x^2 - (E x)^2 in float32 would lose it."""

    class Only(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.norm = nnx.BatchNorm(3, rngs=rngs)
            self.head = nnx.Linear(3, 2, rngs=rngs)

        def __call__(self, x: Array) -> Array:
            return self.head(self.norm(x).mean((1, 2)))

    images = 3000 + batch()
    found = Net.from_nnx(Only(nnx.Rngs(0)), SPACE)(images)
    _, var = numpy_moments(images)
    np.testing.assert_allclose(found.moments[0].var, var, rtol=1e-3)


def test_float64_images_stay_float64() -> None:
    net = models.load("resnet20_cifar", None)
    with jax.enable_x64(True):
        images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 16, 3)))
        assert images.dtype == jnp.float64
        found = jax.jit(net.apply)(net.variables, images)
        assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(jnp.float64)}


def test_derivatives_of_moments_to_second_order() -> None:
    """Forward, reverse and, for gradient matching, reverse over reverse; against plain formulas."""

    def plain(x: Array) -> Moments:
        rows = x.reshape(-1, x.shape[-1])
        return Moments(rows.mean(0), ((rows - rows.sum(0) / len(rows)) ** 2).sum(0) / len(rows))

    def slope(moments: Callable[[Array], Moments], x: Array) -> Array:
        def loss(x: Array) -> Array:
            mean, var = moments(x)
            return (jnp.sin(mean) * jnp.sqrt(var)).sum() + (var**3).sum()

        return jax.grad(loss)(x)

    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x, v = jnp.asarray(rng.normal(1, 2, (2, 2, 3, 4, 3)))
        for moments in (batch_moments, jax.jit(batch_moments)):
            for found, expected in (
                (slope(moments, x), slope(plain, x)),
                (jax.jvp(moments, (x,), (v,))[1].mean, jax.jvp(plain, (x,), (v,))[1].mean),
                (jax.jvp(moments, (x,), (v,))[1].var, jax.jvp(plain, (x,), (v,))[1].var),
                (
                    jax.grad(lambda x, m=moments: (slope(m, x) * v).sum())(x),
                    jax.grad(lambda x: (slope(plain, x) * v).sum())(x),
                ),
            ):
                np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


# --- modules found wherever they are -------------------------------------------------------------


def test_norms_inside_lists_and_submodules_are_found() -> None:
    class Inner(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.layers = nnx.List([nnx.BatchNorm(3, rngs=rngs) for _ in range(11)])

        def __call__(self, x: Array) -> Array:
            for i, layer in enumerate(self.layers):
                x = layer(x + i)
            return x

    class Outer(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.inner = Inner(rngs)
            self.head = nnx.Linear(3, 2, rngs=rngs)

        def __call__(self, x: Array) -> Array:
            return self.head(self.inner(x).mean((1, 2)))

    net = Net.from_nnx(Outer(nnx.Rngs(0)), SPACE)
    # As numbers, not as text: 10 after 9.
    assert [mean for mean, _ in net.statistics] == [
        ("inner", "layers", i, "mean") for i in range(11)
    ]
    x = batch()
    for i, ours in enumerate(net(x).moments):
        x = x + i
        mean, _ = numpy_moments(x)
        np.testing.assert_allclose(ours.mean, mean, rtol=1e-4, atol=1e-5)
        x = x / np.sqrt(1 + 1e-5)


def test_nested_linen_norms_have_their_paths() -> None:
    class Block(linen.Module):
        @linen.compact
        def __call__(self, x: Array) -> Array:
            return linen.BatchNorm(use_running_average=True)(2 * x)

    class Outer(linen.Module):
        @linen.compact
        def __call__(self, x: Array) -> Array:
            x = Block(name="second")(Block(name="third")(x))
            return linen.Dense(2)(x.mean((1, 2)))

    variables = Outer().init(jax.random.key(0), batch())
    net = Net.from_linen(Outer(), variables, SPACE)
    assert [mean for mean, _ in net.statistics] == [
        ("batch_stats", "third", "BatchNorm_0", "mean"),
        ("batch_stats", "second", "BatchNorm_0", "mean"),
    ]
    first, second = net(batch()).moments
    mean, var = numpy_moments(2 * batch())
    np.testing.assert_allclose(first.mean, mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(second.var, 4 * var, rtol=1e-3)


def test_network_without_batch_norm_has_no_moments() -> None:
    class Plain(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.head = nnx.Linear(3, 2, rngs=rngs)

        def __call__(self, x: Array) -> Array:
            return self.head(x.mean((1, 2)))

    class PlainLinen(linen.Module):
        @linen.compact
        def __call__(self, x: Array) -> Array:
            return linen.Dense(2)(x.mean((1, 2)))

    module = PlainLinen()
    variables = module.init(jax.random.key(0), batch())
    for net in (
        Net.from_nnx(Plain(nnx.Rngs(0)), SPACE),
        Net.from_linen(module, variables, SPACE),
    ):
        found = net(batch())
        assert found.moments == net.running_moments() == net.statistics == ()
        np.testing.assert_allclose(found.features, batch().mean((1, 2)), rtol=1e-5, atol=1e-6)


def test_network_without_linear_layer_has_no_features() -> None:
    class Convolutional(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.conv = nnx.Conv(3, 2, (1, 1), rngs=rngs)

        def __call__(self, x: Array) -> Array:
            return self.conv(x).mean((1, 2))

    found = Net.from_nnx(Convolutional(nnx.Rngs(0)), SPACE)(batch())
    assert found.features is None
    assert found.logits.shape == (SHAPE[0], 2)


class Named(nnx.Module):
    """Passes inputs by keyword."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.head = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.head(inputs=self.norm(mask=None, x=x).mean((1, 2)))


class NamedLinen(linen.Module):
    """The same in Linen."""

    @linen.compact
    def __call__(self, x: Array) -> Array:
        x = linen.BatchNorm(use_running_average=True)(mask=None, x=x)
        return linen.Dense(2)(inputs=x.mean((1, 2)))


def test_inputs_passed_by_name_are_seen() -> None:
    variables = NamedLinen().init(jax.random.key(0), batch())
    for net in (
        Net.from_nnx(Named(nnx.Rngs(0)), SPACE),
        Net.from_linen(NamedLinen(), variables, SPACE),
    ):
        found = net(batch())
        mean, var = numpy_moments(batch())
        np.testing.assert_allclose(found.moments[0].mean, mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.moments[0].var, var, rtol=1e-4)
        np.testing.assert_allclose(found.features, batch().mean((1, 2)), rtol=1e-3, atol=1e-5)


def test_own_norm_and_zoo_norm_are_found_by_their_running_statistics() -> None:
    """Any NNX module with `running_mean` and `running_var` counts as BatchNorm."""

    class Frozen(nnx.Module):
        def __init__(self) -> None:
            self.running_mean = nnx.BatchStat(jnp.arange(3.0))
            self.running_var = nnx.BatchStat(jnp.full(3, 4.0))

        def __call__(self, x: Array) -> Array:
            return (x - self.running_mean[...]) / jnp.sqrt(self.running_var[...])

    class Outer(nnx.Module):
        def __init__(self) -> None:
            self.frozen = Frozen()

        def __call__(self, x: Array) -> Array:
            return self.frozen(x).mean((1, 2))

    net = Net.from_nnx(Outer(), SPACE)
    (found,) = net(batch()).moments
    mean, var = numpy_moments(batch())
    np.testing.assert_allclose(found.mean, mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.var, var, rtol=1e-4)
    np.testing.assert_array_equal(net.running_moments()[0].mean, [0, 1, 2])
    expected = (batch().mean((1, 2)) - np.arange(3)) / 2
    np.testing.assert_allclose(net(batch()).logits, expected, rtol=1e-4, atol=1e-5)


def test_apply_may_be_transformed_as_a_whole() -> None:
    """As attacks do: rematerialised, mapped, scanned."""
    net = from_nnx(own_model())
    expected = net(batch(2)).moments[2].var
    stack = jnp.stack([batch(1), batch(2)])
    for found in (
        jax.jit(net)(batch(2)).moments[2].var,
        jax.checkpoint(net)(batch(2)).moments[2].var,
        jax.vmap(net)(stack).moments[2].var[1],
        jax.lax.map(net, stack).moments[2].var[1],
        jax.lax.scan(lambda _, x: (None, net(x)), None, stack)[1].moments[2].var[1],
        jax.jit(jax.checkpoint(net))(batch(2)).moments[2].var,
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_parameters_are_neither_statistics_nor_counters() -> None:
    net = models.load("resnet20_cifar", None)
    names = weights_convert.from_flax(parameters(net)).keys()
    assert "bn1.weight" in names
    assert not [n for n in names if "running" in n or "num_batches" in n]
    doubled = jax.tree.map(lambda leaf: 2 * leaf, parameters(net))
    changed = with_parameters(net.variables, doubled)
    np.testing.assert_array_equal(changed["linear"]["bias"], 2 * net.variables["linear"]["bias"])
    assert changed["bn1"]["running_var"] is net.variables["bn1"]["running_var"]
    assert jax.tree.structure(changed) == jax.tree.structure(dict(net.variables))


# --- what training changes -----------------------------------------------------------------------


class Constants(nnx.Module):
    """Every kind of variable that NNX has."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.idle = nnx.BatchNorm(2, rngs=rngs)  # never called
        self.lora = nnx.LoRALinear(3, 4, lora_rank=2, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)
        self.mask = nnx.Variable(jnp.ones(3))
        self.shift = jnp.zeros(3)
        self.cache = nnx.Cache(jnp.zeros(3))
        self.count = nnx.BatchStat(jnp.zeros((), jnp.int32))
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(3, 3, use_bias=False, rngs=rngs)])

    def __call__(self, x: Array) -> Array:
        self.sow(nnx.Intermediate, "seen", x)
        x = self.norm(x) * self.mask + self.shift + self.cache
        return self.head(self.lora(self.blocks[0](x.mean((1, 2)))))


def cross_entropy(logits: Array) -> Array:
    return -jax.nn.log_softmax(logits)[:, 0].mean()


def test_the_parameters_of_nnx_networks_are_what_flax_differentiates() -> None:
    """Its own gradient is evidence, as a state or as dicts; and it is ours."""
    model = Constants()
    model(batch())  # leaves intermediates behind
    net = Net.from_nnx(model, SPACE)
    model.eval()
    gradient = nnx.grad(lambda model: cross_entropy(model(batch())))(model)
    values = nnx.to_pure_dict(gradient)
    assert jax.tree.structure(parameters(net)) == jax.tree.structure(values)
    for given in (values, gradient):
        evidence.Evidence(given, SHAPE[0]).check(net)
    ours = evidence.observed(net, net.variables, batch(), jax.nn.one_hot(jnp.zeros(5, int), 3))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(values), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


class Spectral(linen.Module):
    """Collections of every kind."""

    @linen.compact
    def __call__(self, x: Array) -> Array:
        x = linen.SpectralNorm(linen.Conv(4, (3, 3)))(x, update_stats=False)
        scale = self.variable("constants", "scale", jnp.ones, (4,)).value
        x = linen.BatchNorm(use_running_average=True)(x * scale)
        self.sow("intermediates", "seen", x)
        return linen.Dense(3)(x.mean((1, 2)))


def test_the_parameters_of_linen_networks_are_their_params() -> None:
    """Whatever kind of dict holds them, and with or without the name of their collection."""
    variables = Spectral().init(jax.random.key(0), batch())
    assert variables.keys() == {"params", "batch_stats", "constants"}
    variables["intermediates"] = {"seen": (batch(),)}  # as `apply` leaves them
    params = variables["params"]

    def loss(params: Any) -> Array:
        kept = {key: value for key, value in variables.items() if key != "intermediates"}
        return cross_entropy(Spectral().apply({**kept, "params": params}, batch()))

    gradient = jax.grad(loss)(params)
    for given in (variables, flax.core.freeze(variables), nnx.State(variables)):
        net = Net.from_linen(Spectral(), given, SPACE)
        assert jax.tree.structure(parameters(net)) == jax.tree.structure({"params": params})
    for values in (gradient, {"params": gradient}, flax.core.freeze({"params": gradient})):
        held = evidence.Evidence(values, SHAPE[0])
        held.check(net)
        config = gradient_inversion.Config(steps=1, seeds=1, group=0, batch_norm=0)
        attack = gradient_inversion.build(config, net, held, [0] * SHAPE[0])
        assert jax.tree.structure(attack.data.wanted) == jax.tree.structure(parameters(net))
        found = labels.restore(labels.head_of(net, held))
        np.testing.assert_array_equal(found, [SHAPE[0], 0, 0])


def test_gradients_of_statistics_are_left_out() -> None:
    """Of a layer that keeps them as parameters, and of all that a Linen module has."""

    class Kept(nnx.Module):
        def __init__(self) -> None:
            self.running_mean = nnx.Param(jnp.zeros(3))
            self.running_var = nnx.Param(jnp.ones(3))
            self.scale = nnx.Param(jnp.ones(3))

        def __call__(self, x: Array) -> Array:
            x = (x - self.running_mean[...]) / jnp.sqrt(self.running_var[...])
            return x * self.scale[...]

    class Outer(nnx.Module):
        def __init__(self) -> None:
            self.norm = Kept()

        def __call__(self, x: Array) -> Array:
            return self.norm(x).mean((1, 2))

    gradient = nnx.grad(lambda model: cross_entropy(model(batch())))(Outer())
    assert gradient["norm"].keys() == {"running_mean", "running_var", "scale"}
    evidence.Evidence(gradient, SHAPE[0]).check(Net.from_nnx(Outer(), SPACE))
    net = from_linen(own_model())
    evidence.Evidence(net.variables, SHAPE[0]).check(net)


def test_gradients_of_other_networks_are_still_refused() -> None:
    net = from_linen(own_model())
    params = {k: v for k, v in parameters(net)["params"].items() if k != "a_head"}
    for values, message in (
        ({"params": {**params, "a_head": {"bias": np.zeros(3)}}}, "missing|misshaped"),
        ({**params, "b": {"kernel": np.zeros((2, 2))}}, "unexpected"),
        ([np.zeros(2)], "values must be a mapping"),
    ):
        with pytest.raises(ValueError, match=message):
            evidence.Evidence(values, 5).check(net)  # type: ignore[arg-type]


def test_evidence_of_bare_linen_parameters_is_kept_in_files(tmp_path: Path) -> None:
    net = from_linen(own_model())
    bare = jax.tree.map(lambda a: np.asarray(1 - 2 * a), dict(parameters(net)["params"]))
    evidence.save(tmp_path / "bare", evidence.Evidence(bare, 5))
    found = evidence.load(tmp_path / "bare", net)
    jax.tree.map(np.testing.assert_array_equal, found.values, {"params": bare})


def test_linen_parameters_alone_make_a_network() -> None:
    class Plain(linen.Module):
        @linen.compact
        def __call__(self, x: Array, train: bool) -> Array:
            return linen.Dense(3)(linen.GroupNorm(1)(x).mean((1, 2)))

    variables = Plain().init(jax.random.key(0), batch(), train=False)
    net = Net.from_linen(Plain(), variables["params"], SPACE)
    expected = Plain().apply(variables, batch(), train=False)
    np.testing.assert_allclose(net.apply(net.variables, batch()).logits, expected, rtol=1e-5)


@pytest.mark.parametrize("kept", ["params", "bare", "one layer"])
def test_missing_statistics_are_told(kept: str) -> None:
    variables = linen_variables(own_model())
    given = {
        "params": {"params": variables["params"]},
        "bare": variables["params"],
        "one layer": {**variables, "batch_stats": {"m_norm": variables["batch_stats"]["m_norm"]}},
    }[kept]
    message = "OwnLinen: .*no running statistics of the BatchNorm layer y_norm: give all collect"
    with pytest.raises(ValueError, match=message):
        Net.from_linen(OwnLinen(), given, SPACE)


def test_what_is_no_network_is_refused() -> None:
    model, variables = own_model(), linen_variables(own_model())
    calls: list[tuple[Callable[..., Net], tuple[Any, ...], str]] = [
        (Net.from_nnx, (Own,), "not the class Own: make an instance"),
        (Net.from_nnx, (OwnLinen(),), "not OwnLinen, which Net.from_linen takes"),
        (Net.from_nnx, (nnx.state(model),), "takes an nnx.Module, not a State"),
        (Net.from_linen, (model, variables), "not Own, which Net.from_nnx takes"),
        (Net.from_linen, (OwnLinen, variables), "not the class OwnLinen"),
        (Net.from_linen, (OwnLinen(), [1]), "variables as module.init returns them.* not a list"),
        (Net.from_linen, (OwnLinen(), {"batch_stats": {}}), r"OwnLinen cannot take .*\"params\""),
    ]
    for make, given, message in calls:
        with pytest.raises(ValueError, match=message):
            make(*given, SPACE)


@pytest.mark.parametrize("space", [16, (16, 16), None, {"size": 16}, Preprocessing])
def test_a_preprocessing_that_is_none_is_refused(space: Any) -> None:
    for make, given in (
        (Net.from_nnx, (own_model(),)),
        (Net.from_linen, (OwnLinen(), linen_variables(own_model()))),
    ):
        with pytest.raises(ValueError, match=r"must be a jinv.Preprocessing, such as Prep.*, not"):
            make(*given, space)


def test_variables_that_are_no_arrays_are_refused() -> None:
    class Held(nnx.Module):
        def __init__(self) -> None:
            self.layer = nnx.Param({"kernel": jnp.ones((3, 3))})

        def __call__(self, x: Array) -> Array:
            return x.mean((1, 2)) @ self.layer["kernel"]

    with pytest.raises(ValueError, match="Held keeps a dict in its variable layer: make one"):
        Net.from_nnx(Held(), SPACE)
    with pytest.raises(ValueError, match=r"Own has no weights yet, only shapes, in a_head\.bias"):
        Net.from_nnx(nnx.eval_shape(lambda: Own(nnx.Rngs(0))), SPACE)


def test_a_net_is_printed_without_its_numbers() -> None:
    assert len(repr(from_nnx(own_model()))) < 1000


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("y_norm", "var"), -0.1, r"running variance below zero in .*y_norm.var \(-0.1\)"),
        (("m_norm", "var"), np.nan, r"values in .*m_norm.var that are not finite"),
        (("m_norm", "mean"), -np.inf, r"values in .*m_norm.mean that are not finite"),
        (("z_conv", "kernel"), np.inf, r"values in .*z_conv.kernel that are not finite"),
        (("a_head", "bias"), np.nan, r"values in .*a_head.bias that are not finite"),
    ],
)
def test_unsound_numbers_are_refused(path: tuple[str, str], value: float, message: str) -> None:
    model = own_model()
    layer = getattr(model, path[0])
    variable = getattr(layer, path[1])
    sound = Net.from_nnx(model, SPACE)
    variable[...] = variable[...].at[(0,) * variable.ndim].set(value)
    for make in (from_nnx, from_linen):
        with pytest.raises(ValueError, match=f"Own.* {message}"):
            make(model)
    changed = {**sound.variables, path[0]: nnx.to_pure_dict(nnx.state(layer))}
    with pytest.raises(ValueError, match=f"Own .*{message}"):
        dataclasses.replace(sound, variables=changed)


def test_unusual_numbers_are_taken() -> None:
    """Variances that are 0, constants that are not finite, and weights whose sum is not."""
    model = Constants()
    model.norm.var[...] = jnp.zeros(3)
    model.mask[...] = jnp.asarray([-jnp.inf, 1, 1])
    model.head.kernel[...] = jnp.full((4, 3), 3e38)
    assert Net.from_nnx(model, SPACE).classes == 3
    jax.eval_shape(
        lambda v: dataclasses.replace(from_nnx(own_model()), variables=v).variables,
        {**from_nnx(own_model()).variables},
    )


# --- programs, classes and memory ----------------------------------------------------------------


@BOTH
def test_calling_a_net_is_its_apply_compiled(make: Make) -> None:
    net = make(own_model())
    for images in (batch(1), batch(2, (2, 12, 10, 3))):
        expected = net.apply(net.variables, images)
        for ours, theirs in zip(
            jax.tree.leaves(net(images)), jax.tree.leaves(expected), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def counting_net() -> tuple[Net, list[tuple[int, ...]]]:
    """Class c's logit is c times the images' mean; and the shapes that it was traced for."""
    traced = []

    def apply(variables: Any, images: Array) -> Outputs:
        traced.append(images.shape)
        return Outputs(images.mean((1, 2, 3))[:, None] * variables["slope"], None, ())

    return Net("counting", apply, {"slope": jnp.arange(4, dtype=jnp.float32)}, SPACE, 4, ()), traced


def test_calling_a_net_traces_once_for_every_shape() -> None:
    net, traced = counting_net()
    small = (2, 8, 8, 3)
    for seed in range(3):
        for shape in (SHAPE, small):
            images = batch(seed, shape)
            expected = np.outer(np.asarray(images, np.float64).mean((1, 2, 3)), range(4))
            np.testing.assert_allclose(net(images).logits, expected, rtol=1e-4, atol=1e-6)
    assert traced == [SHAPE, small]


def test_copies_of_a_net_with_other_variables_share_its_programs() -> None:
    net, traced = counting_net()
    other = dataclasses.replace(
        net, name="other", variables={"slope": jnp.full(4, 2.0, jnp.float32)}
    )
    np.testing.assert_allclose(net(jnp.ones(SHAPE)).logits[0], range(4))
    np.testing.assert_allclose(other(jnp.ones(SHAPE)).logits[0], np.full(4, 2.0))
    assert traced == [SHAPE]


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def classes() -> int:
    """Classes of this process."""
    gc.collect()
    return sum(issubclass(type(thing), type) for thing in gc.get_objects())


def test_nets_leave_neither_classes_nor_programs_nor_memory_behind() -> None:
    applies = []

    def build_and_call(times: int) -> None:
        for seed in range(times):
            net = from_nnx(own_model())
            net(batch(seed))
            applies.append(weakref.ref(net.apply))

    build_and_call(10)
    known, before = classes(), resident()
    build_and_call(100)
    assert classes() == known
    assert [ref() for ref in applies] == [None] * 110
    # Its variables are 5 kB, a program of it about 1 MB.
    assert resident() - before < 20e6


def test_tracing_a_net_makes_no_class() -> None:
    """Not even where nothing is compiled: every call traces."""
    net = from_nnx(own_model())
    net.apply(net.variables, batch())
    known = classes()
    for seed in range(20):
        net.apply(net.variables, batch(seed))
    assert classes() == known


def test_a_module_that_is_no_pytree_is_watched_too() -> None:
    """Its plain list of arrays would be refused in one that is."""

    class Plain(nnx.Module, pytree=False):
        def __init__(self) -> None:
            self.running_mean = nnx.BatchStat(jnp.zeros(3))
            self.running_var = nnx.BatchStat(jnp.ones(3))
            self.notes = [jnp.zeros(2)]

        def __call__(self, x: Array) -> Array:
            self.notes = [*self.notes, jnp.zeros(2)]
            return x

    class Outer(nnx.Module):
        def __init__(self) -> None:
            self.norm = Plain()

        def __call__(self, x: Array) -> Array:
            return self.norm(x).mean((1, 2))

    model = Outer()
    (found,) = Net.from_nnx(model, SPACE)(batch()).moments
    np.testing.assert_allclose(found.mean, numpy_moments(batch())[0], rtol=1e-4, atol=1e-5)
    assert type(model.norm) is Plain


# --- errors --------------------------------------------------------------------------------------


def test_norm_inside_remat_is_refused() -> None:
    """What it saw could not be returned; tracers would leak out of `apply`."""

    class Inside(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.norm = nnx.BatchNorm(3, rngs=rngs)

        def __call__(self, x: Array) -> Array:
            return nnx.remat(lambda norm, x: norm(x))(self.norm, x).mean((1, 2))

    class InsideLinen(linen.Module):
        @linen.compact
        def __call__(self, x: Array) -> Array:
            return linen.remat(linen.BatchNorm)(use_running_average=True)(x).mean((1, 2))

    with pytest.raises(ValueError, match="inside remat, scan, vmap or jit"):
        Net.from_nnx(Inside(nnx.Rngs(0)), SPACE)
    variables = InsideLinen().init(jax.random.key(0), batch())
    with pytest.raises(ValueError, match="inside remat, scan, vmap or jit"):
        Net.from_linen(InsideLinen(), variables, SPACE)


WRONG: dict[str, Callable[[Array], Any]] = {
    "pixels": lambda x: x,
    "one number": lambda x: x.sum(),
    "no batch": lambda x: x.mean((0, 1, 2)),
    "batch summed": lambda x: x.sum((0, 1, 2))[None].repeat(2, 0),
    "tuple": lambda x: (x.mean((1, 2)), x),
    "dict": lambda x: {"logits": x.mean((1, 2))},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_network_that_returns_no_logits_is_refused(wrong: str) -> None:
    class Odd(nnx.Module):
        def __call__(self, x: Array) -> Any:
            return WRONG[wrong](x)

    class OddLinen(linen.Module):
        def __call__(self, x: Array) -> Any:
            return WRONG[wrong](x)

    message = r"must return logits \(batch, classes\) for images \(1, 8, 8, 3\); it returned"
    with pytest.raises(ValueError, match=f"Odd {message}"):
        Net.from_nnx(Odd(), SPACE)
    with pytest.raises(ValueError, match=f"net {message}"):
        Net.from_linen(OddLinen(), {}, SPACE, name="net")


# --- training mode -------------------------------------------------------------------------------


class NoDropout(linen.Module):
    """Linen's convolution, BatchNorm, linear layer."""

    @linen.compact
    def __call__(self, x: Array, train: bool) -> Array:
        x = linen.BatchNorm(use_running_average=not train, name="norm")(linen.Conv(4, (3, 3))(x))
        return linen.Dense(3)(linen.relu(x).mean((1, 2)))


def test_training_mode_normalises_with_the_batchs_own_moments() -> None:
    """Of every layer, dropout off, and without a change of the network's variables."""
    model, images = own_model(), batch()
    net = from_nnx(model)
    assert net.train_apply is not None
    before = jax.tree.map(np.asarray, net.variables)

    def normalised(norm: nnx.BatchNorm, x: Array) -> Array:
        mean, var = numpy_moments(x)
        x = (x - mean) / np.sqrt(var + 1e-5)
        return jnp.maximum(x * norm.scale[...] + norm.bias[...], 0)

    first = model.z_conv(images)
    second = normalised(model.y_norm, first)
    third = model.d_conv(normalised(model.m_norm, second))
    pooled = normalised(model.m_norm, third).mean((1, 2))
    expected = model.a_head(jnp.tanh(model.c_hidden(pooled)))
    found = net.train_apply(net.variables, images)
    np.testing.assert_allclose(found.logits, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.moments[2].var, numpy_moments(third)[1], rtol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, before, dict(net.variables))


def test_linen_networks_train_if_told_how() -> None:
    module, images = NoDropout(), batch()
    variables = module.init(jax.random.key(0), images, train=False)
    silent = Net.from_linen(module, variables, SPACE, train=False)
    assert silent.train_apply is None
    net = Net.from_linen(module, variables, SPACE, training={"train": True}, train=False)
    assert net.train_apply is not None
    expected, _ = module.apply(variables, images, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(net.train_apply(variables, images).logits, expected, rtol=1e-5)
    assert np.abs(np.asarray(net(images).logits) - expected).max() > 1e-2

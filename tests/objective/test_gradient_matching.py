"""Distances without gradients equal those of gradients that JAX forms."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array, lax

import tiny
from jinv.federated import evidence
from jinv.objective import gradient_matching


def convolution(x: Array, w: Array, **settings: Any) -> Array:
    settings = {"window_strides": (1, 1), "padding": "SAME"} | settings
    return lax.conv_general_dilated(x, w, dimension_numbers=("NHWC", "HWIO", "NHWC"), **settings)


def normal(*shape: int, seed: int = 0) -> Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


IMAGES = (2, 6, 5, 3)
LAYERS: dict[str, tuple[tuple[int, ...], Any]] = {
    "convolution": ((3, 3, 3, 8), convolution),
    "strided": (
        (3, 2, 3, 8),
        lambda x, w: convolution(x, w, window_strides=(2, 1), padding=((1, 0), (2, 1))),
    ),
    "dilated": ((2, 2, 3, 8), lambda x, w: convolution(x, w, rhs_dilation=(2, 1), padding="VALID")),
    "NCHW x OIHW": (
        (8, 3, 3, 3),
        lambda x, w: lax.conv(x.transpose(0, 3, 1, 2), w, (1, 1), "SAME"),
    ),
    "dense": ((3, 8), lambda x, w: x @ w),
    "transposed": ((8, 3), lambda x, w: x @ w.T),
    "reshaped": ((8, 9), lambda x, w: convolution(x, w.reshape(8, 3, 3, 1).T.reshape(3, 1, 3, 8))),
    "grouped": ((3, 3, 1, 6), lambda x, w: convolution(x, w, feature_group_count=3)),
    "used twice": ((3, 3), lambda x, w: (x @ w) @ w),
    "multiplied": ((3,), lambda x, w: x * w),
    "behind jit": ((3, 8), lambda x, w: jax.jit(lambda x, w: x @ w)(x, w)),
    "squared first": ((3, 8), lambda x, w: x @ w**2),
}


@pytest.mark.parametrize("form", ["gram", "formed"])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.gpu) if name in ("strided", "grouped") else name
        for name in LAYERS
    ],
)
def test_a_layer_is_matched_as_by_its_gradient(
    name: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and their gradient with respect to images, in double precision."""
    shape, layer = LAYERS[name]
    if form == "gram":  # also where it does not pay
        monkeypatch.setattr(gradient_matching, "forms", lambda *sizes: False)
    with jax.enable_x64(True):
        parameters = {"w": normal(*shape), "b": normal(1, seed=1)}
        wanted = {"w": normal(*shape, seed=2), "b": normal(1, seed=3)}
        images = normal(*IMAGES, seed=4)

        def loss(p: Any, x: Array) -> tuple[Array, Array]:
            y = jnp.tanh(layer(x, p["w"]) + p["b"])
            return (y**2 * jnp.cos(y)).sum(), y.mean()

        def ours(x: Array) -> tuple[Array, Any]:
            kind = "auto" if form == "gram" else "formed"
            found, mean = gradient_matching.compare(loss, parameters, wanted, x, form=kind)
            return mixed(found), (found, mean)

        def reference(x: Array) -> tuple[Array, Any]:
            gradient, mean = jax.grad(loss, has_aux=True)(parameters, x)
            found = [gradient_matching.between(gradient[k], wanted[k]) for k in ("b", "w")]
            return mixed(found), (found, mean)

        (_, a), da = jax.value_and_grad(ours, has_aux=True)(images)
        (_, b), db = jax.value_and_grad(reference, has_aux=True)(images)
    jax.tree.map(lambda p, q: np.testing.assert_allclose(p, q, rtol=1e-9), a, b)
    np.testing.assert_allclose(da, db, rtol=1e-7, atol=1e-9)


def mixed(found: Any) -> Array:
    """Depends on every field."""
    return sum(m.own * 0.3 + jnp.sin(m.product) + jnp.sqrt(m.difference) for m in found)


def test_only_a_layers_own_product_is_watched() -> None:
    """What the shapes say: one site a weight that is used once, in a product."""
    expected = {
        name: name not in ("grouped", "used twice", "multiplied", "squared first")
        for name in LAYERS
    }
    found = {}
    for name, (shape, layer) in LAYERS.items():
        leaves, images = [jnp.zeros(shape)], jnp.zeros(IMAGES)
        program = jax.make_jaxpr(lambda w, x, layer=layer: layer(x, w[0]).sum())(leaves, images)
        found[name] = bool(gradient_matching._sites(program, leaves, [images]))
    assert found == expected


@pytest.mark.parametrize("training", [False, True])
def test_a_network_under_vmap(training: bool) -> None:
    """Several candidates at once, each with its own gradient, through BatchNorm in both modes."""
    net = tiny.network(widths=(6, 8, 12))
    candidates = tiny.noise((3, 2, 16, 16, 3))
    labels = jax.nn.one_hot(jnp.array([1, 4]), net.classes)
    parameters = evidence.parameters(net)
    wanted = jax.tree.map(lambda p: 0.1 * jnp.ones_like(p), parameters)

    def loss(p: Any, x: Array) -> tuple[Array, Any]:
        variables = evidence.with_parameters(net.variables, p)
        return evidence.loss_and_moments(net, variables, x, labels, training)

    def distances(x: Array) -> Array:
        found, _ = gradient_matching.compare(loss, parameters, wanted, x)
        return jnp.stack([m.difference for m in found if m is not None])

    def reference(x: Array) -> Array:
        gradient = jax.grad(lambda p: loss(p, x)[0])(parameters)
        pairs = zip(jax.tree.leaves(gradient), jax.tree.leaves(wanted), strict=True)
        return jnp.stack([gradient_matching.between(a, b).difference for a, b in pairs])

    found = jax.jit(jax.vmap(distances))(candidates)
    np.testing.assert_allclose(found, [reference(x) for x in candidates], rtol=2e-4)


def test_nothing_is_less_than_what_rounding_leaves() -> None:
    """At g = g* the Gram form ends in noise, not below zero; its gradient stays finite."""
    images = normal(4, 300).astype(jnp.float32)
    parameters = {"w": normal(300, 300, seed=1).astype(jnp.float32) / 17}

    def loss(p: Any, x: Array) -> tuple[Array, None]:
        return jnp.tanh(x @ p["w"]).sum(), None

    wanted = jax.grad(loss, has_aux=True)(parameters, images)[0]

    def difference(x: Array) -> Array:
        ((found,), _) = gradient_matching.compare(loss, parameters, wanted, x)
        assert found is not None
        return found.difference

    size = float(jnp.square(wanted["w"]).sum())
    value, slope = jax.value_and_grad(difference)(images)
    assert 0 < float(value) < 1e-5 * size
    assert np.isfinite(slope).all()


def test_a_distance_of_ones_own_is_matched_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets the layers that count, with their factors."""
    monkeypatch.setattr(gradient_matching, "DISTANCES", dict(gradient_matching.DISTANCES))
    matches = [gradient_matching.between(jnp.full(4, x), jnp.ones(4)) for x in (3.0, 5.0, 2.0)]
    with pytest.raises(
        ValueError, match="distance must be one of l2, squared_l2, cosine, not 'most'"
    ):
        gradient_matching.distance("most", [1, 1, 1], matches)

    def most(factors: Any, matches: Any) -> Array:
        return max(f * jnp.sqrt(m.difference) for f, m in zip(factors, matches, strict=True))

    gradient_matching.register_distance("most", most)
    assert float(gradient_matching.distance("most", [2, 0, 5], matches)) == pytest.approx(10)
    assert float(gradient_matching.distance("most", [2, 1, 0], [*matches[:2], None])) == 8
    with pytest.raises(ValueError, match="a new distance cannot be called 'l2'"):
        gradient_matching.register_distance("l2", most)

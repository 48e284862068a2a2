"""Training inside the span of the features: the same weights for a fraction of the arithmetic.

The gradient of the first layer's weights W (H, D) is G' X with the features X (N, D) and the
gradient G (N, H) of z = X W'. Under any optimizer that is linear and treats coordinates alike (SGD,
momentum, weight decay), therefore

    W_t = c_t W_0 + A_t' X,        z_t = c_t X W_0' + (X X') A_t

where A (N, H) follows the optimizer with G for a gradient, and the number c with none. The loop
sees N x N and N x H arrays only.

DP-SGD adds noise Z_t in all D directions. With X = L Q, where the r <= N rows of Q are orthonormal,
it splits into its coordinates Z_t Q', again standard normal, which drive the training, and the
rest, which only accumulates. (An example's gradient has the norm |x_i| |g_i|, and is clipped.) All
that is orthogonal to the features, initial weights and noise, is one Gaussian of known scale s.
With one normal G (H, D) for both,

    z_t = c_t std X G' + (X X') A_t + S_t
    W_T = s G + (c_T std - s) (G Q') Q + (L^+ S_T)' Q + A_T' X

where S (N, H) follows the optimizer with L (Z_t Q')' for a gradient. That is equal in distribution.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.flatten_util import ravel_pytree

from jinv.shadow.config import Config, Privacy, Shadow, Train
from jinv.shadow.descent import clipped, descend, noised, shares, squared_norms
from jinv.shadow.heads import Head, Parameters, without

_ROWS, _KEPT, _SEEN = _OWN = ("rows", "kept", "seen")
"""A_t, c_t and S_t, which move beside the parameters."""


def build(config: Config, head: Head, optimizer: optax.GradientTransformation) -> Train:
    """Training of one shadow model in the span of its features."""
    if config.privacy is None:
        return _exact(config, head, optimizer)
    return _private(config, config.privacy, head, optimizer)


class Moved(NamedTuple):
    """What training makes of a head, on N x N numbers.

    Attributes:
      rows: A_T (N, H).
      kept: c_T.
      others: the parameters after the first matrix.
      loss: () mean over the training set.
    """

    rows: Array
    kept: Array
    others: Parameters
    loss: Array


def simulate(
    head: Head,
    optimizer: optax.GradientTransformation,
    share: Array,
    others: Parameters,
    gram: Array,
    projected: Array,
    labels: Array,
) -> Moved:
    """Train without a feature: with the examples' products alone.

    Args:
      head: with a first matrix W (H, D).
      optimizer: linear, the same for all coordinates.
      share: (steps, N) what each example counts in a step.
      others: the parameters after the first matrix, before the first step.
      gram: X X' (N, N).
      projected: X W_0' (N, H).
      labels: (N,).
    """
    after = head.after
    assert after is not None

    def z(moving: Parameters) -> Array:
        return moving[_KEPT] * projected + gram @ moving[_ROWS]

    def loss(others: Parameters, z: Array, share: Array) -> Array:
        return (share * head.loss(after(others, z), labels)).sum() / share.sum()

    def gradient(moving: Parameters, t: Array) -> Parameters:
        others = without(moving, _ROWS, _KEPT)
        found, rows = jax.grad(loss, (0, 1))(others, z(moving), share[t])
        return {**found, _ROWS: rows, _KEPT: jnp.zeros_like(moving[_KEPT])}

    start = {_ROWS: jnp.zeros_like(projected), _KEPT: jnp.ones((), projected.dtype)}
    moved = descend(optimizer, others | start, gradient, len(share))
    others = without(moved, _ROWS, _KEPT)
    every = jnp.ones_like(share[0])
    return Moved(moved[_ROWS], moved[_KEPT], others, loss(others, z(moved), every))


def _exact(config: Config, head: Head, optimizer: optax.GradientTransformation) -> Train:
    first = head.first
    assert first is not None

    def train(key: Array, features: Array, labels: Array) -> Shadow:
        examples, width = features.shape
        init_key, order_key, _ = jax.random.split(key, 3)
        start = head.init(init_key, width)
        initial = start.pop(first)
        gram, projected = features @ features.T, features @ initial.T
        share = shares(config, order_key, examples)
        moved = simulate(head, optimizer, share, start, gram, projected, labels)
        weight = moved.kept * initial + moved.rows.T @ features
        return Shadow({first: weight, **moved.others}, moved.loss)

    return train


def _private(
    config: Config, privacy: Privacy, head: Head, optimizer: optax.GradientTransformation
) -> Train:
    first, after, std = head.first, head.after, head.first_std
    assert first is not None
    assert after is not None
    assert std is not None

    def train(key: Array, features: Array, labels: Array) -> Shadow:
        examples, width = features.shape
        init_key, order_key, noise_key = jax.random.split(key, 3)
        steps = config.steps(examples)
        expected = privacy.expected(examples)
        scale = orthogonal_scale(optimizer, steps, std, privacy.deviation / expected)

        start = head.init(init_key, width)
        shape = start.pop(first).shape
        normal_key, seen_key, others_key = jax.random.split(noise_key, 3)
        normal = jax.random.normal(normal_key, shape, features.dtype)
        gram = features @ features.T
        coordinates, mixing = factorise(gram)
        products = features @ normal.T
        drawn = products.T @ mixing  # G Q'
        squares = jnp.diagonal(gram)
        share = shares(config, order_key, examples)
        # All noise at once, along long axes: several times as fast as array by array.
        flat, unflatten = ravel_pytree(start)
        seen = jax.random.normal(seen_key, (examples, steps * shape[0]), gram.dtype)
        seen = (coordinates @ seen).reshape(examples, steps, shape[0])
        noises = jax.random.normal(others_key, (flat.size, steps), gram.dtype)

        def z(moving: Parameters) -> Array:
            return moving[_KEPT] * std * products + gram @ moving[_ROWS] + moving[_SEEN]

        def gradient(moving: Parameters, t: Array) -> Parameters:
            others = without(moving, *_OWN)

            def of_one(z: Array, y: Array) -> tuple[Parameters, Array]:
                def loss(others: Parameters, z: Array) -> Array:
                    return head.loss(after(others, z[None]), y[None])[0]

                return jax.grad(loss, (0, 1))(others, z)

            found, rows = jax.vmap(of_one)(z(moving), labels)
            norms = squared_norms(found) + squares * jnp.square(rows).sum(1)
            factor = share[t] * clipped(privacy, norms)
            total = {name: jnp.tensordot(factor, g, 1) for name, g in found.items()}
            total[_SEEN] = jnp.zeros_like(products)
            noise = {**unflatten(noises[:, t]), _SEEN: seen[:, t]}
            rows *= factor[:, None] / expected
            return {
                **noised(privacy, total, noise, examples),
                _ROWS: rows,
                _KEPT: jnp.zeros_like(moving[_KEPT]),
            }

        start |= {_ROWS: jnp.zeros_like(products), _SEEN: jnp.zeros_like(products)}
        start |= {_KEPT: jnp.ones((), products.dtype)}
        moved = descend(optimizer, start, gradient, steps)
        others = without(moved, *_OWN)
        inside = (moved[_KEPT] * std - scale) * drawn + moved[_SEEN].T @ mixing
        weight = scale * normal + (inside @ mixing.T + moved[_ROWS].T) @ features
        losses = head.loss(after(others, z(moved)), labels)
        return Shadow({first: weight, **others}, losses.mean())

    return train


def factorise(gram: Array) -> tuple[Array, Array]:
    """L (N, N) and M (N, N) with X = L Q and Q = M' X of orthonormal rows, from X X'; M' = L^+.

    Where the features span less than N dimensions the surplus columns of both are 0.
    """
    values, vectors = jnp.linalg.eigh(gram)
    # Rounding of the Gram matrix leaves eigenvalues of this size where there is nothing.
    least = len(gram) * jnp.finfo(gram.dtype).eps * values[-1]
    there = values > least
    roots = jnp.where(there, jnp.sqrt(jnp.where(there, values, 1)), 0)
    inverse = jnp.where(there, 1 / jnp.where(there, roots, 1), 0)
    return vectors * roots, vectors * inverse


def orthogonal_scale(
    optimizer: optax.GradientTransformation, steps: int, init_std: float, noise: float
) -> float:
    """Standard deviation after training of a weight that no example moves.

    s^2 = init_std^2 c^2 + noise^2 sum_t k_t^2, where c is what becomes of 1 without gradients and
    k_t of the gradient 1 at step t alone. The optimizer is linear: c and k follow from running it.

    Args:
      optimizer: of SGD's kind.
      steps: of the training.
      init_std: standard deviation before it.
      noise: standard deviation of every step's gradient.
    """

    def run(start: Array, gradients: Array) -> Array:
        return descend(optimizer, {"": start}, lambda _, t: {"": gradients[t]}, steps)[""]

    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        kept = run(jnp.ones(()), jnp.zeros(steps))
        impulses = jax.vmap(lambda g: run(jnp.zeros(()), g))(jnp.eye(steps))
        total = (init_std * kept) ** 2 + noise**2 * jnp.square(impulses).sum()
        return float(np.sqrt(total))

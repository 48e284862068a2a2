"""Training inside the span of the features: the same weights for a fraction of the arithmetic.

The gradient of the first layer's weights W (D, H) is X' G with the features X (N, D) and the
gradient G (N, H) of z = X W. Under any optimiser that is linear and treats coordinates alike (SGD,
momentum, weight decay), therefore

    W_t = c_t W_0 + X' A_t,        z_t = c_t X W_0 + (X X') A_t

where A (N, H) follows the optimiser with G for a gradient, and the number c with none. The loop
sees N x N and N x H arrays only.

DP-SGD adds noise in all D directions. With X = L Q, where the r <= N rows of Q are orthonormal, an
example's gradient has the same norm in the coordinates Q W, and noise splits into its coordinates
Q Z, again standard normal, which drive the training, and the rest, which only accumulates. All
that is orthogonal to the features, initial weights and noise, is one Gaussian of known scale s: of
one normal G (D, H),

    W_T = s G + Q' (V_T - s Q G),        V_0 = std Q G

with the trained coordinates V (r, H). That is equal in distribution.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from jinv.shadow.config import Config, Shadow, Train
from jinv.shadow.gradients import clip_factor, noise_like, shares
from jinv.shadow.heads import Head, Parameters

_ROWS, _KEPT = "rows", "kept"


def build(config: Config, head: Head, optimiser: optax.GradientTransformation) -> Train:
    """Training of one shadow model in the span of its features."""
    if config.privacy is None:
        return _exact(config, head, optimiser)
    return _private(config, head, optimiser)


def _exact(config: Config, head: Head, optimiser: optax.GradientTransformation) -> Train:
    first, after = head.first, head.after
    assert first is not None
    assert after is not None

    def train(key: Array, features: Array, labels: Array) -> Shadow:
        examples, width = features.shape
        init_key, order_key, _ = jax.random.split(key, 3)
        others = head.init(init_key, width)
        initial = others.pop(first)
        gram, start = features @ features.T, features @ initial

        def z(moving: Parameters) -> Array:
            return moving[_KEPT] * start + gram @ moving[_ROWS]

        def loss(others: Parameters, z: Array, share: Array) -> Array:
            return (share * head.loss(after(others, z), labels)).sum() / share.sum()

        def split(moving: Parameters) -> Parameters:
            return {name: v for name, v in moving.items() if name not in (_ROWS, _KEPT)}

        def step(carry: Any, t: Array) -> tuple[Any, None]:
            moving, state = carry
            share = shares(config, order_key, t, examples)
            gradient, rows = jax.grad(loss, (0, 1))(split(moving), z(moving), share)
            gradient |= {_ROWS: rows, _KEPT: jnp.zeros_like(moving[_KEPT])}
            updates, state = optimiser.update(gradient, state, moving)
            return (optax.apply_updates(moving, updates), state), None

        moving = others | {_ROWS: jnp.zeros_like(start), _KEPT: jnp.ones((), start.dtype)}
        carry = (moving, optimiser.init(moving))
        (moving, _), _ = lax.scan(step, carry, jnp.arange(config.steps(examples)))
        weight = moving[_KEPT] * initial + features.T @ moving[_ROWS]
        return Shadow(
            {first: weight, **split(moving)},
            loss(split(moving), z(moving), jnp.ones(examples)),
        )

    return train


def _private(config: Config, head: Head, optimiser: optax.GradientTransformation) -> Train:
    first, after, std, privacy = head.first, head.after, head.first_std, config.privacy
    assert first is not None
    assert after is not None
    assert std is not None
    assert privacy is not None

    def train(key: Array, features: Array, labels: Array) -> Shadow:
        examples, width = features.shape
        init_key, order_key, noise_key = jax.random.split(key, 3)
        expected = privacy.probability(examples) * examples
        steps = config.steps(examples)
        noise = privacy.noise_multiplier * privacy.l2_norm_clip / expected
        scale = orthogonal_scale(optimiser, steps, std, noise)

        others = head.init(init_key, width)
        shape = others.pop(first).shape
        normal = jax.random.normal(jax.random.fold_in(init_key, 1), shape, features.dtype)
        coordinates, basis = factorise(features)
        drawn = basis @ normal  # Q G
        squares = jnp.square(coordinates).sum(1)

        def gradient(moving: Parameters, share: Array, t: Array) -> Parameters:
            z = coordinates @ moving[first]
            rest = {name: v for name, v in moving.items() if name != first}

            def of_one(z: Array, y: Array) -> tuple[Parameters, Array]:
                def loss(rest: Parameters, z: Array) -> Array:
                    return head.loss(after(rest, z[None]), y[None])[0]

                return jax.grad(loss, (0, 1))(rest, z)

            found, rows = jax.vmap(of_one)(z, labels)
            norms = squares * jnp.square(rows).sum(1)
            for g in found.values():
                norms += jnp.square(g).reshape(examples, -1).sum(1)
            factor = share * clip_factor(privacy, norms)
            total = {name: jnp.tensordot(factor, g, 1) for name, g in found.items()}
            total[first] = coordinates.T @ (factor[:, None] * rows)
            added = noise_like(jax.random.fold_in(noise_key, t), total, privacy)
            return jax.tree.map(lambda g, n: (g + n) / expected, total, added)

        def step(carry: Any, t: Array) -> tuple[Any, None]:
            moving, state = carry
            share = shares(config, order_key, t, examples)
            updates, state = optimiser.update(gradient(moving, share, t), state, moving)
            return (optax.apply_updates(moving, updates), state), None

        moving = others | {first: std * drawn}
        carry = (moving, optimiser.init(moving))
        (moving, _), _ = lax.scan(step, carry, jnp.arange(steps))
        losses = head.loss(
            after({k: v for k, v in moving.items() if k != first}, coordinates @ moving[first]),
            labels,
        )
        weight = scale * normal + basis.T @ (moving[first] - scale * drawn)
        return Shadow({**moving, first: weight}, losses.mean())

    return train


def factorise(features: Array) -> tuple[Array, Array]:
    """X = L Q: coordinates L (N, N) and orthonormal rows Q (N, D), from the Gram matrix.

    Where the features span less than N dimensions the surplus columns of L and rows of Q are 0.
    """
    values, vectors = jnp.linalg.eigh(features @ features.T)
    # Rounding of the Gram matrix leaves eigenvalues of this size where there is nothing.
    least = len(features) * jnp.finfo(features.dtype).eps * values[-1]
    there = values > least
    roots = jnp.where(there, jnp.sqrt(jnp.where(there, values, 1)), 0)
    inverse = jnp.where(there, 1 / jnp.where(there, roots, 1), 0)
    return vectors * roots, (vectors * inverse).T @ features


def orthogonal_scale(
    optimiser: optax.GradientTransformation, steps: int, init_std: float, noise: float
) -> float:
    """Standard deviation after training of a weight that no example moves.

    s^2 = init_std^2 c^2 + noise^2 sum_t k_t^2, where c is what becomes of 1 without gradients and
    k_t of the gradient 1 at step t alone. The optimiser is linear: c and k follow from running it.

    Args:
      optimiser: of SGD's kind.
      steps: of the training.
      init_std: standard deviation before it.
      noise: standard deviation of every step's gradient.
    """

    def run(start: Array, gradients: Array) -> Array:
        def step(carry: Any, gradient: Array) -> tuple[Any, None]:
            value, state = carry
            updates, state = optimiser.update(gradient, state, value)
            return (optax.apply_updates(value, updates), state), None

        return lax.scan(step, (start, optimiser.init(start)), gradients)[0][0]

    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        kept = run(jnp.ones(()), jnp.zeros(steps))
        impulses = jax.vmap(lambda g: run(jnp.zeros(()), g))(jnp.eye(steps))
        total = (init_std * kept) ** 2 + noise**2 * jnp.square(impulses).sum()
        return float(np.sqrt(total))

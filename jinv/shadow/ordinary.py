"""Training a head as it is: any head, any optimiser; what the row-space path is tested against."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from jinv.shadow.config import Config, Shadow, Train
from jinv.shadow.gradients import clip_factor, noise_like, shares
from jinv.shadow.heads import Head, Parameters


def build(config: Config, head: Head, optimiser: optax.GradientTransformation) -> Train:
    """Training of one shadow model."""

    def train(key: Array, features: Array, labels: Array) -> Shadow:
        examples, width = features.shape
        init_key, order_key, noise_key = jax.random.split(key, 3)
        parameters = head.init(init_key, width)

        def loss(parameters: Parameters, share: Array) -> Array:
            losses = head.loss(head.apply(parameters, features), labels)
            return (share * losses).sum() / share.sum()

        def private(parameters: Parameters, share: Array, step: Array) -> Parameters:
            privacy = config.privacy
            assert privacy is not None

            def of_one(x: Array, y: Array) -> Parameters:
                return jax.grad(lambda p: head.loss(head.apply(p, x[None]), y[None])[0])(parameters)

            gradients = jax.vmap(of_one)(features, labels)
            squares = [
                jnp.square(g).reshape(examples, -1).sum(1) for g in jax.tree.leaves(gradients)
            ]
            factor = share * clip_factor(privacy, jnp.stack(squares).sum(0))
            total = jax.tree.map(lambda g: jnp.tensordot(factor, g, 1), gradients)
            noise = noise_like(jax.random.fold_in(noise_key, step), total, privacy)
            expected = privacy.probability(examples) * examples
            return jax.tree.map(lambda g, n: (g + n) / expected, total, noise)

        def step(carry: Any, t: Array) -> tuple[Any, None]:
            parameters, state = carry
            share = shares(config, order_key, t, examples)
            if config.privacy is None:
                gradient = jax.grad(loss)(parameters, share)
            else:
                gradient = private(parameters, share, t)
            updates, state = optimiser.update(gradient, state, parameters)
            return (optax.apply_updates(parameters, updates), state), None

        carry = (parameters, optimiser.init(parameters))
        (parameters, _), _ = lax.scan(step, carry, jnp.arange(config.steps(examples)))
        return Shadow(parameters, loss(parameters, jnp.ones(examples)))

    return train

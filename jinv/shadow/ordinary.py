"""Training a head as it is: any head, any optimizer; what the row-space path is tested against."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jinv.shadow.config import Config, Privacy, Shadow, Train
from jinv.shadow.descent import clipped, descend, noised, normal_like, shares, squared_norms
from jinv.shadow.heads import Head, Parameters


def build(config: Config, head: Head, optimizer: optax.GradientTransformation) -> Train:
    """Training of one shadow model."""

    def train(key: Array, features: Array, labels: Array) -> Shadow:
        examples, width = features.shape
        init_key, order_key, noise_key = jax.random.split(key, 3)
        share = shares(config, order_key, examples)

        def loss(parameters: Parameters, share: Array) -> Array:
            losses = head.loss(head.apply(parameters, features), labels)
            return (share * losses).sum() / share.sum()

        def private(privacy: Privacy, parameters: Parameters, t: Array) -> Parameters:
            def of_one(x: Array, y: Array) -> Parameters:
                return jax.grad(lambda p: head.loss(head.apply(p, x[None]), y[None])[0])(parameters)

            gradients = jax.vmap(of_one)(features, labels)
            factor = share[t] * clipped(privacy, squared_norms(gradients))
            total = jax.tree.map(lambda g: jnp.tensordot(factor, g, 1), gradients)
            normal = normal_like(jax.random.fold_in(noise_key, t), total)
            return noised(privacy, total, normal, examples)

        def gradient(parameters: Parameters, t: Array) -> Parameters:
            if config.privacy is None:
                return jax.grad(loss)(parameters, share[t])
            return private(config.privacy, parameters, t)

        found = descend(optimizer, head.init(init_key, width), gradient, config.steps(examples))
        return Shadow(found, loss(found, jnp.ones(examples)))

    return train

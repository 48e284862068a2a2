"""What both ways of training share: the loop, who takes part in a step, clipping, noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from jinv.shadow.config import Config, Privacy
from jinv.shadow.heads import Parameters


def descend(
    optimizer: optax.GradientTransformation,
    start: Parameters,
    gradient: Callable[[Parameters, Array], Parameters],
    steps: int,
) -> Parameters:
    """Return the parameters after some steps of an optimizer.

    Args:
      optimizer: any optax transformation.
      start: the parameters before.
      gradient: (parameters, number of the step) -> gradient.
      steps: how many.
    """

    def step(carry: Any, t: Array) -> tuple[Any, None]:
        parameters, state = carry
        updates, state = optimizer.update(gradient(parameters, t), state, parameters)
        return (optax.apply_updates(parameters, updates), state), None

    (found, _), _ = lax.scan(step, (start, optimizer.init(start)), jnp.arange(steps))
    return found


def shares(config: Config, key: Array, examples: int) -> Array:
    """(steps, N) what each example counts in a step: 1 if it takes part, else 0."""
    steps, size = config.steps(examples), min(config.batch or examples, examples)
    if config.privacy is not None:
        q = config.privacy.probability(examples)
        return jax.random.bernoulli(key, q, (steps, examples)).astype(jnp.float32)
    if size == examples:
        return jnp.ones((steps, examples))
    in_epoch = -(-examples // size)
    keys = jax.random.split(key, config.epochs)
    order = jax.vmap(lambda k: jax.random.permutation(k, examples))(keys)
    taken = order[:, None] // size == jnp.arange(in_epoch)[:, None]
    return taken.reshape(steps, examples).astype(jnp.float32)


def clipped(privacy: Privacy, squared_norms: Array) -> Array:
    """min(1, l2_norm_clip / ||g_i||) for every example's squared gradient norm."""
    return privacy.l2_norm_clip / jnp.maximum(jnp.sqrt(squared_norms), privacy.l2_norm_clip)


def squared_norms(gradients: Parameters) -> Array:
    """(N,) ||g_i||^2 over all parameters, whose first axis is the examples'."""
    return sum(
        (jnp.square(g).reshape(len(g), -1).sum(1) for g in gradients.values()), start=jnp.zeros(())
    )


def normal_like(key: Array, tree: Parameters) -> Parameters:
    """A standard normal number in every coordinate."""
    keys = jax.random.split(key, len(tree))
    return {
        name: jax.random.normal(k, leaf.shape, leaf.dtype)
        for k, (name, leaf) in zip(keys, tree.items(), strict=True)
    }


def noised(privacy: Privacy, total: Parameters, normal: Parameters, examples: int) -> Parameters:
    """Return the private gradient: (sum of clipped gradients + noise) / expected examples.

    Args:
      privacy: clip, noise and sampling.
      total: sum of the clipped gradients.
      normal: standard normal numbers, a tree like it.
      examples: N, in the training set.
    """
    expected = privacy.expected(examples)
    return jax.tree.map(lambda g, n: (g + privacy.deviation * n) / expected, total, normal)

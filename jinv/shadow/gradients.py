"""What both ways of training have in common: who takes part in a step, clipping, noise."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jinv.shadow.config import Config, Privacy
from jinv.shadow.heads import Parameters


def shares(config: Config, key: Array, step: Array, examples: int) -> Array:
    """(N,) what each example counts in a step: 1 if it takes part, else 0."""
    if config.privacy is not None:
        q = config.privacy.probability(examples)
        drawn = jax.random.bernoulli(jax.random.fold_in(key, step), q, (examples,))
        return drawn.astype(jnp.float32)
    size = min(config.batch or examples, examples)
    if size == examples:
        return jnp.ones(examples)
    in_epoch = -(-examples // size)
    order = jax.random.permutation(jax.random.fold_in(key, step // in_epoch), examples)
    return (order // size == step % in_epoch).astype(jnp.float32)


def clip_factor(privacy: Privacy, squared_norms: Array) -> Array:
    """min(1, l2_norm_clip / ||g_i||) for every example's squared gradient norm."""
    return privacy.l2_norm_clip / jnp.maximum(jnp.sqrt(squared_norms), privacy.l2_norm_clip)


def noise_like(key: Array, tree: Parameters, privacy: Privacy) -> Parameters:
    """N(0, (noise_multiplier l2_norm_clip)^2) in every coordinate."""
    deviation = privacy.noise_multiplier * privacy.l2_norm_clip
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    drawn = [
        deviation * jax.random.normal(k, leaf.shape, leaf.dtype)
        for k, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, drawn)

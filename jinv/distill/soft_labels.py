"""What a student learns from a teacher: its softened classes, hard labels, or both.

L = a_soft T^p KL(softmax(t / T) || softmax(s / T)) + a_hard H(y, s), the mean over a batch, of
logits t of the teacher and s of the student for the same view of the images. arXiv 1503.02531 has
p = 2, so that the gradient's size does not depend on T; SRe2L (arXiv 2306.13092) has p = 0.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jinv import checks, training
from jinv.checks import NotNegative, Positive
from jinv.net import Net
from jinv.objective.terms import cross_entropy


@dataclasses.dataclass(frozen=True)
class Config:
    """How a student learns.

    Attributes:
      soft: weight of the divergence from the teacher's softened classes.
      hard: weight of the cross-entropy with the labels, mixed as the view is.
      temperature: T.
      squared: multiply the divergence by T^2.
    """

    soft: NotNegative = 1.0
    hard: NotNegative = 0.0
    temperature: Positive = 20.0
    squared: bool = False

    def __post_init__(self) -> None:
        checks.fields(self)
        if not self.soft and not self.hard:
            raise ValueError("a student learns nothing: give soft or hard a weight")
        if not self.soft:
            checks.unused(self, "soft is 0", "temperature", "squared")


def divergence(teacher: Array, student: Array, temperature: float) -> Array:
    """Return mean_i sum_c p_c (log p_c - log q_c), p and q the softmax at T of logits (B, C)."""
    target = jax.nn.log_softmax(teacher / temperature)
    log_q = jax.nn.log_softmax(student / temperature)
    return (jnp.exp(target) * (target - log_q)).sum(-1).mean()


def make_criterion(config: Config, teacher: Net | None = None) -> training.Criterion:
    """Return the loss of a batch, for `training.make_step`.

    It is told the teacher's variables, or without a teacher its logits (B, C); nothing if `soft`
    is 0. The teacher sees the student's view, brought to its own size and normalisation.

    Args:
      config: the weights.
      teacher: the network; None if its logits come from a store.
    """

    def criterion(logits: Array, view: training.View, *told: Any) -> Array:
        total = jnp.zeros((), logits.dtype)
        if config.soft:
            (known,) = told
            soft = known if teacher is None else says(teacher, known, view.pixels)
            factor = config.temperature**2 if config.squared else 1.0
            value = divergence(soft.astype(logits.dtype), logits, config.temperature)
            total = total + config.soft * factor * value
        if config.hard:
            total = total + config.hard * cross_entropy(logits, view.targets)
        return total

    return criterion


def says(teacher: Net, variables: Any, pixels: Array) -> Array:
    """Return a teacher's logits (B, C) for pixels (B, H, W, C) in [0, 1], in inference mode."""
    seen = training.shown(teacher, pixels)
    return jax.lax.stop_gradient(teacher.apply(variables, seen).logits)

"""Heads: the small networks on frozen features whose weights an attacker gets to see."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jax import Array

Parameters = dict[str, Array]
Kind = Literal["linear", "binary"]


@dataclasses.dataclass(frozen=True)
class Head:
    """A network of features x (N, D), as pure functions.

    Matrices are (outputs, inputs), as torch's: D is the axis that processors work along.

    Attributes:
      init: (key, D) -> parameters.
      apply: (parameters, x) -> outputs, one (or one vector) an example.
      loss: (outputs, labels (N,)) -> (N,), of every example alone.
      correct: (outputs, labels) -> (N,) booleans.
      first: name of the matrix (H, D) with which all that the network does with x begins, x W';
        None if it does not begin so.
      after: (the other parameters, x W') -> outputs, with `first`.
      first_std: of the initial W, whose entries are N(0, first_std^2), with `first`.
    """

    init: Callable[[Array, int], Parameters]
    apply: Callable[[Parameters, Array], Array]
    loss: Callable[[Array, Array], Array]
    correct: Callable[[Array, Array], Array]
    first: str | None = None
    after: Callable[[Parameters, Array], Array] | None = None
    first_std: float | None = None

    def __post_init__(self) -> None:
        if len({self.first is None, self.after is None, self.first_std is None}) > 1:
            raise ValueError(
                "first, after and first_std describe a head together: give all or none"
            )


def without(parameters: Parameters, *names: str) -> Parameters:
    """The other parameters."""
    return {name: value for name, value in parameters.items() if name not in names}


def linear(classes: int, init_std: float) -> Head:
    """x W' + b, cross-entropy over classes.

    Parameters `weight` (classes, D), N(0, init_std^2), and `bias`, 0.
    """

    def init(key: Array, features: int) -> Parameters:
        weight = init_std * jax.random.normal(key, (classes, features))
        return {"weight": weight, "bias": jnp.zeros(classes)}

    def after(parameters: Parameters, z: Array) -> Array:
        return z + parameters["bias"]

    return Head(
        init,
        _applying("weight", after),
        optax.softmax_cross_entropy_with_integer_labels,
        lambda outputs, labels: outputs.argmax(-1) == labels,
        "weight",
        after,
        init_std,
    )


def binary(hidden: int, init_std: float, pos_weight: float = 1.0) -> Head:
    """relu(x W_1' + b_1) W_2' + b_2, one logit z of label 1.

    Loss -(pos_weight y log s(z) + (1 - y) log(1 - s(z))) with the logistic function s, as torch's
    BCEWithLogitsLoss. Parameters `hidden.weight` (hidden, D), `output.weight` (1, hidden), both
    N(0, init_std^2), and their `bias`, 0.
    """

    def init(key: Array, features: int) -> Parameters:
        keys = jax.random.split(key)
        return {
            "hidden.weight": init_std * jax.random.normal(keys[0], (hidden, features)),
            "hidden.bias": jnp.zeros(hidden),
            "output.weight": init_std * jax.random.normal(keys[1], (1, hidden)),
            "output.bias": jnp.zeros(1),
        }

    def after(parameters: Parameters, z: Array) -> Array:
        active = jax.nn.relu(z + parameters["hidden.bias"])
        return (active @ parameters["output.weight"].T + parameters["output.bias"])[..., 0]

    def loss(outputs: Array, labels: Array) -> Array:
        positive = pos_weight * labels * jax.nn.log_sigmoid(outputs)
        return -(positive + (1 - labels) * jax.nn.log_sigmoid(-outputs))

    return Head(
        init,
        _applying("hidden.weight", after),
        loss,
        lambda outputs, labels: (outputs > 0) == (labels == 1),
        "hidden.weight",
        after,
        init_std,
    )


def _applying(
    first: str, after: Callable[[Parameters, Array], Array]
) -> Callable[[Parameters, Array], Array]:
    def apply(parameters: Parameters, x: Array) -> Array:
        return after(without(parameters, first), x @ parameters[first].T)

    return apply

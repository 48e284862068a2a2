"""A batch through a network a few images at a time, with the moments of the whole batch.

BatchNorm's moments tie all images of a batch together, so gradients cannot simply be summed over
smaller batches. They can in two passes: the first finds the moments of the whole batch, and with
them how much the loss depends on each; the second goes through the images again, a few at a time,
now that their share of that is known. The memory is that of a few images, the price one more
forward pass, the result exact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jinv.net import Moments, Outputs, Variables


def in_turns(
    apply: Callable[[Variables, Array], Outputs], at_once: int
) -> Callable[[Variables, Array], Outputs]:
    """Turn `apply` into one that takes `at_once` images at a time.

    The result is differentiable once, in images only.

    mean = avg_b mean_b and var = avg_b [var_b + (mean_b - mean)^2] over parts b of equal size,
    hence d var = avg_b [d var_b + 2 (mean_b - mean) d mean_b].
    """

    @jax.custom_vjp
    def whole(variables: Variables, images: Array) -> Outputs:
        return forward(variables, images)[0]

    def forward(variables: Variables, images: Array) -> tuple[Outputs, Any]:
        parts = _split(images, at_once)
        seen = lax.map(lambda part: apply(variables, part), parts)
        moments = tuple(_combined(m) for m in seen.moments)
        features = None if seen.features is None else _joined(seen.features)
        means = tuple(m.mean for m in seen.moments)
        return Outputs(_joined(seen.logits), features, moments), (variables, parts, means, moments)

    def backward(saved: Any, cotangent: Outputs) -> tuple[None, Array]:
        variables, parts, means, moments = saved
        count = len(parts)

        def one(inputs: tuple) -> Array:
            part, part_means, logits, features = inputs
            shares = tuple(
                Moments((ct.mean + 2 * ct.var * (mean - whole.mean)) / count, ct.var / count)
                for ct, mean, whole in zip(cotangent.moments, part_means, moments, strict=True)
            )
            _, pull = jax.vjp(lambda x: apply(variables, x), part)
            return pull(Outputs(logits, features, shares))[0]

        logits = _split(cotangent.logits, at_once)
        features = None if cotangent.features is None else _split(cotangent.features, at_once)
        return None, _joined(lax.map(one, (parts, means, logits, features)))

    whole.defvjp(forward, backward)
    return whole


def check_even(images: int, at_once: int) -> None:
    """Refuse parts of a batch that are not of equal size.

    Raises:
      ValueError: it names the option and the numbers that are possible.
    """
    if images % at_once:
        even = ", ".join(str(n) for n in range(1, images + 1) if images % n == 0)
        raise ValueError(
            f"execution.images_at_once: {images} images cannot be taken {at_once} at a time "
            f"evenly: possible are {even}"
        )


def _combined(parts: Moments) -> Moments:
    """Combine moments (count, C) of parts of equal size into those (C,) of all."""
    mean = parts.mean.mean(0)
    return Moments(mean, (parts.var + jnp.square(parts.mean - mean)).mean(0))


def _split(batch: Array, at_once: int) -> Array:
    """(B, ...) -> (B / at_once, at_once, ...); image i goes to part i mod count.

    Interleaved so that a batch sharded over devices is split on each of them.
    """
    check_even(len(batch), at_once)
    return batch.reshape(at_once, len(batch) // at_once, *batch.shape[1:]).swapaxes(0, 1)


def _joined(parts: Array) -> Array:
    """Undo `_split`."""
    return parts.swapaxes(0, 1).reshape(-1, *parts.shape[2:])

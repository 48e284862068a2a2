"""A shadow model as a pure function: `make_train(config) -> train(key, features, labels)`.

`train` is to be vmapped over keys and training sets, sharded, or called inside a training step.
There are two ways to the same weights. The ordinary one trains the head. The row-space one uses
that N examples move the first layer's weights only inside the span of their features, and never
touches anything of the features' size D in its loop.
"""

from __future__ import annotations

import optax

from jinv import checks
from jinv.shadow import ordinary, rowspace
from jinv.shadow.config import Config, Train, make_head, make_optimizer
from jinv.shadow.heads import Head


@checks.todays_keywords
def make_train(
    config: Config,
    *,
    head: Head | None = None,
    optimizer: optax.GradientTransformation | None = None,
) -> Train:
    """The function that trains one shadow model.

    Args:
      config: how.
      head: one of your own; the config's by default.
      optimizer: any of optax's instead of the config's. It takes the ordinary path.

    Raises:
      ValueError: the row-space path is asked for where it would be another training, or the noise
        of `Privacy.target_epsilon` is not known yet.
    """
    if config.privacy is not None:
        _ = config.privacy.sigma  # Raises here, not when the first model is traced.
    head = head or make_head(config)
    reason = unsuitable(config, head, optimizer)
    if config.path == "row_space" and reason:
        raise ValueError(f"no row-space training: {reason}")
    optimizer = optimizer or make_optimizer(config)
    if reason:
        return ordinary.build(config, head, optimizer)
    return rowspace.build(config, head, optimizer)


def unsuitable(
    config: Config, head: Head, optimizer: optax.GradientTransformation | None = None
) -> str:
    """Why training takes the ordinary path, "" if the row-space path gives the same."""
    if config.path == "ordinary":
        return "the config asks for the ordinary path"
    if head.first is None:
        return "the head does not begin with a matrix product of the features (`Head.first`)"
    if optimizer is not None:
        return "an optimizer of your own may treat coordinates differently"
    if config.optimizer == "adam":
        return (
            "Adam divides every coordinate by its own size, so that weights leave the span of the "
            "features"
        )
    return ""

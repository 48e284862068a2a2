"""Learning-rate schedules and optimizers by name, shared by all attacks; `register_*` adds more."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jinv import checks, optimise
from jinv.checks import Word

Rate = Callable[[float, int, int, float], optax.Schedule]
"""(lr, warmup, steps, floor) -> the learning rate by step."""

Optimizer = Callable[..., optax.GradientTransformation]
"""(learning_rate, **arguments) -> a transformation, as optax's."""


class Schedule(NamedTuple):
    """A schedule, and which of a config's options it reads beside `lr` and `warmup`.

    Attributes:
      rate: the learning rate.
      reads: names of options. A config without one of them does not offer the schedule; one with
        them refuses values that its schedule would not read.
    """

    rate: Rate
    reads: tuple[str, ...] = ()


def cosine(lr: float, warmup: int, steps: int, floor: float) -> optax.Schedule:
    """Rise linearly to `lr`, then fall along a cosine to `floor * lr`.

    Args:
      lr, warmup, steps, floor: see `optimise.warm_cosine`.
    """
    return optimise.warm_cosine(lr, warmup, steps, floor)


def constant(lr: float, warmup: int, steps: int, floor: float) -> optax.Schedule:
    """Rise linearly to `lr`, which stays.

    Args:
      lr, warmup, steps: see `optimise.warm_cosine`.
      floor: plays no part.
    """
    del floor
    return optimise.warm_cosine(lr, warmup, steps, 1.0)


PLATEAU = "plateau"
LBFGS = "lbfgs"
"""L-BFGS wants the loss as a function: an attack offers it only with a line search."""

SCHEDULES: dict[str, Schedule] = {
    "cosine": Schedule(cosine, ("lr_floor",)),
    "constant": Schedule(constant),
    PLATEAU: Schedule(constant, ("plateau_patience", "plateau_factor")),
}

OPTIMIZERS: dict[str, Optimizer] = {"adam": optax.adam, "sgd": optax.sgd, LBFGS: optax.lbfgs}
"""Optimizers by name; every other name is looked up in optax."""


def is_optimizer(name: str) -> bool:
    """Whether `optimizer` knows the name."""
    factory = OPTIMIZERS.get(name) or getattr(optax, name, None)
    return not name.startswith("_") and callable(factory) and not isinstance(factory, type)


ScheduleName = Annotated[str, Word(lambda: SCHEDULES)]
OptimizerName = Annotated[str, Word(lambda: OPTIMIZERS, is_optimizer, "and all of optax")]


def register_schedule(name: str, rate: Rate, reads: tuple[str, ...] = ()) -> None:
    """Make a schedule of your own a word of the attacks' configs.

    Raises:
      ValueError: the name is taken.
    """
    checks.free("schedule", name, SCHEDULES)
    SCHEDULES[name] = Schedule(rate, reads)


def register_optimizer(name: str, optimizer: Optimizer) -> None:
    """Make an optimizer of your own a word of the attacks' configs.

    Raises:
      ValueError: the name is taken.
    """
    checks.free("optimizer", name, OPTIMIZERS)
    OPTIMIZERS[name] = optimizer


def check_schedule(config: Any) -> None:
    """Refuse a config whose `schedule` is unknown, or that sets options of other schedules.

    Raises:
      ValueError: it names the field.
    """
    fields = {field.name for field in dataclasses.fields(config)}
    offered = {name: s for name, s in SCHEDULES.items() if fields.issuperset(s.reads)}
    checks.one_of("schedule", config.schedule, offered)
    idle = {name for schedule in offered.values() for name in schedule.reads}
    idle -= set(offered[config.schedule].reads)
    checks.unused(config, f"schedule is {config.schedule!r}", *sorted(idle))


def optimizer(name: str) -> Optimizer:
    """The optimizer of this name in `OPTIMIZERS` or in optax.

    Raises:
      ValueError: there is none.
    """
    if not is_optimizer(name):
        raise ValueError(
            f"no optimizer is called {name!r}; there are: {', '.join(OPTIMIZERS)} and all of optax"
        )
    return OPTIMIZERS.get(name) or getattr(optax, name)


def check_optimizer(name: str, arguments: Mapping[str, Any]) -> None:
    """Refuse arguments with which an optimizer cannot be run; nothing is computed.

    Raises:
      FieldError: it names the field, and the argument as far as the optimizer does.
    """
    try:
        made = make_optimizer(name, lambda step: 0.1 + 0.0 * step, arguments)
    except ValueError as error:
        raise checks.FieldError("optimizer_args", f": {error}") from None
    values = jax.ShapeDtypeStruct((2,), jnp.float32)
    try:
        state = jax.eval_shape(made.init, values)
        if name != LBFGS:  # which wants the loss, too
            jax.eval_shape(made.update, values, state, values)
    except Exception as error:  # of optax, whatever it raises
        told = str(error).partition("\n")[0]
        raise checks.FieldError(
            "optimizer", f": {name} cannot be run with a schedule and {dict(arguments)}: {told}"
        ) from None


def takes(name: str, argument: str) -> bool:
    """Whether an optimizer has an argument of this name."""
    try:
        parameters = inspect.signature(optimizer(name)).parameters
    except ValueError:
        return False
    return argument in parameters


def make_optimizer(
    name: str, rate: optax.Schedule | None, arguments: Mapping[str, Any]
) -> optax.GradientTransformation:
    """An optimizer with its learning rate and its other arguments.

    Raises:
      ValueError: no such optimizer, or one that refuses the arguments.
    """
    factory = optimizer(name)
    try:
        made = factory(rate, **arguments)
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{name} refuses its arguments: {error}") from None
    if not isinstance(made, optax.GradientTransformation):
        raise ValueError(f"{name} is no optimizer")
    return made

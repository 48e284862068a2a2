"""Points of a search: values of a recipe's dotted keys, by a grid or by Optuna."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np

from jinv import checks
from jinv.runs import config as configs
from jinv.runs.command import Command

Number = Annotated[int, checks.Range()] | Annotated[float, checks.Range()]
MOST = 10_000
"""Points of a grid, at most."""


@dataclasses.dataclass(frozen=True)
class Span:
    """Numbers between two ends, which are whole if both ends and the step are written so.

    Attributes:
      low, high: the ends, which are among them.
      log: every factor is as likely as another, not every difference.
      step: from one to the next, beginning at `low`; null for all between the ends.
    """

    low: Number
    high: Number
    log: bool = False
    step: Number | None = None

    def __post_init__(self) -> None:
        checks.fields(self)
        if not self.low < self.high:
            raise checks.FieldError("low", f" must be below high: {self.low} is not {self.high}")
        if self.log and not self.low > 0:
            raise checks.FieldError("low", f" must be above 0 where log is true, not {self.low}")
        if self.step is not None and self.log:
            raise ValueError("log and step exclude each other")
        if self.step is not None and not 0 < self.step <= self.high - self.low:
            raise checks.FieldError(
                "step", f" must be above 0 and at most high - low, not {self.step}"
            )

    @property
    def whole(self) -> bool:
        """Whether the numbers are whole."""
        ends = (self.low, self.high, self.low if self.step is None else self.step)
        return all(isinstance(end, int) for end in ends)


Choice = Span | Annotated[tuple[Any, ...], checks.Some()]
"""What Optuna chooses from."""


def grid(values: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Return all combinations of the keys' values; those of the last key change fastest.

    Raises:
      ConfigError: there are too many.
    """
    count = math.prod(map(len, values.values()))
    if count > MOST:
        raise configs.ConfigError(f"the grid has {count} points, which is more than {MOST}")
    return [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]


def recipe(command: Command, base: Mapping[str, Any], values: Mapping[str, Any]) -> Any:
    """Return the config of a command with these values.

    A key is replaced in the recipe as it is written; what the recipe does not spell out, such as
    `attack.phases.0.steps` of a preset, in the config that it makes.

    Args:
      command: whose config it is.
      base: the recipe's tree.
      values: dotted key -> value; a number stands for an entry of a list.

    Raises:
      ConfigError: there is no such key, or the config is refused.
    """
    tree, later = dict(base), {}
    for key, value in values.items():
        place = key.rpartition(".")[0]
        if key == "attack.preset" or isinstance(_at(tree, place), Mapping):
            tree = _replaced(tree, key.split("."), value, key)
        else:
            later[key] = value
    config = command.recipe_from(tree)
    if later:
        tree = configs.plain(config)
        for key, value in later.items():
            tree = _replaced(tree, key.split("."), value, key)
        config = command.recipe_from(tree)
    return config


def _at(tree: Any, place: str) -> Any:
    """Return what lies at a place of a tree, None if nothing does."""
    for name in filter(None, place.split(".")):
        if isinstance(tree, Mapping):
            tree = tree.get(name)
        elif isinstance(tree, list) and name.isdecimal() and int(name) < len(tree):
            tree = tree[int(name)]
        else:
            return None
    return tree


def _replaced(tree: Any, path: Sequence[str], value: Any, key: str) -> Any:
    """Return a tree with another value at a path; `key` names the path in messages."""
    if not path:
        return value
    name, *rest = path
    if isinstance(tree, list):
        if not name.isdecimal() or int(name) >= len(tree):
            raise configs.ConfigError(f"{key}: a list of {len(tree)} has no entry {name}")
        index = int(name)
        return [*tree[:index], _replaced(tree[index], rest, value, key), *tree[index + 1 :]]
    if tree is not None and not isinstance(tree, Mapping):
        raise configs.ConfigError(f"{key}: {checks.shown(tree)} has no key {name}")
    known = tree or {}
    return {**known, name: _replaced(known.get(name), rest, value, key)}


def lookup(tree: Any, key: str) -> Any:
    """Return what stands at a dotted key of a summary; names may hold dots themselves.

    Raises:
      KeyError: nothing does; the message says which names there are.
    """
    if isinstance(tree, list):
        tree = {str(index): value for index, value in enumerate(tree)}
    if not isinstance(tree, Mapping):
        raise KeyError(f"{checks.shown(tree)} has no {key}")
    if key in tree:
        return tree[key]
    for name, value in tree.items():
        if key.startswith(f"{name}."):
            return lookup(value, key[len(name) + 1 :])
    raise KeyError(f"there is no {key}, only {', '.join(tree) or 'nothing'}")


# --- Optuna --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Told:
    """A point that was tried.

    Attributes:
      values: dotted key -> value.
      score: what came out; None if nothing did.
      running: nothing has come out yet.
    """

    values: Mapping[str, Any]
    score: float | None = None
    running: bool = False


def load_optuna() -> Any:
    """Return Optuna; ImportError with what to do if it is missing."""
    try:
        import optuna
    except ImportError:
        raise ImportError(
            "a search of a `space` needs Optuna: pip install optuna; a `grid` needs nothing"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def suggest(
    space: Mapping[str, Choice], goal: str, seed: int, told: Sequence[Told]
) -> dict[str, Any]:
    """Return the point to try next, by Optuna's TPE: a function of its arguments.

    Args:
      space: dotted key -> what it is chosen from.
      goal: "max" or "min".
      seed: of what is random.
      told: all points before.
    """
    optuna = load_optuna()
    number = int(np.random.SeedSequence([seed, len(told)]).generate_state(1)[0])
    # Points that are tried at the same time count as bad ones, so that others are suggested.
    sampler = optuna.samplers.TPESampler(seed=number, constant_liar=True)
    study = optuna.create_study(sampler=sampler, direction=f"{goal}imize")
    distributions = {key: _distribution(optuna, choice) for key, choice in space.items()}
    states = optuna.trial.TrialState
    for point in told:
        state = states.RUNNING if point.running else states.FAIL
        study.add_trial(
            optuna.trial.create_trial(
                state=state if point.score is None else states.COMPLETE,
                value=point.score,
                params={key: _number_of(space[key], point.values[key]) for key in space},
                distributions=distributions,
            )
        )
    drawn = study.ask(distributions).params
    return {key: _value_of(choice, drawn[key]) for key, choice in space.items()}


def _distribution(optuna: Any, choice: Choice) -> Any:
    """Return what Optuna draws: a number of the span, or the index of a step or of a choice."""
    kinds = optuna.distributions
    if not isinstance(choice, Span):
        return kinds.CategoricalDistribution(range(len(choice)))
    if choice.step is not None:
        return kinds.IntDistribution(0, math.floor(_steps(choice, choice.high) + 1e-9))
    kind = kinds.IntDistribution if choice.whole else kinds.FloatDistribution
    return kind(choice.low, choice.high, log=choice.log)


def _steps(span: Span, value: float) -> float:
    assert span.step is not None
    return (value - span.low) / span.step


def _number_of(choice: Choice, value: Any) -> Any:
    """Return the number that Optuna knows a value by."""
    if not isinstance(choice, Span):
        return choice.index(value)
    return value if choice.step is None else round(_steps(choice, value))


def _value_of(choice: Choice, drawn: Any) -> Any:
    """Return the value that Optuna knows by a number."""
    if not isinstance(choice, Span):
        return choice[drawn]
    if choice.step is None:
        return drawn
    value = choice.low + drawn * choice.step
    return value if choice.whole else float(f"{value:.12g}")  # 0.3, not 0.30000000000000004

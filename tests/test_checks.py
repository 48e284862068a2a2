"""Options that cannot be, and options that nothing would read, are refused by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import pytest

from jinv import checks, shadow, training
from jinv.attacks import gradient_inversion
from jinv.objective import ensemble
from jinv.runs import attack_run

Flavour = Literal["sweet", "sour"]


@dataclasses.dataclass(frozen=True)
class Dish:
    """A config with every kind of annotation."""

    flavour: Flavour = "sweet"
    side: Literal["rice", "bread"] | None = None
    bits: Literal["sign"] | int | None = None
    spoons: int = 2
    extras: Mapping[str, float] = dataclasses.field(default_factory=lambda: {"salt": 1.0})

    def __post_init__(self) -> None:
        checks.fields(self)


@pytest.mark.parametrize(
    "settings", [{}, {"flavour": "sour"}, {"side": "rice"}, {"side": None}, {"bits": 7}]
)
def test_words_of_the_annotations_pass(settings: dict[str, Any]) -> None:
    Dish(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"flavour": "salty"}, "^flavour must be one of sweet, sour, not 'salty'$"),
        ({"flavour": None}, "^flavour must be one of sweet, sour, not nothing \\(null\\)$"),
        ({"side": "chips"}, "^side must be one of rice, bread or nothing \\(null\\), not 'chips'$"),
    ],
)
def test_other_words_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Dish(**settings)


def test_one_of_lists_the_keys_of_a_table() -> None:
    checks.one_of("method", "b", {"a": 1, "b": 2})
    with pytest.raises(ValueError, match=r"^method must be one of a, b, not 'c'$"):
        checks.one_of("method", "c", {"a": 1, "b": 2})


def test_options_at_their_defaults_are_not_refused() -> None:
    checks.unused(Dish(extras={"salt": 1.0}), "nobody eats", "spoons", "extras", "side")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"spoons": 3}, r"^spoons: 3 plays no part: nobody eats; leave spoons at 2$"),
        ({"extras": {}}, r"^extras: {} plays no part: nobody eats; leave extras at {'salt': 1.0}$"),
    ],
)
def test_an_option_that_plays_no_part_is_named(settings: dict[str, Any], message: str) -> None:
    checks.unused(Dish(**settings), "nobody eats", "side")
    with pytest.raises(ValueError, match=message):
        checks.unused(Dish(**settings), "nobody eats", "side", "spoons", "extras")


@pytest.mark.parametrize("name", ["a", ""])
def test_names_that_are_taken_or_none_are_not_free(name: str) -> None:
    checks.free("dish", "b", {"a": 1})
    with pytest.raises(ValueError, match=f"^a new dish cannot be called '{name}': taken are a$"):
        checks.free("dish", name, {"a": 1})


@pytest.mark.parametrize(
    ("called", "keyword"),
    [
        (training.Config, "optimiser"),
        (gradient_inversion.Config, "optimiser"),
        (shadow.Config, "optimiser"),
        (shadow.make_train, "optimiser"),
        (ensemble.Execution, "stack"),
        (attack_run.Options, "checkpoint_every"),
    ],
)
def test_keywords_of_yesterday_say_what_has_become_of_them(called: Any, keyword: str) -> None:
    with pytest.raises(TypeError) as caught:
        called(**{keyword: 1})
    assert str(caught.value) == f"{called.__name__}: `{keyword}` {checks.CHANGED[keyword]}"


def test_other_keywords_fail_as_usual() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'nothing'"):
        training.Config(nothing=1)  # type: ignore[call-arg]
    assert training.Config(optimizer="adam") == training.Config(optimizer="adam")

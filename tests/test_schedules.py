"""Schedules and optimizers by name, and what one's own need to be words of the configs."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jinv import schedules
from jinv.attacks import deepinversion, gradient_inversion
from jinv.attacks.deepinversion import Phase


@pytest.fixture(autouse=True)
def tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies, so that what a test registers does not stay."""
    for name in ("SCHEDULES", "OPTIMIZERS"):
        monkeypatch.setattr(schedules, name, dict(getattr(schedules, name)))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cosine", [0.2, 0.4, 0.4, 0.1 + 0.3 * (1 + np.cos(np.pi / 4)) / 2]),
        ("constant", [0.2, 0.4, 0.4, 0.4]),
        ("plateau", [0.2, 0.4, 0.4, 0.4]),
    ],
)
def test_rates_are_their_formulas(name: str, expected: list[float]) -> None:
    """Two warm-up steps to 0.4; of six, and a floor of a quarter."""
    rate = schedules.SCHEDULES[name].rate(0.4, 2, 6, 0.25)
    np.testing.assert_allclose([float(rate(t)) for t in range(4)], expected, rtol=1e-6)


def halving(lr: float, warmup: int, steps: int, floor: float) -> optax.Schedule:
    del warmup, steps, floor
    return lambda step: lr * 0.5 ** jnp.asarray(step, jnp.float32)


def test_a_schedule_of_ones_own_sets_the_learning_rate() -> None:
    with pytest.raises(ValueError, match="schedule must be one of cosine, constant, plateau, not"):
        deepinversion.Config(schedule="halving")
    schedules.register_schedule("halving", halving)
    config = deepinversion.Config(schedule="halving", lr=0.8, optimizer="sgd", optimizer_args={})
    optimizer = deepinversion.make_optimizer(config, Phase(3))
    state, found = optimizer.init(jnp.zeros(())), []
    for _ in range(3):
        update, state = optimizer.update(jnp.ones(()), state, jnp.zeros(()))
        found.append(float(update))
    np.testing.assert_allclose(found, [-0.8, -0.4, -0.2])
    assert gradient_inversion.Config(schedule="halving").schedule == "halving"


def test_options_that_a_schedule_does_not_read_are_refused() -> None:
    schedules.register_schedule("halving", halving, reads=("plateau_factor",))
    deepinversion.Config(schedule="halving", plateau_factor=0.1)
    with pytest.raises(ValueError, match=r"lr_floor: 0.5 plays no part: schedule is 'halving'"):
        deepinversion.Config(schedule="halving", lr_floor=0.5)
    with pytest.raises(ValueError, match="schedule must be one of cosine, constant, not 'halving'"):
        gradient_inversion.Config(schedule="halving")  # which has no plateau_factor


def test_an_optimizer_of_ones_own_moves_the_images() -> None:
    def backwards(learning_rate: Any, gain: float = 1.0) -> optax.GradientTransformation:
        return optax.chain(optax.scale_by_learning_rate(learning_rate), optax.scale(-gain))

    with pytest.raises(ValueError, match="optimizer must be one of adam, sgd"):
        deepinversion.Config(optimizer="backwards")
    schedules.register_optimizer("backwards", backwards)
    config = gradient_inversion.Config(optimizer="backwards", optimizer_args={"gain": 3.0})
    optimizer = gradient_inversion.make_optimizer(config, optax.constant_schedule(0.1))
    update, _ = optimizer.update(jnp.ones(()), optimizer.init(jnp.zeros(())))
    assert float(update) == pytest.approx(0.3)


def test_taken_names_are_refused() -> None:
    with pytest.raises(
        ValueError, match="a new schedule cannot be called 'cosine': taken are cosine"
    ):
        schedules.register_schedule("cosine", halving)
    with pytest.raises(ValueError, match="a new optimizer cannot be called 'adam'"):
        schedules.register_optimizer("adam", optax.adam)

"""Switches are set in one place, for a while, and change no result."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from jax import Array

from jinv import backend, prng
from jinv.attacks import deepinversion
from jinv.models import layers
from jinv.net import Net
from jinv.objective.terms import Member
from tiny import SPACE

SWITCHES = ("depthwise", "grouped", "pointwise", "strided", "stem", "moments", "remat")


def other_position(switch: str) -> Any:
    """Than the switch stands at here."""
    kind = typing.get_type_hints(backend.Choices)[switch]
    positions = (False, True) if kind is bool else typing.get_args(kind)
    (other,) = set(positions) - {getattr(backend.choices(), switch)}
    return other


class EveryKind(nnx.Module):
    """Strided, grouped, depthwise and pointwise convolutions, each with a BatchNorm layer."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.convs = nnx.List(
            [
                layers.Conv2d(3, 8, 3, stride=2, padding=1, rngs=rngs),
                layers.Conv2d(8, 8, 3, stride=2, padding=1, rngs=rngs),
                layers.Conv2d(8, 8, 3, padding=1, groups=2, rngs=rngs),
                layers.Conv2d(8, 8, 3, stride=2, padding=1, groups=8, rngs=rngs),
                layers.Conv2d(8, 16, 1, rngs=rngs),
            ]
        )
        self.norms = nnx.List([layers.BatchNorm2d(n) for n in (8, 8, 8, 8, 16)])
        self.head = layers.Linear(16, 7, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = layers.relu6(norm(conv(x)))
        return self.head(x.mean((1, 2)))


@pytest.fixture(scope="module")
def net() -> Net:
    return Net.from_nnx(EveryKind(rngs=nnx.Rngs(0)), SPACE, name="every kind")


@pytest.fixture
def wide() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def images_after_a_step(net: Net) -> np.ndarray:
    config = deepinversion.Config(
        phases=(deepinversion.Phase(1, jitter=2),),
        optimizer="sgd",  # the images move by the gradient itself
        optimizer_args={},
        schedule="constant",
        warmup=0,
        clip=False,
    )
    attack = deepinversion.build(config, [Member(net)], [0, 3, 6], size=32, compute_dtype="float64")
    (phase,) = attack.phases
    images = jax.random.normal(jax.random.key(0), (3, 32, 32, 3), "float64")
    state = phase.enter(images, 0)
    step = jax.jit(lambda *args: phase.step(*args))
    return np.asarray(step(jax.random.key(1), state, attack.data)[0].images)


@pytest.fixture(scope="module")
def reference(net: Net) -> np.ndarray:
    with jax.enable_x64(True):
        return images_after_a_step(net)


@pytest.mark.gpu
@pytest.mark.parametrize("switch", SWITCHES)
def test_no_switch_changes_a_step(wide: None, net: Net, reference: np.ndarray, switch: str) -> None:
    with backend.choose(**{switch: other_position(switch)}):
        found = images_after_a_step(net)
    np.testing.assert_allclose(found, reference, rtol=1e-9, atol=1e-9)


def test_switches_are_set_for_a_while() -> None:
    usual = backend.choices()
    other = dataclasses.replace(usual, remat=not usual.remat, loop="scan")
    with backend.choose(remat=not usual.remat), backend.choose(loop="scan"):
        assert backend.choices() == other
    assert backend.choices() == usual
    with pytest.raises(TypeError, match="rematerialise"), backend.choose(rematerialise=True):
        pass
    assert backend.choices() == usual


def test_what_a_gpu_takes_is_asked_of_its_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, expected in (("cpu", backend.CPU), ("gpu", backend.OTHER), ("tpu", backend.OTHER)):
        monkeypatch.setattr(jax, "default_backend", lambda name=name: name)
        assert backend.choices() == expected
    key = jax.random.key(0)
    assert prng.written_out(key) is key  # as on a TPU

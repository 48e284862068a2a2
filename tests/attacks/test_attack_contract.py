"""What every attack keeps to, whatever its mathematics."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from attack_examples import EXAMPLES
from jinv import optimise
from jinv.attacks import ATTACKS, gradient_inversion
from jinv.federated import evidence
from jinv.image import Preprocessing
from jinv.optimise import Chunk, State


@pytest.fixture(params=ATTACKS, scope="module")
def attack(request: pytest.FixtureRequest) -> Any:
    name = request.param
    assert name in EXAMPLES, f"attack {name!r} has no example: give one in tests/attack_examples.py"
    return EXAMPLES[name]()


def run(attack: Any, key: int = 0, **settings: Any) -> State:
    images = attack.initial(jax.random.key(key))
    return optimise.run(
        attack.phases, jax.random.key(key + 100), images, attack.data, **{"chunk": 2} | settings
    )


def arrays(tree: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def assert_equal(ours: State, theirs: State) -> None:
    for a, b in zip(arrays(ours), arrays(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def finished(attack: Any) -> State:
    return run(attack)


def test_has_what_runs_and_reports_read(attack: Any) -> None:
    assert all(isinstance(phase, optimise.Phase) for phase in attack.phases)
    assert isinstance(attack.mesh, Mesh)
    assert isinstance(attack.space, Preprocessing)
    jax.tree.map(jnp.shape, attack.data)


def test_same_key_same_images(attack: Any, finished: State) -> None:
    assert_equal(run(attack), finished)


def test_other_key_other_images(attack: Any, finished: State) -> None:
    other = run(attack, key=1)
    difference = np.abs(
        np.asarray(attack.shown(other.best_images)) - np.asarray(attack.shown(finished.best_images))
    )
    assert difference.max() > 0.1 * np.asarray(attack.shown(finished.best_images)).std()


@pytest.mark.parametrize("cut", [pytest.param(1, marks=pytest.mark.gpu), 2])
def test_resumed_run_equals_uninterrupted_run(attack: Any, finished: State, cut: int) -> None:
    """Cut after so many chunks, whose states may be kept."""
    kept: list[tuple[int, State]] = []

    def callback(chunk: Chunk) -> None:
        kept.append((chunk.phase, chunk.state))

    run(attack, callback=callback, should_stop=lambda: len(kept) == cut, loop="scan")
    assert cut <= len(kept) <= cut + 1  # the device had its next program
    assert int(kept[cut - 1][1].step) == 2 * cut
    assert_equal(run(attack, resume=kept[cut - 1], loop="scan"), run(attack, loop="scan"))


def test_every_phase_is_traced_once(attack: Any) -> None:
    """However many chunks it takes, the last one shorter."""
    traces: list[int] = []

    def counted(index: int, phase: optimise.Phase) -> optimise.Phase:
        def step(*args: Any) -> Any:
            traces.append(index)
            return phase.step(*args)

        return dataclasses.replace(phase, step=step)

    phases = tuple(counted(i, phase) for i, phase in enumerate(attack.phases))
    chunks: list[Chunk] = []
    images = attack.initial(jax.random.key(0))
    optimise.run(
        phases,
        jax.random.key(1),
        images,
        attack.data,
        chunk=2,
        loop="python",
        callback=chunks.append,
    )
    assert len(chunks) > len(phases)
    assert traces == list(range(len(phases)))


def test_shown_are_images_of_the_attacks_space(attack: Any, finished: State) -> None:
    pixels = np.asarray(attack.shown(finished.best_images))
    assert pixels.shape == (3, 16, 16, attack.space.channels)
    assert np.isfinite(pixels).all()
    initial = np.asarray(attack.shown(attack.initial(jax.random.key(0))))
    assert initial.shape[0] == 3
    assert initial.ndim == 4


def test_shown_of_candidates_are_the_first_ones_images() -> None:
    attack = EXAMPLES["gradient_inversion"]()
    config = dataclasses.replace(attack.config, group=0.0, group_from=5000, group_every=100)
    held, _ = evidence.simulate(attack.net, np.ones((3, 16, 16, 3), np.float32), [0, 1, 2])
    joint = gradient_inversion.build(config, attack.net, held, None)
    found = joint.initial(jax.random.key(0))
    assert isinstance(found, gradient_inversion.Candidates)
    np.testing.assert_array_equal(joint.shown(found), found.images[0])

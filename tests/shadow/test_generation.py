"""Shadows by the batch: each is its own, whatever company and device it is trained in."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jinv.shadow import Config, Privacy, make_train, sampling
from jinv.shadow.generation import make_generate

KEY = jax.random.key(9)


def data() -> tuple[jax.Array, sampling.Sets]:
    rng = np.random.default_rng(0)
    labels = np.arange(400) % 10
    features = np.maximum(rng.normal(size=(400, 24)) + np.eye(10, 24)[labels] * 2, 0)
    return jnp.asarray(features, jnp.float32), sampling.balanced(labels, 1, 1, 40)


def test_a_shadow_is_the_same_in_any_company() -> None:
    features, sets = data()
    train = make_train(Config(lr=0.5))
    generate = make_generate(train)
    positions = jnp.arange(40)
    together = generate(KEY, features, positions, *sets)
    assert together.parameters["weight"].shape == (40, 10, 24)
    few = slice(17, 20)
    some = generate(KEY, features, positions[few], sets.indices[few], sets.labels[few])
    np.testing.assert_allclose(
        some.parameters["weight"], together.parameters["weight"][few], atol=1e-6
    )
    alone = train(jax.random.fold_in(KEY, 17), features[sets.indices[17]], sets.labels[17])
    np.testing.assert_allclose(
        alone.parameters["weight"], together.parameters["weight"][17], atol=1e-6
    )
    assert float(np.abs(together.parameters["weight"][0] - alone.parameters["weight"]).max()) > 0.1


SHARDED = """
import json, sys
sys.path[:0] = ["tests", "tests/shadow"]
import jax, numpy as np
from test_generation import KEY, data
from jinv import parallel
from jinv.shadow import Config, Privacy, generation, make_train
features, sets = data()
found = []
for config in (Config(lr=0.5), Config(lr=0.5, privacy=Privacy(1.0, 1.0))):
    weights = []
    for devices in (1, 4):
        mesh = parallel.mesh(generation.SHADOWS, jax.devices()[:devices])
        made = generation.make_generate(make_train(config), mesh)(
            KEY, features, np.arange(40), *sets
        )
        assert len(made.loss.sharding.device_set) == devices
        weights.append(np.asarray(made.parameters["weight"]))
    found.append(float(abs(weights[0] - weights[1]).max()))
print(json.dumps(found))
"""


def test_devices_share_shadows_and_change_nothing(run_python: Any) -> None:
    assert max(run_python(SHARDED)) < 1e-5


def test_private_shadows_learn_less() -> None:
    """What privacy is for: mean loss on the training sets, with and without noise."""
    features, sets = data()
    losses = []
    for privacy in (None, Privacy(0.0, 1.0, sampling=1.0), Privacy(5.0, 1.0)):
        generate = make_generate(make_train(Config(lr=0.5, privacy=privacy)))
        losses.append(float(generate(KEY, features, jnp.arange(40), *sets).loss.mean()))
    assert losses[0] < losses[1] < losses[2]

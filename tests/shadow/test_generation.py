"""Shadows by the batch: each is its own, whatever company and device it is trained in."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jinv.shadow import Config, Privacy, generation, make_train, sampling
from jinv.shadow.generation import Execution, Factory, Restarts, make_generate

KEY = jax.random.key(9)


def data() -> tuple[jax.Array, sampling.Sets]:
    rng = np.random.default_rng(0)
    labels = np.arange(400) % 10
    features = np.maximum(rng.normal(size=(400, 24)) + np.eye(10, 24)[labels] * 2, 0)
    return jnp.asarray(features, jnp.float32), sampling.balanced(labels, 1, 1, 40)


@pytest.mark.gpu
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


def factory(*, on_cpu: bool = True, **options: Any) -> Factory:
    """Of the data above, as on a CPU or as where the device has memory of its own."""
    found = Factory(Config(lr=0.05), data()[0], 10, KEY, execution=Execution(chunk=16), **options)
    found._on_cpu = on_cpu
    return found


@pytest.mark.parametrize("kinds", [{"device", "pinned_host"}, {"device"}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_device_and_the_host_put_the_same_seed_together(
    kinds: set[str], dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 models in chunks of 16; those from the median loss on are trained again, once."""
    features, sets = data()
    monkeypatch.setattr(generation, "_memories", lambda device: kinds)
    generate = make_generate(make_train(Config(lr=0.05)))
    key = jax.random.fold_in(KEY, 3)
    first = generate(key, features, jnp.arange(40), *sets)
    limit = float(jnp.median(first.loss))
    failed = np.flatnonzero(np.asarray(first.loss) >= limit)
    again = generate(
        jax.random.fold_in(key, 2**31 + 2),
        features,
        failed,
        sets.indices[failed],
        sets.labels[failed],
    )
    packed = [
        np.concatenate([m.parameters["bias"], m.parameters["weight"].reshape(-1, 240)], 1)
        for m in (first, again)
    ]
    expected = packed[0].copy()
    expected[failed] = packed[1]
    restarts = Restarts(loss=limit, most=2)
    host, other = (
        factory(on_cpu=on_cpu, dtype=dtype, restarts=restarts) for on_cpu in (True, False)
    )
    seen: list[np.ndarray] = []
    made = [host.seed(3, sets, seen.append), other.seed(3, sets), other.on_device(3, sets)]
    made.append(host.on_device(3, sets))
    for found in made:
        assert found.weights.dtype == jnp.dtype(dtype)
        tolerance = 1e-6 if dtype == "float32" else 1e-2
        np.testing.assert_allclose(
            np.asarray(found.weights, np.float32), expected, atol=tolerance, rtol=tolerance
        )
        for name in ("weights", "loss", "attempts"):
            np.testing.assert_array_equal(getattr(found, name), getattr(made[0], name))
        np.testing.assert_array_equal(np.flatnonzero(np.asarray(found.attempts) == 2), failed)
    assert all(isinstance(part, jax.Array) for found in made[2:] for part in found)
    assert [len(chunk) for chunk in seen] == [16, 16, 8]
    np.testing.assert_allclose(np.concatenate(seen), first.loss, rtol=1e-5)


def test_on_a_cpu_the_device_sees_the_hosts_memory() -> None:
    made = factory()
    whole = generation._OnHost(7, made.layout, np.dtype(np.float32), made._every)
    assert np.shares_memory(np.asarray(whole.on_device()), whole.on_host())


def test_chunks_of_a_gpu_are_even() -> None:
    """None is larger than a seed, and the last is about as full as the others."""
    made = factory()
    assert [made.at_once(models) for models in (5, 16, 20)] == [16, 16, 16]
    made._even = True
    assert [made.at_once(models) for models in (5, 16, 20, 33)] == [5, 16, 10, 11]
    sets = data()[1]
    weights = made.seed(1, sampling.Sets(*(part[:20] for part in sets))).weights
    np.testing.assert_allclose(weights, factory().seed(1, sets).weights[:20], atol=1e-6)


SHARDED = """
import json, sys
sys.path[:0] = ["tests", "tests/shadow"]
import jax, numpy as np
from test_generation import KEY, data, factory
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
shared, host = factory(on_cpu=False), factory().seed(2, sets)
assert shared.mesh.size == 4
made = shared.on_device(2, sets)
assert len(made.weights.sharding.device_set) == len(made.loss.sharding.device_set) == 4
for weights in (made.weights, shared.seed(2, sets).weights):
    found.append(float(abs(np.asarray(weights) - host.weights).max()))
shared._even = True
assert [shared.at_once(models) for models in (5, 20, 33)] == [8, 12, 12]
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

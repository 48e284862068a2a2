"""Training on shadow models: what a step takes, and that its source and its cuts do not matter."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from jinv import optimise, training
from jinv.net import with_parameters
from jinv.reconstruct import losses, network
from jinv.reconstruct import training as reconstruction
from jinv.reconstruct.normalisation import Normalisation
from jinv.reconstruct.training import Config, Made, Population, Shadows, State, Stored
from jinv.shadow import sampling, statistics
from jinv.shadow.config import Config as Training
from jinv.shadow.generation import Factory
from jinv.shadow.store import Metadata, Store

CLASSES, WIDTH, SETS, BATCH = 3, 8, 10, 4
KEY = jax.random.key(5)
CONFIG = Config(steps=7, batch=BATCH, lr=1e-3)  # two steps a seed


class World:
    """Twelve images of every class, their features, and heads that are trained on one of each."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.labels = np.repeat(np.arange(CLASSES), 12).astype(np.int32)
        mean = rng.uniform(40, 200, (CLASSES, 4, 4, 1)).repeat(8, 1).repeat(8, 2)
        noise = rng.uniform(-20, 20, (len(self.labels), 32, 32, 1))
        self.images = (mean[self.labels] + noise).astype(np.uint8)
        self.features = rng.standard_normal((len(self.labels), WIDTH)).astype(np.float32)
        config = Training(classes=CLASSES, epochs=5, lr=0.1)
        self.factory = Factory(config, self.features, CLASSES, jax.random.key(1))
        heads = [self.factory.seed(seed, self.draw(seed)).weights for seed in range(100, 104)]
        self.normalisation = Normalisation.of(statistics.of(np.concatenate(heads)))

    def draw(self, seed: int) -> sampling.Sets:
        return sampling.balanced(self.labels, seed, 1, SETS)

    def made(self) -> Made:
        return Made(self.factory, self.draw, SETS)

    def stored(self, folder: Path, seeds: int) -> Stored:
        metadata = Metadata(self.factory.layout, SETS, seeds, "float32", {})
        store = Store.create(folder, metadata)
        for seed in range(seeds):
            store.write(seed, *self.factory.seed(seed, self.draw(seed)))()
        return Stored(store, self.draw)


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return training.batch_mesh(BATCH)


@pytest.fixture(scope="module")
def reconstructor(world: World) -> network.Reconstructor:
    inputs = len(world.normalisation.varying)
    return network.make(network.Config(inputs, width=2, classes=CLASSES))


@pytest.fixture(scope="module")
def train(world: World, reconstructor: network.Reconstructor, mesh: Mesh) -> Any:
    people = reconstruction.population(world.images, world.labels, mesh)

    def run(source: Any = None, config: Config = CONFIG, **settings: Any) -> State:
        return reconstruction.run(
            reconstructor,
            config,
            world.normalisation,
            KEY,
            people,
            source or world.made(),
            mesh=mesh,
            **settings,
        )

    return run


def assert_same(ours: Any, theirs: Any, tolerance: float = 0) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("told", [True, False], ids=["told a class", "any image"])
def test_a_step_is_the_loss_of_the_next_shadow_models(world: World, told: bool) -> None:
    """Against the same images, gathered and compared here."""
    inputs = len(world.normalisation.varying)
    classes = CLASSES if told else None
    net = network.make(network.Config(inputs, width=2, classes=classes))
    config = dataclasses.replace(CONFIG, average=0.75)
    sets = world.draw(3)
    weights = world.factory.seed(3, sets).weights
    shadows = Shadows(jnp.asarray(weights), jnp.asarray(sets.indices), jnp.asarray(6))
    people = Population(jnp.asarray(world.images), jnp.asarray(world.labels))
    state = reconstruction.init(net, config, KEY)._replace(step=jnp.asarray(7))
    step = jax.jit(reconstruction.make_step(net, config, world.normalisation))
    after, info = step(KEY, state, (people, shadows))

    # The second step of the seed: rows 4 to 7.
    kept = world.normalisation
    x = (weights[4:8][:, kept.varying] - kept.mean) / kept.std
    indices = sets.indices[4:8]
    truth = world.images[indices].astype(np.float32) / 127.5 - 1
    labels = members = None
    if told:
        drawn = jax.random.randint(jax.random.fold_in(KEY, 7), (BATCH,), 0, CLASSES)
        labels = world.labels[indices[np.arange(BATCH), np.asarray(drawn)]]
        members = world.labels[indices] == labels[:, None]
        assert (members.sum(1) == 1).all()

    def loss(parameters: Any) -> Any:
        variables = {**state.variables}
        merged = with_parameters(variables, parameters)
        found, _ = net.train_apply(merged, jnp.asarray(x, jnp.float32), labels)
        return losses.set_loss(found, truth, members).mean(), found

    before = network.parameters(state.variables)
    (value, found), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(before)
    np.testing.assert_allclose(info.loss, value, rtol=1e-5)
    apart = np.square(np.asarray(found)[:, None] - truth).mean((2, 3, 4))
    apart = apart if members is None else np.where(members, apart, np.inf)
    np.testing.assert_allclose(info.terms["mse"], apart.min(1).mean(), rtol=1e-5)
    # Adam's first update is the rate times the gradient's sign, but where that is tiny.
    now = network.parameters(after.variables)
    for old, new, slope, kept_average in zip(
        *map(jax.tree.leaves, (before, now, gradient, after.average)), strict=True
    ):
        clear = np.abs(slope) > 1e-5
        moved = np.asarray(new - old)
        np.testing.assert_allclose(moved[clear], -1e-3 * np.sign(slope)[clear], rtol=0.02)
        np.testing.assert_allclose(kept_average, 0.75 * old + 0.25 * new, rtol=1e-5, atol=1e-7)
    assert int(after.step) == 8


def test_fresh_models_train_like_stored_ones(world: World, train: Any, tmp_path: Path) -> None:
    """Step for step, and the store begins again after its last seed."""
    told: dict[str, list[Any]] = {"made": [], "stored": []}

    def note(name: str) -> Any:
        return lambda chunk: told[name].append(chunk.metrics["loss"])

    fresh = train(callback=note("made"))
    stored = train(world.stored(tmp_path / "four", 4), callback=note("stored"))
    assert_same(fresh, stored)
    assert_same(*(np.concatenate(told[name]) for name in ("made", "stored")))
    again = train(world.stored(tmp_path / "two", 2))
    assert float(jnp.abs(jax.tree.leaves(again.variables)[0]).max()) > 0
    assert not all(
        np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (again, fresh)), strict=True)
    )


@pytest.mark.parametrize("loop", ["python", "scan"])
@pytest.mark.parametrize("cut", [2, 3])
def test_a_cut_run_ends_like_one_that_was_not(train: Any, loop: str, cut: int) -> None:
    whole = train(loop=loop)
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) >= cut

    first = train(loop=loop, should_stop=stop)
    assert int(first.step) == cut
    assert_same(train(loop=loop, state=first), whole)


def test_loops_find_the_same(train: Any) -> None:
    """By the losses: Adam makes rounding into steps where a bias before BatchNorm has no slope."""
    config = dataclasses.replace(CONFIG, steps=8)  # scans of two
    found: dict[str, list[float]] = {"scan": [], "python": []}
    for loop, seen in found.items():
        note = seen.extend
        train(config=config, loop=loop, callback=lambda c, note=note: note(c.metrics["loss"]))
    assert len(found["scan"]) == 8
    np.testing.assert_allclose(found["scan"], found["python"], rtol=2e-3)


def test_every_seed_is_made_once(world: World, train: Any) -> None:
    made, asked = world.made(), []

    class Counted:
        sets = SETS

        def __call__(self, seed: int) -> Any:
            asked.append(seed)
            return made(seed)

    train(Counted())
    assert asked == [0, 1, 2, 3]
    assert made.seconds > 0


def test_it_learns_what_classes_look_like(
    world: World, train: Any, reconstructor: network.Reconstructor
) -> None:
    """From weights alone, of heads that it has not seen."""
    config = dataclasses.replace(CONFIG, steps=300, lr=1e-2, average=0.9)
    state = train(config=config, clock=optimise.Clock())
    sets = world.draw(50)
    x = world.normalisation.normalised(world.factory.seed(50, sets).weights)
    labels = np.arange(SETS) % CLASSES
    found = reconstruction.reconstruct(
        reconstructor, reconstruction.averaged(state), x, labels, batch=4
    )
    assert found.shape == (SETS, 32, 32, 1)
    truth = world.images[sets.indices[np.arange(SETS), labels]] / 127.5 - 1
    errors = np.square(found - truth).mean((1, 2, 3))
    overall = np.square(world.images.mean(0) / 127.5 - 1 - truth).mean((1, 2, 3))
    assert errors.mean() < 0.5 * overall.mean()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 11}, "seeds of 10 shadow models fill no batch of 11"),
        ({"batch": 0}, "batch"),
        ({"average": 1.0}, "average"),
        ({"lr": 0.0}, "lr"),
    ],
)
def test_runs_that_cannot_be(train: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(config=dataclasses.replace(CONFIG, **change))


def test_other_weights_and_other_images_are_refused(world: World, mesh: Mesh) -> None:
    other = network.make(network.Config(5, width=2, classes=None))
    people = reconstruction.population(world.images, world.labels, mesh)
    with pytest.raises(ValueError, match="takes 5 numbers, but 27 coordinates of the heads vary"):
        reconstruction.run(other, CONFIG, world.normalisation, KEY, people, world.made(), mesh=mesh)
    with pytest.raises(ValueError, match="bytes with a label each, not float32"):
        reconstruction.population(world.images.astype(np.float32), world.labels, mesh)


SHARED = """
import json, sys
sys.path[:0] = ["tests", "tests/reconstruct"]
from test_reconstructor_training import *
from jinv import parallel

world = World()
net = network.make(network.Config(len(world.normalisation.varying), width=2, classes=CLASSES))
losses = []
for count in (1, 2):
    mesh = parallel.mesh(parallel.BATCH, jax.devices()[:count])
    people = reconstruction.population(world.images, world.labels, mesh)
    state = reconstruction.run(
        net, dataclasses.replace(CONFIG, steps=3), world.normalisation, KEY, people, world.made(),
        mesh=mesh, callback=lambda chunk: losses.extend(chunk.metrics["loss"].tolist()),
    )
print(json.dumps(losses))
"""


def test_two_devices_share_a_batch(run_python: Any) -> None:
    """BatchNorm's moments are those of the whole batch."""
    found = run_python(SHARED, devices=2)
    np.testing.assert_allclose(found[:3], found[3:], rtol=1e-3)

"""Training against PyTorch's own loop; batches, augmentation, resuming, devices."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import test_net
import tiny
import weights_convert
from jinv import image, optimise, training
from jinv.data import Dataset
from jinv.image import Preprocessing
from jinv.models import resnet_cifar
from jinv.net import Net, parameters
from jinv.training import Config

CLASSES = tuple("abcde")
CONFIG = Config(epochs=3, batch=4, warmup=2, flip=True, crop=1)
SPACE = Preprocessing(size=12, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))


def dataset(count: int = 20, channels: int = 3, size: int = 12) -> Dataset:
    """Noise around a brightness that tells the class."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, count, np.int32)
    images = rng.integers(0, 56, (count, size, size, channels)) + 50 * labels[:, None, None, None]
    return Dataset(images.astype(np.uint8), labels, CLASSES)


@pytest.fixture(scope="module")
def net() -> Net:
    model = resnet_cifar.ResNet((1, 1), widths=(4, 8), classes=5, rngs=nnx.Rngs(0))
    return Net.from_nnx(model, SPACE, name="tiny")


def train(net: Net, config: Config, data: Dataset, **kwargs: Any) -> training.State:
    mesh = training.batch_mesh(config.batch)
    return training.run(net, config, jax.random.key(1), data, mesh=mesh, **kwargs)


# --- the step ------------------------------------------------------------------------------------

CONFIGS = {
    "sgd": Config(nesterov=False, weight_decay=1e-2),
    "nesterov": Config(weight_decay=1e-2, warmup=2, lr_floor=0.1),
    "plain": Config(momentum=0.0, nesterov=False, weight_decay=0.0, label_smoothing=0.1),
    "adam": Config(optimizer="adam", lr=1e-2, weight_decay=0.1, warmup=3),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_steps_equal_torch(net: Net, name: str) -> None:
    """Every tensor of the state_dict after four steps, in double precision; loss and accuracy."""
    torch = pytest.importorskip("torch")
    import torch_peers

    config, data, steps = CONFIGS[name], dataset(), 4
    peer = torch_peers.CifarResNet((1, 1), (4, 8), "B", classes=5).double().train()
    start = weights_convert.from_flax(net.variables)
    peer.load_state_dict({key: torch.tensor(value) for key, value in start.items()})
    schedule = optimise.warm_cosine(config.lr, config.warmup, steps, config.lr_floor)
    if config.optimizer == "adam":
        theirs: Any = torch.optim.AdamW(peer.parameters(), weight_decay=config.weight_decay)
    else:
        theirs = torch.optim.SGD(
            peer.parameters(),
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
        )
    criterion = torch.nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
    with jax.enable_x64(True):
        ours = training.make_optimizer(config, steps)
        wide = jax.tree.map(
            lambda leaf: (
                leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
            ),
            net.variables,
        )
        state = training.init(dataclasses.replace(net, variables=wide), ours)
        step = jax.jit(training.make_step(net, config, ours))
        for i in range(steps):
            chosen = slice(5 * i, 5 * i + 5)
            state, info = step(jax.random.key(0), state, (data.images[chosen], data.labels[chosen]))

            for group in theirs.param_groups:
                group["lr"] = float(schedule(jnp.asarray(i, jnp.int32)))  # rounded as ours is
            pixels = (data.images[chosen] / 255 - np.array(SPACE.mean)) / np.array(SPACE.std)
            logits = peer(torch.tensor(pixels.transpose(0, 3, 1, 2).copy()))
            targets = torch.tensor(data.labels[chosen], dtype=torch.int64)
            loss = criterion(logits, targets)
            theirs.zero_grad()
            loss.backward()
            theirs.step()
            assert float(info.loss) == pytest.approx(loss.item(), rel=1e-6)
            right = (logits.argmax(1) == targets).double().mean().item()
            assert float(info.terms["accuracy"]) == pytest.approx(right)
        found = weights_convert.from_flax(jax.device_get(state.variables))
    expected = {key: value.detach().numpy() for key, value in peer.state_dict().items()}
    assert found.keys() == expected.keys()
    moved = 0
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-9, atol=1e-12, err_msg=key)
        moved += not np.allclose(value, start[key], rtol=1e-3)
    assert moved == len(expected)  # the comparison is of something
    assert found["layer2.0.shortcut.1.num_batches_tracked"] == steps


def differing(before: Any, after: Any) -> set[str]:
    """Torch's names of the tensors that are not bit-equal."""
    states = [weights_convert.from_flax(jax.device_get(tree)) for tree in (before, after)]
    assert states[0].keys() == states[1].keys()
    return {name for name, value in states[0].items() if not np.array_equal(value, states[1][name])}


def test_only_the_head_learns(net: Net) -> None:
    state = train(net, dataclasses.replace(CONFIG, learns="head"), dataset())
    assert differing(net.variables, state.variables) == {"linear.weight", "linear.bias"}


def test_all_but_batch_norm_learns(net: Net) -> None:
    """Its parameters, statistics and counters are bit-equal; everything else has moved."""
    state = train(net, dataclasses.replace(CONFIG, learns="all_but_batch_norm"), dataset())
    names = set(weights_convert.from_flax(net.variables))
    norms = {name for name in names if ".bn" in f".{name}" or ".shortcut.1." in name}
    assert len(norms) == 6 * 5
    assert differing(net.variables, state.variables) == names - norms


@pytest.mark.parametrize("make", [test_net.from_nnx, test_net.from_linen])
def test_what_learns_in_any_network(make: test_net.Make) -> None:
    own = make(test_net.own_model())

    def layers(learns: training.Learns) -> dict[str, int]:
        tree = training.learned(own, own.variables, learns)
        return {name: len(layer) for name, layer in tree.get("params", tree).items()}

    rest = {"z_conv": 2, "d_conv": 2, "c_hidden": 2, "a_head": 2}
    assert layers("all") == {**rest, "y_norm": 2, "m_norm": 2}
    assert layers("all_but_batch_norm") == rest
    assert layers("head") == {"a_head": 2}


def test_without_a_head_it_cannot_learn(net: Net) -> None:
    with pytest.raises(ValueError, match="has no head"):
        training.learned(dataclasses.replace(net, head=None), net.variables, "head")


@pytest.mark.parametrize("learns", ["head", "all_but_batch_norm"])
def test_steps_with_frozen_norms_equal_torch(net: Net, learns: training.Learns) -> None:
    """Three steps of a torch loop in eval mode, whose optimizer knows only what learns."""
    torch = pytest.importorskip("torch")
    import torch_peers

    config = Config(learns=learns, weight_decay=1e-2, warmup=2)
    data, steps = dataset(), 3
    rng = np.random.default_rng(0)
    # Running statistics that are not those of a new network.
    start = {
        key: value + rng.uniform(0, 0.5, value.shape) if ".running" in key else value
        for key, value in weights_convert.from_flax(net.variables).items()
    }
    peer = torch_peers.CifarResNet((1, 1), (4, 8), "B", classes=5).double().eval()
    peer.load_state_dict({key: torch.tensor(value) for key, value in start.items()})
    norms = [m for m in peer.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    frozen = {id(p) for norm in norms for p in norm.parameters()}
    chosen = [p for p in peer.parameters() if id(p) not in frozen]
    if learns == "head":
        chosen = list(peer.linear.parameters())
    theirs = torch.optim.SGD(chosen, 0.1, momentum=0.9, nesterov=True, weight_decay=1e-2)
    schedule = optimise.warm_cosine(config.lr, config.warmup, steps, config.lr_floor)

    def double(leaf: Any) -> jax.ShapeDtypeStruct:
        real = jnp.issubdtype(leaf.dtype, jnp.floating)
        return jax.ShapeDtypeStruct(leaf.shape, np.float64 if real else leaf.dtype)

    with jax.enable_x64(True):
        ours = training.make_optimizer(config, steps)
        variables = weights_convert.to_flax(start, jax.tree.map(double, net.variables))
        state = training.init(dataclasses.replace(net, variables=variables), ours, learns)
        step = jax.jit(training.make_step(net, config, ours))
        for i in range(steps):
            part = slice(5 * i, 5 * i + 5)
            state, info = step(jax.random.key(0), state, (data.images[part], data.labels[part]))
            for group in theirs.param_groups:
                group["lr"] = float(schedule(jnp.asarray(i, jnp.int32)))
            pixels = (data.images[part] / 255 - np.array(SPACE.mean)) / np.array(SPACE.std)
            logits = peer(torch.tensor(pixels.transpose(0, 3, 1, 2).copy()))
            targets = torch.tensor(data.labels[part], dtype=torch.int64)
            loss = torch.nn.functional.cross_entropy(logits, targets)
            peer.zero_grad()
            loss.backward()
            theirs.step()
            assert float(info.loss) == pytest.approx(loss.item(), rel=1e-6)
        found = weights_convert.from_flax(jax.device_get(state.variables))
    for key, value in peer.state_dict().items():
        np.testing.assert_allclose(found[key], value.numpy(), rtol=1e-9, atol=1e-12, err_msg=key)
    assert not np.allclose(found["linear.weight"], start["linear.weight"], rtol=1e-3)


def test_attributes_equal_torch(net: Net) -> None:
    """Sigmoid cross-entropy and the share of attributes that are right; also of held-out images."""
    torch = pytest.importorskip("torch")

    marks = np.random.default_rng(0).integers(0, 2, (10, 5), np.int32)
    data = Dataset(dataset(10).images, marks, CLASSES)
    images = image.from_bytes(data.images, SPACE)
    logits = torch.tensor(np.asarray(jax.jit(net.apply)(net.variables, images).logits))
    targets = torch.tensor(marks, dtype=torch.float32)
    right = ((logits > 0) == (targets > 0)).double().mean().item()
    for smoothing in (0.0, 0.2):
        config = Config(learns="head", label_smoothing=smoothing)
        ours = training.make_optimizer(config, 1)
        step = jax.jit(training.make_step(net, config, ours))
        state = training.init(net, ours, "head")
        _, info = step(jax.random.key(0), state, (data.images, data.labels))
        smooth = targets * (1 - smoothing) + smoothing / 2
        expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, smooth)
        assert float(info.loss) == pytest.approx(expected.item(), rel=1e-5)
        assert float(info.terms["accuracy"]) == pytest.approx(right)
    accuracy = training.make_accuracy(net, training.batch_mesh(4), 4)
    assert accuracy(net.variables, data) == pytest.approx(right)


def test_images_are_brought_to_the_networks_size(net: Net) -> None:
    """On the device; training and accuracy are those of images that were resized before."""
    small = dataset(9, size=8)
    resized = dataclasses.replace(small, images=np.asarray(image.resize_bytes(small.images, 12)))
    assert resized.images.shape == (9, 12, 12, 3)
    config = Config(epochs=1, batch=4, warmup=1)
    one, other = train(net, config, small), train(net, config, resized)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    accuracy = training.make_accuracy(net, training.batch_mesh(4), 4)
    assert accuracy(one.variables, small) == accuracy(one.variables, resized)


@pytest.mark.parametrize("make", [test_net.from_nnx, test_net.from_linen])
def test_running_statistics_of_any_network(make: test_net.Make) -> None:
    """r <- 0.9 r + 0.1 b with n / (n - 1) times the biased variance; twice for a shared layer."""
    own = make(test_net.own_model())
    images = test_net.batch()
    moments = jax.jit(own.apply)(own.variables, images).moments
    values = [layer.size // 6 for layer in test_net.by_hand(test_net.own_model(), images)[2]]
    assert own.counts is not None
    assert own.counts(images.shape) == tuple(values)
    found = training.with_statistics(own, own.variables, moments, images.shape, 0.1)

    def mixed(old: Any, seen: Any, n: int) -> tuple[Any, Any]:
        return 0.9 * old[0] + 0.1 * seen.mean, 0.9 * old[1] + 0.1 * seen.var * n / (n - 1)

    before = own.running_moments()
    once = mixed(before[0], moments[0], values[0])
    twice = mixed(mixed(before[1], moments[1], values[1]), moments[2], values[2])
    for new, expected in zip(own.running_moments(found), (once, twice, twice), strict=True):
        np.testing.assert_allclose(new.mean, expected[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(new.var, expected[1], rtol=1e-5, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, parameters(own), parameters(own, found))


def test_batchnorm_cannot_learn_from_one_value(net: Net) -> None:
    with pytest.raises(ValueError, match=r"one value a channel.*\(1, 2, 2, 3\)"):
        training.with_statistics(net, net.variables, net.running_moments(), (1, 2, 2, 3), 0.1)


def test_gray_images_are_equal_channels(net: Net) -> None:
    gray = dataset(8, channels=1)
    rgb = dataclasses.replace(gray, images=gray.images.repeat(3, -1))
    config = Config(epochs=1, batch=4, warmup=1)
    one, three = train(net, config, gray), train(net, config, rgb)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(three), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


# --- batches and augmentation --------------------------------------------------------------------


def test_an_epoch_takes_every_image_once() -> None:
    key = jax.random.key(0)
    order = list(itertools.islice(training.batches(key, 23, 5), 8))
    epochs = np.concatenate(order[:4]), np.concatenate(order[4:])
    for epoch in epochs:
        assert len(epoch) == len(set(epoch)) == 20
        assert set(epoch) <= set(range(23))
    assert list(epochs[0]) != list(epochs[1])
    for start in (1, 4, 6):
        again = itertools.islice(training.batches(key, 23, 5, start), 8 - start)
        np.testing.assert_array_equal(list(again), order[start:])
    with pytest.raises(ValueError, match="4 images fill no batch of 5"):
        next(training.batches(key, 4, 5))


def test_every_image_is_moved_and_mirrored_for_itself() -> None:
    """What comes out is one of the 2 x 9 pictures it can be; all of them come."""
    picture = np.random.default_rng(0).integers(1, 256, (6, 6, 3), np.uint8)
    padded = np.pad(picture, ((1, 1), (1, 1), (0, 0)))
    crops = [padded[y : y + 6, x : x + 6] for y in range(3) for x in range(3)]
    possible = {view.tobytes() for crop in crops for view in (crop, crop[:, ::-1])}
    config = Config(flip=True, crop=1)
    batch = jnp.asarray(np.stack([picture] * 200))
    found = np.asarray(training.augment(jax.random.key(0), batch, config))
    assert found.dtype == np.uint8
    assert {one.tobytes() for one in found} == possible
    mirrored = np.asarray(training.augment(jax.random.key(0), batch, Config(flip=True)))
    count = sum(one.tobytes() == picture[:, ::-1].tobytes() for one in mirrored)
    assert 70 < count < 130  # 100 +- 4.2 standard deviations
    untouched = training.augment(jax.random.key(0), batch, Config())
    np.testing.assert_array_equal(untouched, batch)


def test_every_step_draws_anew_from_key_and_number(net: Net) -> None:
    """The loss of the same images is the same at the same step only."""
    data = dataset(8)
    transform = training.make_optimizer(CONFIG, 10)
    step = jax.jit(training.make_step(net, CONFIG, transform))
    state = training.init(net, transform)

    def loss(key: int, number: int) -> float:
        now = state._replace(step=jnp.asarray(number, jnp.int32))
        return float(step(jax.random.key(key), now, (data.images, data.labels))[1].loss)

    assert loss(0, 3) == loss(0, 3)
    assert len({loss(0, 3), loss(0, 4), loss(1, 3)}) == 3


def test_random_crop_moves_the_whole_batch() -> None:
    images = tiny.noise((2, 5, 7, 3))
    found = np.asarray(image.random_crop(jax.random.key(3), images, 2))
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    places = [padded[:, y : y + 5, x : x + 7] for y in range(5) for x in range(5)]
    assert sum(np.array_equal(found, place) for place in places) == 1


# --- the run -------------------------------------------------------------------------------------


def same(a: training.State, b: training.State) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))


@pytest.mark.parametrize("cut", [5, 12])
def test_resumed_equals_uninterrupted(net: Net, cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut within the second epoch and the third, of five steps each."""
    monkeypatch.setattr(optimise, "LOOK", 1e9)
    told: list[tuple[int, np.ndarray]] = []

    def note(chunk: optimise.Chunk) -> None:
        told.append((chunk.start, chunk.metrics["loss"]))

    whole = train(net, CONFIG, dataset(), callback=note)
    assert int(whole.step) == 15
    assert [start for start, _ in told] == [0, 5, 10]
    losses = np.concatenate([loss for _, loss in told])
    told.clear()
    asked = itertools.count(1)
    first = train(net, CONFIG, dataset(), callback=note, should_stop=lambda: next(asked) >= cut)
    assert int(first.step) == cut
    resumed = train(net, CONFIG, dataset(), callback=note, state=first)
    assert same(resumed, whole)
    np.testing.assert_array_equal(np.concatenate([loss for _, loss in told]), losses)


def test_it_learns_and_leaves_the_network_alone(net: Net) -> None:
    before = jax.tree.map(np.asarray, net.variables)
    data = dataset(40)
    config = Config(epochs=30, batch=8, warmup=5)
    losses: list[float] = []
    state = train(net, config, data, callback=lambda c: losses.extend(c.metrics["loss"]))
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    assert jax.tree.all(jax.tree.map(np.array_equal, before, net.variables))
    mesh = training.batch_mesh(16)
    accuracy = training.make_accuracy(net, mesh, 16)
    held = dataset(37)
    share = accuracy(state.variables, held)
    logits = jax.jit(net.apply)(state.variables, image.from_bytes(held.images, SPACE)).logits
    assert share == float(np.mean(np.asarray(logits).argmax(-1) == held.labels))
    assert share > 0.8


def test_a_step_compiles_once(net: Net) -> None:
    clock = optimise.Clock()
    train(net, CONFIG, dataset(), clock=clock)
    assert clock.steps == 15
    assert clock.compiling > 0
    assert clock.stepping > 0


def test_a_loss_that_is_not_finite_is_told(net: Net) -> None:
    seen: list[tuple[int, Any]] = []
    with pytest.raises(optimise.NonFiniteError, match="not finite at step"):
        train(
            net,
            Config(epochs=3, batch=4, lr=1e25, warmup=0),
            dataset(),
            callback=lambda c: seen.append((len(c.metrics["loss"]), c.finite)),
        )
    assert seen[-1][0] < 5
    assert seen[-1][1] is False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs"),
        ({"lr": 0.0}, "lr"),
        ({"crop": -1}, "crop"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"momentum": 0.0}, "nesterov"),
        ({"statistics_momentum": 0.0}, "statistics_momentum"),
        ({"learns": "tail"}, "learns must be one of all, head, all_but_batch_norm"),
        ({"optimizer": "adamm"}, "optimizer must be one of sgd, adam, not 'adamm'"),
        (
            {"optimizer": "adam", "momentum": 0.5},
            "momentum: 0.5 plays no part: optimizer is 'adam'",
        ),
        ({"learns": "head", "statistics_momentum": 0.5}, "statistics_momentum: 0.5 plays no part"),
    ],
)
def test_configs_that_make_no_sense(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**change)


def test_devices_share_a_batch(run_python: Any) -> None:
    """Four devices with the moments of the whole batch do what one does."""
    code = """
import dataclasses, json, sys
sys.path[:0] = ["tests", "tests/training"]
import jax, numpy as np
import tiny
from test_supervised import CONFIG, dataset
from jinv import parallel, training
from jinv.data import Dataset

data = dataset(20, size=16)
net = tiny.network(classes=5)
key = jax.random.key(0)
one = parallel.mesh(parallel.BATCH, jax.devices()[:1])
four = training.batch_mesh(4)
# The network's own is 1: the statistics of the last batch, which rounding moves far.
config = dataclasses.replace(CONFIG, statistics_momentum=0.1)
states = [training.run(net, config, key, data, mesh=mesh) for mesh in (one, four)]
far = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), *states)
shares = [
    training.make_accuracy(net, mesh, 4)(state.variables, data)
    for mesh, state in zip((one, four), states)
]
print(json.dumps([four.size, training.batch_mesh(6).size, max(jax.tree.leaves(far)), shares]))
"""
    size, even, far, shares = run_python(code)
    assert size == 4
    assert even == 3
    assert far < 5e-4  # rounding, which 15 steps make larger
    assert shares[0] == shares[1]

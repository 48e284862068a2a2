"""Features read from a head's weights are those that it was trained on, or are not believed."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jinv.reconstruct import identification, recovery
from jinv.reconstruct.recovery import Prior, Recovered, recover
from jinv.shadow import Config, Privacy, heads, make_train, rowspace
from jinv.shadow.config import sgd

CLASSES, WIDTH, SETS = 4, 96, 12
CONFIG = Config(classes=CLASSES, epochs=30, lr=0.02, init_std=1e-3, weight_decay=1e-3)
LABELS = np.arange(CLASSES)


@functools.cache
def images() -> tuple[np.ndarray, np.ndarray]:
    """Features after a ReLU, half of them 0, that are not independent; and their classes."""
    rng = np.random.default_rng(0)
    labels = np.arange(2000) % CLASSES
    mixing = rng.normal(size=(24, WIDTH)) / 5
    latent = rng.normal(size=(CLASSES, WIDTH))[labels]
    latent = latent + rng.normal(size=(2000, 24)) @ mixing + 0.5 * rng.normal(size=(2000, WIDTH))
    return np.maximum(latent, 0).astype(np.float32), labels


@functools.cache
def prior() -> Prior:
    features, labels = images()
    return Prior.of(features[1000:], labels[1000:], CLASSES)


def sets(class_size: int = 1, count: int = SETS) -> np.ndarray:
    """(S, N) positions of victims' images, which the attacker does not have."""
    members = np.arange(1000).reshape(-1, CLASSES)[: count * class_size]
    return members.reshape(count, class_size, CLASSES).transpose(0, 2, 1).reshape(count, -1)


@functools.cache
def trained(config: Config, class_size: int = 1) -> tuple[np.ndarray, np.ndarray]:
    labels = np.repeat(LABELS, class_size)
    train = jax.jit(jax.vmap(make_train(config), (0, 0, None)))
    keys = jax.random.split(jax.random.key(1), SETS)
    found = train(keys, jnp.asarray(images()[0][sets(class_size)]), jnp.asarray(labels))
    return np.asarray(found.parameters["weight"]), np.asarray(found.parameters["bias"])


def read(config: Config = CONFIG, assumed: Config | None = None) -> Recovered:
    return recover(*trained(config), assumed or config, LABELS, prior())


def errors(found: Recovered) -> np.ndarray:
    """(S, N) relative to the class means', as `Recovered.error`."""
    true = images()[0][sets()]
    spread = np.sqrt(prior().variances[LABELS].sum(-1))
    return np.linalg.norm(found.features - true, axis=-1) / spread


def test_features_are_exact_but_for_one_vector_without_initial_weights() -> None:
    found = read(dataclasses.replace(CONFIG, init_std=1e-8))
    assert found.believable.all()
    true = images()[0][sets()]
    sizes = np.linalg.svd(found.features - true, compute_uv=False)
    sizes /= np.linalg.norm(true, axis=(1, 2))[:, None]
    assert np.median(sizes[:, 1]) < 0.005
    assert np.median(sizes[:, 0]) < 0.15  # and that one is known from zeros
    assert np.median(errors(found)) < 0.25


def test_expected_errors_are_the_true_ones() -> None:
    found = read()
    assert found.believable.all()
    assert 0.6 < np.sqrt(np.square(errors(found)).mean() / np.square(found.error).mean()) < 1.4
    assert (found.error < 0.5).all()


def test_loss_is_the_true_one() -> None:
    train = jax.jit(jax.vmap(make_train(CONFIG), (0, 0, None)))
    keys = jax.random.split(jax.random.key(1), SETS)
    true = train(keys, jnp.asarray(images()[0][sets()]), jnp.asarray(LABELS)).loss
    np.testing.assert_allclose(read().loss, true, rtol=0.05)


def test_momentum_is_simulated() -> None:
    config = dataclasses.replace(CONFIG, momentum=0.9, lr=0.003)
    assert np.median(errors(read(config))) < 0.2


def test_heads_of_torch_are_read_as_well() -> None:
    import torch

    generator = torch.Generator().manual_seed(0)
    weights, biases = [], []
    for chosen in sets():
        layer = torch.nn.Linear(WIDTH, CLASSES)
        torch.nn.init.normal_(layer.weight, std=CONFIG.init_std, generator=generator)
        torch.nn.init.zeros_(layer.bias)
        optimizer = torch.optim.SGD(
            layer.parameters(), lr=CONFIG.lr, weight_decay=CONFIG.weight_decay
        )
        x, y = torch.tensor(images()[0][chosen]), torch.tensor(LABELS)
        for _ in range(CONFIG.epochs):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(layer(x), y).backward()
            optimizer.step()
        weights.append(layer.weight.detach().numpy())
        biases.append(layer.bias.detach().numpy())
    found = recover(np.stack(weights), np.stack(biases), CONFIG, LABELS, prior())
    assert found.believable.all()
    assert np.median(errors(found)) == pytest.approx(np.median(errors(read())), rel=0.3)


def test_heads_together_are_heads_alone() -> None:
    weights, bias = trained(CONFIG)
    together = read()
    alone = recover(weights[3:4], bias[3:4], CONFIG, LABELS, prior())
    for name, one, all_ in zip(Recovered._fields, alone, together, strict=True):
        np.testing.assert_allclose(one[0], all_[3], rtol=1e-2, atol=1e-2, err_msg=name)


def test_order_of_labels_does_not_matter() -> None:
    order = np.array([2, 0, 3, 1])
    turned = recover(*trained(CONFIG), CONFIG, LABELS[order], prior())
    difference = np.linalg.norm(turned.features - read().features[:, order], axis=-1)
    assert np.median(difference / np.linalg.norm(turned.features, axis=-1)) < 0.05


def test_wrong_settings_are_not_believed() -> None:
    for wrong in ({"lr": 0.06}, {"lr": 0.01}, {"epochs": 15}, {"epochs": 60}):
        found = read(assumed=dataclasses.replace(CONFIG, **wrong))
        assert not found.believable.any()
        assert "lr, epochs" in "".join(found.doubts())
    found = read(assumed=dataclasses.replace(CONFIG, init_std=3e-3))
    assert not found.believable.any()
    assert "init_std" in found.doubts()[0]


def test_other_training_is_not_believed() -> None:
    adam = Config(classes=CLASSES, epochs=30, optimizer="adam", lr=0.01, init_std=1e-3)
    private = dataclasses.replace(CONFIG, privacy=Privacy(1.0, 4.0))
    for other in (adam, private):
        found = read(other, CONFIG)
        assert not found.believable.any()
        assert all("DP" in doubt or "lr" in doubt for doubt in found.doubts())


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Config(classes=CLASSES, optimizer="adam"), "Adam divides"),
        (Config(head="binary"), "hidden layer"),
        (Config(classes=CLASSES, batch=2), "mini-batches"),
        (Config(classes=CLASSES, privacy=Privacy(1.0, 1.0)), "noise"),
    ],
)
def test_what_cannot_be_read_is_refused(config: Config, reason: str) -> None:
    weights, bias = np.ones((2, CLASSES, WIDTH)), np.ones((2, CLASSES))
    assert reason in recovery.unrecoverable(config, len(LABELS))
    with pytest.raises(ValueError, match=reason):
        recover(weights, bias, config, LABELS, prior())
    assert recovery.unrecoverable(Config(classes=CLASSES, batch=4), 4) == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": np.ones((CLASSES, WIDTH))}, "are not \\(S, C, D\\)"),
        ({"weights": np.ones((1, CLASSES, 5))}, "prior's classes"),
        ({"weights": np.full((1, CLASSES, WIDTH), np.nan)}, "not all finite"),
        ({"labels": np.array([0, 7])}, "from 0 to 3"),
        ({"labels": np.zeros(200, int)}, "more features than examples"),
        ({"config": Config(classes=5)}, "4 classes, the config 5"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    weights, bias = np.ones((1, CLASSES, WIDTH)), np.ones((1, CLASSES))
    given = {"weights": weights, "bias": bias, "config": CONFIG, "labels": LABELS} | change
    with pytest.raises(ValueError, match=message):
        recover(**given, prior=prior())


def test_bad_priors_are_named() -> None:
    features, labels = images()
    with pytest.raises(ValueError, match="at least four"):
        Prior.of(features[:8], labels[:8], CLASSES)
    with pytest.raises(ValueError, match="do not vary"):
        Prior.of(np.ones((40, 3)), np.arange(40) % 2, 2)
    with pytest.raises(ValueError, match="not all finite"):
        Prior.of(np.full((40, 3), np.inf), np.arange(40) % 2, 2)


def test_features_may_be_negative() -> None:
    features, labels = images()
    signed = np.where(features == 0, -0.5, features)
    own = Prior.of(signed[1000:], labels[1000:], CLASSES)
    assert own.zeros is None
    train = jax.jit(jax.vmap(make_train(CONFIG), (0, 0, None)))
    heads_ = train(jax.random.split(jax.random.key(1), SETS), signed[sets()], LABELS).parameters
    found = recover(heads_["weight"], heads_["bias"], CONFIG, LABELS, own)
    error = np.linalg.norm(found.features - signed[sets()], axis=-1)
    error = error / np.sqrt(own.variances[LABELS].sum(-1))
    # One of four directions stays unknown.
    assert np.sqrt(np.square(error).mean()) == pytest.approx(0.5, abs=0.1)


def test_gradient_of_the_simulation_is_right() -> None:
    """Against differences, in float64."""
    head = heads.linear(3, 0.0)
    rng = np.random.default_rng(0)
    root, projected = rng.normal(size=(3, 3)), 0.1 * rng.normal(size=(3, 3))
    direction = rng.normal(size=(2, 3, 3))
    with jax.enable_x64(True):

        def rows(root: Any, projected: Any) -> Any:
            optimizer = sgd(0.3, 0.5, 0.01)
            others = {"bias": jnp.zeros(3)}
            moved = rowspace.simulate(
                head, optimizer, jnp.ones((9, 3)), others, root @ root.T, projected, np.arange(3)
            )
            return moved.rows, moved.others["bias"]

        _, exact = jax.jvp(rows, (root, projected), tuple(direction))
        ahead = rows(root + 1e-5 * direction[0], projected + 1e-5 * direction[1])
        behind = rows(root - 1e-5 * direction[0], projected - 1e-5 * direction[1])
        for a, b, c in zip(exact, ahead, behind, strict=True):
            np.testing.assert_allclose(a, (b - c) / 2e-5, rtol=1e-6, atol=1e-8)


def test_learning_rate_and_initial_weights_are_guessed() -> None:
    weights, bias = (a[:6] for a in trained(CONFIG))
    assumed = dataclasses.replace(CONFIG, init_std=0.5)
    best = recovery.guess(weights, bias, assumed, LABELS, prior(), lr=(0.005, 0.04, 0.013))[0]
    assert best.config.lr == pytest.approx(CONFIG.lr, rel=0.25)
    assert best.config.init_std == pytest.approx(CONFIG.init_std, rel=0.1)
    with pytest.raises(ValueError, match="no learning rate"):
        recovery.guess(weights, bias, CONFIG, LABELS, prior(), lr=())


@pytest.mark.parametrize(("class_size", "share"), [(1, 0.95), (2, 0.6)])
def test_training_images_are_identified(class_size: int, share: float) -> None:
    labels = np.repeat(LABELS, class_size)
    config = dataclasses.replace(CONFIG, init_std=1e-4)
    found = recover(*trained(config, class_size), config, labels, prior())
    candidates = images()[0][:1000]
    scores = identification.scores(found, labels, candidates, prior())
    assert scores.shape == (SETS, CLASSES, 1000)
    ranks = identification.ranks(scores[:, labels], sets(class_size))
    assert (ranks < class_size).mean() >= share
    # Those of other heads are not found.
    others = identification.ranks(scores[:, labels], np.roll(sets(class_size), 1, 0))
    assert (others < class_size).mean() < 0.05
    with pytest.raises(ValueError, match="are not"):
        identification.scores(found, labels, candidates[:, :5], prior())


def test_class_means_correct_sums_of_rows() -> None:
    """A is off by as much as its covariance says: the weights tell most of it."""
    config, labels = dataclasses.replace(CONFIG, init_std=1e-4), np.repeat(LABELS, 3)
    weights, bias = trained(config, 3)
    own = prior()
    fits = recovery.fit_all(weights, bias, config, labels, own)
    assert fits.covariance.shape == (SETS, 12, 12)
    assert not recovery.fit_all(*trained(config), config, LABELS, own).covariance.size
    known = tuple(map(jnp.asarray, (labels, own.means, own.scales, own.spread, own.basis)))
    rng, before, after, expected = np.random.default_rng(0), 0.0, 0.0, 0.0
    for rows, chosen in zip(fits.rows, sets(3), strict=True):
        made = rows.T @ images()[0][chosen]
        deviation = 0.2 * np.abs(rows).max()
        off = rng.normal(size=(CLASSES, CLASSES)) * deviation
        off -= off.mean(1, keepdims=True)
        covariance = np.eye(12) * deviation**2 / 6**2
        arrays = (made, rows + off[labels] / 3, 1e-6, covariance)
        found, remaining = recovery._corrected(*map(jnp.float32, arrays), *known)
        left = np.stack([(found - rows)[labels == c].sum(0) for c in LABELS])
        before += np.square(off).sum()
        after += np.square(left).sum()
        expected += float(jnp.einsum("coco->", remaining))
    assert after < 0.6 * before
    assert 0.3 < after / expected < 3

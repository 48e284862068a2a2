"""Shadow models: both ways of training give the same weights, and torch's."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

from jinv.shadow import Config, Privacy, heads, make_train, rowspace, training
from jinv.shadow.config import make_head, make_optimizer

KEY = jax.random.key(5)
BINARY: dict[str, Any] = {"head": "binary", "hidden": 8, "init_std": 0.2}


def problem(examples: int = 10, width: int = 64, classes: int = 10, seed: int = 0) -> tuple:
    """Features after a ReLU and their labels."""
    rng = np.random.default_rng(seed)
    features = np.maximum(rng.normal(0.3, 1, (examples, width)), 0)
    return features, np.arange(examples) % classes


def trained(config: Config, dtype: Any = np.float32, **problem_of: Any) -> dict[str, np.ndarray]:
    features, labels = problem(**problem_of)
    train = jax.jit(make_train(config))
    found = train(KEY, jnp.asarray(features, dtype), jnp.asarray(labels))
    return jax.device_get(found.parameters)


def difference(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    """Relative, over all parameters."""
    assert a.keys() == b.keys()
    left, right = (np.concatenate([np.ravel(t[name]) for name in a]) for t in (a, b))
    return float(np.linalg.norm(left - right) / np.linalg.norm(right))


@pytest.mark.parametrize("batch", [None, 4], ids=["full batch", "mini-batches"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"head": "linear"}, marks=pytest.mark.gpu),
        BINARY,
        BINARY | {"hidden": 4, "pos_weight": 10.0},
    ],
    ids=["linear", "binary", "CelebA"],
)
def test_row_space_equals_ordinary_training(
    settings: dict[str, Any], momentum: float, batch: int | None
) -> None:
    classes = 10 if settings["head"] == "linear" else 2
    config = Config(
        **{"lr": 0.05, "epochs": 20, "momentum": momentum, "weight_decay": 1e-2, "batch": batch}
        | settings
    )
    assert training.unsuitable(config, make_head(config)) == ""
    for dtype, tolerance in ((np.float32, 1e-5), (np.float64, 1e-10)):
        with jax.enable_x64(dtype == np.float64):
            plain = trained(
                dataclasses.replace(config, path="ordinary"), dtype, examples=11, classes=classes
            )
            quick = trained(
                dataclasses.replace(config, path="row_space"), dtype, examples=11, classes=classes
            )
        assert difference(quick, plain) < tolerance
    start = trained(dataclasses.replace(config, lr=1e-9), examples=11, classes=classes)
    assert difference(plain, start) > 0.03  # it has learned something


def torch_head(config: Config, width: int) -> Any:
    import torch

    if config.head == "linear":
        return torch.nn.Sequential(torch.nn.Linear(width, config.classes))
    return torch.nn.Sequential(
        torch.nn.Linear(width, config.hidden), torch.nn.ReLU(), torch.nn.Linear(config.hidden, 1)
    )


def torch_parameters(config: Config, network: Any) -> dict[str, np.ndarray]:
    names = ["weight", "bias"]
    if config.head == "binary":
        names = ["hidden.weight", "hidden.bias", "output.weight", "output.bias"]
    values = [p.detach().numpy() for p in network.parameters()]
    return dict(zip(names, values, strict=True))


def torch_training(config: Config, features: np.ndarray, labels: np.ndarray) -> Any:
    """The published loop, from our initial weights, in float64, full batch."""
    import torch

    network = torch_head(config, features.shape[1]).double()
    with jax.enable_x64(True):
        head = make_head(config)
        initial = head.init(jax.random.split(KEY, 3)[0], features.shape[1])
    for p, value in zip(network.parameters(), initial.values(), strict=True):
        p.data = torch.tensor(np.asarray(value).copy())
    x, y = torch.tensor(features), torch.tensor(labels)
    settings = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.optimizer == "sgd":
        optimizer: Any = torch.optim.SGD(network.parameters(), momentum=config.momentum, **settings)
    else:
        optimizer = torch.optim.Adam(network.parameters(), **settings)
    weight = torch.tensor(config.pos_weight)
    for _ in range(config.epochs):
        optimizer.zero_grad()
        if config.privacy is not None:
            private_gradient(config, network, x, y)
        elif config.head == "linear":
            torch.nn.functional.cross_entropy(network(x), y).backward()
        else:
            torch.nn.functional.binary_cross_entropy_with_logits(
                network(x)[:, 0], y.double(), pos_weight=weight
            ).backward()
        optimizer.step()
    return network


def private_gradient(config: Config, network: Any, x: Any, y: Any) -> None:
    """Opacus' arithmetic, example by example, without noise."""
    import torch

    assert config.privacy is not None
    total = [torch.zeros_like(p) for p in network.parameters()]
    for i in range(len(x)):
        loss = torch.nn.functional.cross_entropy(network(x[i : i + 1]), y[i : i + 1])
        found = torch.autograd.grad(loss, list(network.parameters()))
        norm = torch.sqrt(sum((g**2).sum() for g in found))
        factor = min(1.0, config.privacy.l2_norm_clip / float(norm))
        total = [t + factor * g for t, g in zip(total, found, strict=True)]
    for p, t in zip(network.parameters(), total, strict=True):
        p.grad = t / len(x)


@pytest.mark.parametrize(
    "settings",
    [
        {"momentum": 0.9},
        {"optimizer": "adam"},
        BINARY | {"pos_weight": 10.0},
        {"privacy": Privacy(0.0, 0.5, sampling=1.0)},
    ],
    ids=["momentum", "adam", "binary", "clipped"],
)
def test_training_equals_a_torch_loop(settings: dict[str, Any]) -> None:
    pytest.importorskip("torch")
    config = Config(**{"epochs": 30, "lr": 0.05, "weight_decay": 1e-2} | settings)
    features, labels = problem(classes=10 if config.head == "linear" else 2)
    expected = torch_parameters(config, torch_training(config, features, labels))
    with jax.enable_x64(True):
        train = jax.jit(make_train(dataclasses.replace(config, path="ordinary")))
        found = jax.device_get(train(KEY, jnp.asarray(features), jnp.asarray(labels)))
    assert difference(found.parameters, expected) < 1e-9


@pytest.mark.filterwarnings("ignore")  # opacus' own
def test_clipped_gradients_equal_those_of_opacus() -> None:
    torch, opacus = pytest.importorskip("torch"), pytest.importorskip("opacus")
    config = Config(lr=1.0, weight_decay=0.0, epochs=1, privacy=Privacy(0.0, 0.5, sampling=1.0))
    features, labels = problem()
    network = torch_head(config, features.shape[1]).double()
    with jax.enable_x64(True):
        initial = make_head(config).init(jax.random.split(KEY, 3)[0], features.shape[1])
        plain = dataclasses.replace(config, path="ordinary")
        found = make_train(plain)(KEY, jnp.asarray(features), jnp.asarray(labels)).parameters
        step = {name: np.asarray(initial[name] - found[name]) for name in found}
    for p, value in zip(network.parameters(), (initial["weight"], initial["bias"]), strict=True):
        p.data = torch.tensor(np.asarray(value))
    data = torch.utils.data.TensorDataset(torch.tensor(features), torch.tensor(labels))
    network, optimizer, loader = opacus.PrivacyEngine().make_private(
        module=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=1.0),
        data_loader=torch.utils.data.DataLoader(data, batch_size=len(features)),
        noise_multiplier=0.0,
        max_grad_norm=0.5,
        poisson_sampling=False,
    )
    for x, y in loader:
        torch.nn.functional.cross_entropy(network(x), y).backward()
        optimizer.pre_step()
    gradients = [p.grad.numpy() for p in network.parameters()]
    # opacus adds 1e-6 to every norm.
    assert difference(step, dict(zip(("weight", "bias"), gradients, strict=True))) < 1e-6
    assert np.linalg.norm(gradients[0]) < 0.5  # the mean of ten that were clipped to 0.5


@pytest.mark.parametrize("path", ["ordinary", "row_space"])
def test_clipping_is_the_same_on_both_paths(path: Any) -> None:
    """Without noise, all examples taking part, from zero weights: no randomness is left."""
    private = Config(
        epochs=20, lr=0.2, init_std=0.0, privacy=Privacy(0.0, 0.3, sampling=1.0), path=path
    )
    plain = dataclasses.replace(private, privacy=None)
    with jax.enable_x64(True):
        clipped = trained(private, np.float64)
        reference = trained(dataclasses.replace(private, path="ordinary"), np.float64)
        assert difference(clipped, reference) < 1e-10
        assert difference(clipped, trained(plain, np.float64)) > 0.1


MANY = 20_000
SMALL = Config(
    classes=3,
    epochs=6,
    lr=0.3,
    momentum=0.5,
    weight_decay=0.05,
    init_std=0.4,
    privacy=Privacy(1.0, 0.7),
)


def sample(seed: int, config: Config) -> np.ndarray:
    """(MANY, parameters) weights of shadows that differ by their keys only."""
    features, labels = problem(examples=4, width=6, classes=3 if config.head == "linear" else 2)
    run = jax.jit(jax.vmap(make_train(config), (0, None, None)))
    keys = jax.random.split(jax.random.key(seed), MANY)
    found = run(keys, jnp.asarray(features, jnp.float32), jnp.asarray(labels)).parameters
    return np.concatenate([np.asarray(v).reshape(MANY, -1) for v in found.values()], 1)


def distinguishable(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether any coordinate, any of some sums of them, or their square differs in distribution."""
    directions = np.random.default_rng(0).normal(size=(a.shape[1], 10))
    both = [np.concatenate([x, x @ directions, (x**2).sum(1, keepdims=True)], 1) for x in (a, b)]
    tests = [
        scipy.stats.ks_2samp(*columns).pvalue for columns in zip(*(x.T for x in both), strict=True)
    ]
    return min(tests) < 1e-3 / len(tests)


@pytest.mark.parametrize(
    "config",
    [SMALL, dataclasses.replace(SMALL, head="binary", classes=10, hidden=2)],
    ids=["linear", "binary"],
)
def test_private_row_space_training_is_equal_in_distribution(config: Config) -> None:
    """20000 models of either path; and a noise scale that is wrong by 5 % is noticed."""
    plain = sample(1, dataclasses.replace(config, path="ordinary"))
    quick = sample(2, dataclasses.replace(config, path="row_space"))
    assert not distinguishable(plain, quick)
    deviation = plain.std(0)
    np.testing.assert_allclose(quick.mean(0), plain.mean(0), atol=0.05 * deviation.max())
    np.testing.assert_allclose(quick.std(0), deviation, rtol=0.03)
    np.testing.assert_allclose(
        np.cov(quick.T), np.cov(plain.T), atol=0.05 * np.square(deviation).max()
    )
    wrong = dataclasses.replace(config, privacy=Privacy(1.05, 0.7), path="row_space")
    assert distinguishable(plain, sample(3, wrong))


def test_what_no_example_moves_has_the_scale_it_says() -> None:
    """SGD without momentum by hand: s^2 = std^2 a^2T + (lr noise)^2 sum a^2t, a = 1 - lr wd."""
    config = Config(epochs=7, lr=0.1, weight_decay=0.5)
    found = rowspace.orthogonal_scale(make_optimizer(config), 7, 0.3, 0.2)
    a = 1 - 0.1 * 0.5
    expected = (0.3 * a**7) ** 2 + (0.1 * 0.2) ** 2 * sum(a ** (2 * t) for t in range(7))
    assert found == pytest.approx(np.sqrt(expected), rel=1e-12)


def test_features_factorise_also_where_they_are_not_independent() -> None:
    features = np.random.default_rng(0).normal(size=(5, 12))
    features[3] = features[1]
    with jax.enable_x64(True):
        coordinates, mixing = rowspace.factorise(jnp.asarray(features @ features.T))
        basis = mixing.T @ features
        np.testing.assert_allclose(coordinates @ basis, features, atol=1e-7)
        products = np.asarray(basis @ basis.T)
    np.testing.assert_allclose(products, np.diag([0, 1, 1, 1, 1]), atol=1e-7)


def test_the_path_is_chosen_where_it_applies() -> None:
    features, labels = problem()
    with pytest.raises(ValueError, match="Adam divides every coordinate"):
        make_train(Config(optimizer="adam", path="row_space"))
    with pytest.raises(ValueError, match="an optimizer of your own"):
        make_train(Config(path="row_space"), optimizer=optax.sgd(0.1))
    own = heads.linear(10, 0.1)
    opaque = dataclasses.replace(own, first=None, after=None, first_std=None)
    with pytest.raises(ValueError, match="does not begin with a matrix product"):
        make_train(Config(path="row_space"), head=opaque)
    found = make_train(Config(), head=opaque, optimizer=optax.adam(0.1))(
        KEY, jnp.asarray(features), jnp.asarray(labels)
    )
    assert float(found.loss) < 0.1


def test_training_is_a_pure_function_of_its_key() -> None:
    features, labels = problem()
    train = jax.jit(jax.vmap(make_train(Config()), (0, None, None)))
    keys = jax.random.split(KEY, 3)
    first = train(keys, jnp.asarray(features), jnp.asarray(labels))
    again = train(keys[::-1], jnp.asarray(features), jnp.asarray(labels))
    weights = np.asarray(first.parameters["weight"])
    np.testing.assert_array_equal(weights, np.asarray(again.parameters["weight"])[::-1])
    assert np.abs(weights[0] - weights[1]).max() > 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"epochs": 0}, "epochs must be a whole number of at least 1"),
        ({"batch": 0}, "batch must be a whole number of at least 1"),
        ({"lr": 0.0}, "lr must be a number above 0"),
        ({"momentum": 1.0}, "momentum must be a number of at least 0 and below 1"),
        ({"head": "conv"}, "head must be one of linear, binary"),
        (
            {"optimizer": "adam", "momentum": 0.9},
            "momentum: 0.9 plays no part: optimizer",
        ),
        ({"pos_weight": 10.0}, "pos_weight: 10.0 plays no part: head is 'linear'"),
        ({"hidden": 4}, "hidden: 4 plays no part: head is 'linear'"),
        ({"head": "binary", "classes": 2}, "classes: 2 plays no part: head is 'binary'"),
        ({"batch": 2, "privacy": Privacy(1.0, 1.0)}, "sampled one by one"),
    ],
)
def test_configs_that_make_no_sense_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Config(**settings)


def test_private_settings_are_checked() -> None:
    for settings, words in (
        ((-1.0, 1.0), "noise_multiplier must be a number of at least 0"),
        ((1.0, 0.0), "l2_norm_clip must be a number above 0"),
        ((1.0, 1.0, 0.0), "sampling must be a number above 0 and at most 1"),
        ((None, 1.0, None, 0.0), "target_epsilon must be a number above 0"),
        ((None, 1.0), "exactly one of the two"),
        ((1.0, 1.0, None, 5.0), "exactly one of the two"),
    ):
        with pytest.raises(ValueError, match=words):
            Privacy(*settings)
    with pytest.raises(ValueError, match="noise for epsilon 5 is not known yet"):
        make_train(Config(privacy=Privacy(None, 1.0, target_epsilon=5.0)))

"""Training mode of the zoo: five steps as torch does them, and what is random in them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from test_zoo import random_images

import weights_convert
from jinv import models, training
from jinv.models import layers
from jinv.net import Net, parameters, with_parameters
from jinv.objective.terms import label_loss

QUICK = ("mobilenet_v3_small", "shufflenet_v2_x0_5", "resnet20_cifar")
OTHERS = (
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "googlenet",
    "inception_v3",
    "maxvit_t",
    "mnasnet0_5",
    "mobilenet_v2",
    "regnet_x_400mf",
    "regnet_y_400mf",
    "resnet18_cifar",
    "resnet50",
    "squeezenet1_1",
    "vgg11_bn",
    "wrn_16_2",
)
LR, STEPS = 0.01, 5
# MobileNetV3: torch divides by 6 in float32. MobileNetV2: rounding grows twentyfold a step.
TOLERANCE = {"mobilenet_v3_small": 1e-4, "mobilenet_v2": 1e-5}
SHAPES = {
    "inception_v3": (4, 128, 139, 3),
    "maxvit_t": (2, 224, 224, 3),
    "resnet20_cifar": (4, 16, 19, 3),
}


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)
def test_five_sgd_steps_equal_torch(name: str) -> None:
    """In float64, without dropout: weights, running statistics, counters."""
    torch = pytest.importorskip("torch")
    torchvision = pytest.importorskip("torchvision")
    import torch_peers

    shape = SHAPES.get(name, (4, 64, 75, 3))
    batches = [random_images(shape, seed).astype(np.float64) for seed in range(STEPS)]
    labels = np.array([3, 7, 1, 4])[: shape[0]]
    network = torch_peers.random_network(name, random_images(shape, seed=9)).double().train()
    before = torch_peers.state_arrays(network)
    before = {key: value.copy() for key, value in before.items()}
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout | torchvision.ops.StochasticDepth):
            module.p = 0.0
    for head in ("aux1", "aux2", "AuxLogits"):  # are not trained here
        setattr(network, head, None)
    network.aux_logits = False
    network.requires_grad_(True)
    optimizer = torch.optim.SGD(network.parameters(), lr=LR)
    for images in batches:
        optimizer.zero_grad()
        logits = network(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
        torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels)).backward()
        optimizer.step()
    expected = torch_peers.state_arrays(network)

    with jax.enable_x64(True):
        found = weights_convert.from_flax(
            _trained(models.load(name, None), before, batches, labels)
        )
    for key, was in before.items():
        wanted = expected.get(key, was)  # heads stay as they are
        if wanted.dtype.kind == "i":
            np.testing.assert_array_equal(found[key], wanted, err_msg=key)
        else:
            change = np.linalg.norm(wanted - was)
            scale = max(float(change), 1e-3 * float(np.linalg.norm(wanted)))
            assert np.linalg.norm(found[key] - wanted) < TOLERANCE.get(name, 1e-6) * scale, key


def _trained(net: Net, state: Any, batches: list[np.ndarray], labels: np.ndarray) -> Any:
    template = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, "float64" if leaf.dtype.kind == "f" else leaf.dtype
        ),
        net.variables,
    )
    variables = jax.tree.map(jnp.asarray, weights_convert.to_flax(state, template))
    optimizer = optax.sgd(LR)

    @jax.jit
    def step(variables: Any, images: jax.Array) -> Any:
        def loss(now: Any) -> Any:
            outputs = net.mode(training=True)(with_parameters(variables, now), images)
            return label_loss(outputs.logits, jnp.asarray(labels)), outputs.moments

        now = parameters(net, variables)
        gradient, moments = jax.grad(loss, has_aux=True)(now)
        updates, _ = optimizer.update(gradient, optimizer.init(now), now)
        after = with_parameters(variables, optax.apply_updates(now, updates))
        return training.with_statistics(net, after, moments, images.shape)

    for images in batches:
        variables = step(variables, jnp.asarray(images))
    return variables


# --- what is random ------------------------------------------------------------------------------


class Dropping(nnx.Module):
    """Dropout of half of all values, of an image's whole branch, and inside a user's own stream."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.dropout = layers.dropout(0.5)
        self.depth = layers.stochastic_depth(0.25, rank=2)
        self.own = nnx.Dropout(0.5, rngs=rngs)
        self.linear = layers.Linear(8, 24, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        ones = jnp.ones((x.shape[0], 8)) + 0 * self.linear(x[:, 0, :, 0]).sum()
        return jnp.concatenate([self.dropout(ones), self.depth(ones), self.own(ones)], -1)


def dropping() -> Net:
    space = models.registry.Preprocessing(size=8, mean=(0.5,), std=(0.5,))
    return Net.from_nnx(Dropping(nnx.Rngs(0)), space)


def test_a_key_switches_dropout_and_stochastic_depth_on() -> None:
    net, images = dropping(), jnp.zeros((1000, 8, 8, 1))
    train = jax.jit(net.mode(training=True))
    np.testing.assert_array_equal(train(net.variables, images).logits, 1)
    np.testing.assert_array_equal(net(images).logits, 1)
    key = jax.random.key(0)
    dropped, depth, own = np.split(np.asarray(train(net.variables, images, key).logits), 3, 1)
    for values, kept in ((dropped, 0.5), (depth, 0.75), (own, 0.5)):
        assert set(np.unique(values)) == {0, np.float32(1 / kept)}
        assert (values > 0).mean() == pytest.approx(kept, abs=0.05)
    assert (depth == depth[:, :1]).all()  # all of an image's branch or nothing
    assert (dropped != dropped[:, :1]).any()
    assert (dropped != own).any()


def test_the_key_decides_what_is_dropped() -> None:
    net, images = dropping(), jnp.zeros((50, 8, 8, 1))
    train = jax.jit(net.mode(training=True))
    one, again, other = (
        np.asarray(train(net.variables, images, jax.random.key(seed)).logits) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, again)
    assert (one != other).any(0).all()


class LinenDropping(linen.Module):
    """Dropout of half of all values, with the argument that Linen networks switch it by."""

    @linen.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        ones = jnp.ones((x.shape[0], 8)) + 0 * linen.Dense(8)(x[:, 0, :, 0]).sum()
        return linen.Dropout(0.5, deterministic=not train)(ones)


def test_a_key_switches_dropout_of_linen_networks_on() -> None:
    module, images = LinenDropping(), jnp.zeros((500, 8, 8, 1))
    space = models.registry.Preprocessing(size=8, mean=(0.5,), std=(0.5,))
    variables = module.init(jax.random.key(0), images[:1])
    net = Net.from_linen(module, variables, space, training={"train": True})
    train = jax.jit(net.mode(training=True))
    np.testing.assert_array_equal(train(net.variables, images).logits, 1)
    np.testing.assert_array_equal(net(images).logits, 1)
    one, again, other = (
        np.asarray(train(net.variables, images, jax.random.key(seed)).logits) for seed in (1, 1, 2)
    )
    assert set(np.unique(one)) == {0, 2}
    assert (one > 0).mean() == pytest.approx(0.5, abs=0.05)
    np.testing.assert_array_equal(one, again)
    assert (one != other).any(0).all()


@pytest.mark.parametrize(
    ("name", "rate"),
    [("mobilenet_v2", 0.2), ("efficientnet_b4", 0.4), ("efficientnet_lite2", 0.3), ("vgg11", 0.5)],
)
def test_rates_of_dropout_are_torchvisions(name: str, rate: float) -> None:
    model = nnx.eval_shape(lambda: models.entry(name).build(classes=10, rngs=nnx.Rngs(0)))
    rates = [m.rate for _, m in nnx.iter_modules(model) if isinstance(m, nnx.Dropout)]
    assert max(rates) == rate


@pytest.mark.parametrize("name", ["convnext_small", "efficientnet_b0", "maxvit_t"])
def test_rates_of_stochastic_depth_are_torchvisions(name: str) -> None:
    torchvision = pytest.importorskip("torchvision")
    import torch_peers

    model = nnx.eval_shape(lambda: models.entry(name).build(classes=10, rngs=nnx.Rngs(0)))
    found = [
        m.rate
        for _, m in nnx.iter_modules(model)
        if isinstance(m, nnx.Dropout) and m.broadcast_dims
    ]
    wanted = [
        m.p
        for m in torch_peers.build(name).modules()
        if isinstance(m, torchvision.ops.StochasticDepth)
    ]
    np.testing.assert_allclose(
        sorted(filter(None, found)), sorted(filter(None, wanted)), rtol=1e-12
    )


@pytest.mark.parametrize(
    ("name", "momentum"),
    [("mnasnet0_5", 1 - 0.9997), ("mobilenet_v3_small", 0.01), ("resnet18_cifar", 0.1)],
)
def test_every_layer_has_torchs_momentum(name: str, momentum: float) -> None:
    net = models.load(name, None)
    assert set(net.momenta) == {momentum}
    assert len(net.momenta) == len(net.statistics)


def test_flax_momentum_is_the_weight_of_what_was() -> None:
    class Normed(nnx.Module):
        def __init__(self) -> None:
            self.norm = nnx.BatchNorm(3, momentum=0.95, rngs=nnx.Rngs(0))

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.norm(x).mean((1, 2))

    net = Net.from_nnx(Normed(), models.registry.IMAGENET)
    assert net.momenta == pytest.approx((0.05,))

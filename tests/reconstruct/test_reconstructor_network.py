"""The reconstructor against an independent construction in torch, and against itself."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch import nn

from benchmarks import torch_reconstructor
from jinv.models import convolution
from jinv.net import with_parameters
from jinv.reconstruct import network

BATCH = 5
_CONVS = nn.Conv2d | nn.ConvTranspose2d


def drawn(config: network.Config, dtype: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray]:
    """Variables all of whose entries are random, inputs, classes and images."""
    rng = np.random.default_rng(0)
    variables = network.make(config).init(jax.random.key(0))

    def disturbed(path: Any, leaf: Any) -> Any:
        leaf = np.asarray(leaf)
        if leaf.ndim == 0:
            return leaf
        noise = 0.1 * rng.standard_normal(leaf.shape)
        return (np.abs(leaf + noise) if "var" in str(path[-1]) else leaf + noise).astype(dtype)

    variables = jax.tree_util.tree_map_with_path(disturbed, variables)
    x = rng.standard_normal((BATCH, config.inputs)).astype(dtype)
    classes = rng.integers(0, 3, BATCH)
    images = rng.uniform(-1, 1, (BATCH, config.size, config.size, config.channels)).astype(dtype)
    return variables, x, classes, images


def one_adam_step(
    found: network.Reconstructor, variables: Any, x: Any, labels: Any, images: Any
) -> tuple[Any, Any]:
    optimizer = optax.adam(2e-4)

    def step(variables: Any, x: Any, images: Any) -> Any:
        before = network.parameters(variables)

        def loss(now: Any) -> Any:
            made, moments = found.train_apply(with_parameters(variables, now), x, labels)
            apart = made - images
            return 0.5 * (jnp.square(apart).mean() + jnp.abs(apart).mean()), (made, moments)

        gradient, (made, moments) = jax.grad(loss, has_aux=True)(before)
        updates, _ = optimizer.update(gradient, optimizer.init(before), before)
        after = with_parameters(variables, optax.apply_updates(before, updates))
        return made, found.with_statistics(after, moments, BATCH)

    return jax.jit(step)(variables, x, images)


def like(value: torch.Tensor) -> np.ndarray:
    return value.detach().numpy().transpose(0, 2, 3, 1)


@pytest.mark.parametrize(
    ("config", "merged"),
    [(network.Config(7, 4, 32, 3, None), False), (network.Config(6, 3, 64, 1, 3), True)],
)
def test_output_is_that_of_an_independent_torch_network(
    config: network.Config, merged: bool
) -> None:
    variables, x, classes, images = drawn(config, np.float64)
    labels = None if config.classes is None else classes
    told = x if labels is None else np.concatenate([x, np.eye(3)[classes]], 1)
    found = network.make(config, network.Execution(merged=merged))
    with jax.enable_x64(True):
        ours = np.asarray(jax.jit(found.apply)(variables, x, labels))
    peer = torch_reconstructor.network(config, variables).eval()
    with torch.no_grad():
        theirs = like(peer(torch.from_numpy(told)))
    assert ours.shape == images.shape
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-9), (np.float32, 1e-4)])
def test_an_adam_step_is_that_of_an_independent_torch_network(
    dtype: Any, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = network.Config(7, 4, 32, 1, 3)
    variables, x, classes, images = drawn(config, dtype)
    # Maps this narrow would leave out the form that wide ones are learned in.
    monkeypatch.setattr(convolution, "_WIDE", 1)
    with jax.enable_x64(dtype == np.float64):
        made, after = one_adam_step(network.make(config), variables, x, classes, images)
        after = jax.tree.map(np.asarray, after)
    theirs = torch.from_numpy(np.concatenate([x, np.eye(3)[classes]], 1).astype(np.float64))
    peer = torch_reconstructor.network(config, variables).double().train()
    optimizer = torch.optim.Adam(peer.parameters(), lr=2e-4)
    output = peer(theirs)
    apart = output - torch.from_numpy(images.astype(np.float64).transpose(0, 3, 1, 2))
    (0.5 * (apart.square().mean() + apart.abs().mean())).backward()
    optimizer.step()
    np.testing.assert_allclose(made, like(output), rtol=tolerance, atol=tolerance)
    seen = set()
    for layer, name, tensor, array in torch_reconstructor.paired(peer, after):
        value = tensor.detach().numpy()
        apart = np.linalg.norm(array - value)
        # Before a BatchNorm a bias has no gradient: Adam makes +- 2e-4 of its rounding.
        if name == "bias" and isinstance(layer, _CONVS) and layer is not peer.model[-2]:
            assert apart <= 4.01e-4 * np.sqrt(value.size)
        else:
            assert apart <= tolerance * np.linalg.norm(value), (layer, name)
        seen.add(tensor)
    assert seen == {*peer.parameters(), *peer.buffers()}


@pytest.mark.parametrize(
    ("config", "millions"),
    [
        (network.Config(2570, 256, 32, 1, 10), 53.0),  # MNIST
        (network.Config(12810, 512, 32, 3, 10), 463.1),  # CIFAR
        (network.Config(8201, 512, 64, 3, None), 316.7),  # CelebA
    ],
)
def test_published_sizes(config: network.Config, millions: float) -> None:
    assert round(network.count(config) / 1e6, 1) == millions


@pytest.mark.parametrize("shape", [(2, 4, 4, 5), (1, 3, 7, 2), (2, 1, 1, 3)])
def test_upsampled_convolution_is_upsampling_then_convolution(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x = jnp.asarray(rng.standard_normal(shape))
        weight = jnp.asarray(rng.standard_normal((3, 3, shape[-1], 4)))
        big = network.upsampled(x)
        np.testing.assert_array_equal(big, np.repeat(np.repeat(x, 2, 1), 2, 2))
        np.testing.assert_allclose(
            network.upsampled_convolution(x, weight),
            convolution.convolve(big, weight, padding=1),
            rtol=1e-12,
            atol=1e-12,
        )


def test_a_reconstructor_begins_as_its_initialisation_says() -> None:
    config = network.Config(200, 8, 32, 1, None)
    variables = network.make(config).init(jax.random.key(1))
    weight = variables["blocks"][0]["conv1"]["weight"]
    for drawn_, bound in (
        (variables["first"]["weight"], np.sqrt(6 / 200)),
        (weight, np.sqrt(6 / (9 * 32))),
        (variables["conv"]["weight"], 5 / 3 * np.sqrt(6 / (9 * 9))),
    ):
        assert 0.9 * bound < np.abs(drawn_).max() <= bound
        assert abs(np.std(drawn_) - bound / np.sqrt(3)) < 0.12 * bound
    assert not np.asarray(variables["first"]["bias"]).any()


def test_bfloat16_changes_the_image_little_and_its_type_not() -> None:
    config = network.Config(7, 4, 32, 1, None)
    variables, x, _, _ = drawn(config, np.float32)
    wide = jax.jit(network.make(config).train_apply)(variables, x)
    narrow = jax.jit(network.make(config, network.Execution("bfloat16")).train_apply)(variables, x)
    assert narrow[0].dtype == jnp.float32
    assert {m.dtype for m in jax.tree.leaves(narrow[1])} == {jnp.dtype("float32")}
    assert 1e-4 < np.abs(wide[0] - narrow[0]).mean() < 0.03


def test_what_it_cannot_take_is_refused() -> None:
    conditional = network.make(network.Config(7, 4, 32, 1, 3))
    plain = network.make(network.Config(7, 4, 32, 1, None))
    variables = plain.init(jax.random.key(0))
    x = jnp.zeros((2, 7))
    with pytest.raises(ValueError, match=r"takes 7 numbers for each image, not \(2, 6\)"):
        plain.apply(variables, x[:, 1:])
    with pytest.raises(ValueError, match="leave the labels out"):
        plain.apply(variables, x, jnp.zeros(2, int))
    with pytest.raises(ValueError, match=r"give labels \(2,\), not None"):
        conditional.apply(variables, x)
    with pytest.raises(ValueError, match=r"size must be one of 32, 64, not 28"):
        network.Config(size=28)
    with pytest.raises(ValueError, match=r"channels must be one of 1, 3, not 2"):
        network.Config(channels=2)

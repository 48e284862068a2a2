"""What the gradient benchmark compares is the same work. Times are not tested."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import ROOT
from jinv import models


@pytest.fixture(scope="module")
def gradients() -> Any:
    pytest.importorskip("torch")
    pytest.importorskip("skimage")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts")
        yield importlib.import_module("benchmarks.gradients")


def lenet(gradients: Any, recipe: str) -> tuple[Any, ...]:
    """A case, its torch network, ours, and the problem."""
    case = gradients.Case("lenet", 2, 32, recipe)
    torch_net = gradients.network("lenet")
    net = gradients.our_network("lenet", torch_net)
    return case, torch_net, net, gradients.problem(case, torch_net, net)


def test_convnet_is_torchs(gradients: Any) -> None:
    torch = pytest.importorskip("torch")
    torch_net = gradients.network("convnet")
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    with torch.no_grad():
        expected = torch_net(torch.tensor(images.transpose(0, 3, 1, 2).copy())).numpy()
    logits = jax.jit(gradients.our_network("convnet", torch_net))(jnp.asarray(images)).logits
    assert np.ptp(expected) > 0.01
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("recipe", ["seethroughgradients", "invertinggradients"])
@pytest.mark.parametrize("peer", ["pytorch", "breaching"])
def test_both_sides_do_the_same(gradients: Any, peer: str, recipe: str) -> None:
    if peer == "breaching" and not gradients.has_breaching():
        pytest.skip(gradients.INSTALL)
    case, torch_net, net, given = lenet(gradients, recipe)
    found = gradients.check_agreement(case, peer, net, torch_net, given)
    assert max(found.values()) < 1e-9


def test_other_work_is_refused(gradients: Any) -> None:
    case, torch_net, net, given = lenet(gradients, "seethroughgradients")
    other = jax.tree.map(lambda leaf: 1.001 * leaf, net.variables)
    with pytest.raises(SystemExit, match="does not compute the same"):
        gradients.check_agreement(
            case, "pytorch", dataclasses.replace(net, variables=other), torch_net, given
        )


def test_the_loop_that_is_timed_is_breachings_own(gradients: Any) -> None:
    """Without noise: as many steps of it lead to the images that `reconstruct` returns."""
    if not gradients.has_breaching():
        pytest.skip(gradients.INSTALL)
    case, torch_net, _, given = lenet(gradients, "invertinggradients")

    def side() -> Any:
        shared = (torch_net, given.sent, given.initial[0], given.labels, given.space)
        return gradients.Breaching(case.recipe, *shared, steps=6)

    stepped = side()
    stepped.run(4)
    stepped.run(2)
    best = stepped.best.permute(0, 2, 3, 1).numpy()
    assert np.abs(best - given.initial[0]).max() > 0.3
    np.testing.assert_array_equal(best, side().reconstruct())


def test_labels_are_counted_by_every_method(gradients: Any) -> None:
    """Of an untrained network all are right."""
    module = importlib.import_module("benchmarks.labels")
    net = models.load("lenet", None)

    def draw(net: Any, count: int, generator: np.random.Generator) -> Any:
        images = generator.normal(size=(count, 28, 28, 1)).astype(np.float32)
        return jnp.asarray(images), generator.integers(0, 10, count).tolist()

    rows = list(module.measure(module.Case("lenet", 4, False), net, draw, batches=3))
    assert [row["method"] for row in rows] == ["minimum", "identity", "ilrg", "llg"]
    assert set(rows[0]) == {
        *("case", "method", "batches", "accuracy", "precision", "recall", "exact")
    }
    assert rows[2]["exact"] == 1
    assert rows[0]["accuracy"] < 1  # no class twice

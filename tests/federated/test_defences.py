"""Defences against naive references and torch's; what they cost an attacker."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

import tiny
from jinv.attacks.gradient_inversion import gradient_distance
from jinv.federated import defences, evidence, labels
from jinv.federated.defences import Defence
from jinv.federated.evidence import Evidence, Local
from jinv.net import Moments
from jinv.runs import config

KEY = jax.random.key(5)
as_sent = jax.jit(defences.as_sent, static_argnums=0)
SHAPES = {"conv": {"kernel": (3, 3, 4, 20), "bias": (20,)}, "head": {"kernel": (50, 30)}}


def update(seed: int = 0) -> Evidence:
    """Layers whose magnitudes differ, one of one sign, with every circumstance set."""
    rng = np.random.default_rng(seed)
    values: Any = jax.tree.map(
        lambda shape: (rng.normal() * rng.standard_normal(shape)).astype(np.float32),
        SHAPES,
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )
    values["conv"]["bias"] = -1 - np.abs(values["conv"]["bias"])
    moments = (Moments(jnp.zeros(4), jnp.ones(4)),)
    return Evidence(values, 3, True, "exact", moments, Local(0.1, ((0, 1), (2,))))


def flat(values: Any) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(values)]).astype(np.float64)


def sent(defence: Defence, held: Evidence, key: jax.Array = KEY) -> Any:
    return defences.apply(defence, key, held).values


# --- what is sent --------------------------------------------------------------------------------


def test_no_defence_changes_nothing() -> None:
    held = update()
    jax.tree.map(np.testing.assert_array_equal, sent(Defence(), held), held.values)


def test_only_values_change() -> None:
    held = update()
    before = flat(held.values)
    everything = Defence(0.5, 0.1, 0.3, "layer", 4, True)
    found = defences.apply(everything, KEY, held)
    assert jax.tree.structure(found.values) == jax.tree.structure(held.values)
    for ours, theirs in zip(
        jax.tree.leaves(found.values), jax.tree.leaves(held.values), strict=True
    ):
        assert (ours.shape, ours.dtype) == (theirs.shape, np.float32)
    assert (found.images, found.training, found.statistics, found.local, found.moments) == (
        held.images,
        held.training,
        held.statistics,
        held.local,
        held.moments,
    )
    np.testing.assert_array_equal(flat(held.values), before)


@pytest.mark.parametrize("clip", [0.25, 3.0, 1e4])
def test_clipping_equals_torch(clip: float) -> None:
    torch = pytest.importorskip("torch")
    held = update()
    parameters = []
    for leaf in jax.tree.leaves(held.values):
        parameters.append(torch.nn.Parameter(torch.zeros(leaf.shape)))
        parameters[-1].grad = torch.tensor(leaf)
    torch.nn.utils.clip_grad_norm_(parameters, clip)
    for ours, theirs in zip(
        jax.tree.leaves(sent(Defence(clip=clip), held)), parameters, strict=True
    ):
        np.testing.assert_allclose(ours, theirs.grad.numpy(), rtol=1e-5)
    norm = np.linalg.norm(flat(held.values))
    assert np.linalg.norm(flat(sent(Defence(clip=clip), held))) == pytest.approx(min(norm, clip))


def test_noise_is_gaussian_of_the_stated_deviation_in_every_layer() -> None:
    held = Evidence({"a": np.zeros((200, 300), np.float32), "b": np.zeros(40_000, np.float32)}, 1)
    found = sent(Defence(clip=3.0, noise_multiplier=0.2), held)
    for layer in found.values():
        noise = layer.ravel().astype(np.float64)
        assert noise.std() == pytest.approx(0.6, rel=4 / math.sqrt(2 * noise.size))
        assert abs(noise.mean()) < 4 * 0.6 / math.sqrt(noise.size)
        assert scipy.stats.kstest(noise / 0.6, "norm").pvalue > 1e-3
    together = np.corrcoef(found["a"].ravel()[:40_000], found["b"])[0, 1]
    assert abs(together) < 4 / math.sqrt(40_000)


def test_noise_is_added_to_what_was_clipped() -> None:
    held = update()
    defence = Defence(clip=0.5, noise_multiplier=0.3)
    zero = Evidence(jax.tree.map(np.zeros_like, held.values), 1)
    expected = flat(sent(Defence(clip=0.5), held)) + flat(sent(defence, zero))
    np.testing.assert_allclose(flat(sent(defence, held)), expected, atol=1e-6)
    other = flat(sent(defence, held, jax.random.key(6)))
    assert np.abs(other - expected).max() > 0.1
    np.testing.assert_array_equal(flat(sent(defence, held)), flat(sent(defence, held)))


@pytest.mark.parametrize("keep", [0.001, 0.1, 0.73])
def test_pruning_equals_torchs_topk(keep: float) -> None:
    torch = pytest.importorskip("torch")
    held = update()

    def largest(values: np.ndarray) -> np.ndarray:
        magnitudes = torch.tensor(values).abs()
        chosen = torch.topk(magnitudes, max(1, round(keep * values.size))).indices.numpy()
        return np.where(np.isin(np.arange(values.size), chosen), values, 0)

    np.testing.assert_array_equal(flat(sent(Defence(keep=keep), held)), largest(flat(held.values)))
    for ours, theirs in zip(
        jax.tree.leaves(sent(Defence(keep=keep, keep_per="layer"), held)),
        jax.tree.leaves(held.values),
        strict=True,
    ):
        np.testing.assert_array_equal(ours.ravel(), largest(theirs.ravel()))


def test_of_equal_magnitudes_the_first_are_sent() -> None:
    """In the order of the tree."""
    values = {"a": np.asarray([1, -2, 1], np.float32), "b": np.asarray([-1, 1, 3], np.float32)}
    found = sent(Defence(keep=4 / 6), Evidence(values, 1))
    np.testing.assert_array_equal(found["a"], [1, -2, 1])
    np.testing.assert_array_equal(found["b"], [0, 0, 3])


@pytest.mark.parametrize("keep", [1.0, 0.2])
def test_signs_come_with_the_mean_magnitude_of_what_a_layer_sends(keep: float) -> None:
    held = update()
    before = sent(Defence(keep=keep), held)
    after = sent(Defence(keep=keep, quantise="sign"), held)
    for ours, theirs in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
        there = theirs[theirs != 0]
        mean = np.abs(there).mean() if there.size else 0
        np.testing.assert_allclose(ours, np.sign(theirs) * mean, rtol=1e-5)


@pytest.mark.parametrize("keep", [1.0, 0.2])
@pytest.mark.parametrize("bits", [1, 2, 5, 10])
def test_bits_are_the_nearest_of_even_levels(bits: int, keep: float) -> None:
    held = update()
    per: Any = {"keep_per": "layer"} if keep < 1 else {}
    before = sent(Defence(keep=keep, **per), held)
    after = sent(Defence(keep=keep, **per, quantise=bits), held)
    for ours, theirs in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
        there = theirs != 0
        np.testing.assert_array_equal(ours[~there], 0)
        levels = np.linspace(theirs[there].min(), theirs[there].max(), 2**bits)
        nearest = levels[np.abs(theirs[there][:, None] - levels).argmin(1)]
        step = levels[1] - levels[0]
        assert len(np.unique(ours[there])) <= 2**bits
        # Values half-way between levels may go either way in float32.
        assert np.mean(np.abs(ours[there] - nearest) > 1e-2 * step) < 0.01
        assert np.abs(ours[there] - theirs[there]).max() < 0.51 * step


def test_stochastic_rounding_keeps_the_expectation() -> None:
    values = np.asarray([-1.0, -0.9, -0.35, 0.0, 0.1, 0.6, 2.0], np.float32)
    copies = {f"{i:04}": values for i in range(4000)}
    found = np.stack(list(sent(Defence(quantise=2, stochastic=True), Evidence(copies, 1)).values()))
    np.testing.assert_allclose(found.mean(0), values, atol=4 * 0.5 / math.sqrt(4000))
    np.testing.assert_allclose(np.unique(found), [-1, 0, 1, 2], atol=1e-6)
    assert np.abs(found - values).max() < 1
    np.testing.assert_array_equal(found[:, [0, 6]], np.tile([-1, 2], (4000, 1)))
    again = sent(Defence(quantise=2, stochastic=True), Evidence(copies, 1), jax.random.key(6))
    assert np.any(np.stack(list(again.values())) != found)
    nearest = sent(Defence(quantise=2), Evidence({"a": values}, 1))["a"]
    np.testing.assert_allclose(nearest, [-1, -1, 0, 0, 0, 1, 2], atol=1e-6)


@pytest.mark.parametrize("quantise", ["sign", 1, 4])
def test_layers_without_spread_survive_quantisation(quantise: Any) -> None:
    values = {"zero": np.zeros(4, np.float32), "same": np.full(4, -0.5, np.float32)}
    found = sent(Defence(quantise=quantise), Evidence(values, 1))
    jax.tree.map(np.testing.assert_array_equal, found, values)


def test_pruning_sees_the_noise() -> None:
    """Else the choice of coordinates would betray what the noise hides."""
    held = update()
    noisy = sent(Defence(0.5, 0.1), held)
    expected = sent(Defence(keep=0.1), Evidence(noisy, 1))
    found = sent(Defence(0.5, 0.1, keep=0.1), held)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_values_that_are_not_finite_are_refused() -> None:
    held = Evidence({"a": np.asarray([1, np.nan], np.float32)}, 1)
    with pytest.raises(ValueError, match="not finite"):
        sent(Defence(), held)


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tree", "text"),
    [
        ({}, "none"),
        ({"clip": 1, "noise_multiplier": "1e-2"}, "clip 1, noise 0.01"),
        ({"keep": 0.01}, "top 1%"),
        ({"keep": 0.1, "keep_per": "layer", "quantise": "sign"}, "top 10% per layer, sign"),
        ({"quantise": 4}, "4 bits"),
        ({"quantise": 1, "stochastic": True}, "stochastic 1 bit"),
    ],
)
def test_defences_come_out_of_a_config(tree: dict[str, Any], text: str) -> None:
    defence = config.build(Defence, tree)
    assert defence.describe() == text
    assert config.build(Defence, config.plain(defence)) == defence


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"clip": 0}, "clip must be a number above 0 or nothing"),
        ({"clip": float("nan")}, "clip must be a number above 0 or nothing"),
        ({"noise_multiplier": 0.1}, "set clip too"),
        (
            {"clip": 1, "noise_multiplier": -1},
            "noise_multiplier must be a number of at least 0, not -1",
        ),
        ({"keep": 0}, "keep must be a number above 0 and at most 1, not 0"),
        ({"keep": 1.5}, "keep must be a number above 0 and at most 1, not 1.5"),
        ({"keep": 0.5, "keep_per": "row"}, "keep_per must be one of update, layer, not 'row'"),
        ({"keep_per": "layer"}, "keep_per: 'layer' plays no part: keep is 1"),
        ({"quantise": 0}, "at least 1 and at most 16"),
        ({"quantise": 32}, "at least 1 and at most 16"),
        ({"quantise": True}, "quantise must be 'sign', a whole number"),
        ({"quantise": "signs"}, "quantise must be 'sign', a whole number"),
        ({"quantise": "sign", "stochastic": True}, "set quantise to some bits"),
        ({"stochastic": True}, "set quantise to some bits"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Defence(**tree)


# --- attackers -----------------------------------------------------------------------------------


@functools.cache
def victims() -> tuple[Any, list[tuple[Evidence, np.ndarray, np.ndarray]]]:
    """A network of 20 classes; of 8 batches of 8 the evidence, labels and mean prediction."""
    net = tiny.network(classes=20)

    @jax.jit
    def simulated(images: jax.Array, chosen: jax.Array) -> Any:
        probabilities = jax.nn.softmax(net(images).logits)
        one_hot = jax.nn.one_hot(chosen, 20)
        return evidence.observed(net, net.variables, images, one_hot), probabilities.mean(0)

    found = []
    for seed in range(8):
        chosen = np.random.default_rng(seed).integers(0, 20, 8)
        values, known = jax.device_get(simulated(tiny.noise((8, 16, 16, 3), seed), chosen))
        found.append((Evidence(values, 8), chosen, known))
    return net, found


@pytest.mark.parametrize(
    "ladder",
    [
        [Defence(clip=1e3, noise_multiplier=s / 1e3) for s in (0.0, 0.1, 10.0)],
        [Defence(keep=share) for share in (1.0, 0.2, 0.01)],
        [Defence(quantise=bits) for bits in (16, 2, 1)],
    ],
    ids=["noise", "pruning", "bits"],
)
def test_labels_are_harder_to_restore_the_stronger_the_defence(ladder: list[Defence]) -> None:
    """By the identity, which is exact where predictions are known and nothing is defended."""
    net, simulated = victims()
    head = net.variables["head"]
    accuracy = np.zeros(len(ladder))
    for seed, (held, chosen, known) in enumerate(simulated):
        truth = np.bincount(chosen, minlength=20)
        for i, defence in enumerate(ladder):
            found = sent(defence, held, jax.random.key(seed))["head"]
            given = labels.Head(
                head["kernel"], found["kernel"], 8, head["bias"], found["bias"], known
            )
            accuracy[i] += labels.scores(labels.restore(given), truth)["accuracy"] / len(simulated)
    assert accuracy[0] == 1
    assert accuracy[0] > accuracy[1] + 0.1
    assert accuracy[1] > accuracy[2] + 0.1


@pytest.mark.parametrize(
    "defence",
    [
        Defence(clip=0.1),
        Defence(keep=0.1),
        Defence(keep=0.1, keep_per="layer"),
        Defence(quantise="sign"),
        Defence(quantise=3),
        Defence(clip=0.1, keep=0.2, quantise=2),
        Defence(clip=0.1, keep=0.2, keep_per="layer", quantise="sign"),
    ],
    ids=Defence.describe,
)
def test_an_attacker_who_knows_the_defence_finds_no_distance_at_the_secret(
    defence: Defence,
) -> None:
    (secret, *_), (elsewhere, *_) = victims()[1][:2]
    wanted = sent(defence, secret)

    def distance(found: Evidence, known: Defence) -> float:
        seen = as_sent(known, found.values, wanted)
        return float(gradient_distance(seen, wanted)) / np.linalg.norm(flat(wanted))

    assert distance(secret, Defence()) > 0.1
    assert distance(secret, defence) < 1e-5
    assert distance(elsewhere, defence) > 0.01


def test_within_what_is_rounded_together_nothing_is_left_to_match() -> None:
    wanted = {"a": np.asarray([-1, 0, 1, 2, 2], np.float32)}  # two bits: steps of 1
    found = {"a": jnp.asarray([-1.4, 0.3, 1.7, -3.0, 2.6])}
    seen = as_sent(Defence(quantise=2), found, wanted)
    np.testing.assert_allclose(seen["a"], [-1, 0, 1.2, -2.5, 2.1], atol=1e-6)
    seen = as_sent(Defence(quantise=2, stochastic=True), found, wanted)
    np.testing.assert_array_equal(seen["a"], found["a"])
    # Of the one layer of which values were sent, 3 is one level and 4 the other.
    wanted = {"a": np.asarray([0, 3, 4, 4], np.float32)}
    found = {"a": jnp.asarray([9.0, 4.5, 3.4, 4.4])}
    seen = as_sent(Defence(keep=0.75, quantise=1), found, wanted)
    np.testing.assert_allclose(seen["a"], [0, 4.0, 3.9, 4], atol=1e-6)
    wanted = {"a": np.asarray([-2, 2, 2, 0], np.float32)}
    found = {"a": jnp.asarray([-9.0, 0.1, -0.5, 0.2])}
    seen = as_sent(Defence(quantise="sign"), found, wanted)
    np.testing.assert_allclose(seen["a"], [-2, 2, 1.5, 0.2], atol=1e-6)


@pytest.mark.parametrize(
    "defence",
    [Defence(clip=0.1), Defence(1.0, keep=0.3, quantise=2), Defence(quantise="sign")],
    ids=Defence.describe,
)
def test_what_the_attacker_compares_is_differentiable(defence: Defence) -> None:
    """Along a random direction, in double precision; and finite at zero."""
    rng = np.random.default_rng(0)
    wanted = sent(defence, update(1))

    @jax.jit
    @jax.value_and_grad
    def distance(found: Any) -> Any:
        return gradient_distance(as_sent(defence, found, wanted), wanted, "squared_l2")

    with jax.enable_x64(True):
        at, along = (jax.tree.map(lambda a: rng.normal(size=a.shape), wanted) for _ in "ab")
        ahead, behind = (
            float(distance(jax.tree.map(lambda a, b, h=h: a + h * b, at, along))[0])
            for h in (1e-6, -1e-6)
        )
        slope = flat(distance(at)[1]) @ flat(along)
        assert slope == pytest.approx((ahead - behind) / 2e-6, rel=1e-4)
        assert np.isfinite(flat(distance(jax.tree.map(np.zeros_like, at))[1])).all()

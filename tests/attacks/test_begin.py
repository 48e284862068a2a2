"""BEGIN's settings, and that an ensemble is DeepInversion of several members."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

import tiny
from jinv.attacks import begin, deepinversion
from jinv.attacks.deepinversion import Phase
from jinv.net import Net, Outputs
from jinv.objective.terms import Member, Weights
from jinv.recipes import invert


def test_published_settings() -> None:
    config, weights = begin.CONFIG, begin.WEIGHTS
    assert (weights.label, weights.batch_norm, weights.first_bn_multiplier) == (0.8, 0.05, 1)
    assert (config.lr, config.warmup, config.tv_l2, config.l2) == (0.8, 500, 4e-3, 0)
    assert (config.phases, config.init_std) == ((Phase(2000),), 0.01)
    assert (config.optimizer, config.schedule, config.lr_floor) == ("adam", "cosine", 0)
    assert {**config.optimizer_args} == {"b1": 0.3, "b2": 0.9, "eps": 1e-8}
    assert begin.CLASSES == (985, 417, 402, 94, 63, 250, 530, 920, 386, 949)
    assert invert.PRESETS["begin"] is config


def test_a_member_without_batch_norm_adds_its_cross_entropy_only() -> None:
    def apply(variables: dict, images: jax.Array) -> Outputs:
        return Outputs(images.mean((1, 2)) @ variables["w"], None, ())

    plain = Net("plain", apply, {"w": jnp.ones((3, 7))}, tiny.SPACE, 7, ())
    config = dataclasses.replace(begin.CONFIG, phases=(Phase(2, jitter=1),), warmup=1)
    members = begin.members([tiny.network(), plain])
    attack = deepinversion.build(config, members, [0, 1])
    _, metrics = tiny.run(attack, key=0, noise=1)
    assert list(metrics) == ["loss", "label[tiny]", "batch_norm[tiny]", "label[plain]", "tv_l2"]


def test_an_ensemble_finds_what_each_member_saw() -> None:
    """Two networks whose statistics are those of one batch: both BatchNorm terms fall together."""
    seen = tiny.noise((8, 16, 16, 3), seed=9) * 0.7
    nets = [tiny.network(i, seen=seen, name=f"net{i}") for i in range(2)]
    config = dataclasses.replace(
        begin.CONFIG, phases=(Phase(300, jitter=0),), flip=0.0, lr=0.1, warmup=20, tv_l2=0.0
    )
    members = [Member(net, Weights(label=0, batch_norm=1, first_bn_multiplier=1)) for net in nets]
    attack = deepinversion.build(config, members, [0] * 8)
    _, metrics = tiny.run(attack, key=0, noise=1)
    for i in range(2):
        found = metrics[f"batch_norm[net{i}]"]
        assert found[-1] < found[0] / 30

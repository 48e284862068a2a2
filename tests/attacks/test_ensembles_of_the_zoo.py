"""Joint steps of networks of the zoo, such as BEGIN inverts together."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tiny
from jinv import image, models
from jinv.attacks import begin, deepinversion
from jinv.attacks.deepinversion import Phase
from jinv.net import Net
from jinv.objective.terms import label_loss

EIGHT = (
    "googlenet",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnext50_32x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
    "vgg19_bn",
)


def drawn(name: str, seed: int | None) -> Net:
    """Random weights, or ones; NumPy's, as JAX would compile a program for every shape of them."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple[jax.tree_util.DictKey, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if seed is None or leaf.dtype != np.float32 or path[-1].key == "running_var":
            return jnp.ones(leaf.shape, leaf.dtype)
        fan_in = max(1, np.prod(leaf.shape[:-1]))
        values = rng.standard_normal(leaf.shape, np.float32) * np.float32(np.sqrt(2 / fan_in))
        return jnp.asarray(values if len(leaf.shape) > 1 else 0.1 * values)

    entry = models.entry(name)
    model = nnx.eval_shape(lambda: entry.build(classes=entry.classes, rngs=nnx.Rngs(0)))
    nnx.update(model, jax.tree.map_with_path(draw, models.template(name)))
    return Net.from_nnx(model, entry.preprocessing, name=name, output=())


def one_step(names: tuple[str, ...], *, random: bool) -> deepinversion.Attack:
    """One step on two images of 64 px, neither moved nor mirrored."""
    config = dataclasses.replace(begin.CONFIG, phases=(Phase(1, jitter=0),), flip=0.0)
    nets = [drawn(name, seed if random else None) for seed, name in enumerate(names)]
    return deepinversion.build(config, begin.members(nets), [985, 417], size=64)


@pytest.mark.parametrize(
    "names",
    [("mobilenet_v3_small", "inception_v3"), pytest.param(EIGHT, marks=pytest.mark.slow)],
)
def test_networks_share_a_joint_step(names: tuple[str, ...]) -> None:
    """It is traced; compiling it takes minutes on a CPU."""
    attack = one_step(names, random=False)
    phase = attack.phases[0]
    images = jax.eval_shape(attack.initial, jax.random.key(0))
    state = jax.eval_shape(lambda images: phase.enter(images, 0), images)
    after, info = jax.eval_shape(phase.step, jax.random.key(0), state, attack.data)
    assert after.images.shape == (2, 64, 64, 3)
    assert {f"batch_norm[{name}]" for name in names} <= set(info.terms)
    assert {f"label[{name}]" for name in names} <= set(info.terms)


@pytest.mark.slow
def test_begins_eight_networks_take_a_joint_step() -> None:
    state, metrics = tiny.run(one_step(EIGHT, random=True))
    assert all(np.isfinite(values).all() for values in metrics.values())
    assert len(metrics) == 1 + 2 * len(EIGHT) + 1
    assert np.isfinite(state.images).all()


@pytest.mark.slow
def test_inception_sees_299_pixels_where_another_sees_224() -> None:
    names = ("mobilenet_v3_small", "inception_v3")
    attack = one_step(names, random=True)
    start = attack.initial(jax.random.key(0))
    _, metrics = tiny.run(attack)
    first, second = (drawn(name, seed) for seed, name in enumerate(names))
    assert (first.preprocessing.size, second.preprocessing.size) == (224, 299)
    seen = image.convert(start, first.preprocessing, second.preprocessing)
    for net, images in ((first, start), (second, image.resize(seen, round(64 * 299 / 224)))):
        outputs = net(images)
        expected = label_loss(outputs.logits, jnp.asarray([985, 417]))
        np.testing.assert_allclose(metrics[f"label[{net.name}]"], expected, rtol=1e-4)

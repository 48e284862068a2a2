"""The generator against torch's layers, its loss against the formula, and what it refuses."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from jinv import image, models, optimise, training
from jinv.distill.generator import Config, Data, Generator
from jinv.net import Net
from jinv.objective import priors

SMALL = Config(batch=14, steps=6, noise=5, width=8)


def build(config: Config = SMALL, teacher: Net | None = None, size: int = 16) -> Generator:
    teacher = teacher or tiny.network(seed=1, classes=7)
    space = image.Preprocessing(size, (0.5,) * 3, (0.5,) * 3)
    return Generator(config, teacher, tiny.network(seed=2, name="student"), space)


def test_images_equal_torchs() -> None:
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    generator = build()
    parameters = generator.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    disturbed: Any = jax.tree.map(
        lambda leaf: leaf + jnp.asarray(rng.normal(0, 0.1, leaf.shape), jnp.float32), parameters
    )
    inputs = jnp.asarray(rng.normal(size=(14, disturbed["code"]["scale"].size)), jnp.float32)
    found = generator.generate(disturbed, inputs)

    def norm(x: Any, name: str) -> Any:
        scale, bias = (torch.tensor(np.asarray(disturbed[name][k])) for k in ("scale", "bias"))
        return functional.batch_norm(x, None, None, scale, bias, training=True)

    def convolve(x: Any, name: str) -> Any:
        kernel = np.asarray(disturbed[name]["kernel"]).transpose(3, 2, 0, 1)
        bias = torch.tensor(np.asarray(disturbed[name]["bias"]))
        return functional.conv2d(x, torch.tensor(kernel.copy()), bias, padding=1)

    x = norm(torch.tensor(np.asarray(inputs)), "code")
    x = x @ torch.tensor(np.asarray(disturbed["noisy"]))
    x = norm(x.reshape(14, 4, 4, 8).permute(0, 3, 1, 2), "norm0")
    for number in (1, 2):
        x = convolve(functional.interpolate(x, scale_factor=2), f"conv{number}")
        x = functional.leaky_relu(norm(x, f"norm{number}"), 0.2)
    theirs = norm(convolve(x, "conv3"), "norm3").sigmoid().permute(0, 2, 3, 1)
    assert found.shape == (14, 16, 16, 3)
    np.testing.assert_allclose(found, theirs.numpy(), atol=2e-5)


def test_the_loss_is_its_formula() -> None:
    """Of the mirrored images: statistics, classes, and where teacher and student agree."""
    teacher = tiny.network(seed=1)
    rng = np.random.default_rng(0)
    disturbed: Any = jax.tree.map(
        lambda leaf: leaf + 0.2 * rng.normal(size=leaf.shape).astype(np.float32), teacher.variables
    )
    student = dataclasses.replace(teacher, variables=disturbed)
    generator = build(teacher=teacher)
    parameters = generator.init(jax.random.key(0))
    drawn = generator.draw(jax.random.key(1))
    data = Data(teacher.variables, student.variables, *drawn)
    assert sorted(np.asarray(data.targets).tolist()) == sorted([*range(7)] * 2)
    phase = generator.phases[0]
    key = jax.random.key(5)
    _, info = jax.jit(phase.step)(key, phase.enter(parameters, 0), data)
    keys = jax.random.split(jax.random.fold_in(key, 0), 14)
    pixels = generator.generate(parameters, data.inputs)
    seen = jnp.stack([image.flip(k, p[None])[0] for k, p in zip(keys, pixels, strict=True)])
    told = teacher.apply(teacher.variables, training.shown(teacher, seen))
    other = student.apply(student.variables, training.shown(student, seen)).logits
    p, q = (np.asarray(jax.nn.softmax(x), np.float64) for x in (told.logits, other))
    agree = p.argmax(1) == q.argmax(1)
    assert 0 < agree.sum() < 14
    expected = {
        "label": -np.log(p[np.arange(14), data.targets]).mean(),
        "batch_norm": float(priors.batch_norm(told.moments, teacher.running_moments())),
        "adversarial": -((p * (np.log(p) - np.log(q))).sum(1) * agree).mean(),
    }
    for name, value in expected.items():
        assert float(info.terms[name]) == pytest.approx(value, rel=1e-3), name
    weighted = (
        0.5 * expected["label"] + 10 * expected["batch_norm"] + 1.33 * expected["adversarial"]
    )
    assert float(info.loss) == pytest.approx(weighted, rel=1e-3)


def test_a_loop_teaches_the_generator_and_another_layer_makes_other_images() -> None:
    teacher, student = tiny.network(seed=1), tiny.network(seed=2, name="student")
    generator = build(Config(batch=14, steps=40, noise=5, width=8, adversarial=0.0), teacher)
    parameters = generator.init(jax.random.key(0))
    drawn = generator.draw(jax.random.key(1))
    data = Data(teacher.variables, student.variables, *drawn)
    losses: list[np.ndarray] = []
    state = optimise.run(
        generator.phases,
        jax.random.key(2),
        jax.tree.map(jnp.copy, parameters),
        data,
        callback=lambda chunk: losses.append(chunk.metrics["loss"]),
    )
    told = np.concatenate(losses)
    assert told[-5:].mean() < 0.6 * told[0]
    learned = state.best_images
    assert not np.array_equal(learned["conv2"]["kernel"], parameters["conv2"]["kernel"])
    renewed = generator.renew(jax.random.key(9), learned)
    np.testing.assert_array_equal(renewed["conv2"]["kernel"], learned["conv2"]["kernel"])
    before, after = (generator.generate(p, data.inputs) for p in (learned, renewed))
    assert np.abs(np.asarray(before - after)).max() > 0.1


def test_codes_are_the_rows_of_the_teachers_head() -> None:
    teacher = tiny.network(seed=1)
    inputs, targets = build(teacher=teacher).draw(jax.random.key(1))
    rows: Any = np.asarray(teacher.variables["head"]["kernel"]).T
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True) * np.sqrt(rows.shape[1])
    np.testing.assert_allclose(inputs[:, :8], rows[np.asarray(targets)], rtol=1e-5)
    one_hot = build(Config(batch=14, codes="one_hot", noise=0))
    inputs, targets = one_hot.draw(jax.random.key(1))
    np.testing.assert_array_equal(inputs, np.eye(7)[np.asarray(targets)])
    chance, _ = build(Config(batch=14, codes="random")).draw(jax.random.key(1))
    assert chance.shape == (14, 128 + 64)


def test_what_cannot_be_generated_is_refused() -> None:
    with pytest.raises(ValueError, match="18 x 18 px cannot be halved as often"):
        build(size=18)
    with pytest.raises(ValueError, match="has no BatchNorm layers"):
        build(teacher=models.load("lenet", None), size=28)

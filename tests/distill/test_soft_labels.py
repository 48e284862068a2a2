"""The loss of a student against torch's."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from jinv import training
from jinv.distill import soft_labels
from jinv.distill.soft_labels import Config

RNG = np.random.default_rng(0)
TEACHER, STUDENT = (jnp.asarray(RNG.normal(0, 4, (6, 5)), jnp.float32) for _ in "ts")
LABELS = jnp.array([0, 1, 2, 3, 4, 0])
VIEW = training.View(jnp.zeros((6, 4, 4, 3)), jax.nn.one_hot(LABELS, 5) * 0.7 + 0.06, LABELS)


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_divergence_is_torchs_kl(temperature: float) -> None:
    torch = pytest.importorskip("torch")
    soft, hard = (torch.tensor(np.asarray(x)) / temperature for x in (TEACHER, STUDENT))
    expected = torch.nn.functional.kl_div(
        hard.log_softmax(1), soft.softmax(1), reduction="batchmean"
    )
    found = soft_labels.divergence(TEACHER, STUDENT, temperature)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_soft_and_hard_add_up() -> None:
    found = soft_labels.make_criterion(Config(2.0, 0.5, 4.0, squared=True))(STUDENT, VIEW, TEACHER)
    soft = soft_labels.divergence(TEACHER, STUDENT, 4.0)
    hard = -(VIEW.targets * jax.nn.log_softmax(STUDENT)).sum(1).mean()
    assert float(found) == pytest.approx(float(2 * 16 * soft + 0.5 * hard), rel=1e-6)
    alone = soft_labels.make_criterion(Config(soft=0.0, hard=1.0))(STUDENT, VIEW)
    assert float(alone) == pytest.approx(float(hard), rel=1e-6)


def test_a_student_equal_to_its_teacher_has_no_loss() -> None:
    teacher = tiny.network(space=tiny.OTHER_SPACE)
    pixels = jnp.asarray(RNG.random((6, 12, 12, 3)), jnp.float32)
    view = VIEW._replace(pixels=pixels)
    logits = teacher.apply(teacher.variables, training.shown(teacher, pixels)).logits
    loss = soft_labels.make_criterion(Config(temperature=2.0), teacher)
    assert abs(float(loss(logits, view, teacher.variables))) < 1e-6
    assert float(loss(logits[::-1], view, teacher.variables)) > 0.01


def test_recomputed_labels_train_as_stored_ones() -> None:
    """A step that is told the teacher's variables is a step that is told its logits."""
    teacher, student = tiny.network(seed=1), tiny.network(seed=2)
    images = jnp.asarray(RNG.integers(0, 256, (6, 16, 16, 3)).astype(np.uint8))
    labels, key = jnp.arange(6), jax.random.key(3)
    config = training.Config(flip=True, crop=1, mix="cutmix", warmup=0, lr=0.5)
    optimizer = training.make_optimizer(config, 4)
    view = training.make_view(jax.random.fold_in(key, 0), images, labels, config, 16, 7)
    logits = soft_labels.says(teacher, teacher.variables, view.pixels)
    states: list[Any] = []
    for known, net in ((teacher.variables, teacher), (logits, None)):
        criterion = soft_labels.make_criterion(Config(), net)
        step = jax.jit(training.make_step(student, config, optimizer, criterion))
        states.append(step(key, training.init(student, optimizer), (images, labels, known)))
    (one, info), (other, told) = states
    assert float(info.loss) == pytest.approx(float(told.loss), rel=1e-5)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"soft": 0.0}, "learns nothing"),
        ({"soft": 0.0, "hard": 1.0, "temperature": 3.0}, "soft is 0"),
    ],
)
def test_weights_are_checked(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**keys)

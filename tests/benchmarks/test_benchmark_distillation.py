"""The benchmark of condensation: both sides do the same work, and other work is refused."""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from conftest import ROOT
from jinv import image

pytest.importorskip("torchvision")
sys.path.insert(0, str(ROOT / "scripts"))

from benchmarks import distillation, torch_cifar, torch_distillation  # found through the path above

SYNTHESIS = distillation.Synthesis("sre2l", "resnet20_cifar", 4, 12)
STUDENT = distillation.Student("resnet20_cifar", "resnet20_cifar", 4, 12)


@pytest.fixture(scope="module")
def inverted() -> tuple[Any, ...]:
    """Both networks, images and classes."""
    torch_net = torch_distillation.teacher(SYNTHESIS.network, SYNTHESIS.size)
    net = distillation.ported(SYNTHESIS.network, torch_net)
    images = np.random.default_rng(0).normal(size=(4, 12, 12, 3)).astype(np.float32)
    return net, torch_net, images, np.arange(4)


@pytest.fixture(scope="module")
def learned() -> distillation.Given:
    return distillation.student_problem(STUDENT)


def sides(*names: str) -> dict[str, Any]:
    """On a CPU other ones are compared."""
    return dict.fromkeys(names)


def test_both_sides_recover_alike_in_float64(inverted: Any) -> None:
    peers = sides(*torch_distillation.SYNTHESIS_PEERS)
    found = distillation.compare_synthesis(SYNTHESIS, *inverted, peers)
    assert list(found) == list(peers)
    assert max(value for each in found.values() for value in each.values()) < 1e-9


def test_both_sides_learn_alike_in_float64(learned: Any) -> None:
    peers = sides(*torch_distillation.STUDENT_PEERS)
    found = distillation.compare_student(STUDENT, learned, peers)
    assert list(found) == list(peers)
    assert max(value for each in found.values() for value in each.values()) < 1e-9


@pytest.mark.parametrize("other", ["box", "shifts", "flip"])
def test_another_view_of_the_images_is_refused(
    inverted: Any, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    drawn = distillation.drawn

    def wrong(case: Any) -> Any:
        same = drawn(case)
        top, left, height, width = same.box
        changed = {
            "box": (top, left, height - 1, width),
            "shifts": (same.shifts[0] + 1, same.shifts[1]),
            "flip": not same.flip,
        }
        return same._replace(**{other: changed[other]})

    monkeypatch.setattr(distillation, "drawn", wrong)
    with pytest.raises(SystemExit, match="pytorch_frozen does not compute the same"):
        distillation.compare_synthesis(SYNTHESIS, *inverted, sides("pytorch_frozen"))


def test_another_temperature_is_refused(learned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    their_student = distillation.their_student

    def wrong(*args: Any) -> Any:
        side = their_student(*args)
        side.temperature = 19.9
        return side

    monkeypatch.setattr(distillation, "their_student", wrong)
    with pytest.raises(SystemExit, match="pytorch_batched does not compute the same"):
        distillation.compare_student(STUDENT, learned, sides("pytorch_batched"))


def test_parts_are_those_of_ours() -> None:
    """Of one box for all images, and of one for each."""
    images = np.random.default_rng(0).random((6, 9, 11, 3), np.float32)
    nchw = torch.tensor(images.transpose(0, 3, 1, 2).copy())
    torch.manual_seed(0)
    boxes = torch_cifar.random_boxes(6, 9, 11, (0.08, 1.0), torch.device("cpu"))
    wanted = image.resized_crop(jnp.asarray(images), jnp.asarray(boxes.numpy(), jnp.int32))
    found = torch_cifar.all_resized(nchw, boxes).permute(0, 2, 3, 1)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    for i, box in enumerate(boxes.int().tolist()):
        part = torch_cifar.resized(nchw, tuple(box))[i]
        np.testing.assert_allclose(part.permute(1, 2, 0), wanted[i], atol=1e-5)


def test_boxes_are_drawn_as_ours() -> None:
    """Mean and deviation of place and sides, of thousands."""
    torch.manual_seed(0)
    scale, count = (0.2, 1.0), 4000
    many = torch_cifar.random_boxes(count, 20, 28, scale, torch.device("cpu")).numpy()
    one = np.array([torch_cifar.random_box(20, 28, scale) for _ in range(count)])
    keys = jax.random.split(jax.random.key(0), count)
    ours = np.asarray(jax.vmap(lambda key: image.random_box(key, (20, 28), scale))(keys))
    for theirs in (many, one):
        np.testing.assert_allclose(theirs.mean(0), ours.mean(0), atol=0.35)
        np.testing.assert_allclose(theirs.std(0), ours.std(0), atol=0.35)
        assert (theirs[:, :2] >= 0).all()
        assert (theirs[:, :2] + theirs[:, 2:] <= [20, 28]).all()


def test_cutmix_pastes_one_box_of_other_images() -> None:
    torch.manual_seed(0)
    images = torch.arange(8.0)[:, None, None, None].expand(-1, 3, 10, 14).clone()
    shares = []
    for _ in range(50):
        mixed = torch_cifar.cutmix(images.clone())
        assert all(len(np.unique(each)) <= 2 for each in mixed.numpy())
        pasted = (mixed != images).any(0).any(0)
        rows, columns = pasted.any(1), pasted.any(0)
        assert torch.equal(pasted, rows[:, None] & columns)
        shares.append(pasted.float().mean().item())
    assert 0.2 < np.mean(shares) < 0.6


@pytest.mark.parametrize("peer", torch_distillation.STUDENT_PEERS)
def test_views_of_both_peers_are_bytes_and_differ(learned: Any, peer: str) -> None:
    side = distillation.their_student(STUDENT, peer, learned, 2)
    few = side.images[:6]
    seen = side.augmented(few)
    assert seen.dtype == torch.uint8
    assert seen.shape == few.shape
    assert all(not torch.equal(a, b) for a, b in zip(seen, few, strict=True))


def test_steps_that_are_timed_take_the_students_to_the_teacher(learned: Any) -> None:
    torch.manual_seed(0)
    pixels = learned.images[:4] / np.float32(255)
    side = distillation.their_student(STUDENT, "pytorch_batched", learned, 20)
    before, _ = side.loss_and_gradient(pixels)
    side.run(20)
    after, _ = side.loss_and_gradient(pixels)
    assert after < 0.9 * before
    ours = distillation.OurStudent(STUDENT, learned, 20)
    found = []
    step = ours._step
    ours._step = lambda *args: found.append(step(*args)) or found[-1]
    ours.run(20)
    losses = [float(info.loss) for _, info in found]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])


def test_rows_have_images_a_second() -> None:
    rounds = [distillation.timing.Round(0.5, {"pytorch_frozen": 1.0}, 0.0)] * 3
    (row,) = distillation.rows(SYNTHESIS, rounds, {"pytorch_frozen": {"loss_difference": 0.0}})
    assert row["case"] == "sre2l resnet20_cifar 4x12 float32"
    assert (row["ours_images_per_s"], row["peer_images_per_s"], row["ratio"]) == (8, 4, 2)


def test_cases_hold_all_presets_that_are_timed() -> None:
    for case in distillation.GPU_CASES:
        if isinstance(case, distillation.Synthesis):
            assert case.phase(7).steps == 7
            assert case.jitter[0] == 0

"""What a step sees: parts, mixtures, and their labels."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from jinv import image, training
from jinv.training import Config, Views

RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(RNG.integers(0, 256, (8, 12, 16, 3)).astype(np.uint8))
LABELS = jnp.arange(8) % 5


def view(views: Views, seed: int = 0, **how: Any) -> training.View:
    how = {"size": (12, 16), "classes": 5} | how
    return training.make_view(jax.random.key(seed), IMAGES, LABELS, views, **how)


def test_without_options_a_view_is_the_images() -> None:
    seen = view(Views())
    np.testing.assert_allclose(seen.pixels, np.asarray(IMAGES) / 255, rtol=1e-6)
    np.testing.assert_array_equal(seen.targets, np.eye(5)[LABELS])


def test_parts_are_of_the_size_and_of_every_image_alone() -> None:
    """Each is the crop of some box of the shares; rounded to bytes as pictures are."""
    shares = (0.2, 0.3)
    parts = np.asarray(view(Views(resized_crop=shares), size=(10, 10)).pixels) * 255
    assert parts.shape == (8, 10, 10, 3)
    np.testing.assert_allclose(parts, np.rint(parts), atol=1e-3)
    boxes = []
    for i, key in enumerate(jax.random.split(jax.random.key(0), 8)):
        drawn = jax.random.split(jax.random.split(key)[0])[0]
        box = image.random_box(drawn, (12, 16), shares)
        boxes.append(tuple(np.asarray(box).tolist()))
        alone = image.resized_crop(IMAGES[i : i + 1].astype(jnp.float32), box, (10, 10))
        np.testing.assert_allclose(parts[i], np.floor(np.asarray(alone[0]) + 0.5), atol=1e-3)
    assert len(set(boxes)) > 4


@pytest.mark.parametrize("seed", range(4))
def test_mixup_blends_images_and_labels_by_one_share(seed: int) -> None:
    mixed = view(Views(mix="mixup", mix_alpha=0.8), seed)
    plain = np.asarray(IMAGES).reshape(8, -1) / 255.0
    shares, partners = [], []
    for i, found in enumerate(np.asarray(mixed.pixels).reshape(8, -1)):
        errors = []
        for other in plain:
            away = other - plain[i]
            share = 1.0 if not away.any() else 1 - (found - plain[i]) @ away / (away @ away)
            errors.append((np.abs(share * plain[i] + (1 - share) * other - found).max(), share))
        alone = np.abs(found - plain[i]).max() < 1e-6
        j = i if alone else int(np.argmin([error for error, _ in errors]))
        assert errors[j][0] < 1e-5
        partners.append(j)
        shares.append(errors[j][1] if j != i else None)
    known = [share for share in shares if share is not None]
    assert known
    np.testing.assert_allclose(known, known[0], atol=1e-4)
    assert sorted(partners) == list(range(8))
    eye = np.eye(5)
    expected = known[0] * eye[LABELS] + (1 - known[0]) * eye[np.asarray(LABELS)[partners]]
    np.testing.assert_allclose(mixed.targets, expected, atol=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_cutmix_pastes_one_box_and_mixes_labels_by_its_area(seed: int) -> None:
    mixed = view(Views(mix="cutmix"), seed)
    plain = np.asarray(IMAGES) / np.float32(255)
    found = np.asarray(mixed.pixels)
    changed = (np.abs(found - plain) > 1e-5).any((0, 3))
    rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    area = 0.0
    if len(rows):
        inside = np.ix_(range(8), range(rows[0], rows[-1] + 1), range(columns[0], columns[-1] + 1))
        assert changed[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        area = len(rows) * len(columns) / (12 * 16)
        boxes = plain[inside]
        order = [int(np.argmin([np.abs(b - f).max() for b in boxes])) for f in found[inside]]
        assert sorted(order) == list(range(8))
        np.testing.assert_allclose(found[inside], boxes[order], atol=1e-6)
        eye = np.eye(5)[LABELS]
        np.testing.assert_allclose(mixed.targets, (1 - area) * eye + area * eye[order], atol=1e-6)
    else:
        np.testing.assert_allclose(mixed.targets, np.eye(5)[LABELS], atol=1e-6)


def test_shares_follow_beta() -> None:
    """Mean 1/2 and variance 1 / (4 (2 alpha + 1))."""
    draw = jax.jit(
        jax.vmap(
            lambda key: training.make_view(
                key, IMAGES[:2], jnp.array([0, 1]), Views(mix="mixup", mix_alpha=0.8), (12, 16), 2
            ).targets[0, 0]
        )
    )
    found = np.asarray(draw(jax.random.split(jax.random.key(0), 3000)))
    mixed = found[found < 1]  # half of the orders leave two images where they are
    assert abs(mixed.mean() - 0.5) < 0.03
    assert abs(mixed.var() - 1 / (4 * 2.6)) < 0.01


def test_the_same_key_gives_the_same_view() -> None:
    views = Views(flip=True, crop=2, resized_crop=(0.1, 1.0), mix="cutmix")
    first, again, other = view(views, 3), view(views, 3), view(views, 4)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(first.pixels, other.pixels)


def test_networks_see_a_view_at_their_size_and_normalisation() -> None:
    net = tiny.network(space=tiny.OTHER_SPACE)
    seen = training.shown(net, view(Views()).pixels[:, :, :12])
    plain = jnp.asarray(np.asarray(IMAGES)[:, :, :12] / np.float32(255))
    wanted = image.normalise(plain, tiny.OTHER_SPACE)
    np.testing.assert_allclose(seen, wanted, atol=1e-5)
    assert training.shown(net, view(Views()).pixels).shape == (8, 12, 12, 3)


def test_half_precision_changes_the_loss_a_little() -> None:
    """Parameters and losses stay float32."""
    net = tiny.network()
    found = {}
    for dtype in ("float32", "bfloat16"):
        config = Config(compute_dtype=dtype, warmup=0)  # type: ignore[arg-type]
        optimizer = training.make_optimizer(config, 10)
        step = jax.jit(training.make_step(net, config, optimizer))
        state, info = step(jax.random.key(0), training.init(net, optimizer), (IMAGES, LABELS))
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.variables["convs"]))
        found[dtype] = float(info.loss)
    assert found["float32"] != found["bfloat16"]
    assert found["float32"] == pytest.approx(found["bfloat16"], rel=0.03)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"mix_alpha": 2.0}, "mix is 'none'"),
        ({"resized_crop": (0.5, 0.1)}, "must be the least and the greatest"),
        ({"mix": "mosaic"}, "mix"),
    ],
)
def test_views_are_checked(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Views(**keys)

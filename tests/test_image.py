"""Spaces, augmentations and resolutions against NumPy, torch and Pillow."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jinv import image
from jinv.image import Preprocessing

IMAGENET = Preprocessing()
LITE = Preprocessing(size=224, mean=(127.0,) * 3, std=(128.0,) * 3, pixel_range=(0.0, 255.0))
GRAY = Preprocessing(size=28, mean=(0.1307,), std=(0.3081,))
SPACES = pytest.mark.parametrize("space", [IMAGENET, LITE, GRAY], ids=["imagenet", "lite", "gray"])


def random(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Uniform in [0, 1)."""
    return np.random.default_rng(seed).random(shape, np.float32)


def keys(count: int) -> jax.Array:
    return jax.random.split(jax.random.key(0), count)


# --- spaces --------------------------------------------------------------------------------------


@SPACES
def test_normalise_is_the_formula(space: Preprocessing) -> None:
    """(lo + pixels (hi - lo) - mean) / std."""
    pixels = random((2, 5, 4, space.channels))
    lo, hi = space.pixel_range
    expected = np.empty_like(pixels)
    for c in range(space.channels):
        expected[..., c] = (lo + pixels[..., c] * (hi - lo) - space.mean[c]) / space.std[c]
    found = image.normalise(jnp.asarray(pixels), space)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_normalise_known_values() -> None:
    """Black and white: ImageNet's -2.1179 .. 2.64, EfficientNet-Lite's -127/128 .. 1."""
    black, white = jnp.zeros((1, 1, 1, 3)), jnp.ones((1, 1, 1, 3))
    np.testing.assert_allclose(
        image.normalise(black, IMAGENET)[0, 0, 0], [-2.117904, -2.035714, -1.804444], rtol=1e-5
    )
    np.testing.assert_allclose(
        image.normalise(white, IMAGENET)[0, 0, 0], [2.248908, 2.428571, 2.64], rtol=1e-5
    )
    np.testing.assert_allclose(image.normalise(black, LITE)[0, 0, 0], [-127 / 128] * 3, rtol=1e-6)
    np.testing.assert_allclose(image.normalise(white, LITE)[0, 0, 0], [1.0] * 3, rtol=1e-6)


@pytest.mark.parametrize("mean", [0.0, 255.0, 127.5])
def test_a_mean_may_be_at_an_end_of_the_range(mean: float) -> None:
    Preprocessing(mean=mean, std=58.0, pixel_range=(0, 255))
    Preprocessing(mean=mean / 255, std=0.2)


WHOLE = [np.uint8, np.int64, np.int32, np.bool_]


@pytest.mark.parametrize("dtype", WHOLE)
def test_pixels_and_normalised_images_that_are_no_floats_are_refused(dtype: Any) -> None:
    given = np.ones((1, 2, 2, 3), dtype)
    for use in (image.normalise, image.denormalise, lambda x, _: image.to_bytes(x)):
        for images in (given, jnp.asarray(given)):
            with pytest.raises(ValueError, match=r"floating-point numbers, not .*from_bytes"):
                use(images, IMAGENET)
    with pytest.raises(ValueError, match="floating-point numbers"):
        jax.eval_shape(lambda x: image.normalise(x, IMAGENET), given)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, *WHOLE[1:]])
def test_bytes_that_are_not_uint8_are_refused(dtype: Any) -> None:
    given = np.ones((1, 2, 2, 3), dtype)
    for use in (
        lambda x: image.from_bytes(x, IMAGENET),
        lambda x: image.from_bytes(x, GRAY),
        lambda x: image.resize_bytes(x, 4),
    ):
        for images in (given, jnp.asarray(given)):
            with pytest.raises(ValueError, match=r"uint8, not .*normalise"):
                use(images)
        with pytest.raises(ValueError, match=r"uint8, not .*normalise"):
            jax.eval_shape(use, given)


def test_images_that_are_no_array_are_refused() -> None:
    with pytest.raises(ValueError, match="array, not a list"):
        image.normalise([[0.5]], IMAGENET)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="array, not a"):
        image.from_bytes(Image.new("RGB", (2, 2)), IMAGENET)  # type: ignore[arg-type]


@SPACES
def test_denormalise_undoes_normalise(space: Preprocessing) -> None:
    pixels = 2 * random((2, 5, 4, space.channels)) - 0.5  # not clipped outside [0, 1] either
    back = image.denormalise(image.normalise(jnp.asarray(pixels), space), space)
    np.testing.assert_allclose(back, pixels, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtype_is_kept(dtype: Any) -> None:
    x = jnp.asarray(random((2, 6, 6, 3)), dtype)
    key = jax.random.key(0)
    for found in (
        image.normalise(x, IMAGENET),
        image.denormalise(x, IMAGENET),
        image.convert(x, IMAGENET, LITE),
        image.clip(x, IMAGENET),
        image.jitter(key, x, 2),
        image.flip(key, x),
        image.downscale(x, 2),
        image.resize(x, 3),
    ):
        assert found.dtype == dtype


def test_convert_between_equal_spaces_is_the_same_object() -> None:
    x = jnp.asarray(random((1, 4, 4, 3)))
    same = Preprocessing(size=99, mean=IMAGENET.mean, std=IMAGENET.std)
    assert image.convert(x, IMAGENET, IMAGENET) is x
    assert image.convert(x, IMAGENET, same) is x


@pytest.mark.parametrize(("source", "target"), [(IMAGENET, LITE), (LITE, IMAGENET)])
def test_convert_is_denormalise_then_normalise(
    source: Preprocessing, target: Preprocessing
) -> None:
    x = image.normalise(jnp.asarray(random((2, 4, 5, 3))), source)
    expected = image.normalise(image.denormalise(x, source), target)
    np.testing.assert_allclose(image.convert(x, source, target), expected, rtol=1e-4, atol=1e-5)


@SPACES
def test_clip_to_the_valid_range(space: Preprocessing) -> None:
    """[(lo - mean) / std, (hi - mean) / std], a range of its own for each channel."""
    x = 20 * random((3, 9, 9, space.channels)) - 10
    found = np.asarray(image.clip(jnp.asarray(x), space))
    lo, hi = space.pixel_range
    for c in range(space.channels):
        low, high = (lo - space.mean[c]) / space.std[c], (hi - space.mean[c]) / space.std[c]
        np.testing.assert_allclose(found[..., c], np.clip(x[..., c], low, high), rtol=1e-6)
    pixels = np.asarray(image.denormalise(found, space))
    assert pixels.min() == pytest.approx(0, abs=1e-6)
    assert pixels.max() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mean": (0.5,), "std": (0.5, 0.5)}, "one value a channel: 1 against 2"),
        ({"mean": (), "std": ()}, "one value a channel"),
        ({"std": (0.2, 0.0, 0.2)}, "must be positive"),
        ({"std": (0.2, -0.2, 0.2)}, "must be positive"),
        ({"size": 0}, "must be positive"),
        ({"pixel_range": (1.0, 0.0)}, "rising"),
        ({"pixel_range": (1.0, 1.0)}, "rising"),
        ({"pixel_range": 255}, r"such as \(0, 255\); not 255"),
        ({"pixel_range": (0, 128, 255)}, "two rising numbers"),
        ({"size": "224"}, "one side, such as 224, .*not '224'"),
        ({"size": 224.5}, "whole numbers of pixels.*not 224.5"),
        ({"size": True}, "not True"),
        ({"size": (16, 24, 3)}, r"height and width.*not \(16, 24, 3\)"),
        ({"size": (16, -24)}, "must be positive"),
        ({"size": None}, "not None"),
        ({"mean": (0.5, float("nan"), 0.5)}, "mean must be a finite number"),
        ({"std": float("inf")}, "std must be a finite number"),
        ({"std": -0.2}, "std must be positive, not -0.2"),
        ({"mean": "0.5"}, "mean must be a finite number.*not '0.5'"),
        ({"mean": True}, "mean must be a finite number"),
        ({"mean": np.full((3, 1, 1), 0.5)}, "a flat list"),
        ({"mean": [[0.5], [0.5, 0.5]]}, "a flat list"),
        ({"mean": np.full(4, 0.5)}, "one value a channel: 4 against 3"),
        (
            {"mean": (123.0, 116.0, 103.0), "std": (58.0, 57.0, 57.0)},
            r"pixel_range, \(0.0, 1.0\), .*not \(123.0, 116.0, 103.0\): .*pixel_range=\(0, 255\)",
        ),
        ({"mean": (0.5, 0.5, 127.5)}, r"give pixel_range=\(0, 255\)"),
        ({"mean": 33.3, "std": 78.6}, r"give pixel_range=\(0, 255\)"),
        ({"mean": -0.1}, "the values of black and white"),
        ({"mean": 30000.0, "std": 9.0}, "the values of black and white"),
        ({"mean": 1.5, "pixel_range": (-1, 1)}, r"pixel_range, \(-1.0, 1.0\)"),
        ({"resize": 223}, "at least the shorter side of the size, 224, not 223"),
        ({"size": (90, 60), "resize": 59}, "the shorter side of the size, 60, not 59"),
        ({"resize": 256.0}, "resize must be a whole number of at least 1 or nothing .*, not 256.0"),
        ({"resize": True}, "resize must be a whole number of at least 1 or nothing .*, not true"),
        ({"resize": "256"}, "resize must be a whole number of at least 1"),
        ({"resize": 0}, "resize must be a whole number of at least 1"),
        ({"interpolation": "nearest"}, "interpolation must be one of bicubic, bilinear, not"),
        ({"interpolation": None}, "interpolation must be one of"),
        ({"interpolation": ["bilinear"]}, "interpolation must be one of"),
    ],
)
def test_preprocessing_refuses(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preprocessing(**settings)


@pytest.mark.parametrize(
    ("given", "mean", "std"),
    [
        ({"mean": 0.5, "std": 0.25}, (0.5,), (0.25,)),
        ({"mean": 0.5, "std": (0.2, 0.25, 0.3)}, (0.5, 0.5, 0.5), (0.2, 0.25, 0.3)),
        ({"mean": [0.5], "std": np.float64(0.25)}, (0.5,), (0.25,)),
        ({"mean": np.full(3, 0.5), "std": [1, 2, 3]}, (0.5, 0.5, 0.5), (1.0, 2.0, 3.0)),
        ({"mean": jnp.zeros(4), "std": 1}, (0.0,) * 4, (1.0,) * 4),
        ({"mean": 0}, (0.0,) * 3, (0.229, 0.224, 0.225)),
    ],
)
def test_preprocessing_of_numbers_lists_and_arrays(
    given: dict[str, Any], mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    """The same as of tuples of floats: equal, with one hash, and plain in JSON."""
    found = Preprocessing(**given, pixel_range=[0, 1], resize=np.int64(300))
    assert (found.mean, found.std, found.pixel_range) == (mean, std, (0.0, 1.0))
    assert {type(value) for value in (*found.mean, *found.std, *found.pixel_range)} == {float}
    same = Preprocessing(mean=mean, std=std, resize=300)
    assert found == same
    assert hash(found) == hash(same)
    assert Preprocessing(**json.loads(json.dumps(dataclasses.asdict(found)))) == found
    assert dataclasses.replace(found, size=8).mean == mean


@pytest.mark.parametrize(
    ("given", "size", "height", "width"),
    [
        (16, 16, 16, 16),
        (np.int64(16), 16, 16, 16),
        ((16, 16), 16, 16, 16),
        ((16, 24), (16, 24), 16, 24),
        ([16, np.int32(24)], (16, 24), 16, 24),
        (np.array([24, 16]), (24, 16), 24, 16),
    ],
)
def test_preprocessing_of_every_size(given: Any, size: Any, height: int, width: int) -> None:
    found = Preprocessing(given)
    assert (found.size, found.height, found.width) == (size, height, width)
    assert hash(found) == hash(Preprocessing(size))
    assert image.sides(given) == (height, width)
    x = jnp.zeros((1, 4, 6, 1))
    assert image.resize(x, given).shape == (1, height, width, 1)
    assert image.resize_bytes(x.astype(jnp.uint8), given).shape == (1, height, width, 1)


# --- augmentations -------------------------------------------------------------------------------


def shift_of(found: np.ndarray, original: np.ndarray, limit: int) -> tuple[int, int]:
    """The roll (rows, columns) that made every image of `found` from `original`."""
    reach = range(-limit - 2, limit + 3)
    matches = [
        (dy, dx)
        for dy in reach
        for dx in reach
        if np.array_equal(found, np.roll(np.roll(original, dy, axis=1), dx, axis=2))
    ]
    assert len(matches) == 1, "no roll, or a different one for each image"
    return matches[0]


def test_jitter_rolls_the_whole_batch_by_every_shift_up_to_the_limit() -> None:
    limit = 2
    original = random((2, 9, 8, 3))
    found = jax.jit(jax.vmap(image.jitter, (0, None, None)), static_argnums=2)(
        keys(400), jnp.asarray(original), limit
    )
    shifts = [shift_of(batch, original, limit) for batch in np.asarray(found)]
    inclusive = range(-limit, limit + 1)
    assert set(shifts) == {(dy, dx) for dy in inclusive for dx in inclusive}
    # Uniform: 16 expected of each of the 25; the standard deviation is 4.
    counts = [shifts.count(shift) for shift in set(shifts)]
    assert min(counts) >= 3
    assert max(counts) <= 36


def test_jitter_by_nothing_and_by_key() -> None:
    x = jnp.asarray(random((2, 9, 8, 3)))
    key = jax.random.key(7)
    np.testing.assert_array_equal(image.jitter(key, x, 0), x)
    np.testing.assert_array_equal(image.jitter(key, x, 4), image.jitter(key, x, 4))


def test_flip_mirrors_the_whole_batch_half_of_the_time() -> None:
    original = random((3, 4, 5, 3))
    found = np.asarray(jax.vmap(image.flip, (0, None))(keys(400), jnp.asarray(original)))
    mirrored = np.asarray([np.array_equal(batch, original[:, :, ::-1]) for batch in found])
    kept = np.asarray([np.array_equal(batch, original) for batch in found])
    assert (mirrored ^ kept).all()
    assert 150 < mirrored.sum() < 250  # five standard deviations


@pytest.mark.parametrize(("probability", "mirrored"), [(0.0, False), (1.0, True)])
def test_flip_never_and_always(probability: float, mirrored: bool) -> None:
    original = random((3, 4, 5, 3))
    for key in keys(20):
        found = image.flip(key, jnp.asarray(original), probability)
        np.testing.assert_array_equal(found, original[:, :, ::-1] if mirrored else original)


# --- resolutions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1, 2, 3])
@pytest.mark.parametrize("size", [(12, 6), (13, 8), (7, 11)])
def test_downscale_equals_torch_average_pool(size: tuple[int, int], factor: int) -> None:
    torch = pytest.importorskip("torch")
    x = random((2, *size, 3))
    nchw = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    expected = torch.nn.functional.avg_pool2d(nchw, factor).numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(image.downscale(jnp.asarray(x), factor), expected, atol=1e-6)


@pytest.mark.parametrize("size", [(9, 14), (20, 31)])
def test_resize_equals_torch_bilinear(size: tuple[int, int]) -> None:
    """Antialiased, half-pixel centres: shrinking and growing, each axis with its own factor."""
    torch = pytest.importorskip("torch")
    x = random((2, 12, 17, 3))
    nchw = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    expected = torch.nn.functional.interpolate(
        nchw, size, mode="bilinear", antialias=True, align_corners=False
    )
    found = image.resize(jnp.asarray(x), size)
    np.testing.assert_allclose(found, expected.numpy().transpose(0, 2, 3, 1), atol=1e-5)


def test_resize_sides_and_methods() -> None:
    x = jnp.asarray(random((2, 6, 8, 3)))
    assert image.resize(x, 5).shape == (2, 5, 5, 3)
    assert image.resize(x, (3, 4), "nearest").shape == (2, 3, 4, 3)
    assert image.resize(x, (6, 8)) is x
    np.testing.assert_array_equal(
        image.resize(x, (12, 16), "nearest"), np.repeat(np.repeat(x, 2, axis=1), 2, axis=2)
    )


# --- colours and gray ----------------------------------------------------------------------------


def test_colours_become_gray_as_in_pillow() -> None:
    """ITU-R 601: bytes as Pillow's mode "L" has them, in NumPy and JAX; floats by the formula."""
    colour = np.random.default_rng(0).integers(0, 256, (3, 40, 40, 3), np.uint8)
    expected = np.stack([np.asarray(Image.fromarray(one).convert("L")) for one in colour])
    for found in (image.for_channels(colour, 1), image.for_channels(jnp.asarray(colour), 1)):
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, expected[..., None])
    luma = (colour / 255) @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose(image.for_channels(colour / 255, 1)[..., 0], luma, rtol=1e-12)
    found = image.from_bytes(jnp.asarray(colour), GRAY)
    np.testing.assert_allclose(found[..., 0], (expected / 255 - 0.1307) / 0.3081, atol=1e-5)


def test_gray_stays_and_other_channels_are_named() -> None:
    gray, colour = np.zeros((1, 2, 2, 1), np.uint8), np.zeros((1, 2, 2, 3), np.uint8)
    assert image.for_channels(gray, 3) is gray
    assert image.for_channels(colour, 3) is colour
    assert image.from_bytes(jnp.asarray(gray), IMAGENET).shape == (1, 2, 2, 3)
    for found, wanted in ((2, 1), (4, 3), (2, 3), (4, 1), (3, 4)):
        with pytest.raises(ValueError, match=f"{found} channels .* takes {wanted}"):
            image.for_channels(np.zeros((1, 2, 2, found), np.uint8), wanted)


# --- bytes, sheets, photographs ------------------------------------------------------------------


def test_to_bytes_rounds_to_nearest_and_clips() -> None:
    values = np.array([-0.5, 0, 0.49 / 255, 0.51 / 255, 0.5, 254.4 / 255, 254.6 / 255, 1, 7])
    found = image.to_bytes(values.astype(np.float32))
    assert found.dtype == np.uint8
    assert found.tolist() == [0, 0, 0, 1, 128, 254, 255, 255, 255]
    every = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(image.to_bytes(jnp.asarray(every, jnp.float32) / 255), every)
    assert image.to_bytes(jnp.ones((2, 2), jnp.bfloat16)).tolist() == [[255, 255], [255, 255]]


def test_grid_places_every_image_in_a_white_frame() -> None:
    pixels = random((5, 4, 3, 3)) / 2
    sheet = image.grid(pixels, columns=3, gap=2)
    assert sheet.shape == (2 + 2 * (4 + 2), 2 + 3 * (3 + 2), 3)
    covered = np.zeros(sheet.shape[:2], bool)
    for i, (y, x) in enumerate([(2, 2), (2, 7), (2, 12), (8, 2), (8, 7)]):
        np.testing.assert_array_equal(sheet[y : y + 4, x : x + 3], pixels[i])
        covered[y : y + 4, x : x + 3] = True
    assert (sheet[~covered] == 1).all()
    assert image.grid(image.to_bytes(pixels), columns=3, gap=2)[~covered].min() == 255


@pytest.mark.parametrize(
    ("count", "rows", "columns"),
    [(1, 1, 1), (2, 1, 2), (6, 2, 3), (7, 2, 4), (16, 4, 4), (24, 4, 6), (64, 8, 8), (84, 7, 12)],
)
def test_grid_is_wide_and_has_few_empty_places(count: int, rows: int, columns: int) -> None:
    sheet = image.grid(np.zeros((count, 4, 4, 1), np.float32), gap=1)
    assert sheet.shape == (1 + 5 * rows, 1 + 5 * columns, 1)


def gradient_picture(width: int, height: int) -> Image.Image:
    """A smooth RGB picture in which place can be read from colour."""
    y, x = np.mgrid[:height, :width]
    channels = (255 * x / (width - 1), 255 * y / (height - 1), np.full_like(x, 128.0))
    return Image.fromarray(np.stack(channels, -1).round().astype(np.uint8))


@pytest.mark.parametrize(("width", "height"), [(301, 200), (200, 303), (256, 256), (100, 90)])
def test_centre_crop_takes_the_central_square(width: int, height: int) -> None:
    """Side int(S / (S + 32) min(w, h)), bicubic to S; seven eighths at 224."""
    picture = gradient_picture(width, height)
    found = image.centre_crop(picture, IMAGENET)
    assert found.shape == (224, 224, 3)
    assert found.dtype == np.float32
    assert 0 <= found.min() <= found.max() <= 1

    side = int(0.875 * min(width, height))
    left, top = math.ceil((width - side) / 2), math.ceil((height - side) / 2)
    box = (left, top, left + side, top + side)
    expected = picture.resize((224, 224), Image.Resampling.BICUBIC, box)
    # Pillow's `box` samples the same square, and looks past its border for the outermost pixels.
    inside = (slice(8, -8), slice(8, -8))
    np.testing.assert_allclose(
        found[inside], np.asarray(expected, np.float32)[inside] / 255, atol=1.01 / 255
    )
    middle = found[112, 112]
    np.testing.assert_allclose(middle, [0.5, 0.5, 128 / 255], atol=0.02)
    # Left edge, top edge: where the square begins in the picture.
    assert found[112, 0, 0] == pytest.approx(left / (width - 1), abs=0.012)
    assert found[0, 112, 1] == pytest.approx(top / (height - 1), abs=0.012)


def test_centre_crop_puts_an_odd_pixel_left_and_top() -> None:
    """As EfficientNet's evaluation: offset (length - side + 1) // 2. 224 of 256 px: no resizing."""
    columns = np.arange(257, dtype=np.float32) % 256
    picture = Image.fromarray(np.broadcast_to(columns, (256, 257)).astype(np.uint8))
    space = Preprocessing(size=224, mean=(0.0,), std=(1.0,))
    found = image.to_bytes(image.centre_crop(picture, space))
    assert (found[:, :, 0] == np.arange(17, 241)).all()
    turned = image.to_bytes(image.centre_crop(picture.transpose(Image.Transpose.TRANSPOSE), space))
    assert (turned[:, :, 0] == np.arange(17, 241)[:, None]).all()


def test_centre_crop_gray_and_other_modes() -> None:
    colour = gradient_picture(90, 60)
    gray = image.centre_crop(colour, GRAY)
    assert gray.shape == (28, 28, 1)
    # ITU-R 601 luma: 0.299 red + 0.587 green + 0.114 blue.
    rgb = image.centre_crop(colour, Preprocessing(size=28))
    luma = rgb @ np.array([0.299, 0.587, 0.114], np.float32)
    np.testing.assert_allclose(gray[..., 0], luma, atol=2.5 / 255)

    from_gray = image.centre_crop(colour.convert("L"), Preprocessing(size=28))
    assert from_gray.shape == (28, 28, 3)
    assert (from_gray == from_gray[..., :1]).all()
    with_alpha = image.centre_crop(colour.convert("RGBA"), Preprocessing(size=28))
    np.testing.assert_array_equal(with_alpha, rgb)


@pytest.mark.parametrize("size", [1, 28, 32, 224, (16, 24), (24, 16)])
def test_a_picture_of_the_size_stays_as_it_is(size: Any) -> None:
    height, width = image.sides(size)
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    found = image.centre_crop(Image.fromarray(pixels), Preprocessing(size))
    np.testing.assert_array_equal(image.to_bytes(found), pixels)
    gray = Image.fromarray(pixels[..., 0])
    found = image.centre_crop(gray, dataclasses.replace(GRAY, size=size))
    np.testing.assert_array_equal(image.to_bytes(found), pixels[..., :1])


@pytest.mark.parametrize(
    ("given", "size"),
    [
        (28, 32),
        (32, 28),
        (32, 224),
        (64, 32),
        (250, 224),
        ((8, 12), (16, 24)),
        ((48, 32), (24, 16)),
    ],
)
def test_small_pictures_of_the_proportions_come_whole(given: Any, size: Any) -> None:
    """Those of data sets, which have no margin to lose: bicubic by Pillow itself."""
    height, width = image.sides(given)
    picture = gradient_picture(width, height)
    expected = picture.resize(image.sides(size)[::-1], Image.Resampling.BICUBIC)
    found = image.to_bytes(image.centre_crop(picture, Preprocessing(size)))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("picture", "size", "box"),
    [
        ((330, 200), (16, 24), (116, 67, 215, 133)),  # S = 16: a third of 300 x 200
        ((400, 400), 100, (49, 49, 352, 352)),  # int(100 / 132 * 400) = 303
        ((40, 30), 32, (7, 2, 33, 28)),  # not 15 px, half of them, but 7 / 8
        ((50, 80), 24, (13, 28, 37, 52)),  # not 21 px, which were enlarged
        ((45, 25), 24, (12, 2, 33, 23)),
    ],
)
def test_others_lose_a_margin(
    picture: tuple[int, int], size: Any, box: tuple[int, int, int, int]
) -> None:
    whole = gradient_picture(*picture)
    sides = image.sides(size)[::-1]
    expected = whole.crop(box).resize(sides, Image.Resampling.BICUBIC)
    found = image.to_bytes(image.centre_crop(whole, Preprocessing(size)))
    np.testing.assert_array_equal(found, expected)


def photograph(name: str) -> Image.Image:
    """One inside scikit-image's or scikit-learn's wheel."""
    package, folder = ("skimage", "data") if name[-3:] == "png" else ("sklearn", "datasets/images")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package} is not installed")
    return Image.open(Path(spec.origin).parent / folder / name).convert("RGB")


@pytest.mark.parametrize("name", ["chelsea.png", "china.jpg"])
@pytest.mark.parametrize(
    ("network", "member"),
    [
        ("resnet50", "IMAGENET1K_V1"),  # 224 of 256, bilinear
        ("resnet50", "IMAGENET1K_V2"),  # 224 of 232
        ("efficientnet_b1", "IMAGENET1K_V1"),  # 240 of 256, bicubic
        ("inception_v3", "IMAGENET1K_V1"),  # 299 of 342: larger than the picture
        ("efficientnet_b5", "IMAGENET1K_V1"),  # 456 of 456
    ],
)
def test_centre_crop_is_torchvisions_resize_and_crop(network: str, member: str, name: str) -> None:
    """Byte for byte but for roundings: 3 % of the bytes by 1, and hardly any by 2."""
    pytest.importorskip("torch")
    models = pytest.importorskip("torchvision").models
    theirs = models.get_model_weights(network)[member].transforms()
    picture = photograph(name)
    normalised = theirs(picture).numpy().transpose(1, 2, 0)
    expected = np.rint(255 * (normalised * theirs.std + theirs.mean))
    space = Preprocessing(
        size=theirs.crop_size[0],
        resize=theirs.resize_size[0],
        interpolation=theirs.interpolation.value,
    )
    difference = np.abs(image.to_bytes(image.centre_crop(picture, space)) - expected)
    assert difference.max() <= 2
    assert difference.mean() < 0.03
    # What is usual without is another picture: this test would notice.
    usual = image.to_bytes(image.centre_crop(picture, Preprocessing(size=space.size)))
    if (network, member) != ("efficientnet_b1", "IMAGENET1K_V1") or name != "chelsea.png":
        assert np.abs(usual - expected).mean() > 0.5


@pytest.mark.parametrize("size", [(60, 90), (90, 60)])
def test_resize_is_of_the_shorter_side_of_the_proportions(size: tuple[int, int]) -> None:
    """A picture of 2 : 1 keeps 3 : 2 of it, resized to 75 px, of which 60 px stay."""
    given = (400, 200) if size[0] < size[1] else (200, 400)
    picture = gradient_picture(*given)
    whole = picture.resize((150, 75) if size[0] < size[1] else (75, 150), Image.Resampling.BICUBIC)
    left, top = (round((w - s) / 2) for w, s in zip(whole.size, size[::-1], strict=True))
    expected = np.asarray(whole, int)[top : top + size[0], left : left + size[1]]
    found = image.to_bytes(image.centre_crop(picture, Preprocessing(size, resize=75)))
    assert np.abs(found - expected).max() <= 1


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_a_resize_leaves_data_sets_pictures_whole(interpolation: Any) -> None:
    method = Image.Resampling[interpolation.upper()]
    space = Preprocessing(224, resize=300, interpolation=interpolation)
    for side in (100, 299):
        picture = gradient_picture(side, side)
        expected = np.asarray(picture.resize((224, 224), method))
        np.testing.assert_array_equal(image.to_bytes(image.centre_crop(picture, space)), expected)
    picture = gradient_picture(300, 300)
    expected = np.asarray(picture)[38:262, 38:262]
    np.testing.assert_array_equal(image.to_bytes(image.centre_crop(picture, space)), expected)
    picture = gradient_picture(224, 224)
    found = image.to_bytes(image.centre_crop(picture, space))
    np.testing.assert_array_equal(found, np.asarray(picture))


def test_interpolation_counts_without_a_resize() -> None:
    picture = photograph("chelsea.png")
    box = image._centre(picture.size, (224, 224))
    expected = picture.crop(box).resize((224, 224), Image.Resampling.BILINEAR)
    found = image.centre_crop(picture, Preprocessing(interpolation="bilinear"))
    np.testing.assert_array_equal(image.to_bytes(found), np.asarray(expected))


@pytest.mark.parametrize("shape", [(1, 96), (96, 1), (1, 1), (2, 500), (3, 1), (1, 20_000)])
@pytest.mark.parametrize("size", [1, 32, 224, (16, 24)])
@pytest.mark.parametrize("resize", [None, 256])
def test_thin_pictures_keep_their_colour(
    shape: tuple[int, int], size: Any, resize: int | None
) -> None:
    picture = Image.new("RGB", shape, (200, 50, 0))
    found = image.centre_crop(picture, Preprocessing(size, resize=resize))
    assert (image.to_bytes(found) == (200, 50, 0)).all()


def test_what_is_transparent_lies_on_white() -> None:
    rng = np.random.default_rng(0)
    rgb, gray = (rng.integers(0, 255, shape, np.uint8) for shape in ((9, 9, 3), (9, 9)))
    clear = rng.random((9, 9)) < 0.5
    alpha = np.where(clear, 0, 255).astype(np.uint8)
    space = Preprocessing(9)
    seen = np.where(clear[..., None], 255, rgb)
    colour = Image.fromarray(np.dstack([rgb, alpha]))
    np.testing.assert_array_equal(image.to_bytes(image.centre_crop(colour, space)), seen)
    half = Image.new("RGBA", (9, 9), (0, 0, 0, 128))
    np.testing.assert_allclose(image.centre_crop(half, space), 127 / 255, atol=1 / 255)

    la = Image.merge("LA", [Image.fromarray(gray), Image.fromarray(alpha)])
    seen = np.where(clear, 255, gray)
    found = image.centre_crop(la, dataclasses.replace(GRAY, size=9))
    np.testing.assert_array_equal(image.to_bytes(found)[..., 0], seen)
    marked = Image.fromarray(np.where(clear, 255, gray // 2).astype(np.uint8))
    marked.info["transparency"] = 255  # as PNG and GIF mark one gray or one colour of a palette
    for picture in (marked, marked.convert("P")):
        picture.info["transparency"] = 255
        found = image.to_bytes(image.centre_crop(picture, space))
        np.testing.assert_array_equal(found[..., 0], np.where(clear, 255, gray // 2))


def test_sixteen_bits_become_eight() -> None:
    """rint(v / 257): 65535 is 255. Of 32 bits and of floats nobody knows which value is white."""
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.rint(values / 257)
    space = Preprocessing(256)
    for dtype in ("<u2", ">u2"):
        found = image.to_bytes(image.centre_crop(Image.fromarray(values.astype(dtype)), space))
        np.testing.assert_array_equal(found[..., 0], expected)
    for unknown in (values.astype(np.int32), values.astype(np.float32)):
        with pytest.raises(ValueError, match=r"which value is white is unknown: save it as 8-bit"):
            image.centre_crop(Image.fromarray(unknown), space)
    with pytest.raises(ValueError, match="network of 4 channels"):
        image.centre_crop(gradient_picture(9, 9), Preprocessing(9, (0.5,) * 4, 0.5))


def test_stack_square_is_normalised_crops() -> None:
    pictures = [gradient_picture(300, 200), gradient_picture(60, 90)]
    found = image.stack_square(pictures, LITE)
    assert found.shape == (2, 224, 224, 3)
    assert found.dtype == np.float32
    for one, picture in zip(found, pictures, strict=True):
        pixels = image.centre_crop(picture, LITE)
        np.testing.assert_allclose(one, (255 * pixels - 127) / 128, atol=1e-5)


# --- boxes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(20, 30), (9, 7)])
def test_resized_crop_equals_torchvisions(size: tuple[int, int]) -> None:
    """Enlarged and shrunk, at edges and inside, every image with a box of its own."""
    pytest.importorskip("torchvision")
    import torch
    from torchvision.transforms.v2 import functional

    images = random((4, 16, 24, 3))
    boxes = np.array([[0, 0, 16, 24], [3, 5, 7, 11], [15, 23, 1, 1], [0, 12, 16, 12]])
    found = image.resized_crop(jnp.asarray(images), jnp.asarray(boxes), size)
    for ours, picture, box in zip(found, images, boxes, strict=True):
        channels = torch.from_numpy(picture.transpose(2, 0, 1).copy())
        theirs = functional.resized_crop(channels, *map(int, box), list(size), antialias=True)
        np.testing.assert_allclose(ours, theirs.numpy().transpose(1, 2, 0), atol=2e-6)
    shared = image.resized_crop(jnp.asarray(images), jnp.asarray(boxes[1]), size)
    np.testing.assert_array_equal(shared[1], found[1])


def boxes_of(size: tuple[int, int], scale: tuple[float, float], count: int = 4000) -> np.ndarray:
    draw = functools.partial(image.random_box, size=size, scale=scale)
    return np.asarray(jax.jit(jax.vmap(draw))(keys(count)))


def test_random_boxes_are_distributed_as_torchvisions() -> None:
    """Mean and spread of every side and corner, within four standard errors."""
    pytest.importorskip("torchvision")
    import torch
    from torchvision.transforms import RandomResizedCrop

    size, scale = (24, 40), (0.08, 1.0)
    ours = boxes_of(size, scale)
    torch.manual_seed(0)
    blank = torch.zeros(1, *size)
    draw = [RandomResizedCrop.get_params(blank, scale, (3 / 4, 4 / 3)) for _ in range(4000)]
    theirs = np.array(draw)
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 2:] >= 1).all()
    assert (ours[:, :2] + ours[:, 2:] <= size).all()
    error = np.sqrt(2 / len(ours)) * theirs.std(0)
    assert (np.abs(ours.mean(0) - theirs.mean(0)) < 4 * error).all()
    assert (np.abs(ours.std(0) - theirs.std(0)) < 4 * error).all()


@pytest.mark.parametrize(("size", "whole"), [((8, 100), (0, 44, 8, 11)), ((90, 9), (39, 0, 12, 9))])
def test_where_no_box_fits_the_largest_centred_one_is_taken(size: Any, whole: Any) -> None:
    assert boxes_of(size, (1.0, 1.0), 3).tolist() == [[*whole]] * 3


def test_the_whole_image_is_a_box() -> None:
    """Of a square, nothing else has all of its area and fits."""
    draw = functools.partial(image.random_box, size=(12, 12), scale=(1.0, 1.0), ratio=(1.0, 1.0))
    assert np.asarray(jax.vmap(draw)(keys(5))).tolist() == [[0, 0, 12, 12]] * 5


def test_jitter_between_two_shifts() -> None:
    picture = random((1, 9, 9, 1))
    rolled = [np.asarray(image.jitter(key, jnp.asarray(picture), (0, 2))) for key in keys(60)]
    shifts = {shift_of(one, picture, 4) for one in rolled}
    assert shifts == {(y, x) for y in range(3) for x in range(3)}

"""Pure functions on images (B, H, W, C): spaces, augmentations, resolutions.

Three spaces occur. *Pixels* are floats in [0, 1]; *normalised* images are what a network takes;
bytes (0..255) exist only in files. A `Preprocessing` is the affine map between the first two.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any, Literal, TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike
from PIL import Image

from jinv import checks

A = TypeVar("A", Array, np.ndarray)
Interpolation = Literal["bicubic", "bilinear"]


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How a network wants its images: `normalised = (lo + pixels * (hi - lo) - mean) / std`.

    Lists and arrays become tuples of floats. A single number as `mean` or `std` stands for every
    channel of the other; two single numbers make one channel.

    Attributes:
      size: of the images the network was trained on, in pixels: the side of squares, or
        (height, width).
      mean: one value a channel, in units of `pixel_range`.
      std: one value a channel, in units of `pixel_range`.
      pixel_range: (lo, hi), the values of black and white before normalisation.
      resize: shorter side of the pictures, in pixels, that the images are the centre of, see
        `centre_crop`; None for 32 more than the images' shorter side.
      interpolation: how pictures are resampled, "bicubic" or "bilinear".

    Raises:
      ValueError: a value is none of these; std is not positive, pixel_range does not rise, mean
        lies outside of it, or resize is less than the images' shorter side.
    """

    size: int | tuple[int, int] = 224
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    pixel_range: tuple[float, float] = (0.0, 1.0)
    resize: int | None = None
    interpolation: Interpolation = "bicubic"

    def __post_init__(self) -> None:
        height, width = sides(self.size)
        mean, std = _finite("mean", self.mean), _finite("std", self.std)
        if not mean.ndim:
            mean = np.full(std.shape or 1, mean)
        if not std.ndim:
            std = np.full(mean.shape, std)
        if mean.shape != std.shape or not mean.size:
            raise ValueError(
                f"mean and std need one value a channel: {mean.size} against {std.size}"
            )
        if std.min() <= 0:
            raise ValueError(f"std must be positive, not {self.std!r}")
        ends = _finite("pixel_range", self.pixel_range)
        if ends.shape != (2,) or ends[0] >= ends[1]:
            raise ValueError(
                "pixel_range must be two rising numbers, the values of black and white, such as "
                f"(0, 255); not {self.pixel_range!r}"
            )
        if mean.min() < ends[0] or mean.max() > ends[1]:
            raise ValueError(
                f"mean must lie in pixel_range, {tuple(ends.tolist())}, in whose units it and std "
                f"are, not {self.mean!r}: "
                + (
                    "give pixel_range=(0, 255) with these"
                    if mean.min() >= 0 and 1 < mean.max() <= 255
                    else "give the values of black and white that it is of as pixel_range"
                )
            )
        if self.resize is not None:
            object.__setattr__(self, "resize", _resize(self.resize, min(height, width)))
        checks.one_of("interpolation", self.interpolation, get_args(Interpolation))
        object.__setattr__(self, "size", height if height == width else (height, width))
        object.__setattr__(self, "mean", tuple(mean.tolist()))
        object.__setattr__(self, "std", tuple(std.tolist()))
        object.__setattr__(self, "pixel_range", tuple(ends.tolist()))

    @property
    def height(self) -> int:
        """Height of the images in pixels."""
        return sides(self.size)[0]

    @property
    def width(self) -> int:
        """Width of the images in pixels."""
        return sides(self.size)[1]

    @property
    def channels(self) -> int:
        """Number of channels of an image: 3 for RGB, 1 for gray."""
        return len(self.mean)

    def gray(self) -> Preprocessing:
        """The one-channel space with this one's mean brightness and contrast."""
        mean, std = float(np.mean(self.mean)), float(np.mean(self.std))
        return dataclasses.replace(self, mean=(mean,), std=(std,))

    @property
    def scale(self) -> np.ndarray:
        """Normalised units that one pixel unit spans, per channel."""
        lo, hi = self.pixel_range
        return (hi - lo) / np.asarray(self.std)

    @property
    def black(self) -> np.ndarray:
        """Normalised value of pixel 0, per channel."""
        return (self.pixel_range[0] - np.asarray(self.mean)) / np.asarray(self.std)

    @property
    def white(self) -> np.ndarray:
        """Normalised value of pixel 1, per channel."""
        return (self.pixel_range[1] - np.asarray(self.mean)) / np.asarray(self.std)


def check_space(what: str, space: object) -> None:
    """Refuse what is no `Preprocessing`.

    Raises:
      ValueError: it names what was to be one.
    """
    if not isinstance(space, Preprocessing):
        raise ValueError(
            f"{what} must be a jinv.Preprocessing, such as Preprocessing(size=32, mean=(0.5,) * 3, "
            f"std=(0.25,) * 3), not {space!r}"
        )


def sides(size: int | Sequence[int]) -> tuple[int, int]:
    """Return height and width of a size: of one side, or of the two.

    Raises:
      ValueError: it is neither; says what a size looks like.
    """
    several = isinstance(size, Sequence | np.ndarray) and not isinstance(size, str)
    try:
        # `index`: neither 224.5 nor "224" is a number of pixels.
        found = tuple(operator.index(side) for side in (size if several else (size, size)))  # type: ignore
    except TypeError:
        found = ()
    if len(found) != 2 or min(found) < 1 or isinstance(size, bool):
        raise ValueError(
            "size must be positive whole numbers of pixels: one side, such as 224, or height and "
            f"width, such as (224, 320); not {size!r}"
        )
    return found


def _resize(resize: Any, least: int) -> int:
    if not checks.fits(checks.Count, resize):
        raise ValueError(f"resize{checks.refusal(checks.Count | None, resize)}")
    if resize < least:
        raise ValueError(
            f"resize must be at least the shorter side of the size, {least}, not {resize}: images "
            "are cut out of the resized picture"
        )
    return int(resize)


def _finite(name: str, given: object) -> np.ndarray:
    """Return a number () or numbers (C,) as float64."""
    try:
        values = np.asarray(given)
        if values.dtype.kind in "iuf" and values.ndim <= 1 and np.isfinite(values).all():
            return values.astype(np.float64)
    except (TypeError, ValueError, RuntimeError):  # lists of several lengths, others' tensors
        pass
    raise ValueError(f"{name} must be a finite number or a flat list of such, not {given!r}")


def pixels(channels: int) -> Preprocessing:
    """Return the space of plain pixels in [0, 1]: nothing is normalised."""
    return Preprocessing(size=1, mean=(0.0,) * channels, std=(1.0,) * channels)


def _like(values: np.ndarray, images: Array) -> Array:
    return jnp.asarray(values, images.dtype)


def _check_floats(what: str, images: Array | np.ndarray) -> None:
    """Refuse bytes and other whole numbers: arithmetic on them is that of whole numbers."""
    if not jnp.issubdtype(_dtype(images), jnp.floating):
        raise ValueError(
            f"{what} are floating-point numbers, not {images.dtype}: of bytes, "
            "jinv.image.from_bytes(images, preprocessing) makes normalised images, and "
            "images / 255 pixels"
        )


def _check_bytes(images: Array | np.ndarray) -> None:
    """Refuse what is not uint8: its range would be a guess."""
    if _dtype(images) != np.uint8:
        raise ValueError(
            f"bytes are uint8, not {images.dtype}: of pixels, floats in [0, 1], "
            "jinv.image.normalise(pixels, preprocessing) makes normalised images, and "
            "jinv.image.to_bytes(pixels) bytes; whole numbers from 0 to 255 become bytes by "
            "images.astype('uint8')"
        )


def _dtype(images: object) -> np.dtype:
    if not isinstance(images, Array | np.ndarray | np.generic):
        raise ValueError(f"images are a NumPy or JAX array, not a {type(images).__name__}")
    return images.dtype


def normalise(pixels: Array, preprocessing: Preprocessing) -> Array:
    """Pixels in [0, 1] to the network's normalised space.

    Raises:
      ValueError: they are no floating-point numbers.
    """
    _check_floats("pixels in [0, 1]", pixels)
    return pixels * _like(preprocessing.scale, pixels) + _like(preprocessing.black, pixels)


def from_bytes(images: Array, preprocessing: Preprocessing, dtype: DTypeLike = "float32") -> Array:
    """Bytes (B, H, W, 1, 3 or C) to normalised images (B, H, W, C), see `for_channels`.

    Raises:
      ValueError: they are not uint8, or of another number of channels.
    """
    _check_bytes(images)
    seen = for_channels(images, preprocessing.channels)
    return normalise(jnp.asarray(seen, dtype) / 255, preprocessing)


def denormalise(images: Array, preprocessing: Preprocessing) -> Array:
    """Normalised images to pixels; inverse of `normalise`, not clipped.

    Raises:
      ValueError: they are no floating-point numbers.
    """
    _check_floats("normalised images", images)
    return (images - _like(preprocessing.black, images)) / _like(preprocessing.scale, images)


def for_channels(images: A, channels: int, name: str = "a network") -> A:
    """Return bytes or pixels (..., 1, 3 or C) as a network of C channels can take them.

    The one way from colours to gray, for C = 1, is the luma of ITU-R 601, as Pillow's mode "L" has
    it: 0.299 red + 0.587 green + 0.114 blue, of bytes rounded to a byte. Gray images stay as they
    are: their one channel is spread over C equal ones wherever they are normalised.

    Raises:
      ValueError: the images have another number of channels; says so of the network of this `name`.
    """
    found = images.shape[-1]
    if found in (1, channels):
        return images
    if (found, channels) != (3, 1):
        raise ValueError(
            f"images of {found} channels cannot be shown to {name}, which takes {channels}: only "
            "gray and RGB images can be changed into each other"
        )
    red, green, blue = (images[..., i : i + 1] for i in range(3))
    if images.dtype != np.uint8:
        return 0.299 * red + 0.587 * green + 0.114 * blue
    red, green, blue = (channel.astype(np.int32) for channel in (red, green, blue))
    # Pillow's own numbers, of 65536.
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).astype(np.uint8)


def convert(images: Array, source: Preprocessing, target: Preprocessing) -> Array:
    """Return images (B, H, W, C) that are normalised for `source` as `target` wants them.

    The identity if both are equal. Gray images become as many equal channels as the target has.

    Raises:
      ValueError: the channels of colour images are not as many as the target's.
    """
    if source.channels not in (1, target.channels):
        raise ValueError(
            f"{source.channels}-channel images cannot be shown to a network of "
            f"{target.channels} channels"
        )
    if np.array_equal(source.scale, target.scale) and np.array_equal(source.black, target.black):
        return images
    gain = target.scale / source.scale
    return images * _like(gain, images) + _like(target.black - source.black * gain, images)


def clip(images: Array, preprocessing: Preprocessing) -> Array:
    """Clip each channel to the valid range [(lo - mean)/std, (hi - mean)/std]."""
    return jnp.clip(images, _like(preprocessing.black, images), _like(preprocessing.white, images))


def jitter(key: Array, images: Array, limit: int | tuple[int, int]) -> Array:
    """Roll the whole batch by one integer an axis, uniform in [-limit, limit] or [low, high]."""
    low, high = (-limit, limit) if isinstance(limit, int) else limit
    shift = jax.random.randint(key, (2,), low, high + 1)
    return jnp.roll(images, shift, axis=(1, 2))


def flip(key: Array, images: Array, probability: float = 0.5) -> Array:
    """Mirror the whole batch horizontally with the given probability."""
    return jnp.where(jax.random.bernoulli(key, probability), images[:, :, ::-1], images)


def random_crop(key: Array, images: Array, margin: int) -> Array:
    """Add a margin of zeros and cut the whole batch back to its size at one uniform place."""
    padded = jnp.pad(images, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
    top, left = jax.random.randint(key, (2,), 0, 2 * margin + 1)
    return jax.lax.dynamic_slice(padded, (0, top, left, 0), images.shape)


_ATTEMPTS = 10
"""Boxes that are tried before the largest centred one is taken, as in torchvision."""


def random_box(
    key: Array,
    size: tuple[int, int],
    scale: tuple[ArrayLike, ArrayLike],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Array:
    """Draw a box (top, left, height, width) in whole pixels, as torchvision's RandomResizedCrop.

    Args:
      key: of the box.
      size: height and width of the image.
      scale: least and greatest share of the image's area, uniform between them.
      ratio: least and greatest width / height, uniform between their logarithms.
    """
    height, width = size
    area_key, ratio_key, place_key = jax.random.split(key, 3)
    low, high = scale
    area = height * width * jax.random.uniform(area_key, (_ATTEMPTS,), minval=low, maxval=high)
    logs = np.log(ratio)
    wide = jnp.exp(jax.random.uniform(ratio_key, (_ATTEMPTS,), minval=logs[0], maxval=logs[1]))
    sides = jnp.rint(jnp.sqrt(jnp.stack([area / wide, area * wide]))).astype(jnp.int32)
    fits = (sides > 0).all(0) & (sides[0] <= height) & (sides[1] <= width)
    usual = np.clip(width / height, *ratio)
    whole = (min(height, round(width / usual)), min(width, round(height * usual)))
    box = jnp.where(fits.any(), sides[:, jnp.argmax(fits)], jnp.array(whole))
    free = jnp.array(size) - box
    place = jax.random.randint(place_key, (2,), 0, free + 1)
    return jnp.concatenate([jnp.where(fits.any(), place, free // 2), box])


def resized_crop(images: Array, boxes: Array, size: int | Sequence[int] | None = None) -> Array:
    """Cut a box out of each image (B, H, W, C) and resample it bilinearly; antialiased.

    Equal to cropping and then resizing: no pixel outside of a box counts. Two products with small
    matrices do it, so that one program serves all boxes.

    Args:
      images: floats.
      boxes: (top, left, height, width) in pixels, (4,) of all images or (B, 4).
      size: of the result, one side or height and width; the images' own by default.
    """
    height, width = images.shape[1:3] if size is None else sides(size)
    boxes = jnp.broadcast_to(boxes, (len(images), 4))
    rows = jax.vmap(_taps, (0, 0, None, None))(boxes[:, 0], boxes[:, 2], height, images.shape[1])
    columns = jax.vmap(_taps, (0, 0, None, None))(boxes[:, 1], boxes[:, 3], width, images.shape[2])
    tall = jnp.einsum("byh,bhwc->bywc", rows, images, precision=jax.lax.Precision.HIGHEST)
    return jnp.einsum("bxw,bywc->byxc", columns, tall, precision=jax.lax.Precision.HIGHEST)


def _taps(start: Array, length: Array, count: int, of: int) -> Array:
    """Return the weights (count, of) of pixels from `start` on in `count` samples of `length`."""
    scale = length / count
    at = (jnp.arange(count) + 0.5) * scale - 0.5
    pixel = jnp.arange(of) - start
    weights = jnp.maximum(0, 1 - jnp.abs(at[:, None] - pixel) / jnp.maximum(scale, 1))
    weights = jnp.where((pixel >= 0) & (pixel < length), weights, 0)
    return weights / weights.sum(1, keepdims=True)


def downscale(images: Array, factor: int) -> Array:
    """Average-pool by `factor`; rows and columns that do not fill a window are dropped."""
    batch, height, width, channels = images.shape
    h, w = height // factor, width // factor
    windows = images[:, : h * factor, : w * factor].reshape(batch, h, factor, w, factor, channels)
    return windows.mean(axis=(2, 4))


def resize(images: Array, size: int | Sequence[int], method: str = "bilinear") -> Array:
    """Resample to (size, size) or (height, width); antialiased when shrinking."""
    height, width = sides(size)
    if images.shape[1:3] == (height, width):
        return images
    return jax.image.resize(images, (images.shape[0], height, width, images.shape[3]), method)


def resize_bytes(images: Array, size: int | Sequence[int], method: str = "bicubic") -> Array:
    """Bytes (B, H, W, C) of another size, in Pillow's two passes: along rows, then columns.

    Bicubic overshoots at edges; what is outside of bytes is cut off after each pass.

    Raises:
      ValueError: they are not uint8.
    """
    _check_bytes(images)
    height, width = sides(size)
    for shape in ((images.shape[1], width), (height, width)):
        if images.shape[1:3] != shape:
            values = resize(images.astype(jnp.float32), shape, method)
            images = jnp.floor(jnp.clip(values, 0, 255) + 0.5).astype(jnp.uint8)
    return images


def to_bytes(pixels: Array | np.ndarray) -> np.ndarray:
    """Pixels in [0, 1] (clipped) to uint8, rounded to nearest.

    Raises:
      ValueError: they are no floating-point numbers.
    """
    _check_floats("pixels in [0, 1]", np.asarray(pixels))
    return np.asarray(np.rint(np.clip(np.asarray(pixels, np.float32), 0, 1) * 255), np.uint8)


def rows(batches: Sequence[np.ndarray], scale: int = 1) -> np.ndarray:
    """One row a batch of bytes (K, H, W, C), enlarged without smoothing: (H', W', C)."""
    tiles = np.concatenate(batches).repeat(scale, 1).repeat(scale, 2)
    return grid(tiles, columns=len(batches[0]))


def grid(pixels: np.ndarray, columns: int | None = None, gap: int = 2) -> np.ndarray:
    """Tile pixels or bytes (B, H, W, C) into one white-framed, rather wide sheet (H', W', C)."""
    count, height, width, channels = pixels.shape
    if columns is None:
        ideal = np.sqrt(count * 1.5)
        near = range(int(np.ceil(np.sqrt(count))), int(np.ceil(np.sqrt(2.5 * count))) + 1)
        columns = min(near, key=lambda n: (-count % n, abs(n - ideal)))  # few empty places
    rows = -(-count // columns)
    white = 255 if pixels.dtype == np.uint8 else 1
    shape = (rows * (height + gap) + gap, columns * (width + gap) + gap, channels)
    sheet = np.full(shape, white, pixels.dtype)
    for i, image in enumerate(pixels):
        y, x = gap + (i // columns) * (height + gap), gap + (i % columns) * (width + gap)
        sheet[y : y + height, x : x + width] = image
    return sheet


def centre_crop(picture: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """A picture as pixels (H, W, 3), or (H, W, 1) of luma, of the network's size.

    All readers of pictures bring them to a size here, in one of three ways:

    - A picture of this size stays as it is, bit for bit.
    - One of these proportions with less than 256 px or less than R px a side is no photograph but
      a data set's small picture: it is resized whole. R is `resize`, or S + 32, S the shorter side
      of the size.
    - Any other loses what is outside of the largest centred rectangle of these proportions, and of
      this a margin: `S / R` of its sides stay, as is usual in evaluation on ImageNet. Without
      `resize` the margin is an eighth at most where fewer pixels than S were left. With it the
      image is what torchvision's Resize(R) and CenterCrop(S) make of the picture.

    16 bits a pixel become 8; what is transparent lies on white.

    Raises:
      ValueError: the picture has pixels of an unknown range, or the network takes neither gray
        images nor RGB.
    """
    if preprocessing.channels not in (1, 3):
        raise ValueError(
            f"pictures cannot be shown to a network of {preprocessing.channels} channels: they are "
            "gray or RGB"
        )
    height, width = preprocessing.height, preprocessing.width
    picture = _plain(picture).convert("L" if preprocessing.channels == 1 else "RGB")
    if picture.size != (width, height):
        method = Image.Resampling[preprocessing.interpolation.upper()]
        box = None
        if preprocessing.resize is not None:
            box = _centre_of_resized(picture.size, (width, height), preprocessing.resize)
        else:
            picture = picture.crop(_centre(picture.size, (width, height)))
        picture = picture.resize((width, height), method, box)
    return np.asarray(picture, np.float32).reshape(height, width, -1) / 255


def _is_small(given: tuple[int, int], wanted: tuple[int, int], resized: int) -> bool:
    """Whether a picture is of a data set, and has no margin; sizes are (width, height)."""
    same_proportions = given[0] * wanted[1] == given[1] * wanted[0]
    return same_proportions and min(given) < max(256, resized)


def _centre(given: tuple[int, int], wanted: tuple[int, int]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what stays of a picture; sizes are (width, height)."""
    short = min(wanted)
    # Of the largest rectangle, along the shorter side of what is wanted.
    side = min(have * short / want for have, want in zip(given, wanted, strict=True))
    if not _is_small(given, wanted, short + 32):
        side = max(int(short / (short + 32) * side), min(short, int(7 / 8 * side)), 1)
    kept = [
        min(have, max(1, round(side * want / short)))
        for have, want in zip(given, wanted, strict=True)
    ]
    # An odd pixel goes to the left and top, as in the published evaluation.
    left, top = ((have - keep + 1) // 2 for have, keep in zip(given, kept, strict=True))
    return left, top, left + kept[0], top + kept[1]


def _centre_of_resized(
    given: tuple[int, int], wanted: tuple[int, int], resize: int
) -> tuple[float, float, float, float]:
    """Return where in a picture the centre lies that torchvision cuts out of the resized one.

    Resampling this box makes the same pixels, but for roundings, and none that are then cut off.
    """
    if _is_small(given, wanted, resize):
        return 0, 0, *given
    # Of the side that is short for these proportions. torchvision drops fractions of pixels.
    have, want = min(zip(given, wanted, strict=True), key=lambda pair: pair[0] / pair[1])
    resized = [side * resize * want // (have * min(wanted)) for side in given]
    starts = [round((of - cut) / 2) for of, cut in zip(resized, wanted, strict=True)]
    left, top = (i * side / of for i, side, of in zip(starts, given, resized, strict=True))
    right, bottom = (
        min((i + cut) * side / of, side)
        for i, cut, side, of in zip(starts, wanted, given, resized, strict=True)
    )
    return left, top, right, bottom


def _plain(picture: Image.Image) -> Image.Image:
    """A picture of 8 bits a channel, laid on white where it is transparent."""
    if picture.mode.startswith(("I", "F")):
        return _eight_bits(picture)
    if not picture.has_transparency_data:
        return picture
    if picture.mode == "La":
        picture = picture.convert("LA")
    above = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", above.size, "white"), above)


def _eight_bits(picture: Image.Image) -> Image.Image:
    """A gray picture of 16 bits with 8."""
    wide = picture.mode == "I" and picture.format in ("PNG", "PPM")  # whose values end at 65535
    if not (picture.mode.startswith("I;16") or wide):
        raise ValueError(
            f"its pixels have neither 8 nor 16 bits (Pillow's mode {picture.mode}), and which "
            "value is white is unknown: save it as 8-bit"
        )
    values = np.asarray(picture).astype(np.int64)
    transparent = values == picture.info.get("transparency", -1)
    if getattr(picture, "tag_v2", {}).get(262) == 0:  # TIFF's "white is zero"
        values = 65535 - values
    return Image.fromarray(np.where(transparent, 255, (values + 128) // 257).astype(np.uint8))


def stack_square(pictures: Sequence[Image.Image], preprocessing: Preprocessing) -> np.ndarray:
    """Pictures as one normalised batch (B, H, W, C), see `centre_crop`."""
    pixels = np.stack([centre_crop(picture, preprocessing) for picture in pictures])
    return pixels * preprocessing.scale.astype(np.float32) + preprocessing.black.astype(np.float32)

"""What a training step sees of its images: random parts, mirrored, mixed.

A view is a function of the step's key, and of what the images and labels of the batch are: a second
process, or a teacher, sees the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jinv import checks, image
from jinv.checks import Natural, Positive, PositiveShare
from jinv.net import Net

_MIXES = 2
"""Number of the mixture's key among a step's; dropout has 1."""


@dataclasses.dataclass(frozen=True)
class Views:
    """How images are seen.

    Attributes:
      flip: mirror every image with probability 1/2.
      crop: pixels of black margin that every image may be moved into, at random.
      resized_crop: least and greatest share of every image that is seen, enlarged to the network's
        size; of width / height 3/4 to 4/3, as torchvision's RandomResizedCrop. None for all of it.
      mix: "mixup" (arXiv 1710.09412) blends every image with another of the batch, "cutmix" (arXiv
        1905.04899) pastes a box of it. Labels are mixed by the same shares.
      mix_alpha: the share is drawn from Beta(mix_alpha, mix_alpha), once a batch.
    """

    flip: bool = False
    crop: Natural = 0
    resized_crop: tuple[PositiveShare, PositiveShare] | None = None
    mix: Literal["none", "mixup", "cutmix"] = "none"
    mix_alpha: Positive = 1.0

    def __post_init__(self) -> None:
        checks.fields(self)
        if self.mix == "none":
            checks.unused(self, "mix is 'none'", "mix_alpha")
        if self.resized_crop is not None and self.resized_crop[0] > self.resized_crop[1]:
            raise checks.FieldError(
                "resized_crop", f" must be the least and the greatest, not {self.resized_crop}"
            )


class View(NamedTuple):
    """What a network sees in a step.

    Attributes:
      pixels: (B, H, W, C) in [0, 1].
      targets: (B, classes), each a distribution; of attributes (B, K), each its share.
      labels: as they were given, (B,) or (B, K).
    """

    pixels: Array
    targets: Array
    labels: Array

    @property
    def has_attributes(self) -> bool:
        """Labels say which attributes an image has, not which class."""
        return self.labels.ndim == 2


def make_view(
    key: Array,
    images: Array,
    labels: Array,
    views: Views,
    size: int | Sequence[int],
    classes: int,
    dtype: DTypeLike = "float32",
) -> View:
    """Return what a step sees.

    Args:
      key: of the step.
      images: bytes (B, H, W, C).
      labels: (B,) or (B, K).
      views: how images are seen.
      size: of the result, one side or height and width.
      classes: how many there are.
      dtype: of pixels and targets.
    """
    seen = image.resize_bytes(augment(key, images, views, size), size)
    targets = labels if labels.ndim == 2 else jax.nn.one_hot(labels, classes)
    view = View(jnp.asarray(seen, dtype) / 255, jnp.asarray(targets, dtype), labels)
    return view if views.mix == "none" else _mixed(jax.random.fold_in(key, _MIXES), view, views)


def augment(
    key: Array, images: Array, views: Views, size: int | Sequence[int] | None = None
) -> Array:
    """Return every image of a batch of bytes (B, H, W, C) cropped and mirrored for itself.

    Args:
      key: of the step.
      images: the batch.
      views: how images are seen.
      size: to which a part is enlarged, the images' own by default.
    """
    if not views.crop and not views.flip and views.resized_crop is None:
        return images

    def one(key: Array, picture: Array) -> Array:
        crop_key, flip_key = jax.random.split(key)
        batch = picture[None]
        if views.resized_crop is not None:
            part_key, crop_key = jax.random.split(crop_key)
            box = image.random_box(part_key, picture.shape[:2], views.resized_crop)  # type: ignore[arg-type]
            part = image.resized_crop(batch.astype(jnp.float32), box, size)
            batch = jnp.floor(part + 0.5).astype(jnp.uint8)
        if views.crop:
            batch = image.random_crop(crop_key, batch, views.crop)
        if views.flip:
            batch = image.flip(flip_key, batch)
        return batch[0]

    return jax.vmap(one)(jax.random.split(key, len(images)), images)


def _mixed(key: Array, view: View, views: Views) -> View:
    """Return a view of which every image has a part of another one, in random order."""
    share_key, order_key, box_key = jax.random.split(key, 3)
    pixels, dtype = view.pixels, view.pixels.dtype
    share = jax.random.beta(share_key, views.mix_alpha, views.mix_alpha, dtype=dtype)
    order = jax.random.permutation(order_key, len(pixels))
    if views.mix == "mixup":
        pixels = share * pixels + (1 - share) * pixels[order]
    else:
        box = _box(box_key, pixels.shape[1], pixels.shape[2], share)
        share = 1 - box.mean(dtype=dtype)
        pixels = jnp.where(box[None, :, :, None], pixels[order], pixels)
    return view._replace(
        pixels=pixels, targets=share * view.targets + (1 - share) * view.targets[order]
    )


def _box(key: Array, height: int, width: int, share: Array) -> Array:
    """Return where a box (H, W) of 1 - share of the area lies, cut off at the edges."""
    centre = jax.random.randint(key, (2,), 0, jnp.array([height, width]))
    half = jnp.floor(jnp.array([height, width]) * jnp.sqrt(1 - share)).astype(int) // 2
    inside = [
        (jnp.arange(side) >= middle - reach) & (jnp.arange(side) < middle + reach)
        for side, middle, reach in zip((height, width), centre, half, strict=True)
    ]
    return inside[0][:, None] & inside[1]


def shown(net: Net, pixels: Array) -> Array:
    """Return a view's pixels (B, H, W, 1 or C) as a network takes them, at its size."""
    wanted = net.preprocessing
    seen = image.for_channels(pixels, wanted.channels, net.name)
    if seen.shape[1:3] != (wanted.height, wanted.width):
        seen = jnp.clip(image.resize(seen, wanted.size, "bicubic"), 0, 1)
    return image.normalise(seen, wanted)


def normalised(net: Net, images: Array, dtype: DTypeLike = "float32") -> Array:
    """Return bytes of any size as the network takes them."""
    resized = image.resize_bytes(images, net.preprocessing.size)
    return image.from_bytes(resized, net.preprocessing, dtype)

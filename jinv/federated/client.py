"""A client that a run simulates: its images, what it does with them, and what it sends."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jinv import checks, data, image
from jinv.checks import Class, Count, File, Natural, Positive
from jinv.data import Split
from jinv.federated.defences import Defence
from jinv.federated.evidence import Local, Statistics
from jinv.image import Preprocessing
from jinv.net import Net, check_size


@dataclasses.dataclass(frozen=True)
class Client:
    """What a config says of a simulated client.

    Attributes:
      data: where its images are from, if not `files`.
      split: of the data.
      files: pictures, cropped to the centre square.
      classes: of the files; what the network says of them by default.
      images: how many of the data, drawn at random.
      distractors: how many other images of the data a reconstruction is compared with for IIP.
      training: BatchNorm layers normalise with the batch's moments.
      statistics: what it betrays of the moments at BatchNorm layers, see `Evidence`.
      local_steps: 0 for a gradient; else so many SGD steps, over the images in order.
      local_lr: their learning rate.
      local_batch: images of each step; all by default.
      defence: what it does to the gradient or update before it is sent.
    """

    data: data.Source = dataclasses.field(default_factory=data.Source)
    split: Split = "test"
    files: tuple[Annotated[str, File()], ...] = ()
    classes: tuple[Class, ...] = ()
    images: Count = 8
    distractors: Natural = 1000
    training: bool = False
    statistics: Statistics = "running"
    local_steps: Natural = 0
    local_lr: Positive = 0.01
    local_batch: Count | None = None
    defence: Defence = dataclasses.field(default_factory=Defence)

    def __post_init__(self) -> None:
        checks.fields(self)
        if self.classes and len(self.classes) != len(self.files):
            raise ValueError(f"{len(self.classes)} classes are given for {len(self.files)} files")

    @property
    def count(self) -> int:
        """Number of its images."""
        return len(self.files) or self.images

    def local(self) -> Local | None:
        """Return its local steps: batch after batch, from the front again after the last image."""
        if not self.local_steps:
            return None
        size = min(self.local_batch or self.count, self.count)
        order = np.arange(self.local_steps * size) % self.count
        return Local(self.local_lr, tuple(map(tuple, order.reshape(-1, size).tolist())))


class Drawn(NamedTuple):
    """A client's images.

    Attributes:
      pixels: bytes (K, H, W, C), gray or of the network's channels.
      classes: K, or () if they are not known.
      distractors: other images of the data, bytes (M, H, W, C); None for files.
      names: of the data's classes; None for files.
    """

    pixels: np.ndarray
    classes: tuple[int, ...]
    distractors: np.ndarray | None = None
    names: tuple[str, ...] | None = None


def draw(client: Client, net: Net, size: int | Sequence[int], key: Array) -> Drawn:
    """Return a client's images.

    Args:
      client: what the config says.
      net: whose classes they must fit, and its input.
      size: of the images in pixels, one side or height and width.
      key: of the random choice.

    Raises:
      ValueError: the data does not fit the network, or has too few images.
    """
    height, width = image.sides(size)
    if client.files:
        check_size(net, size)
        return Drawn(_shown(data.image_files(client.files, size), net), client.classes)
    everything = client.data.load(client.split, size)
    if everything.has_attributes:
        raise ValueError("labels are attributes: a client's images have classes")
    if client.images > len(everything):
        raise ValueError(f"{client.images} images wanted; the data has {len(everything)}")
    wanted = client.images + client.distractors
    order = np.asarray(jax.random.permutation(key, len(everything)))[:wanted]
    found = everything.images.shape[1:3]
    if found != (height, width):
        check_size(net, found)  # before it is advised
        advice = str(found[0]) if found[0] == found[1] else str(list(found))
        raise ValueError(
            f"images of {height} x {width} px are wanted, the data's are {found[0]} x {found[1]} "
            f"px: set size: {advice}"
        )
    check_size(net, size)
    drawn = everything.take(order)
    if len(everything.classes) > net.classes:
        raise ValueError(
            f"{net.name} knows {net.classes} classes, the data has {len(everything.classes)}"
        )
    own = net.class_names or ()
    if own != everything.classes and sorted(own) == sorted(everything.classes):
        raise ValueError(
            f"the data has the classes of {net.name}, but in another order: "
            f"{', '.join(everything.classes[:10])} against {', '.join(own[:10])}"
        )
    images = _shown(drawn.images, net)
    return Drawn(
        images[: client.images],
        tuple(map(int, drawn.labels[: client.images])),
        images[client.images :],
        everything.classes,
    )


def _shown(images: np.ndarray, net: Net) -> np.ndarray:
    return image.for_channels(images, net.preprocessing.channels, net.name)


def normalised(pixels: np.ndarray, wanted: Preprocessing) -> Array:
    """Return bytes (K, H, W, 1, 3 or C) as a network of this preprocessing takes them."""
    values = jnp.asarray(image.for_channels(pixels, wanted.channels) / np.float32(255))
    return image.convert(values, image.pixels(values.shape[-1]), wanted)

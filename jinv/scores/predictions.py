"""What networks say of many images: a batch at a time, on all devices, into files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from jinv import image, parallel, training
from jinv.net import Net, Variables

TOP = 5
"""Likeliest classes that are kept in order."""


class Predictions(NamedTuple):
    """What a network says of N images.

    Attributes:
      top: (N, 5) its likeliest classes, int32; fewer if it has fewer. The first is the class that
        it gives: the highest logit, of equal ones the first.
      probabilities: (N, classes) float32, softmax of the logits.
      features: (N, D) float32, input of its last linear layer; None if it has none.
    """

    top: np.ndarray
    probabilities: np.ndarray
    features: np.ndarray | None

    def hits(self, targets: np.ndarray) -> np.ndarray:
        """Return whether (N, 5) each of the likeliest classes is the target (N,)."""
        return self.top == np.asarray(targets)[:, None]


Predict = Callable[[Variables, Array], tuple[Array, Array, Array | None]]
"""`(variables, bytes (B, H, W, C)) -> Predictions`, on the device."""


def make_predict(net: Net) -> Predict:
    """Return a compiled function that tells what the network says of bytes of any size."""

    @jax.jit
    def predict(variables: Variables, images: Array) -> tuple[Array, Array, Array | None]:
        outputs = net.apply(variables, training.normalised(net, images))
        _, top = jax.lax.top_k(outputs.logits, min(TOP, net.classes))
        features = outputs.features
        if features is not None:
            features = features.astype(jnp.float32) if features.ndim == 2 else None
        return top, jax.nn.softmax(outputs.logits).astype(jnp.float32), features

    return predict


def check(net: Net, images: np.ndarray) -> int | None:
    """Return the length of the network's features, None if it has none.

    Raises:
      ValueError: bytes like these cannot be shown to it.
    """
    space = net.preprocessing
    image.for_channels(images[:1], space.channels, net.name)
    example = jax.ShapeDtypeStruct((1, space.height, space.width, space.channels), jnp.float32)
    found = jax.eval_shape(net.apply, net.variables, example).features
    return None if found is None or found.ndim != 2 else found.shape[1]


def blocks(
    net: Net, predict: Predict, batches: Iterable[np.ndarray], batch: int, mesh: Mesh
) -> Iterator[Predictions]:
    """Yield what the network says of each batch; the devices work while the next one is read.

    Args:
      net: the network.
      predict: its `make_predict`.
      batches: bytes (B, H, W, C), B at most `batch`; smaller ones are filled up with black.
      batch: images at once.
      mesh: of the devices that share a batch evenly, see `training.batch_mesh`.

    Raises:
      ValueError: a prediction is not finite.
    """
    variables = parallel.put(mesh, PartitionSpec(), net.variables)
    spread = PartitionSpec(parallel.BATCH)
    pending: list[tuple[int, Any]] = []

    def fetched() -> Predictions:
        count, outputs = pending.pop(0)
        top, likely, features = parallel.fetch(outputs)
        kept = None if features is None else features[:count]
        found = Predictions(top[:count], likely[:count], kept)
        if not all(np.isfinite(a).all() for a in found if a is not None):
            raise ValueError(f"what {net.name} says of an image is not finite: look at its weights")
        return found

    for images in batches:
        filled = np.pad(images, ((0, batch - len(images)), (0, 0), (0, 0), (0, 0)))
        pending.append((len(images), predict(variables, parallel.put(mesh, spread, filled))))
        if len(pending) > 1:
            yield fetched()
    while pending:
        yield fetched()


class Files:
    """Predictions of N images on their way into files, batch after batch; a context manager.

    Args:
      folder: of the files, made if absent.
      images: N.
      net: the network.
      features: length of its features, None if it has none.
      start: go on after so many images, which an earlier one has written.

    Raises:
      ValueError: an earlier one's files do not hold so many.
    """

    def __init__(
        self, folder: Path, images: int, net: Net, features: int | None, start: int = 0
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._images = images
        self._held: list[tuple[Path, int | None, Any]] = [
            (folder / "top", min(TOP, net.classes), np.int32),
            (folder / "probabilities", net.classes, np.float32),
            (folder / "features", features, np.float32),
        ]
        self._open: list[BinaryIO | None] = []
        for path, width, dtype in self._held:
            if width is None:
                self._open.append(None)
                continue
            file = path.open("r+b" if start else "w+b")
            self._open.append(file)
            end = start * width * np.dtype(dtype).itemsize
            if file.seek(0, os.SEEK_END) < end:
                self.__exit__()
                raise ValueError(f"{path} lacks what was written there: begin anew")
            file.truncate(end)
            file.seek(end)

    def add(self, block: Predictions) -> None:
        """Write a block behind those before it."""
        for file, (_, _, dtype), values in zip(self._open, self._held, block, strict=True):
            if file is not None:
                file.write(np.ascontiguousarray(values, dtype).data)

    def flush(self) -> None:
        """Bring what was added to the disk."""
        for file in filter(None, self._open):
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> Predictions:
        """Return all that was written, as memory maps."""
        self.flush()

        def mapped(path: Path, width: int | None, dtype: Any) -> np.ndarray | None:
            return None if width is None else np.memmap(path, dtype, "r", 0, (self._images, width))

        return Predictions(*(mapped(*one) for one in self._held))  # type: ignore[arg-type]

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *error: object) -> None:
        for file in filter(None, self._open):
            file.close()

"""Deep features of a data set: what shadow models are trained on, beside the images behind them.

A folder of features is complete or absent:

  features.npy   (M, D) float32
  labels.npy     (M,) or (M, K) int32
  images.npy     (M, h, w, c) bytes, if they were kept
  features.json  network, classes; shape, type and sha256 of every file; fingerprint of all that
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jinv import image, optimise, parallel
from jinv.data import Dataset
from jinv.files import path as given_path
from jinv.files import sha256, write_atomic
from jinv.net import Net, Variables

INDEX = "features.json"
ARRAYS = ("features.npy", "labels.npy", "images.npy")
PARTIAL = ".partial"
"""Ends the name of a folder that is being written."""

Interpolation = Literal["bicubic", "bilinear"]
DType = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True, eq=False)
class Features:
    """What a network makes of M images before its classifier.

    Attributes:
      features: (M, D) float32.
      labels: (M,) indices of classes, or (M, K) attributes 0 and 1; int32.
      classes: names of classes or attributes.
      images: (M, h, w, c) bytes, as a reconstructor shall see them; None if not kept.
      fingerprint: sha256 of all the rest.
      network: name of the network.
    """

    features: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    images: np.ndarray | None
    fingerprint: str
    network: str = ""

    def __post_init__(self) -> None:
        _check({"features.npy": self.features, "labels.npy": self.labels} | self._pictures())

    def __len__(self) -> int:
        return len(self.features)

    def _pictures(self) -> dict[str, np.ndarray]:
        return {} if self.images is None else {"images.npy": self.images}

    def save(self, folder: str | Path) -> None:
        """Write the folder; ValueError if it is there."""
        with Writer(folder, len(self)) as writer:
            writer.add(Block(0, self.features, self.labels, self.images))
            writer.finish(self.classes, self.network)


class Block(NamedTuple):
    """Images `start` and following: B of them, with the fields of `Features`."""

    start: int
    features: np.ndarray
    labels: np.ndarray
    images: np.ndarray | None

    def arrays(self) -> dict[str, np.ndarray]:
        """Name of the file -> what goes into it."""
        named = zip(ARRAYS, (self.features, self.labels, self.images), strict=True)
        return {name: array for name, array in named if array is not None}


def extract(
    net: Net,
    dataset: Dataset,
    *,
    batch: int,
    mesh: Mesh,
    images_size: int | None = None,
    interpolation: Interpolation = "bicubic",
    dtype: DType = "float32",
    scale: float = 1.0,
) -> Features:
    """Return all features of a data set, in memory.

    Args:
      net: whose features.
      dataset: the images.
      batch, mesh, images_size, interpolation, dtype, scale: see `blocks`.
    """
    how: dict[str, Any] = {"interpolation": interpolation, "dtype": dtype, "scale": scale}
    found = blocks(net, dataset, batch=batch, mesh=mesh, images_size=images_size, **how)
    parts = [block.arrays() for block in found]
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    files = {name: _entry(array.shape, array.dtype) for name, array in arrays.items()}
    for name, array in arrays.items():
        digest = hashlib.sha256(_header(array.shape, array.dtype))
        digest.update(np.ascontiguousarray(array).data)
        files[name]["sha256"] = digest.hexdigest()
    return Features(
        arrays["features.npy"],
        arrays["labels.npy"],
        dataset.classes,
        arrays.get("images.npy"),
        _described(dataset.classes, net.name, files)["fingerprint"],
        net.name,
    )


def blocks(
    net: Net,
    dataset: Dataset,
    *,
    batch: int,
    mesh: Mesh,
    start: int = 0,
    images_size: int | None = None,
    interpolation: Interpolation = "bicubic",
    dtype: DType = "float32",
    scale: float = 1.0,
    clock: optimise.Clock | None = None,
) -> Iterator[Block]:
    """The input of the network's classifier, a batch of images after the other.

    Images go to the devices as bytes and are brought to the network's size there. A run that
    begins at `start`, a multiple of `batch`, yields what is left of the whole one, bit by bit.

    Args:
      net: the network; in inference mode.
      dataset: images of any size, gray, RGB or of the network's channels.
      batch: images at once; the last batch is filled up with zeros.
      mesh: of the devices that share a batch evenly, see `training.batch_mesh`.
      start: first image.
      images_size: side of the images that are kept; None for their own size, 0 to keep none.
      interpolation: for both sizes; antialiased when shrinking.
      dtype: of the network's arithmetic.
      scale: of the features, see `jinv.recipes.extract_features.Config`.
      clock: told where the time went.

    Raises:
      ValueError: the network has no linear layer or takes other channels, or a feature is not
        finite.
    """
    clock = clock or optimise.Clock()
    check(net, dataset)
    if start >= len(dataset):
        return
    resized = images_size if images_size not in (None, 0, *_square(dataset.images)) else None
    shape = (batch, *dataset.images.shape[1:])
    began = time.perf_counter()
    variables = parallel.put(mesh, PartitionSpec(), net.variables)
    spread = PartitionSpec(parallel.BATCH)
    compiled = _compiled(net, variables, shape, mesh, resized, interpolation, dtype, scale)
    clock.compiling += time.perf_counter() - began

    def fetched(first: int, outputs: Any) -> Block:
        chosen = slice(first, min(first + batch, len(dataset)))
        features, kept = parallel.fetch(outputs)
        features = features[: chosen.stop - first]
        if not np.isfinite(features).all():
            raise ValueError(f"{net.name}: features of images {first} and following are not finite")
        if kept is None and images_size != 0:
            kept = dataset.images[chosen]
        elif kept is not None:
            kept = kept[: chosen.stop - first]
        return Block(first, features, np.asarray(dataset.labels[chosen], np.int32), kept)

    # One batch ahead: the devices compute while the host writes.
    pending: list[tuple[int, Any]] = []
    for first in (*range(start, len(dataset), batch), None):
        began = time.perf_counter()
        if first is not None:
            images = dataset.images[first : first + batch]
            images = np.pad(images, ((0, batch - len(images)), (0, 0), (0, 0), (0, 0)))
            pending.append((first, compiled(variables, parallel.put(mesh, spread, images))))
        block = fetched(*pending.pop(0)) if first is None or len(pending) > 1 else None
        clock.stepping += time.perf_counter() - began
        if block is not None:
            clock.steps += 1
            yield block


# Splits of one data set share a program, which lives as long as its network.
_PROGRAMS: weakref.WeakKeyDictionary[Net, dict[Any, Callable]] = weakref.WeakKeyDictionary()


def _compiled(
    net: Net,
    variables: Variables,
    shape: tuple[int, ...],
    mesh: Mesh,
    resized: int | None,
    interpolation: Interpolation,
    dtype: DType,
    scale: float,
) -> Callable[[Variables, Array], tuple[Array, Array | None]]:
    """Return (variables, bytes) -> (features, images of the size that is kept), compiled."""
    known = _PROGRAMS.setdefault(net, {})
    wanted = (shape, mesh, resized, interpolation, dtype, scale)
    if wanted not in known:
        apply, space = net.apply, net.preprocessing  # not the network, which would keep itself

        def program(variables: Variables, images: Array) -> tuple[Array, Array | None]:
            seen = image.resize_bytes(images, space.size, interpolation)
            outputs = apply(variables, image.from_bytes(seen, space).astype(dtype))
            assert outputs.features is not None
            kept = image.resize_bytes(images, resized, interpolation) if resized else None
            return scale * outputs.features.astype(jnp.float32), kept

        spread = NamedSharding(mesh, PartitionSpec(parallel.BATCH))
        example = jax.ShapeDtypeStruct(shape, np.uint8, sharding=spread)
        known[wanted] = jax.jit(program).lower(variables, example).compile()
    return known[wanted]


def check(net: Net, dataset: Dataset) -> None:
    """ValueError if the network has no features, or takes images of other channels."""
    taken = net.preprocessing.channels
    image.for_channels(dataset.images[:1], taken, net.name)
    shape = (1, net.preprocessing.height, net.preprocessing.width, taken)
    example = jax.ShapeDtypeStruct(shape, jnp.float32)
    found = jax.eval_shape(net.apply, net.variables, example).features
    if found is None or found.ndim != 2:
        raise ValueError(f"{net.name} has no features: it ends in no linear layer")


def _square(images: np.ndarray) -> tuple[int, ...]:
    """The side of square images."""
    _, height, width, _ = images.shape
    return (height,) if height == width else ()


class Writer:
    """Features on their way to a folder: blocks in order, into FOLDER.partial until `finish`.

    A context manager, which closes the files.

    Args:
      folder: where they shall be.
      images: M, how many there will be.
      start: go on after so many, which an earlier writer wrote.

    Raises:
      ValueError: the folder holds something, or the earlier writer's files do not fit.
    """

    def __init__(self, folder: str | Path, images: int, start: int = 0) -> None:
        self.folder = given_path(folder)
        if self.folder.exists() and any(self.folder.iterdir()):
            raise ValueError(f"{self.folder} is not empty: choose another folder")
        self._partial = self.folder.with_name(self.folder.name + PARTIAL)
        self._partial.mkdir(parents=True, exist_ok=True)
        left = list(self._partial.iterdir())
        if any(not path.name.lstrip(".").startswith((*ARRAYS, INDEX)) for path in left):
            raise ValueError(
                f"{self._partial} holds other files: remove it, or choose another folder"
            )
        for path in left if not start else ():
            path.unlink()
        self._count = images
        self._open: dict[str, BinaryIO] = {}

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._open.values():
            file.close()

    def add(self, block: Block) -> None:
        """Write the block behind those before it."""
        for name, array in block.arrays().items():
            if name not in self._open:
                self._open[name] = self._opened(name, block.start, array)
            self._open[name].write(np.ascontiguousarray(array).data)

    def _opened(self, name: str, start: int, array: np.ndarray) -> BinaryIO:
        path = self._partial / name
        header = _header((self._count, *array.shape[1:]), array.dtype)
        end = len(header) + start * (array.nbytes // len(array))
        if not start:
            path.write_bytes(header)
        try:
            file = path.open("r+b")
            if file.read(len(header)) != header or file.seek(0, os.SEEK_END) < end:
                file.close()
                raise ValueError("it does not hold what was written")
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot go on with {path}: {error}; begin anew") from None
        file.truncate(end)
        file.seek(end)
        return file

    def flush(self) -> None:
        """Bring what was added to the disk."""
        for file in self._open.values():
            file.flush()
            os.fsync(file.fileno())

    def finish(self, classes: tuple[str, ...], network: str) -> None:
        """Write features.json and give the folder its name; ValueError if files lack something."""
        self.flush()
        files = {}
        for path in (self._partial / name for name in ARRAYS):
            if path.exists() or path.name != "images.npy":
                array = _mapped(path)
                files[path.name] = _entry(array.shape, array.dtype) | {"sha256": sha256(path)}
        described = _described(classes, network, files)
        write_atomic(self._partial / INDEX, json.dumps(described, indent=2) + "\n")
        self._partial.rename(self.folder)


def load(folder: str | Path, *, verify: bool = True) -> Features:
    """The features of a folder as read-only memory maps.

    Args:
      folder: that `Features.save` or `jinv extract-features` wrote.
      verify: read all files and compare their sha256, not only their sizes.

    Raises:
      ValueError: names the file that is missing, damaged or not what features.json says.
    """
    folder = given_path(folder)
    path = folder / INDEX
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        classes, network = tuple(map(str, found["classes"])), str(found["network"])
        files = {name: dict(found["files"][name]) for name in ARRAYS if name in found["files"]}
        if _described(classes, network, files) != found:
            raise ValueError("its fingerprint is not that of what it says")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is missing or damaged: {error}") from None
    arrays = {}
    for name, told in files.items():
        path = folder / name
        array = arrays[name] = _mapped(path)
        entry = _entry(array.shape, array.dtype)
        if entry != {key: told.get(key) for key in entry}:
            raise ValueError(f"{path} is damaged: it holds {entry}, not what {INDEX} says")
        if verify and sha256(path) != told.get("sha256"):
            raise ValueError(f"{path} is damaged: its sha256 is not that of {INDEX}")
    try:
        _check(arrays)
    except ValueError as error:
        raise ValueError(f"{folder} holds no features: {error}") from None
    return Features(
        arrays["features.npy"],
        arrays["labels.npy"],
        classes,
        arrays.get("images.npy"),
        found["fingerprint"],
        network,
    )


def _check(arrays: Mapping[str, np.ndarray]) -> None:
    """ValueError if types or shapes are not those of features."""
    wanted: dict[str, tuple[Any, tuple[int, ...]]] = {
        "features.npy": (np.float32, (2,)),
        "labels.npy": (np.int32, (1, 2)),
        "images.npy": (np.uint8, (4,)),
    }
    count = len(arrays["features.npy"]) if "features.npy" in arrays else 0
    for name, (dtype, ranks) in wanted.items():
        if name not in arrays and name != "images.npy":
            raise ValueError(f"{name} is missing")
        array = arrays.get(name)
        if array is None:
            continue
        if array.dtype != dtype or array.ndim not in ranks or len(array) != count or not array.size:
            raise ValueError(f"{name} is {array.dtype} {array.shape} for {count} images")


def _mapped(path: Path) -> np.ndarray:
    """A .npy file's array; ValueError names a file that is none, or not of its header's size."""
    try:
        # Without pickles: a file of objects would run code.
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.memmap):
            raise ValueError("it is no .npy file")
        size = path.stat().st_size
        if array.offset + array.nbytes != size:
            raise ValueError(f"{size} bytes are not what its header {array.shape} promises")
    except Exception as error:  # what damaged headers make of NumPy's reader has no common kind
        raise ValueError(f"{path} is missing or damaged: {error}") from None
    return array


def _header(shape: tuple[int, ...], dtype: Any) -> bytes:
    """Of a .npy file."""
    file = io.BytesIO()
    told = {"shape": shape, "fortran_order": False, "descr": np.lib.format.dtype_to_descr(dtype)}
    np.lib.format.write_array_header_1_0(file, told)
    return file.getvalue()


def _entry(shape: tuple[int, ...], dtype: Any) -> dict[str, Any]:
    return {"shape": list(shape), "dtype": np.dtype(dtype).name}


def _described(
    classes: tuple[str, ...], network: str, files: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """What features.json says; the fingerprint is the sha256 of all the rest."""
    told = {"network": network, "classes": list(classes), "files": dict(files)}
    text = json.dumps(told, sort_keys=True).encode()
    return told | {"fingerprint": hashlib.sha256(text).hexdigest()}

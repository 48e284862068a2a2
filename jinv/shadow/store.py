"""Shadow models on disk: one shard a seed, checksummed, whole or absent.

A store is a folder with `shadows.json`, which says all that makes the models what they are, and
Zarr arrays (version 3, CRC-32C of every piece) that other tools can read if weights are float32;
bfloat16 is an extension. Stores grow: along the first axis arrays are longer than what is there.

    weights   (seeds, sets, P) the parameters, one after the other as `Layout` says
    loss      (seeds, sets) mean over the training set
    attempts  (seeds, sets) trainings until the loss was low enough

A seed is in the store once the shard of its weights is, which is written last. Several processes
may write different seeds at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tensorstore

from jinv import files
from jinv.files import write_atomic
from jinv.runs import config as configs

Dtype = Literal["float32", "bfloat16"]
METADATA = "shadows.json"
STATISTICS = "statistics.npz"
ARRAYS = ("weights", "loss", "attempts")
VERSION = 1
_MANY = 2**31 - 1
"""More than there are seeds, sets, or numbers along an axis."""
_PIECE = 2**22
"""Bytes that are checksummed, and read, together."""


class StoreError(ValueError):
    """A store that cannot be used, with the folder or shard to blame."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a head's parameters lie in its vector of P numbers: one after the other, by name."""

    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, parameters: Mapping[str, Any]) -> Layout:
        """Return the layout of a head's arrays, or of their shapes."""
        return cls(tuple((name, tuple(parameters[name].shape)) for name in sorted(parameters)))

    @property
    def size(self) -> int:
        """P."""
        return sum(math.prod(shape) for _, shape in self.shapes)

    def split(self, weights: Any) -> dict[str, Any]:
        """(..., P) -> parameters (..., *shape) by name; arrays of NumPy or JAX."""
        shapes = dict(self.shapes)
        return {
            name: weights[..., part].reshape(*weights.shape[:-1], *shapes[name])
            for name, part in self.slices()
        }

    def slices(self) -> Iterator[tuple[str, slice]]:
        """(name, where its numbers are)."""
        start = 0
        for name, shape in self.shapes:
            stop = start + math.prod(shape)
            yield name, slice(start, stop)
            start = stop


@dataclasses.dataclass(frozen=True)
class Metadata:
    """What a store holds.

    Attributes:
      layout: of the weights.
      sets: shadow models a seed.
      seeds: how many.
      dtype: of the weights.
      origin: all that the models follow from: the recipe's part that matters, and the
        fingerprint of the data. Plain values.
    """

    layout: Layout
    sets: int
    seeds: int
    dtype: Dtype
    origin: Mapping[str, Any]

    def plain(self) -> dict[str, Any]:
        """As the file says it."""
        return {
            "format": "jinv shadow models",
            "version": VERSION,
            "layout": [[name, list(shape)] for name, shape in self.layout.shapes],
            "sets": self.sets,
            "seeds": self.seeds,
            "dtype": self.dtype,
            "origin": configs.plain(self.origin),
        }

    @property
    def seed_bytes(self) -> int:
        """Bytes of a seed's weights."""
        return self.sets * self.layout.size * (2 if self.dtype == "bfloat16" else 4)


class Store:
    """Reads and writes a folder of shadow models.

    Args:
      folder: of a store.

    Raises:
      StoreError: there is none, or it is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = files.path(folder)
        self.metadata = read_metadata(self.folder)
        self._arrays = {name: _open(self.folder, self.metadata, name) for name in ARRAYS}

    @classmethod
    def create(cls, folder: str | Path, metadata: Metadata) -> Store:
        """A new store, or the one that is there if it is of the same models.

        With more seeds than a store has it is extended.

        Raises:
          StoreError: it is of other models; says in what they differ.
        """
        folder = files.path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"cannot make the folder {folder}: {error.strerror}") from None
        told = metadata.plain()
        if not _write_new(folder / METADATA, json.dumps(told, indent=2) + "\n"):
            before = read_metadata(folder).plain()
            changed = configs.differences(before, told | {"seeds": before["seeds"]})
            if changed:
                raise StoreError(
                    f"{folder} holds other models: {', '.join(changed)}; choose another folder"
                )
            if metadata.seeds > before["seeds"]:
                write_atomic(folder / METADATA, json.dumps(told, indent=2) + "\n")
        for name in ARRAYS:
            _open(folder, metadata, name, create=True)
        return cls(folder)

    def __contains__(self, seed: int) -> bool:
        return self._shard(seed).exists()

    def missing(self) -> list[int]:
        """Seeds that are not there yet."""
        return [seed for seed in range(self.metadata.seeds) if seed not in self]

    def write(
        self, seed: int, weights: np.ndarray, loss: np.ndarray, attempts: np.ndarray
    ) -> Callable[[], None]:
        """Write a seed.

        Args:
          seed: its number.
          weights: (sets, P).
          loss, attempts: (sets,).

        Returns:
          A function that waits until it is there. Let `weights` alone until then.

        Raises:
          StoreError: it cannot be written, now or in waiting; other seeds are safe.
        """
        with self._writing(seed):
            for name, values in (("loss", loss), ("attempts", attempts)):
                self._arrays[name][seed].write(values).result()
            # Read where they lie, not copied first: a fifth faster into memory.
            last = self._arrays["weights"][seed].write(
                weights, can_reference_source_data_indefinitely=True
            )

        def wait() -> None:
            with self._writing(seed):
                last.result()

        return wait

    @contextlib.contextmanager
    def _writing(self, seed: int) -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError) as error:
            raise StoreError(f"cannot write {self._shard(seed)}: {error}") from None

    def read(self, seed: int, models: slice = slice(None), name: str = "weights") -> np.ndarray:
        """Weights (models, P) of a seed, or its "loss" or "attempts" (models,).

        Raises:
          StoreError: the seed is missing or damaged.
        """
        if not self._shard(seed, name).exists():
            raise StoreError(
                f"{self.folder} holds no seed {seed}: {self._shard(seed, name)} is missing"
                + (f"; `--regenerate {seed}` makes it again" if seed in self else "")
            )
        try:
            return self._arrays[name][seed, models].read().result()
        except ValueError as error:
            raise StoreError(
                f"{self._shard(seed, name)} is damaged: `--regenerate {seed}` makes it again "
                f"({error})"
            ) from None

    def parameters(self, seed: int, models: slice = slice(None)) -> dict[str, np.ndarray]:
        """The same by name: (models, *shape)."""
        return self.metadata.layout.split(self.read(seed, models))

    def damaged(self) -> dict[int, str]:
        """Seeds whose checksums are wrong, and what is; reads everything."""
        found = {}
        for seed in range(self.metadata.seeds):
            if seed in self:
                try:
                    for name in ARRAYS:
                        self.read(seed, name=name)
                except StoreError as error:
                    found[seed] = str(error)
        return found

    def discard(self, seed: int) -> None:
        """Remove a seed, so that it counts as missing."""
        for name in ARRAYS:
            self._shard(seed, name).unlink(missing_ok=True)

    def _shard(self, seed: int, name: str = "weights") -> Path:
        return self.folder / name / "c" / str(seed) / ("0/0" if name == "weights" else "0")


def _open(folder: Path, told: Metadata, name: str, *, create: bool = False) -> Any:
    """One of the arrays; StoreError if it is not there, or another."""
    weights = name == "weights"
    width = (told.layout.size,) if weights else ()
    dtype = told.dtype if weights else "float32" if name == "loss" else "uint16"
    models = max(1, min(told.sets, _PIECE // (4 * told.layout.size))) if weights else told.sets
    pieces = -(-told.sets // models) * models
    check = [
        {"name": "bytes", "configuration": {"endian": "little"}},
        {"name": "crc32c"},
    ]
    sharding = {"chunk_shape": [1, models, *width], "codecs": check, "index_codecs": check}
    # Not as many seeds as there are now: stores grow.
    shape = [_MANY, told.sets, *width]
    grid = {"name": "regular", "configuration": {"chunk_shape": [1, pieces, *width]}}
    spec = {
        "driver": "zarr3",
        "store_data_equal_to_fill_value": True,  # what is not there counts as missing
        "kvstore": {"driver": "file", "path": str((folder / name).resolve())},
        "metadata": {
            "shape": shape,
            "data_type": dtype,
            "chunk_grid": grid,
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "dimension_names": ["seed", "set", "parameter"][: len(shape)],
        },
    }
    try:
        return tensorstore.open(spec, open=True, create=create).result()
    except ValueError as error:
        raise StoreError(f"{folder / name} is no array of this store: {error}") from None


def read_metadata(folder: Path) -> Metadata:
    """Return what a folder's store holds.

    Raises:
      StoreError: there is none, or it is damaged.
    """
    path = folder / METADATA
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        if told["version"] != VERSION:
            raise ValueError(f"its version is {told['version']}, this program's {VERSION}")
        shapes = tuple((str(name), tuple(map(int, shape))) for name, shape in told["layout"])
        origin = configs.modern(told["origin"])
        found = Metadata(
            Layout(shapes), int(told["sets"]), int(told["seeds"]), told["dtype"], origin
        )
        lengths = [found.sets, found.seeds, *(n for _, shape in shapes for n in shape)]
        if found.dtype not in ("float32", "bfloat16") or not all(0 < n < _MANY for n in lengths):
            raise ValueError("its numbers make no sense")
        return found
    except FileNotFoundError:
        raise StoreError(f"{folder} holds no shadow models: there is no {METADATA}") from None
    except (
        *(OSError, ValueError, TypeError, KeyError, AttributeError),
        *(OverflowError, RecursionError),
    ) as error:
        raise StoreError(f"{path} is damaged: {error!r}") from None


def _write_new(path: Path, text: str) -> bool:
    """Write a file unless it exists; of several processes one succeeds, with a whole file."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        with contextlib.suppress(FileExistsError):
            os.link(partial, path)
            return True
        return False
    finally:
        partial.unlink(missing_ok=True)

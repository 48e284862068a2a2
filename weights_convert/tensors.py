"""Tensors as files describe them, and the checks that come before any memory is allocated."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from weights_convert.errors import WeightsError, shown

Buffer = bytes | memoryview

# How each element type lies in a little-endian file. NumPy has no bfloat16: its bits are the
# upper half of a float32, to which `decode` widens it.
STORED: dict[str, np.dtype] = {
    "bool": np.dtype("u1"),
    "uint8": np.dtype("u1"),
    "int8": np.dtype("i1"),
    "uint16": np.dtype("<u2"),
    "int16": np.dtype("<i2"),
    "uint32": np.dtype("<u4"),
    "int32": np.dtype("<i4"),
    "uint64": np.dtype("<u8"),
    "int64": np.dtype("<i8"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "float32": np.dtype("<f4"),
    "float64": np.dtype("<f8"),
    "complex64": np.dtype("<c8"),
    "complex128": np.dtype("<c16"),
}
WIDEST = 2**62  # counts and byte sizes above this are nonsense in any file
MAX_RANK = 32
GROWTH, SLACK = 4, 16 * 2**20  # a file may unfold to GROWTH times its size plus SLACK bytes


@dataclass(frozen=True, eq=False, slots=True)
class Storage:
    """``numel`` elements of the block of bytes saved under ``key``, from element ``offset`` on."""

    key: str
    dtype: str
    numel: int
    offset: int = 0


@dataclass(frozen=True, eq=False, slots=True)
class Tensor:
    """A strided view into a storage; offset and strides count elements of ``dtype``."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the array that `to_array` returns."""
        return math.prod(self.shape) * loaded_itemsize(self.dtype)


@dataclass(frozen=True)
class Contents:
    """What a file holds: the saved object, and the bytes that its tensors view."""

    saved: Any
    blocks: Mapping[str, Buffer]
    big_endian: bool = False

    def bytes_of(self, storage: Storage) -> Buffer:
        """Return the bytes of a storage, itself perhaps a part of a saved one."""
        if storage.key not in self.blocks:
            raise WeightsError(f"storage {shown(storage.key)!r} is missing; get a fresh copy")
        itemsize = STORED[storage.dtype].itemsize
        start = storage.offset * itemsize
        return self.blocks[storage.key][start : start + storage.numel * itemsize]


def loaded_itemsize(dtype: str) -> int:
    """Bytes of one element once in memory."""
    return 4 if dtype == "bfloat16" else STORED[dtype].itemsize


def is_count(value: object) -> bool:
    """Tell whether ``value`` is an int (not a bool) that can be a size, a stride or an offset."""
    return type(value) is int and 0 <= value < WIDEST


def check_shape(name: str, shape: Iterable[int], dtype: str) -> None:
    """Refuse shapes whose size in bytes overflows; dimensions of 0 do not hide the others."""
    shape = tuple(shape)
    ranked = len(shape) <= MAX_RANK and all(map(is_count, shape))
    if not ranked or math.prod(max(n, 1) for n in shape) * loaded_itemsize(dtype) >= WIDEST:
        raise WeightsError(
            f"tensor {shown(name)!r} has the impossible shape {shown(shape)}; "
            "the file is damaged or hostile, get a fresh copy"
        )


def check_tensor(name: str, tensor: Tensor) -> None:
    """Refuse a view that reaches outside its storage."""
    check_shape(name, tensor.shape, tensor.dtype)
    if 0 in tensor.shape:
        return
    pairs = zip(tensor.shape, tensor.strides, strict=True)
    end = tensor.offset + sum((n - 1) * stride for n, stride in pairs) + 1
    held = tensor.storage.numel * STORED[tensor.storage.dtype].itemsize
    if end * STORED[tensor.dtype].itemsize > held:
        raise WeightsError(
            f"tensor {shown(name)!r} (shape {tensor.shape}) reaches outside its storage of "
            f"{held} bytes; the file is damaged or hostile, get a fresh copy"
        )


def check_total(nbytes: int, file_size: int) -> None:
    """Refuse tensors that unfold (expanded or much-shared views) far beyond the file's size."""
    if nbytes > GROWTH * file_size + SLACK:
        raise WeightsError(
            f"its {file_size} bytes would unfold to {nbytes} bytes of tensors, because views "
            "repeat the same data; save contiguous copies (tensor.clone()) if that is wanted"
        )


def to_array(tensor: Tensor, raw: Buffer, big_endian: bool) -> np.ndarray:
    """Copy a checked tensor out of ``raw``, the bytes of its storage."""
    stored = STORED[tensor.dtype]
    if big_endian:
        stored = stored.newbyteorder(">")
    if 0 in tensor.shape:
        return decode(np.empty(tensor.shape, stored), tensor.dtype)
    # A dimension of one never steps, and torch leaves any number as its stride.
    pairs = zip(tensor.shape, tensor.strides, strict=True)
    strides = [stride * stored.itemsize if n > 1 else 0 for n, stride in pairs]
    offset = tensor.offset * stored.itemsize
    view: np.ndarray = np.ndarray(tensor.shape, stored, raw, offset, strides)
    return decode(view, tensor.dtype)


def decode(view: np.ndarray, dtype: str) -> np.ndarray:
    """Copy elements as they lie in a file into a contiguous array of the machine's byte order."""
    if dtype == "bool":
        return np.asarray(view != 0, order="C")
    if dtype == "bfloat16":
        wide = np.left_shift(view.astype(np.uint32, order="C"), np.uint32(16))
        return np.asarray(wide).view(np.float32)
    return view.astype(view.dtype.newbyteorder("="), order="C", copy=True)

"""State dicts as files that torch and torchvision load, written without torch."""

import contextlib
import functools
import json
import os
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import IO

import numpy as np

from weights_convert.errors import WeightsError, shown
from weights_convert.safetensors_files import DTYPES

ALIGNMENT = 64  # of a tensor's bytes in a .pth, as torch itself writes them
_STORAGES = {
    "bool": "BoolStorage",
    "uint8": "ByteStorage",
    "int8": "CharStorage",
    "int16": "ShortStorage",
    "int32": "IntStorage",
    "int64": "LongStorage",
    "float16": "HalfStorage",
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
    "complex64": "ComplexFloatStorage",
    "complex128": "ComplexDoubleStorage",
}
Writer = Callable[[IO[bytes], Mapping[str, np.ndarray]], None]
_SAFETENSORS = {ours: theirs for theirs, ours in DTYPES.items() if ours != "bfloat16"}


def write(
    path: str | PathLike[str], state: Mapping[str, np.ndarray], *, wrapper: str | None = None
) -> None:
    """Write a state_dict, in full or not at all.

    Args:
        path: ends in ``.pth`` or ``.pt`` (torch's zip format, which
            ``torch.load(weights_only=True)`` reads) or ``.safetensors``. A file that is there
            is replaced.
        state: arrays in torch's layout by torch's names, as `from_flax` returns them.
        wrapper: save ``{wrapper: state}``, as training scripts do; not in ``.safetensors``.

    Raises:
        WeightsError: unknown suffix, a wrapper or an element type the format lacks, or no place
            to write.
    """
    path = Path(path).expanduser()
    pth: Writer = functools.partial(_write_pth, wrapper=wrapper)
    writers: dict[str, tuple[Writer, Mapping[str, str]]] = {
        ".pth": (pth, _STORAGES),
        ".pt": (pth, _STORAGES),
        ".safetensors": (_write_safetensors, _SAFETENSORS),
    }
    if path.suffix not in writers:
        raise WeightsError(
            f"{path}: the suffix {path.suffix!r} names no format; use .pth or .safetensors"
        )
    writer, types = writers[path.suffix]
    if wrapper is not None and writer is not pth:
        raise WeightsError(f"{path}: a .safetensors cannot hold {wrapper!r}; write a .pth")
    arrays = _checked(path, state, types)
    # A name of its own in the same folder, so that the final rename is one step.
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            writer(file, arrays)
        partial.replace(path)
    except OSError as error:
        raise WeightsError(
            f"{path}: cannot be written ({error.strerror}); check the folder and its free space"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def _checked(
    path: Path, state: Mapping[str, np.ndarray], types: Mapping[str, str]
) -> dict[str, np.ndarray]:
    arrays = {name: np.asarray(value) for name, value in state.items()}
    if not arrays:
        raise WeightsError(f"{path}: there are no tensors to write; pass a state_dict")
    for name, array in arrays.items():
        if not isinstance(name, str) or not _is_name(name):
            raise WeightsError(f"{path}: {shown(name)!r} cannot name a tensor; rename it")
        if array.dtype.name not in types:
            raise WeightsError(
                f"{path}: {name} has the element type {array.dtype}, which {path.suffix} files "
                "cannot hold; convert it, for example to float32"
            )
    return arrays


def _is_name(name: str) -> bool:
    return bool(name) and name.isprintable() and name != "__metadata__"


def _bytes(array: np.ndarray) -> bytes:
    """Elements in C order, little-endian."""
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def _write_safetensors(file: IO[bytes], arrays: Mapping[str, np.ndarray]) -> None:
    # Wide elements first, so that every tensor starts at a multiple of its element's size.
    order = sorted(arrays, key=lambda name: -arrays[name].dtype.itemsize)
    offsets, position = {}, 0
    for name in order:
        offsets[name] = [position, position + arrays[name].nbytes]
        position += arrays[name].nbytes
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for name, array in arrays.items():
        dtype = _SAFETENSORS[array.dtype.name]
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": offsets[name]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for name in order:
        file.write(_bytes(arrays[name]))


def _write_pth(file: IO[bytes], arrays: Mapping[str, np.ndarray], wrapper: str | None) -> None:
    saved = b"".join(_pickle(arrays))
    if wrapper is not None:
        saved = b"}" + _text(wrapper) + saved + b"s"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        _add(archive, "data.pkl", b"\x80\x02" + saved + b".")
        _add(archive, "byteorder", b"little")
        for key, array in enumerate(arrays.values()):
            _add(archive, f"data/{key}", _bytes(array))
        _add(archive, "version", b"3\n")


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    """Add a member whose bytes start at a multiple of ALIGNMENT, by padding its header."""
    info = zipfile.ZipInfo("archive/" + name)  # dated 1980: same weights, same file
    assert archive.fp is not None
    start = archive.fp.tell() + 30 + len(info.filename) + 4
    padding = -start % ALIGNMENT
    info.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
    archive.writestr(info, content)


def _pickle(arrays: Mapping[str, np.ndarray]) -> Iterator[bytes]:
    """Spell out, opcode by opcode, an OrderedDict of tensors in a pickle of protocol 2.

    The pickle module would have to import the torch names it writes.
    """
    yield _ORDERED_DICT + b"("
    for key, (name, array) in enumerate(arrays.items()):
        storage = _STORAGES[array.dtype.name]
        reference = _text("storage") + _global("torch", storage) + _text(str(key)) + _text("cpu")
        yield _text(name) + _global("torch._utils", "_rebuild_tensor_v2") + b"("
        yield b"(" + reference + _int(array.size) + b"tQ"
        yield _int(0) + _ints(array.shape) + _ints(_strides(array.shape))
        yield b"\x89" + _ORDERED_DICT + b"tR"  # requires_grad=False, no hooks
    yield b"u" + _METADATA + b"b"


def _strides(shape: tuple[int, ...]) -> list[int]:
    strides, count = [], 1
    for n in reversed(shape):
        strides.append(count)
        count *= max(n, 1)
    return strides[::-1]


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _text(text: str) -> bytes:
    encoded = text.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def _int(value: int) -> bytes:
    if value < 2**31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)


def _ints(values: tuple[int, ...] | list[int]) -> bytes:
    return b"(" + b"".join(map(_int, values)) + b"t"


_ORDERED_DICT = _global("collections", "OrderedDict") + b")R"
# What torch.save keeps as the attribute _metadata: the version of the whole, without which
# torchvision's MNASNet loads nothing. 2 is MNASNet's; no other network of torchvision asks.
_METADATA = (
    b"}("
    + _text("_metadata")
    + _ORDERED_DICT
    + b"("
    + _text("")
    + b"}("
    + _text("version")
    + _int(2)
    + b"uuu"
)

"""Weight files of the torch world, read into NumPy arrays. Nothing in a file is ever run.

Formats are told by content, not by suffix: the zip archives and the older pickle streams of
``torch.save``, and ``.safetensors``. Every size is checked against the file before memory is
allocated, and every failure is one `WeightsError`.
"""

import mmap
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import IO, Any

import numpy as np

from weights_convert.errors import WeightsError, shown
from weights_convert.safetensors_files import looks_like_safetensors, read_safetensors
from weights_convert.tensors import Contents, Tensor, check_tensor, check_total, to_array
from weights_convert.torch_files import read_legacy, read_zip

# Where training scripts put the weights, most telling first.
WRAPPERS = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "net",
    "network",
    "module",
    "params",
    "weights",
)
PREFIXES = ("module.", "_orig_mod.")  # DataParallel, torch.compile
MAX_NAME = 512
_SIGNATURES = {
    b"version https://git-lfs": "a git-lfs pointer, not the file; run `git lfs pull`",
    b"\x1f\x8b": "gzip-compressed; unpack it first",
    b"\x89HDF": "an HDF5 file; export the weights with torch.save or safetensors",
    b"GGUF": "a GGUF file; export the weights with torch.save or safetensors",
    b"\x93NUMPY": "a NumPy array; export the weights with torch.save or safetensors",
}


def read(path: str | PathLike[str]) -> dict[str, np.ndarray]:
    """Read a weight file.

    The weights may lie in a wrapper such as ``{"state_dict": ..., "epoch": ...}``, whose other
    entries are dropped. A ``module.`` or ``_orig_mod.`` prefix that every name has is removed.
    bfloat16 becomes float32 (exactly), every other element type stays.

    Args:
        path: a ``.pth``/``.pt`` file of any torch version, or a ``.safetensors`` file.

    Returns:
        Arrays in torch's layout by torch's names, in the file's order, each with its own memory.

    Raises:
        WeightsError: the file cannot be read; the message says why and what to do.
    """
    path = Path(path)
    try:
        return _read(path)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    except OSError as error:
        raise WeightsError(f"{path}: cannot be opened ({error.strerror}); check the path") from None
    except MemoryError:
        raise WeightsError(
            f"{path}: the tensors do not fit in memory; use a larger machine"
        ) from None


def _read(path: Path) -> dict[str, np.ndarray]:
    if path.is_dir():
        raise WeightsError("is a folder; give the weight file inside it")
    if not path.exists():
        raise WeightsError("does not exist; check the path")
    if not path.is_file():
        raise WeightsError("is not a regular file; save it to disk first")
    if not path.stat().st_size:
        raise WeightsError("is empty; get a fresh copy")
    with path.open("rb") as file:
        # Mapped, not read: a view that runs past the end is short, whatever the file claims.
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return _unpack(file, mapped)


def _unpack(file: IO[bytes], mapped: mmap.mmap) -> dict[str, np.ndarray]:
    data = memoryview(mapped)
    start = bytes(data[:512])
    if looks_like_safetensors(start):
        contents = read_safetensors(data)
    elif start.startswith((b"PK\3\4", b"PK\5\6")):
        contents = read_zip(file, data)
    elif start.startswith(b"\x80"):
        contents = read_legacy(mapped, data)  # type: ignore[arg-type]
    else:
        raise WeightsError(_diagnosis(start))
    return _arrays(contents, _checked_names(_find(contents.saved)), len(data))


def _diagnosis(start: bytes) -> str:
    """Say what a file that holds no weights is."""
    for signature, meaning in _SIGNATURES.items():
        if start.startswith(signature):
            return f"is {meaning}"
    if start.lstrip().startswith(b"<"):
        return "is a web page (HTML or XML), not weights; download the file itself"
    if start[257:262] == b"ustar":
        return "is a tar archive; unpack it, or save it again with a torch newer than 0.1"
    return (
        "is neither a torch.save file nor .safetensors; check that it is a weight file "
        "and that the download is whole"
    )


def _tensors(saved: object) -> dict[str, Tensor]:
    if not isinstance(saved, dict):
        return {}
    return {k: v for k, v in saved.items() if isinstance(k, str) and isinstance(v, Tensor)}


def _find(saved: Any) -> dict[str, Tensor]:
    """Return the dict of tensors in a saved object."""
    if found := _find_wrapped(saved, set()) or _tensors(saved):
        return found
    if not isinstance(saved, dict):
        raise WeightsError("does not hold a dict of tensors; save model.state_dict()")
    candidates = {id(v): (k, v) for k, v in saved.items() if isinstance(v, dict)}
    named = {str(k): tensors for k, v in candidates.values() if (tensors := _tensors(v))}
    if len(named) > 1:
        names = ", ".join(shown(name, 40) for name in list(named)[:10])
        raise WeightsError(f"holds several networks ({names}); save the one you want alone")
    if not named:
        raise WeightsError("holds no tensors; save model.state_dict()")
    return next(iter(named.values()))


def _find_wrapped(saved: object, seen: set[int]) -> dict[str, Tensor]:
    """Look under the usual names, at any depth; ``seen`` keeps loops and repeats cheap."""
    if not isinstance(saved, dict) or id(saved) in seen or len(seen) > 100:
        return {}
    seen.add(id(saved))
    for name in WRAPPERS:
        inner = saved.get(name)
        if found := _find_wrapped(inner, seen) or _tensors(inner):
            return found
    return {}


def _checked_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    if not tensors:
        raise WeightsError("holds no tensors; save model.state_dict()")
    for name in tensors:
        if not name or not name.isprintable() or len(name) > MAX_NAME:
            raise WeightsError(
                f"the tensor name {shown(ascii(name))} is empty, unprintable or longer than "
                f"{MAX_NAME} characters; the file is damaged, get a fresh copy"
            )
    return _without_prefix(tensors)


def _without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in PREFIXES:
        if all(name.startswith(prefix) and name != prefix for name in tensors):
            return _without_prefix({n.removeprefix(prefix): t for n, t in tensors.items()})
    return tensors


def _arrays(contents: Contents, tensors: dict[str, Tensor], size: int) -> dict[str, np.ndarray]:
    """Check all tensors, then copy them out."""
    for name, tensor in tensors.items():
        check_tensor(name, tensor)
    check_total(sum(tensor.nbytes for tensor in tensors.values()), size)
    return dict(_copies(contents, tensors))


def _copies(contents: Contents, tensors: dict[str, Tensor]) -> Iterator[tuple[str, np.ndarray]]:
    for name, tensor in tensors.items():
        raw = contents.bytes_of(tensor.storage)
        yield name, to_array(tensor, raw, contents.big_endian)

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
from weights_convert.layout import CHOOSE
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


def read(path: str | PathLike[str], *, key: str | None = None) -> dict[str, np.ndarray]:
    """Read a weight file.

    The weights may lie in a wrapper such as ``{"state_dict": ..., "epoch": ...}``, whose other
    entries are dropped. A ``module.`` or ``_orig_mod.`` prefix that every name has is removed.
    bfloat16 becomes float32 (exactly), every other element type stays.

    Args:
        path: a ``.pth``/``.pt`` file of any torch version, or a ``.safetensors`` file.
        key: of a file with several networks, the name of the one that is wanted: ``ema`` of
            ``{"model": ..., "ema": ...}``, or ``teacher`` where its names begin with ``teacher.``.

    Returns:
        Arrays in torch's layout by torch's names, in the file's order, each with its own memory.

    Raises:
        WeightsError: the file cannot be read; the message says why and what to do.
    """
    path = Path(path).expanduser()
    try:
        return _read(path, key)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    except OSError as error:
        raise WeightsError(f"{path}: cannot be opened ({error.strerror}); check the path") from None
    except MemoryError:
        raise WeightsError(
            f"{path}: the tensors do not fit in memory; use a larger machine"
        ) from None


def _read(path: Path, key: str | None) -> dict[str, np.ndarray]:
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
        return _unpack(file, mapped, key)


def _unpack(file: IO[bytes], mapped: mmap.mmap, key: str | None) -> dict[str, np.ndarray]:
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
    found = _find(contents.saved) if key is None else _chosen(contents.saved, key)
    return _arrays(contents, _checked_names(found), len(data))


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


def _chosen(saved: Any, key: str) -> dict[str, Tensor]:
    """Return the network of this name: a dict in the saved object, or a part of its tensors."""
    inside = saved.get(key) if isinstance(saved, dict) else None
    if isinstance(inside, dict):
        return _find(inside)
    tensors = _find(saved)
    begin = f"{key}."
    if part := {n.removeprefix(begin): t for n, t in tensors.items() if n.startswith(begin)}:
        return part
    dicts = [str(name) for name, value in saved.items() if isinstance(value, dict)]
    names = sorted(dicts or {name.partition(".")[0] for name in tensors})
    raise WeightsError(
        f"has nothing called {shown(key)!r}; there are: "
        + ", ".join(shown(name, 40) for name in names[:10])
    )


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
        raise WeightsError(f"holds several networks ({names}): {CHOOSE}")
    if named:
        return next(iter(named.values()))
    if "param_groups" in saved or ("optimizer" in saved and not named):
        raise WeightsError("holds an optimizer's state but no weights; save model.state_dict()")
    if any(isinstance(v, list) and any(isinstance(t, Tensor) for t in v) for v in saved.values()):
        raise WeightsError(
            "holds lists of tensors without names, as an EMA keeps its shadow_params; copy them "
            "into the network and save model.state_dict()"
        )
    raise WeightsError("holds no tensors; save model.state_dict()")


def _find_wrapped(saved: object, seen: set[int]) -> dict[str, Tensor]:
    """Look under the usual names, at any depth; ``seen`` keeps loops and repeats cheap."""
    if not isinstance(saved, dict) or id(saved) in seen or len(seen) > 100:
        return {}
    seen.add(id(saved))
    for name in WRAPPERS:
        inner = saved.get(name)
        if found := _find_wrapped(inner, seen) or _tensors(inner):
            _check_alone(saved, name, found)
            return found
    return {}


def _check_alone(saved: dict, chosen: str, found: dict[str, Tensor]) -> None:
    """Refuse a file with another network of the same layers: which is meant, it does not say."""
    names = {_bare(name) for name in found}
    others = {id(v): (k, v) for k, v in saved.items() if v is not saved[chosen]}
    several = [chosen]
    for key, value in others.values():
        inside = [value, *(value.get(name) for name in WRAPPERS)] if isinstance(value, dict) else []
        # Each name for itself: an average has a count beside its module's names.
        rivals = ({_bare(name) for name in _tensors(part)} & names for part in inside)
        if any(2 * len(shared) > len(names) for shared in rivals):
            several.append(str(key))
    if len(several) > 1:
        listed = ", ".join(shown(name, 40) for name in several[:10])
        raise WeightsError(f"holds several networks of the same layers ({listed}): {CHOOSE}")


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


def _bare(name: str) -> str:
    while name.startswith(PREFIXES):
        name = name.partition(".")[2]
    return name


def _without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for _ in range(MAX_NAME):
        for prefix in PREFIXES:
            if tensors and all(n.startswith(prefix) and n != prefix for n in tensors):
                tensors = {n.removeprefix(prefix): t for n, t in tensors.items()}
                break
        else:
            break
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

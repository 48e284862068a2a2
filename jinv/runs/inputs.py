"""What the files held that a config names: a resumed run has to read the same again."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from jinv import checks, files

_LARGE = 2**30
"""Bytes from which a file counts by its name and size."""


def digests(config: Any) -> dict[str, str]:
    """Return a digest of the content of every file and folder that a config names, by its key.

    Args:
      config: a dataclass whose paths are annotated as `checks.File`, and names of functions as
        `checks.Code`; their modules have been imported.
    """
    found = {}
    for key, text, note in _paths(config, ""):
        if isinstance(note, checks.Code):
            file = getattr(sys.modules.get(text.partition(":")[0]), "__file__", None)
            if ":" in text and file is not None:
                found[key] = _digest([Path(file)])
            continue
        path = files.path(text)
        stem = path.name
        for ending in note.endings:
            stem = stem.removesuffix(ending)
        places = [path, *(path.with_name(stem + ending) for ending in note.endings)]
        if text not in note.words and any(file.exists() for file in places):
            found[key] = _digest([file for file in places if file.exists()])
    return found


def _paths(config: Any, path: str) -> Iterator[tuple[str, str, checks.File | checks.Code]]:
    for name, hint in checks.hints(type(config)).items():
        value = getattr(config, name)
        entries = enumerate(value) if _is_list(value) else [(None, value)]
        for number, entry in entries:
            here = ".".join(str(part) for part in (path, name, number) if part not in ("", None))
            if dataclasses.is_dataclass(entry):
                yield from _paths(entry, here)
            elif entry is not None:
                yield from ((here, str(entry), note) for note in _notes(hint))


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _notes(hint: Any) -> Iterator[checks.File | checks.Code]:
    """Yield what annotations say of a path, or of the paths in a list."""
    for option in checks.options(hint):
        kind, notes = checks.bare(option)
        yield from (note for note in notes if isinstance(note, checks.File | checks.Code))
        if get_origin(kind) is tuple:
            yield from _notes(get_args(kind)[0])


def _digest(places: Sequence[Path]) -> str:
    """Return one digest of files and of all that folders hold, wherever they lie."""
    total = hashlib.sha256()
    for place in places:
        inside = sorted(place.rglob("*")) if place.is_dir() else [place]
        for file in filter(Path.is_file, inside):
            told = file.stat()
            name = str(file.relative_to(place)) if place.is_dir() else file.suffix
            content = _content(file, told.st_mtime_ns, told.st_size)
            # A file name need not be UTF-8.
            total.update(f"{name}\0{content}\0".encode(errors="surrogateescape"))
    return total.hexdigest()


@functools.lru_cache(maxsize=4096)
def _content(file: Path, modified: int, size: int) -> str:
    """Return a file's digest, kept as long as the file stays as it is."""
    del modified
    return files.sha256(file) if size < _LARGE else str(size)

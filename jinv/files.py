"""Paths as people write them, and files that are either complete or absent."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np


def path(text: str | os.PathLike[str]) -> Path:
    """Return a path that a person gave, with `~` and `~name` as the home folders they stand for.

    Raises:
      ValueError: there is no such home folder.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(f"cannot read the path {text}: {error}") from None


def write_atomic(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write all of `data` beside `path`, then rename: readers see the old file or the new one."""
    target = Path(path)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.write_bytes(data.encode() if isinstance(data, str) else data)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def csv_text(rows: Iterable[Sequence[object]]) -> str:
    """Return rows as the text of a .csv file."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def write_arrays(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays as a .npz file, which is complete or absent."""
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]
    write_atomic(path, file.getvalue())


def sha256(path: Path) -> str:
    """Return the file's SHA-256 in hex, without reading it into memory at once."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sha256(path: Path, digits: str, remedy: str) -> None:
    """Raise ValueError if the file's sha256 does not start with these digits."""
    digest = sha256(path)
    if not digest.startswith(digits):
        raise ValueError(
            f"{path} is damaged: its sha256 starts with {digest[:8]}, not {digits}; {remedy}"
        )

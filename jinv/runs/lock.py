"""One process at a time writes into a folder: locks that end with their process, however it ends.

A process may take the same lock again. The lock file says who holds it, and is removed at the end.
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows has no such locks: folders are not guarded there
    fcntl = None  # type: ignore[assignment]

NAME = ".lock"

_held: dict[Path, Any] = {}


def hold(folder: Path, command: str, *, shared: bool = False) -> bool:
    """Lock a folder for this process until it releases it or ends; False if it has it already.

    Args:
      folder: it exists.
      command: what is done in it, for those who find it locked.
      shared: other processes that share it may hold it at the same time.

    Raises:
      BlockingIOError: another process holds it; the message says which.
    """
    folder = folder.resolve()
    if fcntl is None or folder in _held:
        return False
    file = (folder / NAME).open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read(500) or "another process"
        file.close()
        raise BlockingIOError(f"it is being written by {holder}") from None
    except OSError:  # a disk that knows no locks
        file.close()
        return False
    if not _is_there(folder, file):  # its holder has removed it since it was opened
        file.close()
        return hold(folder, command, shared=shared)
    _held[folder] = file
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()} (`{command}`, since {since})")
    file.flush()
    return True


def release(folder: Path) -> None:
    """Unlock a folder, if this process holds it."""
    file = _held.pop(folder.resolve(), None)
    if file is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (folder / NAME).unlink(missing_ok=True)
    except OSError:
        pass  # others share it: the last one removes the file
    file.close()


def release_all() -> None:
    """Unlock all folders that this process holds."""
    for folder in list(_held):
        release(folder)


def _is_there(folder: Path, file: Any) -> bool:
    try:
        return os.path.samestat((folder / NAME).stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False

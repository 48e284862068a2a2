"""Arrays as ``np.savez`` and ``np.savez_compressed`` write them, read without pickle."""

import math
import zipfile
from os import PathLike
from pathlib import Path
from typing import IO

import numpy as np

from weights_convert.errors import WeightsError, shown
from weights_convert.pickles import DAMAGED

_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def read_arrays(path: str | PathLike[str], most: int) -> dict[str, np.ndarray]:
    """Read a .npz file, in the file's order.

    Args:
        path: of the file.
        most: bytes that all arrays together may have; no more memory is taken.

    Returns:
        Arrays of numbers by their names: ``arr_0``, ``arr_1``, ... of a list.

    Raises:
        WeightsError: the file cannot be read; the message says why and what to do.
    """
    path, found = Path(path).expanduser(), {}
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                with archive.open(info) as file:
                    name = info.filename.removesuffix(".npy")
                    found[name] = array = _array(file, name, most)
                    most -= array.nbytes
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    except OSError as error:
        reason = f"cannot be opened ({error.strerror})"
        raise WeightsError(f"{path}: {reason}; check the path") from None
    except Exception as error:  # zipfile and zlib let many types through on damaged files
        raise WeightsError(
            f"{path}: no file of np.savez ({shown(str(error))}); {DAMAGED}"
        ) from None
    return found


def _array(file: IO[bytes], name: str, most: int) -> np.ndarray:
    version = np.lib.format.read_magic(file)
    if version not in _HEADERS:
        raise WeightsError(f"{shown(name)!r} is of an unknown version {version}; {DAMAGED}")
    shape, by_columns, dtype = _HEADERS[version](file)
    if dtype.kind not in "fiu":
        raise WeightsError(
            f"{shown(name)!r} has the element type {dtype}, which holds no numbers that can be "
            "read without running code; convert it to float32 and save again"
        )
    size = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or size > most:
        raise WeightsError(f"{shown(name)!r} of shape {shape} is more than the network has")
    data = file.read(size)
    if len(data) != size:
        raise WeightsError(f"{shown(name)!r} is cut short; {DAMAGED}")
    array: np.ndarray = np.ndarray(shape, dtype, data, order="F" if by_columns else "C")
    return array.astype(dtype.newbyteorder("="), order="C", copy=True)

"""The .safetensors container: a length, a JSON header, then the tensors end to end."""

import json
from typing import Any

from weights_convert.errors import WeightsError, shown
from weights_convert.pickles import DAMAGED
from weights_convert.tensors import STORED, Contents, Storage, Tensor, check_shape, is_count

MAX_HEADER = 100_000_000
# The format's names for the element types, in both directions.
DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
}


def looks_like_safetensors(start: bytes) -> bool:
    """Tell from the first 9 bytes: a length below 2**48 and an opening brace."""
    return start[6:9] == b"\0\0{"


def read_safetensors(data: memoryview) -> Contents:
    """Return the tensors, each as a view of a storage of its own."""
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER or length > len(data) - 8:
        raise WeightsError(f"its header claims {length} bytes; {DAMAGED}")
    body = data[8 + length :]
    spans, tensors = [], {}
    for name, entry in _header(bytes(data[8 : 8 + length])).items():
        if name != "__metadata__":
            begin, end, tensors[name] = _entry(name, entry, len(body))
            spans.append((begin, end))
    _check_spans(spans, len(body))
    return Contents(tensors, dict.fromkeys(tensors, body))


def _header(text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        raise WeightsError(f"its header is not valid JSON; {DAMAGED}") from None
    if not isinstance(header, dict):
        raise WeightsError(f"its header is not a JSON object; {DAMAGED}")
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError
    return result


def _entry(name: str, entry: object, size: int) -> tuple[int, int, Tensor]:
    problem = WeightsError(f"the header's entry of {shown(name)!r} makes no sense; {DAMAGED}")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise problem
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        raise problem
    if not all(map(is_count, offsets)) or not offsets[0] <= offsets[1] <= size:
        raise problem
    if not isinstance(entry["dtype"], str):
        raise problem
    dtype = DTYPES.get(entry["dtype"])
    if dtype is None:
        raise WeightsError(
            f"tensor {shown(name)!r} has the element type {shown(entry['dtype'])}, which is not "
            "supported; convert it to float32 and save again"
        )
    check_shape(name, shape, dtype)
    return offsets[0], offsets[1], _contiguous(name, dtype, shape, *offsets)


def _contiguous(name: str, dtype: str, shape: list[int], begin: int, end: int) -> Tensor:
    strides, count = [], 1
    for n in reversed(shape):
        strides.append(count)
        count *= n
    if count * STORED[dtype].itemsize != end - begin:
        raise WeightsError(
            f"tensor {shown(name)!r} of shape {tuple(shape)} and type {dtype} cannot lie in "
            f"{end - begin} bytes; {DAMAGED}"
        )
    # A storage of its own, because begin need not be a multiple of the element's size.
    storage = Storage(name, "uint8", end - begin, begin)
    return Tensor(storage, dtype, 0, tuple(shape), tuple(reversed(strides)))


def _check_spans(spans: list[tuple[int, int]], size: int) -> None:
    """The tensors must lie end to end and fill the file: no overlaps, no holes, no rest."""
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise WeightsError(f"its tensors overlap or leave holes; {DAMAGED}")
        position = end
    if position != size:
        raise WeightsError(f"its tensors take {position} of {size} bytes; {DAMAGED}")

"""Kernels of a compiled program, and the bytes that each reads and writes, from its HLO text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

_BYTES = {
    **dict.fromkeys(("pred", "s8", "u8"), 1),
    **dict.fromkeys(("bf16", "f16", "s16", "u16"), 2),
    **dict.fromkeys(("f32", "s32", "u32"), 4),
    **dict.fromkeys(("f64", "s64", "u64", "c64"), 8),
}
_ARRAY = re.compile(rf"\b({'|'.join(_BYTES)})\[([\d,]*)\]")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*?)\)(?:, |$)")
_CALLED = re.compile(r"(?:body|to_apply|calls)=%?([\w.\-]+)")
_NO_KERNEL = {
    *("parameter", "tuple", "get-tuple-element", "bitcast", "constant"),
    *("after-all", "copy-done", "async-done", "async-update", "conditional"),
}


class Kernel(NamedTuple):
    """One kernel of a program.

    Attributes:
      name: of the HLO instruction.
      kind: "convolution", "product", "reduction", "loop fusion", "copy" or the opcode.
      shape: of the result.
      op_name: where it comes from in the JAX program.
      bytes: of operands and result, each counted once.
    """

    name: str
    kind: str
    shape: str
    op_name: str
    bytes: int


def size(shape: str) -> int:
    """Bytes of an array or a tuple, as HLO writes its shape."""
    total = 0
    for kind, lengths in _ARRAY.findall(shape):
        count = _BYTES[kind]
        for length in filter(None, lengths.split(",")):
            count *= int(length)
        total += count
    return total


def kernels(text: str) -> list[Kernel]:
    """Those of the entry computation and of what it loops over or calls, each once."""
    computations, entry = _computations(text)
    return list(_kernels(computations, entry))


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    found: dict[str, list[str]] = {}
    entry, current = "", ""
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = head[2]
            found[current] = []
            entry = current if head[1] else entry
        elif line.startswith("}"):
            current = ""
        elif current:
            found[current].append(line)
    return found, entry


def _kernels(computations: dict[str, list[str]], name: str) -> Iterator[Kernel]:
    shapes: dict[str, str] = {}
    for line in computations[name]:
        found = _INSTRUCTION.match(line)
        if found is None:
            continue
        name, shape, opcode, operands = found.groups()
        shapes[name] = shape
        if opcode in ("while", "call"):
            called = _CALLED.search(line)
            assert called is not None
            yield from _kernels(computations, called[1])
        elif opcode not in _NO_KERNEL:
            read = (size(shapes.get(each, "")) for each in re.findall(r"%([\w.\-]+)", operands))
            origin = re.search(r'op_name="([^"]*)"', line)
            yield Kernel(
                name,
                _kind(opcode, name, line),
                re.sub(r"\{[^}]*\}|/\*.*?\*/", "", shape),
                origin[1] if origin else "",
                sum(read) + size(shape),
            )


def _kind(opcode: str, name: str, line: str) -> str:
    target = re.search(r'custom_call_target="([^"]+)"', line)
    told = f"{opcode} {name} {target[1] if target else ''}".lower()
    if "conv" in told and ("cudnn" in told or opcode in ("convolution", "custom-call")):
        return "convolution"
    if any(word in told for word in ("gemm", "dot", "matmul", "cublas")):
        return "product"
    if "transpose" in told or opcode in ("copy", "copy-start"):
        return "copy"
    if "reduce" in told:
        return "reduction"
    return "loop fusion" if opcode == "fusion" else opcode

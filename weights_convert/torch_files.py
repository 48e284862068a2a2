"""The two containers that ``torch.save`` writes: a zip archive, and the older pickle stream."""

import io
import struct
import zipfile
import zlib
from collections.abc import Collection, Mapping
from typing import IO

from weights_convert.errors import WeightsError, shown
from weights_convert.pickles import DAMAGED, Machine
from weights_convert.tensors import STORED, Buffer, Contents, Storage

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001


def read_zip(file: IO[bytes], data: memoryview) -> Contents:
    """Read what torch has written since 1.6: ``*/data.pkl`` and one ``*/data/<key>`` a storage."""
    members = _members(file)
    roots = [name.removesuffix("data.pkl") for name in members if _is_pickle(name)]
    if len(roots) != 1:
        raise WeightsError(
            "it is a zip archive but not one of torch.save (no single data.pkl); "
            "if it is an archive of weight files, unpack it first"
        )
    root = roots[0]
    if root + "constants.pkl" in members or any(n.startswith(root + "code/") for n in members):
        raise WeightsError(
            "it is a TorchScript archive (a program, not only weights); "
            "load it with torch.jit.load and save model.state_dict()"
        )
    _check_sizes(members.values(), len(data))
    machine = Machine()
    saved = machine.run(io.BytesIO(_content(data, members[root + "data.pkl"])))
    blocks = {}
    for key, storage in machine.storages.items():
        member = members.get(f"{root}data/{key}")
        if member is None:
            continue  # an error only if a weight needs it
        if member.file_size != storage.numel * STORED[storage.dtype].itemsize:
            raise WeightsError(
                f"storage {shown(key)!r} should hold {storage.numel} elements of "
                f"{storage.dtype} but has {member.file_size} bytes; {DAMAGED}"
            )
        blocks[key] = _content(data, member)
    return Contents(saved, blocks, _is_big_endian(data, members.get(root + "byteorder")))


def _is_pickle(name: str) -> bool:
    return name == "data.pkl" or (name.endswith("/data.pkl") and name.count("/") == 1)


def _is_big_endian(data: memoryview, member: zipfile.ZipInfo | None) -> bool:
    order = bytes(_content(data, member)) if member else b"little"
    if order not in (b"little", b"big"):
        raise WeightsError(f"its byte order {shown(order[:20])} is unknown; {DAMAGED}")
    return order == b"big"


def _members(file: IO[bytes]) -> dict[str, zipfile.ZipInfo]:
    """Return the archive's directory."""
    try:
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
    except Exception as error:  # zipfile lets many types through on a damaged directory
        raise WeightsError(
            f"its zip directory is broken ({shown(str(error))}); {DAMAGED}"
        ) from None
    members = {info.filename: info for info in infos}
    if len(members) != len(infos):
        raise WeightsError(f"its zip directory names a member twice; {DAMAGED}")
    return members


def _check_sizes(infos: Collection[zipfile.ZipInfo], size: int) -> None:
    """Refuse members that could unfold, or that claim more bytes than there are."""
    if any(info.compress_type or info.file_size != info.compress_size for info in infos):
        raise WeightsError(
            "its members are compressed, which torch.save never does and which could unfold "
            "to any size; unpack it and pack it again without compression (zip -0)"
        )
    if sum(info.file_size for info in infos) > size:
        raise WeightsError(f"its members claim more bytes than the file's {size}; {DAMAGED}")
    if any(info.flag_bits & 1 for info in infos):
        raise WeightsError("it is an encrypted zip archive; decrypt it first")


def _content(data: memoryview, member: zipfile.ZipInfo) -> memoryview:
    """Return a stored member's bytes without copying them, after checking their CRC."""
    start = member.header_offset
    header = bytes(data[start : start + 30]) if start >= 0 else b""
    if len(header) == 30 and header[:4] == b"PK\3\4":
        start += 30 + sum(struct.unpack("<HH", header[26:]))
        content = data[start : start + member.file_size]
        if len(content) == member.file_size and zlib.crc32(content) == member.CRC:
            return content
    raise WeightsError(f"member {shown(member.filename)!r} is damaged; get a fresh copy")


def read_legacy(stream: IO[bytes], data: memoryview) -> Contents:
    """Read the older stream: magic, protocol, system, object and keys as pickles, then bytes.

    The raw part is little-endian on every machine: for each key an int64 count, then elements.
    """
    if Machine().run(stream) != LEGACY_MAGIC or Machine().run(stream) != LEGACY_PROTOCOL:
        raise WeightsError(
            "it is a pickle, but not one of torch.save; save it with "
            "torch.save(model.state_dict(), path)"
        )
    Machine().run(stream)
    machine = Machine()
    saved = machine.run(stream)
    keys = Machine().run(stream)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise WeightsError(f"its list of storages is broken; {DAMAGED}")
    return Contents(saved, _blocks(keys, machine.storages, data, stream.tell()))


def _blocks(
    keys: list[str], storages: Mapping[str, Storage], data: memoryview, position: int
) -> dict[str, Buffer]:
    blocks: dict[str, Buffer] = {}
    for key in keys:
        storage = storages.get(key)
        if storage is None or key in blocks:
            raise WeightsError(f"storage {shown(key)!r} is listed but unknown; {DAMAGED}")
        count = int.from_bytes(data[position : position + 8], "little", signed=True)
        end = position + 8 + storage.numel * STORED[storage.dtype].itemsize
        if count != storage.numel or end > len(data):
            raise WeightsError(
                f"storage {shown(key)!r} should hold {storage.numel} elements of {storage.dtype} "
                f"but the file has not that many; {DAMAGED}"
            )
        blocks[key] = data[position + 8 : end]
        position = end
    return blocks

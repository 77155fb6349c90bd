"""What guests wrote to parts of clusters, kept in the state directory from one run to the next.

The file holds pieces, one after the other: offset (8 bytes, big endian), length (4 bytes, big endian), data.
The journal names it and has its checksum, so a file that is not whole is never taken for one that is.
"""

import hashlib
import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from blockd.aio import in_thread
from blockd.block.node import BlockNode, Buffer
from blockd.daemon.state import StagedRecord
from blockd.daemon.state_dir import STAGED
from blockd.drivers.sharing import files_of
from blockd.errors import StorageError

_PIECE = struct.Struct(">QI")


class KeptWrites(NamedTuple):
    """Staged writes of an earlier run; `pieces` is None if they cannot be read any more."""

    record: StagedRecord
    pieces: list[tuple[int, Buffer]] | None


def pack(pieces: Iterable[tuple[int, Buffer]]) -> bytes:
    """The content of the file."""
    return b"".join(part for offset, data in pieces for part in (_PIECE.pack(offset, len(data)), data))


def unpack(content: bytes) -> Iterator[tuple[int, Buffer]]:
    """The pieces of a file whose checksum is right."""
    position = 0
    while position < len(content):
        offset, length = _PIECE.unpack_from(content, position)
        position += _PIECE.size
        yield offset, content[position : position + length]
        position += length


def record_of(image: BlockNode, births: tuple[str, ...], length: int, content: bytes) -> StagedRecord:
    """What the journal says of a file; its name follows from what is in it."""
    checksum = hashlib.sha256(content).hexdigest()
    return StagedRecord(
        node=image.node_name,
        file=f"{STAGED}{checksum[:16]}",
        sha256=checksum,
        length=length,
        births=births,
    )


async def births_of(image: BlockNode) -> tuple[str, ...]:
    """What tells the files of an image from others that have their names later.

    Raises:   StorageError: that is not to be had.
    """
    files = list(files_of(image))
    try:
        return await in_thread(lambda: tuple(file.birth_blocking() for file in files))
    except OSError as error:
        raise StorageError.from_os(error, "look at", image.filename) from error


def is_whole(record: StagedRecord, content: bytes) -> bool:
    return hashlib.sha256(content).hexdigest() == record.sha256

"""The order in which an image and its add-cow file reach the disk. Blocking calls, in one thread hop.

    1  data, holes too      the image synced
    2  bits                 the add-cow file synced

So a bit is on the disk only after the data that it stands for. A crash between any two writes leaves
some bits unset: those clusters read as the backing, as before.
"""

from collections.abc import Sequence

from blockd.block.file_events import FileEvent
from blockd.block.node import ProtocolNode
from blockd.formats.add_cow import header as headers
from blockd.formats.add_cow.bitmap import PageWrite
from blockd.formats.add_cow.header import Header, Name


def write_checkpoint(image: ProtocolNode, file: ProtocolNode, pages: Sequence[PageWrite]) -> None:
    """Make all data written so far, and the bits that belong to it, durable."""
    for used in (image, file):
        if used.failed is not None:
            raise used.failed
        used.require_unchanged_blocking()
    image.sync_blocking()
    if pages:
        for page in pages:
            file.announce(FileEvent.L2_UPDATE)
            file.write_blocking(page.host_offset, page.data)
        file.sync_blocking()


def write_name(file: ProtocolNode, name: Name, current: bytes) -> bytes:
    """Write a name into free space of the header, durably; returns what the header is now."""
    changed = headers.put_name(current, name)
    file.write_blocking(name.offset, changed[name.offset : name.end])
    file.sync_blocking()
    return changed


def write_header(file: ProtocolNode, header: Header, current: bytes) -> None:
    """Replace the header, whose names are there already, durably: one sector."""
    file.write_blocking(0, headers.pack_first_sector(header, current))
    file.sync_blocking()


def grow_bitmap(file: ProtocolNode, size: int) -> None:
    """Make the add-cow file long enough for a larger disk: what is new are unset bits."""
    if file.size < size:
        file.truncate_blocking(size)
        file.sync_blocking()


def set_length(image: ProtocolNode, size: int) -> None:
    """Make the image larger, durably; the bits for what is new are durable already."""
    image.truncate_blocking(size)
    image.sync_blocking()

"""The order in which metadata reaches the disk. Blocking calls, each run in one thread hop.

    1  the data, which is already written                           sync
    2  new L2 tables                                                sync
    3  L2 entries of linked tables, L1 entries of new tables        sync

So data are durable before a map points to them, a new table before what points to it. A crash between
any two writes leaves the map of before or of after, and leaked clusters at worst. The need-check bit, which
is durable before the first cluster is allocated, makes whoever opens the image after a crash look for them.
The format asks for it before tables of an image without backing file change; with one it is set as well, for
a stream leaks most.
"""

from collections.abc import Iterable

from blockd.block.file_events import FileEvent
from blockd.block.node import ProtocolNode
from blockd.formats.qed.allocator import Run
from blockd.formats.qed.header import HeaderChange
from blockd.formats.qed.mapping import MappingChanges, TableWrite, pack_entries


def write_tables(file: ProtocolNode, writes: Iterable[TableWrite], event: FileEvent) -> None:
    """Write tables, in no order that a crash would keep."""
    for write in writes:
        file.announce(event)
        file.write_blocking(write.host_offset, pack_entries(write.entries))


def write_checkpoint(file: ProtocolNode, maps: MappingChanges) -> None:
    """Make all data written so far, and the map changes that belong to it, durable."""
    file.sync_blocking()
    if maps.new_tables:
        write_tables(file, maps.new_tables, FileEvent.L2_ALLOC_WRITE)
        file.sync_blocking()
    if maps.updates or maps.l1_entries:
        write_tables(file, maps.updates, FileEvent.L2_UPDATE)
        write_tables(file, maps.l1_entries, FileEvent.L1_UPDATE)
        file.sync_blocking()


def punch(file: ProtocolNode, runs: Iterable[Run], cluster_size: int) -> None:
    """Give the space of free clusters back to the filesystem."""
    for run in runs:
        file.punch_hole_blocking(run.host_offset, run.cluster_count * cluster_size)


def write_header_field(file: ProtocolNode, field_offset: int, field: bytes) -> None:
    """Change a header field, durably."""
    file.write_blocking(field_offset, field)
    file.sync_blocking()


def write_last_field(file: ProtocolNode, field_offset: int, field: bytes) -> None:
    """Change a header field, durably, that tells of all that was written before."""
    file.sync_blocking()
    write_header_field(file, field_offset, field)


def write_header_change(file: ProtocolNode, change: HeaderChange) -> None:
    """Record another backing file; the last step is one sector."""
    if change.name:
        file.write_blocking(change.header.backing_offset, change.name)
        file.sync_blocking()
    file.write_blocking(0, change.first_sector)
    file.sync_blocking()

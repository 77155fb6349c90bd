"""The order in which metadata reaches the disk. Blocking calls, each run in one thread hop.

    1  refcount blocks, beside the data that is already written     sync
    2  refcount table entries of new blocks, and new L2 tables      sync
    3  L2 entries of linked tables, L1 entries of new tables        sync

So data and refcounts are durable before a map points to them, a new table before what points to
it. Refcounts that fall are written by a later call, when the maps without the clusters are durable;
nothing waits for them to be durable themselves: until then they are leaks, and a cluster that is used
again gets its refcount by step 1 before a map names it. A crash between any two writes leaves the maps
of before or of after, and leaked clusters at worst.
"""

import contextlib
from collections.abc import Iterable

from blockd.block.file_events import FileEvent
from blockd.block.node import ProtocolNode
from blockd.errors import StorageError
from blockd.formats.qcow2.header import L1_FIELDS, REFCOUNT_TABLE_FIELDS
from blockd.formats.qcow2.mapping import MappingChanges, TableWrite
from blockd.formats.qcow2.refcount_changes import RefcountChanges
from blockd.formats.qcow2.runs import Run
from blockd.units import SECTOR_SIZE


def write_tables(file: ProtocolNode, writes: Iterable[TableWrite], event: FileEvent) -> None:
    """Write tables, in no order that a crash would keep."""
    for write in writes:
        file.announce(event)
        file.write_blocking(write.host_offset, write.pack(write.entries))


def write_refcounts(file: ProtocolNode, refcounts: RefcountChanges) -> None:
    """Write refcounts, most of which have fallen; a new block is durable before its table entry."""
    write_tables(file, refcounts.blocks, FileEvent.REFBLOCK_UPDATE)
    if refcounts.table_entries:
        file.sync_blocking()
        write_tables(file, refcounts.table_entries, FileEvent.REFBLOCK_ALLOC_HOOKUP)


def write_checkpoint(file: ProtocolNode, refcounts: RefcountChanges, maps: MappingChanges) -> None:
    """Make all data written so far, and the metadata changes that belong to it, durable."""
    if refcounts.blocks:
        file.require_unchanged_blocking()  # before anything is written; a sync looks, too
        write_tables(file, refcounts.blocks, FileEvent.REFBLOCK_UPDATE)
    file.sync_blocking()
    if refcounts.table_entries or maps.new_tables:
        write_tables(file, refcounts.table_entries, FileEvent.REFBLOCK_ALLOC_HOOKUP)
        write_tables(file, maps.new_tables, FileEvent.L2_ALLOC_WRITE)
        file.sync_blocking()
    if maps.updates or maps.l1_entries:
        write_tables(file, maps.updates, FileEvent.L2_UPDATE)
        write_tables(file, maps.l1_entries, FileEvent.L1_UPDATE)
        file.sync_blocking()


def lengthen(file: ProtocolNode, offset: int, length: int) -> None:
    """Let the file reach the end of a range, durably, whatever is written there meanwhile; best effort."""
    with contextlib.suppress(StorageError):
        file.allocate_blocking(offset, length)
    file.sync_blocking()


def punch(file: ProtocolNode, runs: Iterable[Run], cluster_size: int) -> None:
    """Give the space of free clusters back to the filesystem."""
    for run in runs:
        file.punch_hole_blocking(run.host_offset, run.cluster_count * cluster_size)


def move_l1(file: ProtocolNode, write: TableWrite, field: bytes) -> None:
    """Write the L1 table to its new place, then point the header at it."""
    write_tables(file, [write], FileEvent.L1_GROW_WRITE_TABLE)
    file.sync_blocking()
    file.announce(FileEvent.L1_GROW_ACTIVATE_TABLE)
    write_header_field(file, L1_FIELDS, field)


def move_refcount_table(file: ProtocolNode, writes: Iterable[TableWrite], field: bytes) -> None:
    """Write the refcount table to its new place, with new blocks, then point the header at it."""
    write_tables(file, writes, FileEvent.REFBLOCK_ALLOC_WRITE_TABLE)
    file.sync_blocking()
    file.announce(FileEvent.REFBLOCK_ALLOC_SWITCH_TABLE)
    write_header_field(file, REFCOUNT_TABLE_FIELDS, field)


def write_header_field(file: ProtocolNode, field_offset: int, field: bytes) -> None:
    """Change a header field that lies within one sector, durably."""
    file.write_blocking(field_offset, field)
    file.sync_blocking()


def write_last_field(file: ProtocolNode, field_offset: int, field: bytes) -> None:
    """Change a header field, durably, that tells of all that was written before."""
    file.sync_blocking()
    write_header_field(file, field_offset, field)


def write_header_change(file: ProtocolNode, prepared: bytes, final: bytes) -> None:
    """Replace the header cluster; the last step is one sector."""
    if prepared[SECTOR_SIZE:]:
        file.write_blocking(SECTOR_SIZE, prepared[SECTOR_SIZE:])
        file.sync_blocking()
    changed_beyond = final[SECTOR_SIZE:] != prepared[SECTOR_SIZE:]
    file.write_blocking(0, final if changed_beyond else final[:SECTOR_SIZE])
    file.sync_blocking()

"""Internal snapshots of an image that is written: where their tables are, so that they stay as they are.

A snapshot has an L1 table of its own. It shares L2 tables and clusters with the active map, and with other
snapshots; what is shared has a refcount above 1 and is not COPIED, so that writing goes around it.

A row of the snapshot table (big endian), padded to 8 bytes:

      0 L1 offset u64        8 L1 entry count u32   12 id length u16      14 name length u16
     16 time and VM state (20 bytes)                36 extra data length u32
     40 extra data: VM state size u64, disk size u64 (always there in version 3), …; then id, name

Source: qcow2 specification, "Snapshots".
"""

import struct
from typing import NamedTuple

from blockd.block.node import ProtocolNode
from blockd.errors import ImageError
from blockd.formats.early_read import read_early
from blockd.formats.qcow2.header import L1_SIZE_MAX, Header
from blockd.units import KIB, MIB, align_up

SNAPSHOT_COUNT_MAX = 65536
# What rows may take on average; QEMU's are below 2 KiB, names and all.
ROW_SIZE_MAX = 4 * KIB
# Of all snapshots together: memory holds a number for each cluster of them.
L1_TOTAL_SIZE_MAX = 64 * MIB

_ROW = struct.Struct(">QIHH20xI")
_DISK_SIZE = struct.Struct(">8xQ")


class Snapshot(NamedTuple):
    """What an internal snapshot says about itself; no disk size: as large as the disk is now."""

    l1_offset: int
    l1_entry_count: int
    disk_size: int | None


class SnapshotTable(NamedTuple):
    """All snapshots, and how many bytes the table of them has."""

    snapshots: list[Snapshot]
    length: int

    def clusters(self, header: Header) -> set[int]:
        """The host offsets of all clusters that the table and the L1 tables take."""
        step = header.cluster_size
        found = set(range(header.snapshots_offset, header.snapshots_offset + self.length, step))
        for snapshot in self.snapshots:
            found.update(range(snapshot.l1_offset, snapshot.l1_offset + snapshot.l1_entry_count * 8, step))
        return found


NO_SNAPSHOTS = SnapshotTable([], 0)


async def load(file: ProtocolNode, header: Header) -> SnapshotTable:
    """Read the snapshot table.

    Raises:   ImageError: it is cut off, or names an L1 table that cannot be.
    """
    count, start = header.snapshot_count, header.snapshots_offset
    if not count:
        return NO_SNAPSHOTS
    if count > SNAPSHOT_COUNT_MAX:
        raise ImageError(f"'{file.filename}': {count} snapshots are more than {SNAPSHOT_COUNT_MAX}")
    length = max(0, min(file.size - start, count * ROW_SIZE_MAX, 64 * MIB))
    data = bytes(await read_early(file, start, length)) if length else b""
    snapshots: list[Snapshot] = []
    offset = total = 0
    for number in range(count):
        end = _end_of_row(data, offset)
        if end is None:
            raise ImageError(f"'{file.filename}': the snapshot table ends after {number} of {count} rows")
        snapshot = _parse_row(data, offset)
        total += snapshot.l1_entry_count * 8
        _require_l1(file, header, number, snapshot, total)
        snapshots.append(snapshot)
        offset = end
    return SnapshotTable(snapshots, offset)


def _end_of_row(data: bytes, offset: int) -> int | None:
    """Where the next row begins, if the one at `offset` is all there."""
    if offset + _ROW.size > len(data):
        return None
    _, _, id_length, name_length, extra_length = _ROW.unpack_from(data, offset)
    end = offset + _ROW.size + extra_length + id_length + name_length
    return align_up(end, 8) if end <= len(data) else None


def _parse_row(data: bytes, offset: int) -> Snapshot:
    l1_offset, l1_entry_count, _, _, extra_length = _ROW.unpack_from(data, offset)
    has_disk_size = extra_length >= _DISK_SIZE.size
    disk_size = _DISK_SIZE.unpack_from(data, offset + _ROW.size)[0] if has_disk_size else None
    return Snapshot(l1_offset, l1_entry_count, disk_size)


def _require_l1(file: ProtocolNode, header: Header, number: int, snapshot: Snapshot, total: int) -> None:
    length = snapshot.l1_entry_count * 8
    is_inside = not snapshot.l1_offset % header.cluster_size and snapshot.l1_offset + length <= file.size
    if not is_inside or length > L1_SIZE_MAX or total > L1_TOTAL_SIZE_MAX:
        raise ImageError(
            f"'{file.filename}': snapshot {number} has an L1 table of {snapshot.l1_entry_count} entries at "
            f"{snapshot.l1_offset:#x}, which cannot be"
        )

"""What a qcow2 image says about itself: its features, internal snapshots and persistent bitmaps.

Only the header and the two directories are read. What is too large or runs out of the file is left
out of the lists: `check` is what says that something is wrong.

A snapshot (big endian):  0 L1 offset u64 · 8 L1 entries u32 · 12 id length u16 · 14 name length u16 ·
16 seconds u32 · 20 nanoseconds u32 · 24 guest clock in ns u64 · 32 VM state size u32 · 36 extra length u32 ·
40 extra: VM state size u64, disk size u64, instruction count u64 · id · name · padding to 8
A bitmap:  0 table offset u64 · 8 table entries u32 · 12 flags u32 · 16 type u8 · 17 granularity bits u8 ·
18 name length u16 · 20 extra length u32 · extra · name · padding to 8

Source:   qcow2 specification, "Snapshots" and "Bitmaps".
"""

import struct
from collections.abc import Iterator
from typing import NamedTuple

from blockd.aio import in_thread
from blockd.block.node import ProtocolNode
from blockd.formats.qcow2 import header as qcow2_header
from blockd.formats.qcow2.check_tables import BITMAP_COUNT_MAX, SNAPSHOT_COUNT_MAX, read_header
from blockd.formats.qcow2.header import Header
from blockd.units import align_up

# Longer extra data is of no version that is known; names are shorter than 64 KiB by their field.
EXTRA_LENGTH_MAX = 1024

_SNAPSHOT = struct.Struct(">QIHHIIQII")
_SNAPSHOT_EXTRA = struct.Struct(">QQQ")
_BITMAPS = struct.Struct(">IIQQ")
_BITMAP = struct.Struct(">QIIBBHI")
_BITMAP_FLAGS = ("in-use", "auto")
_NS = 10**9
_NO_ICOUNT = (1 << 64) - 1


class Snapshot(NamedTuple):
    """An internal snapshot."""

    id: str
    name: str
    vm_state_size: int
    date_sec: int
    date_nsec: int
    vm_clock_ns: int
    icount: int | None = None

    def as_json(self) -> dict[str, object]:
        """As QEMU's SnapshotInfo."""
        clock_sec, clock_nsec = divmod(self.vm_clock_ns, _NS)
        told: dict[str, object] = {
            "id": self.id,
            "name": self.name,
            "vm-state-size": self.vm_state_size,
            "date-sec": self.date_sec,
            "date-nsec": self.date_nsec,
            "vm-clock-sec": clock_sec,
            "vm-clock-nsec": clock_nsec,
        }
        return told if self.icount is None else {**told, "icount": self.icount}


class Bitmap(NamedTuple):
    """A persistent dirty bitmap."""

    name: str
    granularity: int
    flags: tuple[str, ...]

    def as_json(self) -> dict[str, object]:
        """As QEMU's Qcow2BitmapInfo."""
        return {"name": self.name, "granularity": self.granularity, "flags": list(self.flags)}


class Qcow2Info(NamedTuple):
    """All of it."""

    header: Header
    snapshots: tuple[Snapshot, ...] = ()
    bitmaps: tuple[Bitmap, ...] = ()

    @property
    def is_dirty(self) -> bool:
        return bool(self.header.incompatible & qcow2_header.INCOMPATIBLE_DIRTY)

    @property
    def is_corrupt(self) -> bool:
        return bool(self.header.incompatible & qcow2_header.INCOMPATIBLE_CORRUPT)

    def image_info(self) -> dict[str, object]:
        """The members that QEMU's ImageInfo has for this format."""
        told: dict[str, object] = {
            "cluster-size": self.header.cluster_size,
            "dirty-flag": self.is_dirty,
            "format-specific": {"type": "qcow2", "data": self.format_specific()},
        }
        if self.snapshots:
            told["snapshots"] = [snapshot.as_json() for snapshot in self.snapshots]
        return told

    def format_specific(self) -> dict[str, object]:
        """What stands under "format-specific" as "data" in QEMU's ImageInfo."""
        header = self.header
        told: dict[str, object] = {
            "compat": "1.1" if header.version > 2 else "0.10",
            "compression-type": qcow2_header.compression_name(header.compression_type),
            "refcount-bits": 1 << header.refcount_order,
        }
        if header.version > 2:
            told |= {
                "lazy-refcounts": bool(header.compatible & qcow2_header.COMPATIBLE_LAZY_REFCOUNTS),
                "corrupt": self.is_corrupt,
                "extended-l2": header.has_extended_l2,
            }
        if self.bitmaps:
            told["bitmaps"] = [bitmap.as_json() for bitmap in self.bitmaps]
        if header.incompatible & qcow2_header.INCOMPATIBLE_DATA_FILE:
            name = header.extension(qcow2_header.EXTENSION_DATA_FILE)
            if name is not None:
                told["data-file"] = name.decode("utf-8", "surrogateescape")
            told["data-file-raw"] = bool(header.autoclear & qcow2_header.AUTOCLEAR_DATA_FILE_RAW)
        return told


async def info(file: ProtocolNode) -> Qcow2Info:
    """Read what the image in `file` says about itself, also when blockd could not open it.

    Raises:   ImageError: it is no qcow2 image, or its header is wrong.
    """
    return await in_thread(info_blocking, file)


def info_blocking(file: ProtocolNode, header: Header | None = None) -> Qcow2Info:
    """Like `info`; with the header of an image that is open already."""
    header = header or read_header(file)
    return Qcow2Info(header, tuple(_snapshots(file, header)), tuple(_bitmaps(file, header)))


def _snapshots(file: ProtocolNode, header: Header) -> Iterator[Snapshot]:
    offset = header.snapshots_offset
    for _ in range(min(header.snapshot_count, SNAPSHOT_COUNT_MAX)):
        fixed = _read(file, offset, _SNAPSHOT.size)
        if fixed is None:
            return
        _, _, id_length, name_length, *stamps, vm_state_size, extra_length = _SNAPSHOT.unpack(fixed)
        length = extra_length + id_length + name_length
        rest = _read(file, offset + _SNAPSHOT.size, length) if extra_length <= EXTRA_LENGTH_MAX else None
        if rest is None:
            return
        extra = rest[:extra_length].ljust(_SNAPSHOT_EXTRA.size, b"\0")
        large_size, _, icount = _SNAPSHOT_EXTRA.unpack_from(extra)
        date_sec, date_nsec, clock = stamps
        yield Snapshot(
            id=_text(rest[extra_length : extra_length + id_length]),
            name=_text(rest[extra_length + id_length :]),
            vm_state_size=large_size if extra_length >= 8 else vm_state_size,
            date_sec=date_sec,
            date_nsec=date_nsec,
            vm_clock_ns=clock,
            icount=icount if extra_length >= _SNAPSHOT_EXTRA.size and icount != _NO_ICOUNT else None,
        )
        offset += align_up(_SNAPSHOT.size + length, 8)


def _bitmaps(file: ProtocolNode, header: Header) -> Iterator[Bitmap]:
    data = header.extension(qcow2_header.EXTENSION_BITMAPS)
    if data is None or len(data) != _BITMAPS.size or not header.autoclear & qcow2_header.AUTOCLEAR_BITMAPS:
        return  # none, or somebody has written to the image without keeping them up to date
    count, _, _, offset = _BITMAPS.unpack(data)
    for _ in range(min(count, BITMAP_COUNT_MAX)):
        fixed = _read(file, offset, _BITMAP.size)
        if fixed is None:
            return
        _, _, flags, _, granularity_bits, name_length, extra_length = _BITMAP.unpack(fixed)
        length = extra_length + name_length
        rest = _read(file, offset + _BITMAP.size, length) if extra_length <= EXTRA_LENGTH_MAX else None
        if rest is None or granularity_bits > 63:
            return
        names = tuple(name for bit, name in enumerate(_BITMAP_FLAGS) if flags & 1 << bit)
        yield Bitmap(_text(rest[extra_length:]), 1 << granularity_bits, names)
        offset += align_up(_BITMAP.size + length, 8)


def _read(file: ProtocolNode, offset: int, length: int) -> bytes | None:
    """Bytes of the file; None when they are not all inside it."""
    if not 0 < offset <= offset + length <= file.size:
        return None
    buffer = bytearray(length)
    file.readinto_blocking(offset, memoryview(buffer))
    return bytes(buffer)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "replace")

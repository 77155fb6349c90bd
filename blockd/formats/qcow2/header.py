"""The qcow2 header cluster: parse, pack, and change its backing file in one atomic step. No I/O.

All fields are big endian. Offsets and sizes in bytes:

      0 magic "QFI\\xfb"    4 version (2, 3)      8 backing name offset  16 backing name size
     20 cluster_bits       24 virtual size       32 encryption          36 L1 entry count
     40 L1 offset          48 refcount table offset                     56 refcount table clusters
     60 snapshot count     64 snapshot table offset
    version 3 only:
     72 incompatible       80 compatible         88 autoclear feature bits
     96 refcount_order    100 header length     104 compression type (when header length > 104)

Header extensions follow (type u32, length u32, data padded to 8), closed by type 0; the backing
name stands somewhere after them in the first cluster.

Source: qcow2 specification, "Header" and "Header extensions".
"""

import struct
from dataclasses import dataclass, replace
from typing import NamedTuple

from blockd.errors import ImageError, RequestError
from blockd.filenames import RECORDED_LENGTH_MAX, pack_recorded, parse_recorded
from blockd.units import MIB, SECTOR_SIZE, align_up

MAGIC = b"QFI\xfb"
CLUSTER_BITS_MIN, CLUSTER_BITS_MAX = 9, 21
L1_SIZE_MAX = 32 * MIB
# Where each is stays in memory. Met only with the smallest clusters: 32 GiB of data in clusters of 512 bytes.
L2_TABLE_COUNT_MAX = 1 << 20
REFCOUNT_TABLE_SIZE_MAX = 8 * MIB
REFCOUNT_ORDER_MAX = 6
OFFSET_MAX = (1 << 63) - 1
HEADER_EXTENSION_COUNT_MAX = 64

# The first version whose map can say that a cluster is zeroes.
ZERO_VERSION = 3

INCOMPATIBLE_DIRTY = 1 << 0
INCOMPATIBLE_CORRUPT = 1 << 1
INCOMPATIBLE_DATA_FILE = 1 << 2
INCOMPATIBLE_COMPRESSION = 1 << 3
INCOMPATIBLE_EXTENDED_L2 = 1 << 4
_INCOMPATIBLE_NAMES = {
    INCOMPATIBLE_DATA_FILE: "external data file",
}
_INCOMPATIBLE_KNOWN = (
    INCOMPATIBLE_DIRTY | INCOMPATIBLE_CORRUPT | INCOMPATIBLE_COMPRESSION | INCOMPATIBLE_EXTENDED_L2
)

COMPATIBLE_LAZY_REFCOUNTS = 1 << 0

AUTOCLEAR_BITMAPS = 1 << 0
AUTOCLEAR_DATA_FILE_RAW = 1 << 1
# Our own, far from those that the specification gives out: the image has been written to and not been closed,
# so that clusters may be leaked. Any other program that writes to it clears the bit, as it does not know it.
AUTOCLEAR_IN_USE = 1 << 63

COMPRESSION_TYPES = ("zlib", "zstd")
COMPRESSION_ZSTD = COMPRESSION_TYPES.index("zstd")

EXTENSION_END = 0
EXTENSION_BITMAPS = 0x23852875
EXTENSION_DATA_FILE = 0x44415441
EXTENSION_BACKING_FORMAT = 0xE2792ACA
EXTENSION_FEATURE_NAMES = 0x6803F857

# Where single fields are rewritten in place; each lies inside the first sector, so that is atomic.
SIZE_FIELD = 24
L1_FIELDS = 36  # entry count u32, offset u64
REFCOUNT_TABLE_FIELDS = 48  # offset u64, clusters u32
INCOMPATIBLE_FIELD = 72
AUTOCLEAR_FIELD = 88

_V2 = struct.Struct(">4sIQIIQIIQQIIQ")
_V3 = struct.Struct(">QQQII")
_V3_LENGTH = 104
# What new images have: version 3 with the compression type byte and its padding, or version 2.
HEADER_LENGTH = 112
HEADER_LENGTH_V2 = _V2.size

L2_ENTRY_SIZE = 8
# The second half is the bitmap of the subclusters, which are at least a sector each.
EXTENDED_L2_ENTRY_SIZE = 16
SUBCLUSTER_COUNT = 32


class Extension(NamedTuple):
    """One header extension as stored."""

    type: int
    data: bytes


@dataclass(frozen=True)
class Header:
    """What the header cluster says, checked against the bounds that need no look at the file."""

    version: int
    cluster_bits: int
    size: int
    l1_entry_count: int
    l1_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    refcount_order: int = 4
    snapshot_count: int = 0
    snapshots_offset: int = 0
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    compression_type: int = 0
    header_length: int = HEADER_LENGTH
    backing_filename: str | None = None
    extensions: tuple[Extension, ...] = ()

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    @property
    def has_extended_l2(self) -> bool:
        return bool(self.incompatible & INCOMPATIBLE_EXTENDED_L2)

    @property
    def subcluster_size(self) -> int:
        """What is allocated at a time: a part of a cluster with extended L2 entries, else a whole one."""
        return self.cluster_size // SUBCLUSTER_COUNT if self.has_extended_l2 else self.cluster_size

    @property
    def l2_entry_size(self) -> int:
        return EXTENDED_L2_ENTRY_SIZE if self.has_extended_l2 else L2_ENTRY_SIZE

    @property
    def backing_format(self) -> str | None:
        data = self.extension(EXTENSION_BACKING_FORMAT)
        return None if data is None else data.decode("utf-8", "replace")

    def extension(self, kind: int) -> bytes | None:
        """The data of the first header extension of a type; None if there is none."""
        return next((entry.data for entry in self.extensions if entry.type == kind), None)


def probe(first_bytes: bytes) -> bool:
    """Whether a file that starts like this is a qcow2 image."""
    return first_bytes.startswith(MAGIC)


def l1_entry_count_for(size: int, cluster_bits: int, l2_entry_size: int = L2_ENTRY_SIZE) -> int:
    """How many L1 entries a disk of `size` bytes needs."""
    l2_coverage = (1 << cluster_bits) // l2_entry_size << cluster_bits
    return -(-size // l2_coverage)


def compression_name(compression_type: int) -> str:
    """What a compression type is called, also one of a later version."""
    known = compression_type < len(COMPRESSION_TYPES)
    return COMPRESSION_TYPES[compression_type] if known else f"unknown ({compression_type})"


# -- parsing ----------------------------------------------------------------------------------


def cluster_size_of(data: bytes) -> int:
    """What the start of an image says of the size of its clusters, in bytes; 0: nothing that could be."""
    if len(data) < _V2.size:
        return 0
    cluster_bits: int = _V2.unpack_from(data)[4]
    return 1 << cluster_bits if cluster_bits <= CLUSTER_BITS_MAX else 0


def parse(data: bytes, name: str, *, supported_only: bool = True) -> Header:
    """Parse the start of an image: its first cluster, or the whole file when it is smaller.

    `supported_only`: refuse what blockd cannot read, by name; otherwise only what breaks the format.

    Raises:   ImageError: naming `name` and the field that is wrong.
    """
    if len(data) < _V2.size or not probe(data):
        raise ImageError(f"'{name}' is not a qcow2 image")
    _, version, backing_offset, backing_length, cluster_bits, size, encryption, *tables = _V2.unpack_from(
        data
    )
    l1_entry_count, l1_offset, table_offset, table_clusters, snapshot_count, snapshots_offset = tables
    if version not in (2, 3):
        raise ImageError(f"'{name}': qcow2 version {version} is not supported")
    if encryption:
        raise ImageError(f"'{name}': encrypted images are not supported")
    if not CLUSTER_BITS_MIN <= cluster_bits <= CLUSTER_BITS_MAX:
        raise ImageError(f"'{name}': cluster_bits {cluster_bits} is outside 9..21")
    header = Header(
        version=version,
        cluster_bits=cluster_bits,
        size=size,
        l1_entry_count=l1_entry_count,
        l1_offset=l1_offset,
        refcount_table_offset=table_offset,
        refcount_table_clusters=table_clusters,
        snapshot_count=snapshot_count,
        snapshots_offset=snapshots_offset,
        header_length=_V2.size,
    )
    if version == 3:
        header = _with_version_3_fields(header, data, name)
    backing_filename = _parse_backing(data, header, backing_offset, backing_length, name)
    extensions = _parse_extensions(data, header, backing_offset, name)
    header = replace(header, backing_filename=backing_filename, extensions=extensions)
    _check_bounds(header, name)
    if supported_only:
        _check_supported(header, name)
    return header


def _with_version_3_fields(header: Header, data: bytes, name: str) -> Header:
    if len(data) < _V3_LENGTH:
        raise ImageError(f"'{name}': the header is cut short at {len(data)} bytes")
    incompatible, compatible, autoclear, refcount_order, header_length = _V3.unpack_from(data, _V2.size)
    if header_length < _V3_LENGTH or header_length > min(len(data), header.cluster_size) or header_length % 8:
        raise ImageError(f"'{name}': header length {header_length} is invalid")
    compression_type = data[_V3_LENGTH] if header_length > _V3_LENGTH else 0
    if bool(incompatible & INCOMPATIBLE_COMPRESSION) != bool(compression_type):
        raise ImageError(
            f"'{name}': compression type {compression_type} contradicts the incompatible features"
        )
    if compression_type > COMPRESSION_ZSTD:
        raise ImageError(f"'{name}': compression type {compression_type} is not supported")
    return replace(
        header,
        incompatible=incompatible,
        compatible=compatible,
        autoclear=autoclear,
        refcount_order=refcount_order,
        header_length=header_length,
        compression_type=compression_type,
    )


def _parse_extensions(data: bytes, header: Header, backing_offset: int, name: str) -> tuple[Extension, ...]:
    """Read the extension list, which ends at its end mark, the backing name or the cluster's end.

    An extension that the backing name cuts off is refused, as QEMU does, be it the end mark.
    """
    end = backing_offset or header.cluster_size
    offset = header.header_length
    found: list[Extension] = []
    while offset < end:
        kind, length = struct.unpack(">II", data[offset : offset + 8].ljust(8, b"\0"))
        if length > end - offset - 8:
            raise ImageError(
                f"'{name}': header extension 0x{kind:08x} of {length} bytes runs past the header"
            )
        if kind == EXTENSION_END:
            break
        if len(found) == HEADER_EXTENSION_COUNT_MAX:
            raise ImageError(f"'{name}': more than {HEADER_EXTENSION_COUNT_MAX} header extensions")
        found.append(Extension(kind, data[offset + 8 : offset + 8 + length]))
        offset += 8 + align_up(length, 8)
    return tuple(found)


def _parse_backing(data: bytes, header: Header, offset: int, length: int, name: str) -> str | None:
    if not offset:
        return None
    if length > RECORDED_LENGTH_MAX:
        raise ImageError(f"'{name}': the backing file name is {length} bytes long, more than 1023")
    if offset < header.header_length or offset + length > min(len(data), header.cluster_size):
        raise ImageError(f"'{name}': the backing file name at {offset} is outside the header cluster")
    return parse_recorded(data[offset : offset + length]) or None


def _check_bounds(header: Header, name: str) -> None:
    if header.refcount_order > REFCOUNT_ORDER_MAX:
        raise ImageError(f"'{name}': refcount_order {header.refcount_order} is larger than 6")
    if header.subcluster_size < SECTOR_SIZE:
        raise ImageError(f"'{name}': clusters of {header.cluster_size} bytes are too small for subclusters")
    if header.l1_entry_count * 8 > L1_SIZE_MAX:
        raise ImageError(f"'{name}': an L1 table of {header.l1_entry_count} entries is larger than 32 MiB")
    if header.l1_entry_count < l1_entry_count_for(header.size, header.cluster_bits, header.l2_entry_size):
        raise ImageError(
            f"'{name}': the L1 table of {header.l1_entry_count} entries is too small for the disk size"
        )
    if header.refcount_table_clusters << header.cluster_bits > REFCOUNT_TABLE_SIZE_MAX:
        raise ImageError(f"'{name}': the refcount table is larger than 8 MiB")
    if not header.refcount_table_clusters:
        raise ImageError(f"'{name}': the image has no refcount table")
    for field, offset, needed in (
        ("L1 table", header.l1_offset, header.l1_entry_count > 0),
        ("refcount table", header.refcount_table_offset, True),
        ("snapshot table", header.snapshots_offset, header.snapshot_count > 0),
    ):
        if offset > OFFSET_MAX:
            raise ImageError(f"'{name}': the {field} offset {offset:#x} is beyond the end of any file")
        if offset % header.cluster_size:
            raise ImageError(f"'{name}': the {field} offset {offset:#x} is not cluster aligned")
        if needed and offset < header.cluster_size:
            raise ImageError(f"'{name}': the {field} offset {offset:#x} overlaps the header")


def _check_supported(header: Header, name: str) -> None:
    unknown = header.incompatible & ~_INCOMPATIBLE_KNOWN
    if not unknown:
        return
    bit = unknown & -unknown
    what = _INCOMPATIBLE_NAMES.get(bit, _feature_name(header, bit.bit_length() - 1))
    raise ImageError(f"'{name}' uses a qcow2 feature that is not supported: {what}")


def _feature_name(header: Header, bit: int) -> str:
    """The name of an incompatible feature bit as the image itself gives it."""
    for extension in header.extensions:
        if extension.type != EXTENSION_FEATURE_NAMES:
            continue
        for start in range(0, len(extension.data) - 47, 48):
            if extension.data[start : start + 2] == bytes((0, bit)):
                text = extension.data[start + 2 : start + 48].rstrip(b"\0").decode("ascii", "replace")
                return "".join(letter if letter.isprintable() else "?" for letter in text)
    return f"unknown incompatible feature bit {bit}"


# -- packing ----------------------------------------------------------------------------------


def pack(header: Header) -> bytes:
    """Lay out a new header cluster with the extensions and then the backing name.

    Raises:   RequestError: the backing file name does not fit.
    """
    area = _pack_fields(header, 0, 0) + _pack_extensions(header.extensions)
    name = _packed_name(header.backing_filename)
    if len(area) + len(name) > header.cluster_size:
        raise RequestError(f"The backing file name is too long for clusters of {header.cluster_size} bytes")
    offset = len(area) if name else 0
    area = _pack_fields(header, offset, len(name)) + area[header.header_length :]
    return (area + name).ljust(header.cluster_size, b"\0")


def _pack_fields(header: Header, backing_offset: int, backing_length: int) -> bytes:
    fields = _V2.pack(
        MAGIC,
        header.version,
        backing_offset,
        backing_length,
        header.cluster_bits,
        header.size,
        0,
        header.l1_entry_count,
        header.l1_offset,
        header.refcount_table_offset,
        header.refcount_table_clusters,
        header.snapshot_count,
        header.snapshots_offset,
    )
    if header.version == 2:
        return fields
    fields += _V3.pack(
        header.incompatible, header.compatible, header.autoclear, header.refcount_order, header.header_length
    )
    if header.header_length > _V3_LENGTH:
        fields += bytes((header.compression_type,))
    return fields.ljust(header.header_length, b"\0")


def _pack_extensions(extensions: tuple[Extension, ...]) -> bytes:
    parts = [
        struct.pack(">II", extension.type, len(extension.data))
        + extension.data.ljust(align_up(len(extension.data), 8), b"\0")
        for extension in extensions
    ]
    return b"".join(parts) + struct.pack(">II", EXTENSION_END, 0)


def _packed_name(filename: str | None) -> bytes:
    return pack_recorded(filename) if filename else b""


# -- another backing file -----------------------------------------------------------------------


class HeaderChange(NamedTuple):
    """New contents of the header cluster in two steps, each durable before the next.

    `prepared` differs from the present contents only in bytes that nothing refers to yet; `final`
    differs from `prepared` only in the first sector, so a torn write leaves the one or the other.
    """

    header: Header
    prepared: bytes
    final: bytes


def change_backing(
    current: bytes, header: Header, filename: str | None, backing_format: str | None
) -> HeaderChange:
    """Plan how the header cluster `current` gets another backing file.

    Raises:   RequestError: the name does not fit into the header cluster.
    """
    extensions = _changed_extensions(header, backing_format if filename else None)
    name = _packed_name(filename)
    length = header.header_length + len(_pack_extensions(extensions))
    offset = _place_name(current, header, length, len(name)) if name else 0
    new = replace(header, extensions=extensions, backing_filename=filename or None)
    fields = _pack_fields(new, offset, len(name))[:HEADER_LENGTH]
    first = fields + current[len(fields) :]  # with the fields of later versions as they are
    first = first[: header.header_length] + _pack_extensions(extensions) + first[length:]
    prepared = current[:offset] + name + current[offset + len(name) :] if offset >= SECTOR_SIZE else current
    final = first[:offset] + name + first[offset + len(name) :] if name else first
    return HeaderChange(new, prepared, final)


def _changed_extensions(header: Header, backing_format: str | None) -> tuple[Extension, ...]:
    """The extensions with another backing format, within the first sector whenever that can be.

    The table of feature names only explains error texts; it goes when it would push the list past
    the one sector that can be replaced atomically.
    """
    kept = tuple(entry for entry in header.extensions if entry.type != EXTENSION_BACKING_FORMAT)
    added = (Extension(EXTENSION_BACKING_FORMAT, backing_format.encode()),) if backing_format else ()
    extensions = added + kept
    if header.header_length + len(_pack_extensions(extensions)) > SECTOR_SIZE:
        extensions = tuple(entry for entry in extensions if entry.type != EXTENSION_FEATURE_NAMES)
    return extensions


def _place_name(current: bytes, header: Header, extensions_end: int, length: int) -> int:
    """Find room for a backing name that neither the present header nor the new one uses otherwise."""
    if extensions_end + length <= SECTOR_SIZE:
        return extensions_end
    old_offset, old_length = struct.unpack_from(">QI", current, 8)
    old_end = header.header_length + len(_pack_extensions(header.extensions))
    free = align_up(max(SECTOR_SIZE, extensions_end, old_end), 8)
    if old_offset and free < old_offset + old_length and free + length > old_offset:
        free = align_up(old_offset + old_length, 8)
    if free + length > header.cluster_size:
        raise RequestError(f"The backing file name is too long for clusters of {header.cluster_size} bytes")
    return free

"""The QED header: parsing with bounds, packing, and replacing the backing file in one sector.

    offset  width   field                       (all little endian)
      0      4      magic "QED\\0"
      4      4      cluster size                bytes, a power of two, 4 KiB to 64 MiB
      8      4      table size                  clusters, a power of two, 1 to 16: of every table
     12      4      header size                 clusters
     16      8      features                    an unknown bit: refuse
     24      8      compatible features         unknown bits are ignored
     32      8      autoclear features          unknown bits are cleared when the image is written
     40      8      L1 table offset             bytes, cluster aligned
     48      8      disk size                   bytes, whole sectors
     56      4      backing file name offset    bytes; both mean something with feature bit 0 only
     60      4      backing file name length    bytes, not terminated, inside the header's clusters

Every field lies in the first sector, so that a change of any of them is atomic.

Source:   QED specification, "Header".
"""

import struct
from dataclasses import dataclass, replace
from typing import NamedTuple

from blockd.errors import ErrorKind, ImageError, RequestError
from blockd.filenames import RECORDED_LENGTH_MAX, pack_recorded, parse_recorded
from blockd.units import KIB, MIB, SECTOR_SIZE

MAGIC = b"QED\0"
CLUSTER_SIZE_MIN, CLUSTER_SIZE_MAX = 4 * KIB, 64 * MIB
TABLE_SIZE_MIN, TABLE_SIZE_MAX = 1, 16
# What a disk can have at all: offsets are signed to the operating system.
DISK_SIZE_MAX = (1 << 63) - SECTOR_SIZE
HEADER_SIZE_MAX = (1 << 32) - 1

FEATURE_BACKING_FILE = 1 << 0
FEATURE_NEED_CHECK = 1 << 1
FEATURE_BACKING_RAW = 1 << 2  # the backing file is raw: its content is never to be taken for a format
_FEATURES_KNOWN = FEATURE_BACKING_FILE | FEATURE_NEED_CHECK | FEATURE_BACKING_RAW

# Where long names go: in the smallest cluster, and so far apart that no name reaches into both.
_NAME_PLACES = (SECTOR_SIZE, CLUSTER_SIZE_MIN - 2 * SECTOR_SIZE)
# Where single fields are rewritten in place.
FEATURES_FIELD = 16
AUTOCLEAR_FIELD = 32
SIZE_FIELD = 48

_ENTRY_SIZE = 8
_FIELDS = struct.Struct("<4sIIIQQQQQII")
HEADER_LENGTH = _FIELDS.size


@dataclass(frozen=True)
class Header:
    """What the header says, checked against the bounds that need no look at the file."""

    cluster_size: int
    table_size: int
    header_size: int
    l1_offset: int
    size: int
    features: int = 0
    compatible: int = 0
    autoclear: int = 0
    backing_offset: int = 0
    backing_length: int = 0
    backing_filename: str | None = None

    @property
    def table_length(self) -> int:
        """Bytes of one table."""
        return self.table_size * self.cluster_size

    @property
    def entry_count(self) -> int:
        """Entries of one table."""
        return self.table_length // _ENTRY_SIZE

    @property
    def first_cluster(self) -> int:
        """Where the clusters begin that tables may name."""
        return self.header_size * self.cluster_size

    @property
    def needs_check(self) -> bool:
        return bool(self.features & FEATURE_NEED_CHECK)

    @property
    def backing_format(self) -> str | None:
        """Only ``raw`` can be recorded."""
        return "raw" if self.backing_filename and self.features & FEATURE_BACKING_RAW else None


def probe(first_bytes: bytes) -> bool:
    """Whether a file that starts like this is a QED image."""
    return first_bytes.startswith(MAGIC)


def size_max(cluster_size: int, table_size: int) -> int:
    """The largest disk that such tables can map."""
    entry_count = cluster_size * table_size // _ENTRY_SIZE
    return min(entry_count * entry_count * cluster_size, DISK_SIZE_MAX)


def l1_entry_count_for(size: int, header: Header) -> int:
    """How many L1 entries a disk of `size` bytes uses."""
    return -(-size // (header.entry_count * header.cluster_size))


# -- parsing ----------------------------------------------------------------------------------


def parse(data: bytes, name: str) -> Header:
    """Parse the first sector of an image; the name of the backing file is not in it: see `with_backing`.

    Raises:   ImageError: naming `name` and the field that is wrong.
    """
    if len(data) < HEADER_LENGTH or not probe(data):
        raise ImageError(f"'{name}' is not a QED image")
    _, cluster_size, table_size, header_size, features, compatible, autoclear, *rest = _FIELDS.unpack_from(
        data
    )
    l1_offset, size, backing_offset, backing_length = rest
    unknown = features & ~_FEATURES_KNOWN
    if unknown:
        raise ImageError(
            f"'{name}' uses a QED feature that is not supported: unknown feature bit "
            f"{(unknown & -unknown).bit_length() - 1}"
        )
    if not is_cluster_size(cluster_size):
        raise ImageError(f"'{name}': cluster size {cluster_size} is not a power of two from 4096 to 67108864")
    if not is_table_size(table_size):
        raise ImageError(f"'{name}': table size {table_size} is not a power of two from 1 to 16")
    header = Header(
        cluster_size,
        table_size,
        header_size,
        l1_offset,
        size,
        features,
        compatible,
        autoclear,
        backing_offset,
        backing_length,
    )
    _check_bounds(header, name)
    return header


def is_cluster_size(value: int) -> bool:
    return CLUSTER_SIZE_MIN <= value <= CLUSTER_SIZE_MAX and value.bit_count() == 1


def is_table_size(value: int) -> bool:
    return TABLE_SIZE_MIN <= value <= TABLE_SIZE_MAX and value.bit_count() == 1


def _check_bounds(header: Header, name: str) -> None:
    if not header.header_size or header.first_cluster > HEADER_SIZE_MAX:
        raise ImageError(f"'{name}': header size {header.header_size} clusters is invalid")
    if header.size % SECTOR_SIZE:
        raise ImageError(f"'{name}': image size {header.size} is not a multiple of 512")
    if header.size > size_max(header.cluster_size, header.table_size):
        raise ImageError(f"'{name}': image size {header.size} is more than the tables can map")
    if header.l1_offset % header.cluster_size:
        raise ImageError(f"'{name}': the L1 table offset {header.l1_offset:#x} is not cluster aligned")
    if header.l1_offset < header.first_cluster:
        raise ImageError(f"'{name}': the L1 table offset {header.l1_offset:#x} overlaps the header")
    if header.features & FEATURE_BACKING_FILE:
        if header.backing_length > RECORDED_LENGTH_MAX:
            raise ImageError(
                f"'{name}': the backing file name is {header.backing_length} bytes long, more than 1023"
            )
        if (
            header.backing_offset < HEADER_LENGTH
            or header.backing_offset + header.backing_length > header.first_cluster
        ):
            raise ImageError(
                f"'{name}': the backing file name at {header.backing_offset} is outside the header's clusters"
            )


def with_backing(header: Header, name: bytes) -> Header:
    """Add the backing file's name, as read from `backing_offset`."""
    return replace(header, backing_filename=parse_recorded(name) or None)


# -- packing ----------------------------------------------------------------------------------


def pack(header: Header) -> bytes:
    """The fields; the name of the backing file stands elsewhere."""
    return _FIELDS.pack(
        MAGIC,
        header.cluster_size,
        header.table_size,
        header.header_size,
        header.features,
        header.compatible,
        header.autoclear,
        header.l1_offset,
        header.size,
        header.backing_offset,
        header.backing_length,
    )


# -- another backing file -----------------------------------------------------------------------


class HeaderChange(NamedTuple):
    """Another backing file, in two steps, each durable before the next.

    `name` goes to `header.backing_offset` where nothing refers to yet, unless it is in the first sector
    already; `first_sector` then replaces the first sector of the file, which is all or nothing.
    """

    header: Header
    name: bytes
    first_sector: bytes


def change_backing(
    current: bytes, header: Header, filename: str | None, backing_format: str | None
) -> HeaderChange:
    """Plan how the image with the first sector `current` gets another backing file.

    Raises:   RequestError: there is no room for the name, or what is behind the header is not known.
    """
    name = pack_recorded(filename) if filename else b""
    if name and header.compatible:
        raise RequestError(
            f"The image has unknown compatible features {header.compatible:#x}, so that no place for a "
            "backing file name is known to be free",
            kind=ErrorKind.NOT_SUPPORTED,
        )
    features = header.features & ~(FEATURE_BACKING_FILE | FEATURE_BACKING_RAW)
    if name:
        features |= FEATURE_BACKING_FILE | (FEATURE_BACKING_RAW if backing_format == "raw" else 0)
    offset = _place_name(header, len(name)) if name else 0
    new = replace(
        header,
        features=features,
        backing_offset=offset,
        backing_length=len(name),
        backing_filename=filename or None,
    )
    first_sector = bytearray(current)
    first_sector[:HEADER_LENGTH] = pack(new)
    is_inside = offset + len(name) <= SECTOR_SIZE
    if name and is_inside:
        first_sector[offset : offset + len(name)] = name
    return HeaderChange(new, b"" if is_inside else name, bytes(first_sector))


def _place_name(header: Header, length: int) -> int:
    """Find room: in the first sector, else in one of two places behind it, where the present name is not."""
    if HEADER_LENGTH + length <= SECTOR_SIZE:
        return HEADER_LENGTH
    is_used = bool(header.features & FEATURE_BACKING_FILE)
    old_start, old_end = header.backing_offset, header.backing_offset + header.backing_length
    first, second = _NAME_PLACES
    return second if is_used and old_start < first + length and first < old_end else first

"""The header of an add-cow file: the small file beside an image that gives it a backing file.

    offset  width  little endian
    0       4      magic "ACOW"
    4       4      backing file name: where it stands in the header; 0: there is none
    8       4      its length
    12      4      image file name: where it stands in the header
    16      4      its length
    20      4      cluster_bits, 12-21
    24      8      features; who finds a bit that it does not know must not open the image
    32      8      compatible features; bit 0 ALL_ALLOCATED: bitmap and backing are no longer used
    40      4      header size: 4096, or one cluster if that is larger
    44      16     format of the backing file, padded with zeroes
    60      16     format of the image
    76             names, not terminated; the rest of the header is zero

Behind the header comes the bitmap (bitmap.py). The size of the disk stands nowhere: it is that of the
image file. Both names count from the folder of the add-cow file.

Order on disk: everything that ever changes lies in the first 512 bytes, except the names, and a name is
never written over one that is in use. So a new backing file is recorded in two steps: its name into free
space of the header, durable; then the first sector with its place, length and format, durable. A sector is
written as a whole or not at all, so that a crash leaves the old header or the new one, and there is no need
for a second copy with a generation and a checksum, for which the layout has no room either.

Source:   "add-cow" as published on qemu-devel in 2012 (version 20).
"""

import struct
from dataclasses import dataclass, replace
from typing import NamedTuple

from blockd.errors import ImageError, RequestError
from blockd.filenames import RECORDED_LENGTH_MAX, pack_recorded, parse_recorded
from blockd.units import SECTOR_SIZE

MAGIC = b"ACOW"
CLUSTER_BITS_MIN, CLUSTER_BITS_MAX = 12, 21
HEADER_SIZE_MIN = 4096
FORMAT_LENGTH_MAX = 16
ALL_ALLOCATED = 1 << 0
# The one format of images that has no backing files of its own.
IMAGE_FORMAT = "raw"

_FIELDS = struct.Struct("<4s5I2QI16s16s")
# Where names are put: two places for the backing file's, which take turns, and one for the image's.
_BACKING_PLACES = (_FIELDS.size, _FIELDS.size + RECORDED_LENGTH_MAX)
_IMAGE_PLACE = _FIELDS.size + 2 * RECORDED_LENGTH_MAX


class Name(NamedTuple):
    """A name and where it stands in the header."""

    text: str
    offset: int

    @property
    def end(self) -> int:
        return self.offset + len(_encoded(self.text))

    def overlaps(self, other: "Name") -> bool:
        return self.offset < other.end and other.offset < self.end


@dataclass(frozen=True)
class Header:
    """A parsed header."""

    cluster_bits: int
    image: Name
    backing: Name | None
    backing_format: str | None
    compatible: int = 0

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    @property
    def size(self) -> int:
        """The length of the header, and so where the bitmap begins."""
        return max(HEADER_SIZE_MIN, self.cluster_size)

    @property
    def is_all_allocated(self) -> bool:
        return bool(self.compatible & ALL_ALLOCATED)

    def bitmap_length(self, size: int) -> int:
        """The length of the bitmap of a disk of `size` bytes, in whole clusters."""
        cluster_count = -(-size >> self.cluster_bits)
        byte_count = -(-cluster_count // 8)
        return -(-byte_count >> self.cluster_bits) << self.cluster_bits


def probe(first_bytes: bytes) -> bool:
    """Whether a file that starts like this is an add-cow file."""
    return first_bytes.startswith(MAGIC)


# -- parsing ----------------------------------------------------------------------------------


def parse(data: bytes, name: str) -> Header:
    """Parse the start of an add-cow file: at least its header, or the whole file when it is smaller.

    Raises:   ImageError: naming `name` and the field that is wrong.
    """
    if len(data) < _FIELDS.size or not probe(data):
        raise ImageError(f"'{name}' is not an add-cow file")
    _, *places, cluster_bits, features, compatible, size, backing_format, image_format = _FIELDS.unpack_from(
        data
    )
    if features:
        bit = (features & -features).bit_length() - 1
        raise ImageError(f"'{name}' uses an add-cow feature that is not supported: unknown feature bit {bit}")
    if not CLUSTER_BITS_MIN <= cluster_bits <= CLUSTER_BITS_MAX:
        raise ImageError(f"'{name}': cluster_bits {cluster_bits} is outside 12..21")
    if size != max(HEADER_SIZE_MIN, 1 << cluster_bits):
        raise ImageError(f"'{name}': header size {size} does not fit cluster_bits {cluster_bits}")
    if len(data) < size:
        raise ImageError(f"'{name}': the header is cut short at {len(data)} bytes")
    backing = _parse_name(data[:size], places[0], places[1], name, "backing")
    image = _parse_name(data[:size], places[2], places[3], name, "image")
    if image is None:
        raise ImageError(f"'{name}': there is no image file name")
    if backing is not None and backing.text == image.text:
        raise ImageError(f"'{name}': the image file name and the backing file name are the same")
    if backing is not None and backing.overlaps(image):
        raise ImageError(f"'{name}': the image file name and the backing file name overlap")
    if (found := _parse_format(image_format, name, "image")) != IMAGE_FORMAT:
        raise ImageError(f"'{name}': the image format '{found or ''}' is not supported; it must be raw")
    return Header(cluster_bits, image, backing, _parse_format(backing_format, name, "backing"), compatible)


def _parse_name(data: bytes, offset: int, length: int, name: str, what: str) -> Name | None:
    if not offset:
        return None
    if not 0 < length <= RECORDED_LENGTH_MAX:
        raise ImageError(
            f"'{name}': the {what} file name is {length} bytes long, not 1 to {RECORDED_LENGTH_MAX}"
        )
    if offset < _FIELDS.size or offset + length > len(data):
        raise ImageError(f"'{name}': the {what} file name at {offset} is outside the header")
    text = parse_recorded(data[offset : offset + length])
    if "\0" in text:
        raise ImageError(f"'{name}': the {what} file name has a NUL character in it")
    return Name(text, offset)


def _parse_format(field: bytes, name: str, what: str) -> str | None:
    try:
        return field.rstrip(b"\0").decode("ascii") or None
    except UnicodeDecodeError as error:
        raise ImageError(f"'{name}': the {what} format is no text") from error


# -- packing ----------------------------------------------------------------------------------


def new_header(
    cluster_bits: int, image_filename: str, backing_filename: str | None, backing_format: str | None
) -> Header:
    """The header of a new file.

    Raises:   RequestError: a name or the format does not fit, or both names are the same.
    """
    image = Name(image_filename, _IMAGE_PLACE)
    header = Header(cluster_bits, image, None, None)
    pack_recorded(image.text, "image file")
    return header if backing_filename is None else with_backing(header, backing_filename, backing_format)


def with_backing(header: Header, filename: str | None, backing_format: str | None) -> Header:
    """The header with another backing file, whose name stands where none does now.

    Raises:   RequestError: the name or the format does not fit, or the image has this name.
    """
    if filename is None:
        compatible = header.compatible | ALL_ALLOCATED
        return replace(header, backing=None, backing_format=None, compatible=compatible)
    pack_recorded(filename)
    if len((backing_format or "").encode()) > FORMAT_LENGTH_MAX:
        raise RequestError(f"The backing format '{backing_format}' is longer than {FORMAT_LENGTH_MAX} bytes")
    if filename == header.image.text:
        raise RequestError(f"The image file and the backing file must differ, and both are '{filename}'")
    used = [name for name in (header.image, header.backing) if name is not None]
    for offset in (*_BACKING_PLACES, *(name.end for name in used)):
        name = Name(filename, offset)
        if name.end <= header.size and not any(name.overlaps(other) for other in used):
            return replace(header, backing=name, backing_format=backing_format)
    raise RequestError(f"There is no room in the header for the backing file name '{filename}'")


def pack_first_sector(header: Header, current: bytes) -> bytes:
    """The first sector of `header`; the rest of it is as in `current`, which has the names already."""
    places = [number for name in (header.backing, header.image) for number in _place(name)]
    fields = _FIELDS.pack(
        MAGIC,
        *places,
        header.cluster_bits,
        0,
        header.compatible,
        header.size,
        (header.backing_format or "").encode(),
        IMAGE_FORMAT.encode(),
    )
    return fields + current[_FIELDS.size : SECTOR_SIZE]


def _place(name: Name | None) -> tuple[int, int]:
    return (0, 0) if name is None else (name.offset, len(_encoded(name.text)))


def put_name(area: bytes, name: Name) -> bytes:
    """The header `area` with a name in it."""
    return area[: name.offset] + _encoded(name.text) + area[name.end :]


def pack(header: Header) -> bytes:
    """Lay out a whole new header."""
    area = bytes(header.size)
    for name in (header.image, header.backing):
        area = area if name is None else put_name(area, name)
    return pack_first_sector(header, area) + area[SECTOR_SIZE:]


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")

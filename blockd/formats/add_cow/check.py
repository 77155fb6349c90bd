"""Check an add-cow file: does it fit the image that it speaks of?

The check reads the header and the bitmap straight from the file. Nothing is repaired. What a crash may
leave is a leak: bits behind the end of the disk, and a bitmap that is longer than it must be. Both are
there while a disk grows, and a disk that has grown needs them.
"""

from blockd.aio import in_thread
from blockd.block.node import ProtocolNode
from blockd.formats.add_cow import header as headers
from blockd.formats.check_report import CheckReport
from blockd.units import MIB

_CHUNK = 1 * MIB


async def check(file: ProtocolNode, size: int) -> CheckReport:
    """Check the add-cow file in `file`, which must not be written meanwhile, for an image of `size` bytes.

    Raises:   ImageError: the header is so wrong that nothing behind it can be looked at.
    """
    return await in_thread(_check, file, size)


def _check(file: ProtocolNode, size: int) -> CheckReport:
    first = bytearray(min(file.size, 1 << headers.CLUSTER_BITS_MAX))
    file.readinto_blocking(0, memoryview(first))
    header = headers.parse(bytes(first), file.filename)
    report = CheckReport(file.filename, image_end_offset=file.size)
    report.total_clusters = -(-size >> header.cluster_bits)
    if header.is_all_allocated:
        report.allocated_clusters = report.total_clusters
        return report
    needed = header.size + header.bitmap_length(size)
    if file.size < needed:
        report.add_corruption("bitmap", file.size, f"it ends before {needed:#x}, where its last cluster does")
    elif file.size > needed:
        report.add_leak(needed, f"the bitmap goes on up to {file.size:#x}")
    _count_bits(file, header.size, min(file.size, needed), report)
    return report


def _count_bits(file: ProtocolNode, start: int, end: int, report: CheckReport) -> None:
    offset, remaining = start, report.total_clusters
    while offset < end:
        buffer = bytearray(min(_CHUNK, end - offset))
        file.readinto_blocking(offset, memoryview(buffer))
        bits = int.from_bytes(buffer, "little")
        inside = bits & ((1 << min(remaining, len(buffer) * 8)) - 1)
        report.allocated_clusters += inside.bit_count()
        if bits != inside:
            behind = (bits ^ inside).bit_count()
            report.add_leak(offset, f"{behind} bits are set for clusters behind the end of the disk")
        offset += len(buffer)
        remaining = max(0, remaining - len(buffer) * 8)

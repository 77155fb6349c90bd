"""Clusters that are too large to be held in memory whole: QED has them up to 64 MiB.

They are copied in pieces. A piece of zeroes is not written, for the new cluster reads as zeroes
already: it is behind the former end of the file, or a hole is punched into it first. In the end the file
has to reach over the whole cluster.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from blockd.aio import in_thread
from blockd.block.file_events import FileEvent
from blockd.block.node import ProtocolNode
from blockd.block.segments import clipped, read_segments, zeroes
from blockd.formats.qed.allocator import Run
from blockd.units import MIB, SECTOR_SIZE, align_down

if TYPE_CHECKING:
    from blockd.formats.qed.image import QedImage

# Clusters that are larger are copied in pieces of this size.
BUFFER_LENGTH = 2 * MIB


async def write_cluster(image: "QedImage", run: Run, offset: int, data: memoryview) -> None:
    """Write `data` for guest offset `offset` into new clusters, with what the disk holds around it.

    Needs:    the data begin in the first cluster of the run and end in its last one.
    """
    start = align_down(offset, image.cluster_size)
    end = start + run.cluster_count * image.cluster_size
    await in_thread(prepare_blocking, image.file, run, image.cluster_size)
    to_host = run.host_offset - start
    await _copy_old(image, start, offset, to_host)
    await image.file.write(offset + to_host, data)
    await _copy_old(image, offset + len(data), end, to_host)
    await in_thread(complete_blocking, image.file, end + to_host)


async def _copy_old(image: "QedImage", start: int, end: int, to_host: int) -> None:
    """Copy a part of the disk that is stored anywhere to its new place."""
    end = min(end, image.size)
    if start >= end:
        return
    plan = await image.plan_read(start, end - start)
    position = 0
    for segment in plan:
        for piece in range(position, position + segment.length, BUFFER_LENGTH):
            length = min(BUFFER_LENGTH, position + segment.length - piece)
            if segment.source is not None:
                image.file.announce(FileEvent.COW_READ)
                content = await read_segments(clipped(plan, piece, length), length)
                if content != zeroes(length):
                    await image.file.write(start + piece + to_host, content)
        position += segment.length


def copy_blocking(
    file: ProtocolNode,
    cluster_size: int,
    read: Callable[[int, memoryview], None],
    allocate: Callable[[], Run],
    write: Callable[[int, memoryview], None],
) -> bool:
    """Copy one cluster, which `read` reads by position; False: it is all zeroes, nothing was allocated."""
    run: Run | None = None
    buffer = memoryview(bytearray(BUFFER_LENGTH))
    for position in range(0, cluster_size, BUFFER_LENGTH):
        read(position, buffer)
        if buffer == zeroes(BUFFER_LENGTH):
            continue
        if run is None:
            run = allocate()
            prepare_blocking(file, run, cluster_size)
        write(run.host_offset + position, buffer)
    if run is not None:
        complete_blocking(file, run.host_offset + cluster_size)
    return run is not None


def prepare_blocking(file: ProtocolNode, run: Run, cluster_size: int) -> None:
    """See that new clusters read as zeroes."""
    if not run.is_fresh:
        file.punch_hole_blocking(run.host_offset, run.cluster_count * cluster_size)


def complete_blocking(file: ProtocolNode, end: int) -> None:
    """See that the file reaches to the end of new clusters."""
    if file.size < end:
        file.write_blocking(end - SECTOR_SIZE, zeroes(SECTOR_SIZE))

"""Named workloads, each about one thing that has to reach the disk in order."""

from array import array
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from blockd.aio import task_group
from blockd.block.node import BlockNode
from blockd.formats.qcow2 import header as headers
from blockd.formats.qcow2.mapping import pack_entries
from tests.crash.scene import BASE, MIDDLE, SETTLED_STEP_COUNT, Scene, unwrapped
from tests.doubles import HeldNode
from tests.inline_threads import steps
from tests.recording import RecordingFile


async def write_whole(scene: Scene) -> None:
    await scene.write(1)
    await scene.flush()
    await scene.write(1)
    await scene.write(2)
    await scene.flush()


async def write_parts(scene: Scene) -> None:
    await scene.write(1.25, 0.5)
    await scene.write(2.5, 1.25)
    await scene.flush()
    await scene.write(1.5, 0.25)
    await scene.write(5.125, 0.25)
    await scene.flush()


async def write_across_tables(scene: Scene) -> None:
    """With 512-byte clusters an L2 table maps 64 of them."""
    await scene.write(62.5, 3)
    await scene.flush()
    await scene.write(127, 2)
    await scene.flush()


async def zero_and_discard(scene: Scene) -> None:
    await scene.write(0, 6)
    await scene.flush()
    await scene.zero(1, 2)
    await scene.discard(3, 2)
    await scene.zero(0.5, 0.25)
    await scene.flush()
    await scene.write(1.5, 0.5)
    await scene.write(3, 1)
    await scene.flush()


async def reuse_freed_clusters(scene: Scene) -> None:
    for _ in range(2):
        await scene.write(0, 4)
        await scene.flush()
        await scene.discard(0, 4)
        await scene.flush()
        await scene.write(6, 4)
        await scene.flush()
        await scene.zero(6, 4)
        await scene.flush()


async def stream_to_none(scene: Scene) -> None:
    await scene.complete()


async def stream_to_base(scene: Scene) -> None:
    scene.base_name = BASE
    await scene.complete()


async def write_then_stream(scene: Scene) -> None:
    await scene.write(1.5, 2)
    await scene.discard(6, 1)
    await scene.complete()
    await scene.write(4, 1.5)
    await scene.flush()


async def stream_twice(scene: Scene) -> None:
    """First to the base, then to nothing."""
    scene.base_name = BASE
    await scene.complete()
    await scene.write(2, 1)
    scene.base_name = None
    await scene.complete()
    await scene.discard(0, 3)


async def cancel_then_stream(scene: Scene) -> None:
    await scene.stream_step()
    await scene.write(0.5, 2)
    await scene.flush()
    await scene.complete()


async def stage_parts(scene: Scene) -> None:
    """Parts of clusters are written while the source does not answer; flushes and a cancel wait for it."""
    source = scene.nodes[MIDDLE]
    assert isinstance(source, HeldNode)
    source.hold()
    await scene.stream_step()
    for first, count in ((1.25, 0.5), (5.5, 1.0), (1.5, 0.25)):
        await scene.write(first, count)
    async with task_group() as tasks:
        tasks.create_task(scene.flush())
        await steps(SETTLED_STEP_COUNT)
        source.release()
    source.hold()
    await scene.write(8.25, 0.5)
    async with task_group() as tasks:
        tasks.create_task(scene.cancel())
        await steps(SETTLED_STEP_COUNT)
        source.release()
    await scene.flush()
    await scene.complete()


async def copy_on_read(scene: Scene) -> None:
    await scene.read(0.5, 2)
    await scene.flush()
    await scene.read(4, 3)
    await scene.write(4.5, 0.25)
    await scene.flush()


async def grow(scene: Scene) -> None:
    await scene.write(3.5, 0.25)
    await scene.resize(scene.cluster_count + 70)
    await scene.write(scene.cluster_count + 65, 2)
    await scene.flush()
    await scene.complete()


async def shrink(scene: Scene) -> None:
    """What is behind the new end goes, and does not come back."""
    await scene.write(3.5, 0.25)
    await scene.write(scene.cluster_count - 3, 3)
    await scene.flush()
    await scene.write(1, 1)
    await scene.write(scene.cluster_count - 1.5, 0.5)
    await scene.resize(scene.cluster_count - 2)
    await scene.write(0, 1)
    await scene.flush()
    await scene.grow(4)
    await scene.write(scene.cluster_count - 0.5, 0.25)
    await scene.flush()


async def shrink_and_stream(scene: Scene) -> None:
    await scene.write(scene.cluster_count - 3, 2)
    await scene.resize(scene.cluster_count - 2)
    await scene.complete()


async def grow_over_the_backing(scene: Scene) -> None:
    """What the backing holds behind the disk's old end must never be seen."""
    await scene.write(3.5, 0.25)
    await scene.grow(4)
    await scene.write(scene.cluster_count - 1.5, 0.5)
    await scene.flush()


async def rename_the_backing(scene: Scene) -> None:
    """Names too long for the first sector of the header, which alone is replaced at once."""
    await scene.rename_backing("long/" * 120 + MIDDLE)
    await scene.write(1.5, 1)
    await scene.rename_backing("other/" * 120 + MIDDLE)
    await scene.rename_backing(MIDDLE)


async def detach(scene: Scene) -> None:
    await scene.write(1.5, 1)
    await scene.detach()


async def close_and_open(scene: Scene) -> None:
    await scene.write(1.5, 2)
    await scene.close()
    await scene.write(4, 1)
    await scene.stream_step()
    await scene.discard(1, 2)
    await scene.close()
    await scene.complete()


async def switch_and_stream(scene: Scene) -> None:
    await scene.write(0.5, 3)
    await scene.switch()
    await scene.write(2.5, 2)
    await scene.stream_step()
    await scene.zero(1, 2)
    await scene.flush()
    await scene.complete()
    await scene.switch()
    await scene.write(5, 1)
    await scene.flush()


async def grow_refcount_table(scene: Scene) -> None:
    """The first allocation that needs another refcount block finds no room for it in the table."""
    await scene.write(0, 6)
    await scene.flush()
    await scene.write(8.5, 3)
    await scene.discard(0, 4)
    await scene.flush()
    await scene.write(1, 3)
    await scene.flush()


async def grow_refcount_table_unflushed(scene: Scene) -> None:
    """The table is outgrown while the last block that it had room for is not durable yet."""
    await scene.write(0, 300)
    await scene.write(300, 10)
    await scene.flush()


# What is left of the clusters that the refcount table of a new image can describe.
FREE_CLUSTER_COUNT = 4


def fill_refcount_table(disk: bytes) -> bytes:
    """Take all but a few of the clusters that the refcount table of a new image can describe."""
    return _with_refcounts(disk, FREE_CLUSTER_COUNT)


def fill_refcount_table_but_one(disk: bytes) -> bytes:
    """The same, but the last refcount block that the table has room for is still to be made."""
    return _with_refcounts(disk, headers.parse(disk, "new").cluster_size // 2)


def _with_refcounts(disk: bytes, free_count: int) -> bytes:
    header = headers.parse(disk, "new")
    size, span = header.cluster_size, header.cluster_size // 2
    table_offset, table_size = header.refcount_table_offset, header.refcount_table_clusters * size
    used_count = table_size // 8 * span - free_count
    table = array("Q", [index * span * size for index in range(-(-used_count // span))])
    table[0] = int.from_bytes(disk[table_offset : table_offset + 8], "big")
    filled = bytearray(disk.ljust(used_count * size, b"\0"))
    for index, block in enumerate(table):
        count = min(span, used_count - index * span)
        filled[block : block + size] = pack_entries(array("H", [1] * count + [0] * (span - count)))
    filled[table_offset : table_offset + table_size] = pack_entries(table).ljust(table_size, b"\0")
    return bytes(filled)


@dataclass(frozen=True)
class Workload:
    """What is done, and to which disk."""

    run: Callable[[Scene], Awaitable[None]]
    cluster_count: int = 12
    cluster_size: int = 512
    hidden_count: int = 0
    prepare: Callable[[bytes], bytes] = bytes
    image_format: str = "qcow2"
    wrap_source: Callable[[BlockNode], BlockNode] = unwrapped
    file_type: type[RecordingFile] = RecordingFile
    # What else the active images are made with.
    options: tuple[tuple[str, object], ...] = ()
    variant: str = ""
    # Other formats cannot do it.
    is_for_qcow2: bool = False

    def __str__(self) -> str:
        kind = self.variant or (self.image_format if self.image_format != "qcow2" else "")
        return f"{kind}: {self.run.__name__}" if kind else self.run.__name__

    @property
    def is_large(self) -> bool:
        """Whether the file is, so that every look at it takes long."""
        return self.prepare is not bytes

    @property
    def is_for_all(self) -> bool:
        """Whether it is one for every format, whose tables are large."""
        return not (self.is_for_qcow2 or self.is_large) and self.cluster_count < 100

    def scene(self, cold_share: float = 0) -> Scene:
        return Scene(
            self.cluster_size,
            self.cluster_count,
            image_format=self.image_format,
            options=dict(self.options),
            hidden_count=self.hidden_count,
            prepare=self.prepare,
            file_type=self.file_type,
            wrap_source=self.wrap_source,
            cold_share=cold_share,
        )


WORKLOADS = [
    Workload(write_whole),
    Workload(write_parts),
    Workload(write_across_tables, 130),
    Workload(zero_and_discard),
    Workload(reuse_freed_clusters),
    Workload(stream_to_none),
    Workload(stream_to_base),
    Workload(write_then_stream),
    Workload(stream_twice),
    Workload(cancel_then_stream),
    Workload(stage_parts, wrap_source=HeldNode),
    Workload(copy_on_read),
    Workload(grow),
    Workload(shrink, is_for_qcow2=True),
    Workload(shrink_and_stream, is_for_qcow2=True),
    Workload(grow_over_the_backing, hidden_count=4),
    Workload(rename_the_backing, cluster_size=2048),
    Workload(detach),
    Workload(close_and_open),
    Workload(switch_and_stream),
    Workload(grow_refcount_table, prepare=fill_refcount_table),
    Workload(grow_refcount_table_unflushed, 320, prepare=fill_refcount_table_but_one),
]

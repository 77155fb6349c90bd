"""The node interface: one layer of the graph that a guest request runs through.

A node is a *protocol* (where bytes live), a *format* (what they mean) or a *filter* (put in front).
Every operation comes in two forms. The `_nowait` form answers at once, on the event loop, or says
that it would have to wait; the awaitable form always answers. Callers try the first and fall back:

    data = node.read_nowait(offset, length)
    if data is None:
        data = await node.read(offset, length)

Needs:    for every operation 0 <= offset, 0 < length, offset + length <= size; callers check at the
          border (NBD server, job), nodes do not check again.
Raises:   StorageError when the disk fails, ImageError when a table of the image is found wrong,
          RequestError of kind READ_ONLY for a write to a read-only node. After any of them the
          image is valid and everything acknowledged before is there.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from blockd.aio import in_thread
from blockd.block.file_events import FileEvent
from blockd.block.permissions import Access, access_to_backing, access_to_file
from blockd.block.pins import Pins
from blockd.block.settings import DEFAULTS
from blockd.errors import ErrorKind, RequestError, StorageError
from blockd.extents import Extent, Kind, Range

if TYPE_CHECKING:
    from array import array

    from blockd.block.segments import SourcePlan

Buffer = bytes | bytearray | memoryview

IsWanted = Callable[[int, int], bool]  # whether all clusters from one offset to another are wanted still

_ZERO_CHUNK = 1 << 20  # written at a time by files that know no other way to take or free space


class BlockingSource(ABC):
    """Something that a thread can read by itself."""

    @abstractmethod
    def readinto_blocking(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer`; past the end of the source it becomes zeroes."""

    def read_pieces_blocking(self, pieces: "list[tuple[int, memoryview]]") -> None:
        """Fill many buffers, each from an offset of its own."""
        for offset, buffer in pieces:
            self.readinto_blocking(offset, buffer)


class Segment(NamedTuple):
    """Where `length` bytes of a disk are stored: at `offset` of `source`; no source means zeroes."""

    length: int
    source: "Source | None"
    offset: int


class Labelled(NamedTuple):
    """What a layer says of a range, one label for each unit of it; what they mean see layers.py."""

    labels: bytes
    # In bytes; 0: one label for all of the range.
    unit: int
    # Where the first unit begins, at or before the range.
    start: int
    # Up to where the range is told.
    end: int
    # The map entries of the clusters from `start` on, as the format has them; only with places.
    entries: "array[int] | None"


class BlockNode(ABC):
    """One layer: a disk of `size` bytes that can be read, and unless `read_only` written."""

    driver: ClassVar[str]
    # The unit in which the node keeps track of what it holds; 1 when it can tell single bytes apart.
    cluster_size: int = 1
    # What guests are told (NBD's block sizes): in which units requests cost least, and the most that one
    # moves, 0 if that is up to the nodes below. All other requests are taken too.
    request_alignment: int = 1
    transfer_max: int = 0
    # What it does depends on how many requests there are: streams copy as QEMU's do, one chunk after another.
    counts_requests: ClassVar[bool] = False
    backing: "BlockNode | None" = None
    # What its options say of its requests.
    settings = DEFAULTS

    def __init__(self, node_name: str, filename: str, size: int, *, read_only: bool) -> None:
        self.node_name = node_name
        self.filename = filename
        self.size = size
        self.read_only = read_only
        self.pins = Pins()

    def children(self) -> Mapping[str, "BlockNode"]:
        """The nodes right below, by role: ``file``, ``backing``."""
        return {}

    def access_to(self, role: str, wanted: Access, *, read_only: bool) -> Access:
        """What this node, `read_only` or not, needs of a child when its users want `wanted` of itself."""
        if role == "backing":
            return access_to_backing(wanted)
        return access_to_file(wanted, is_writable=not read_only)

    # -- reading ------------------------------------------------------------------------------

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        """Read if that needs no waiting, else return None."""
        return None

    @abstractmethod
    async def read(self, offset: int, length: int) -> Buffer:
        """Read exactly `length` bytes."""

    async def plan_read(self, offset: int, length: int) -> list[Segment]:
        """Tell where the bytes of a range are stored, down through the backing chain.

        Shape:    segments in order, together exactly the range.
        Needs:    the answer holds until this node or one below it is written; callers that write
                  at the same time keep what they planned from being freed (see the format). What is
                  planned beside changes of the graph is pinned (pins.py).
        """
        return [Segment(length, self, offset)]

    async def map(self, offset: int, length: int) -> list[Extent]:
        """Tell what this layer alone holds, backing left out.

        Shape:    extents in order from `offset`, at least one, none empty, neighbours differ in
                  kind. They may stop before the end of the range; go on from where they stop.
        """
        return [Extent(offset, length, Kind.DATA)]

    async def labels(
        self, offset: int, length: int, *, with_places: bool, with_holes: bool
    ) -> Labelled | None:
        """Tell what this layer alone holds as labels, many at once; None: it has none, `map` tells.

        `with_places`: also where, for `place`. `with_holes`: what a file's filesystem knows of its holes.
        """
        return None

    async def place(self, told: Labelled, ranges: "Sequence[tuple[int, int]]") -> list[Segment]:
        """Where ranges (offset and length) are stored of which each is one run of what `labels` told."""
        raise NotImplementedError

    def kind_nowait(self, offset: int, length: int) -> Kind | None:
        """The kind of a range in this layer when it is all one kind and known without waiting."""
        return Kind.DATA

    # -- writing ------------------------------------------------------------------------------

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        """Write if that needs no waiting and return True, else do nothing and return False."""
        return False

    @abstractmethod
    async def write(self, offset: int, data: Buffer) -> None:
        """Write all of `data`, which must not change until this returns.

        Cancel:   the range holds old and new data, each 512-byte sector whole; the rest is untouched.
        """

    @property
    def copies_apart(self) -> bool:
        """Whether copies into this node are made in another process now, where their sources are files."""
        return False

    def write_zeroes_nowait(self, offset: int, length: int) -> bool:
        """Do what `write_zeroes` does, with `unmap`, if that needs no waiting, else nothing."""
        return False

    def discard_nowait(self, offset: int, length: int) -> bool:
        """Do what `discard` does if that needs no waiting, else nothing."""
        return False

    @abstractmethod
    async def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        """Make a range read as zeroes; with `unmap` its space may be given back."""

    @abstractmethod
    async def discard(self, offset: int, length: int) -> None:
        """Give the space of a range back as far as possible; what was given back reads as zeroes."""

    def needs_flush(self) -> bool:
        """Whether closing has to bring anything to the disk; a guest's flush is of what others wrote, too."""
        return True

    @abstractmethod
    async def flush(self) -> None:
        """Return when everything written before this call is on the disk, maps included."""

    async def catch_up(self) -> None:
        """Return when what was acknowledged is in the images, where their maps tell of it.

        Raises:   StorageError: something of it cannot be brought there; reads find it nevertheless.
        """
        for child in self.children().values():
            await child.catch_up()

    async def resize(self, size: int) -> None:
        """Change the virtual size; new bytes read as zeroes."""
        raise RequestError(f"The '{self.driver}' driver cannot change the size of '{self.node_name}'")

    async def reopen(self, *, read_only: bool) -> None:
        """Become read-only, everything written before durable, or writable.

        Needs:    no request is in flight; the nodes below are writable if this one is to be.
        Raises:   RequestError, ImageError, StorageError: it cannot be.
        Fails to: the node is as before.
        """
        raise RequestError(
            f"Block format '{self.driver}' used by node '{self.node_name}' does not support reopening files"
        )

    @abstractmethod
    async def close(self) -> None:
        """Flush, and let go of the files; idempotent. The nodes below are closed by their owner."""


Source = BlockNode | BlockingSource  # what a segment is read from


class ProtocolNode(BlockNode, BlockingSource):
    """Where bytes live: a node whose operations are also there as blocking calls for threads.

    Formats do large work in one thread hop with these. Everything a format ever does to its file
    goes through this interface, so that a recording or failing file can stand in its place.
    """

    # The first failed sync: the kernel may have dropped the pages, so nothing may be written after it.
    failed: StorageError | None = None
    is_longer_allowed = False  # set by a format whose tables tell what is in use: so it may be, for speed
    # Direct writes and guests' are not in the same stretch of so much of the file (protocols/folios.py).
    folio_length: ClassVar[int] = 1
    may_clone = True  # cleared by who copies to find zeroes: what is cloned is not looked at

    async def disk_usage(self) -> int | None:
        """How many bytes the file takes on its disk, 0 for a device; None: nobody can tell, or not soon."""

    def announce(self, event: FileEvent, count: int = 1) -> None:
        """Hear what the format above is about to do, so often; for nodes that inject faults. Any thread."""

    def _require_writable(self) -> None:
        """Refuse to write to what is read-only or has failed."""
        if self.read_only:
            raise RequestError(f"'{self.filename}' was opened read-only", kind=ErrorKind.READ_ONLY)
        if self.failed is not None:
            raise self.failed

    def require_unchanged_blocking(self) -> None:
        """Refuse to go on when somebody has removed or cut off the file, or whatever it is.

        Raises:   StorageError: what is written would not be found again.
        """

    async def discard(self, offset: int, length: int) -> None:
        await self.write_zeroes(offset, length)

    async def resize(self, size: int) -> None:
        await in_thread(self.truncate_blocking, size)

    @abstractmethod
    def write_blocking(self, offset: int, data: Buffer) -> None:
        """Write all of `data`, growing the file if needed."""

    @abstractmethod
    def start_writeback_blocking(self, offset: int, length: int) -> None:
        """Ask the kernel to begin writing a range to the disk; promises nothing."""

    def write_cold_blocking(self, offset: int, data: Buffer) -> None:
        """Write data that nobody is expected to read soon, and get it on its way to the disk."""
        self.write_blocking(offset, data)
        self.start_writeback_blocking(offset, len(data))

    def can_clone_blocking(self, source: Source, *bounds: int) -> bool:
        """Whether it is worth trying to clone from `source`, at offsets and lengths that are these.

        Not where a node is in between, of this file or of the source: it is to see everything.
        """
        return False

    def clone_blocking(self, source: Source, source_offset: int, offset: int, length: int) -> bool:
        """Make a range hold what `source` does without copying it, growing the file if needed.

        False: it cannot be done, and the range may hold anything; copying finds out why.
        """
        return False

    async def copy_apart(
        self, source: list[Segment], offset: int, length: int, cluster_size: int, place_length: int = 0
    ) -> list[int] | None:
        """Copy in another process, which keeps guests waiting less than threads of this one do.

        The file grows if needed. Clusters that are all zeroes are not written: their positions, from `offset`
        on, are told. With `place_length` they have no places, the others follow each other, and the copy ends
        where there is no more place (`packed_end`). Where the source ends before `length`, zeroes follow.

        None: it cannot be done, or is not worth while, and the range may hold anything.

        Cancel:   takes effect when nothing is written any more.
        """
        return None

    def allocate_blocking(self, offset: int, length: int) -> bool:
        """Take the space of a range and let the file reach its end; False: there is no such call."""
        return False

    def write_zeroes_blocking(self, offset: int, length: int) -> None:
        """Write zeroes as any other data."""
        end = offset + length
        while offset < end:
            count = min(_ZERO_CHUNK, end - offset)
            self.write_blocking(offset, bytes(count))
            offset += count

    @abstractmethod
    def punch_hole_blocking(self, offset: int, length: int) -> None:
        """Free the space of a range, which then reads as zeroes; where that cannot be, write zeroes."""

    @abstractmethod
    def sync_blocking(self) -> None:
        """Return when all that was written is on the disk. A failure is final: see `failed`."""

    @abstractmethod
    def truncate_blocking(self, size: int) -> None:
        """Set the file's length."""

    def trim_blocking(self, end: int) -> None:
        """Give back what the file has behind `end`, where that can be.

        Needs:    nothing is being written.
        """


class FilterNode(BlockNode):
    """A node put in front of another one: it holds nothing itself and is left out of chains."""

    def __init__(self, child: BlockNode, *, node_name: str) -> None:
        super().__init__(node_name, child.filename, child.size, read_only=child.read_only)
        self.stand_before(child)

    def stand_before(self, child: BlockNode) -> None:
        """Be in front of `child` from now on, and of what became of it: its size, whether it is read-only."""
        self.child = child
        self.filename = child.filename
        self.size = child.size
        self.read_only = child.read_only
        self.cluster_size = child.cluster_size

    def children(self) -> Mapping[str, "BlockNode"]:
        return {"file": self.child}

    def access_to(self, role: str, wanted: Access, *, read_only: bool) -> Access:
        return wanted

    async def plan_read(self, offset: int, length: int) -> list[Segment]:
        return await self.child.plan_read(offset, length)

    async def map(self, offset: int, length: int) -> list[Extent]:
        return await self.child.map(offset, length)

    def kind_nowait(self, offset: int, length: int) -> Kind | None:
        return self.child.kind_nowait(offset, length)

    async def flush(self) -> None:
        await self.child.flush()

    async def resize(self, size: int) -> None:
        try:
            await self.child.resize(size)
        finally:
            self.stand_before(self.child)

    async def reopen(self, *, read_only: bool) -> None:
        self.stand_before(self.child)

    async def close(self) -> None:
        """Nothing is held: the node below belongs to the graph."""


class FillCounts(NamedTuple):
    """What a fill did, in bytes."""

    copied: int
    zeroed: int
    dropped: int  # no longer wanted when the copy was there: the guest wrote meanwhile


class OverlayNode(BlockNode):
    """A format with a backing file: the kind of image that can be streamed into."""

    # As recorded in the image: the name is relative to the image's folder or absolute.
    backing_filename: str | None
    backing_format: str | None
    # Cleared by who fills an image that nobody else uses before it loses its backing: zeroes need no entry
    # then, and no table, for what no entry is for reads as the backing at first, and as zeroes in the end.
    records_zeroes = True

    @property
    def is_backed(self) -> bool:
        """Whether clusters that are not in the image show a backing file, now or when it is open again.

        Only what the image records can say that there is none: the backing may be detached for a time.
        """
        return self.backing is not None or self.backing_filename is not None

    def backed_end(self, size: int) -> int:
        """Up to where a backing file may show in a disk of `size` bytes: anywhere if it is not open."""
        if self.backing is not None:
            return min(size, self.backing.size)
        return size if self.is_backed else 0

    def require_streamable(self) -> None:
        """Refuse a stream into this image if it would change more than where the disk's data is stored.

        Raises:   RequestError: the image holds something else that needs its present backing.
        """

    @abstractmethod
    def read_own_nowait(self, offset: int, length: int) -> Buffer | None:
        """Like `read_nowait`, but None as soon as any byte would come from the backing."""

    def announce_backing_read(self) -> None:
        """Have the file hear that the backing is about to be read; for nodes that inject faults."""

    async def unallocated(self, offset: int, length: int) -> tuple[list[Range], int]:
        """Tell what of a range this layer has nothing for, and up to where that is known now."""
        extents = await self.map(offset, length)
        lacking = [(extent.offset, extent.end) for extent in extents if extent.kind is Kind.UNALLOCATED]
        return lacking, extents[-1].end

    async def plan_backing_read(self, offset: int, length: int) -> list[Segment]:
        """Tell where the bytes of a range are stored as far as this layer has nothing to do with it.

        Shape:    as `plan_read`; zeroes where there is no backing, and behind its end.
        """
        backing = self.backing
        if backing is None or offset >= backing.size:
            return [Segment(length, None, 0)]
        stored = min(length, backing.size - offset)
        below = await backing.plan_read(offset, stored)
        return below if stored == length else [*below, Segment(length - stored, None, 0)]

    @abstractmethod
    async def fill(
        self,
        ranges: Sequence[Range],
        source: "SourcePlan",
        is_wanted: IsWanted,
        *,
        keep_cached: bool = False,
    ) -> FillCounts:
        """Store the data of `source` in those clusters of some ranges that hold nothing yet.

        `keep_cached`: it will be read soon, so it should stay in memory.

        Whole clusters of zeroes are stored as zero, if that `records_zeroes`. Nothing becomes visible before
        all of it is written, and then `is_wanted` is asked: a cluster that is no longer wanted, or that got
        content meanwhile, is left as it is.

        Needs:    ranges in order; starts and ends are multiples of `cluster_size` (the last end may be the
                  disk's end). The source covers them; what lies between them does not matter.
        Fails to: no cluster changed.
        """

    async def trim(self) -> None:
        """Give back space that the image has taken and does not use.

        Needs:    no request is in flight, and no copy.
        Raises:   StorageError: some of it stays taken; the image is as good as before.
        """

    @abstractmethod
    async def require_recordable(self, filename: str | None, backing_format: str | None) -> None:
        """Refuse what `change_backing` could not record.

        Raises:   RequestError: the header has no room for it.
        """

    @abstractmethod
    async def change_backing(self, filename: str | None, backing_format: str | None) -> None:
        """Record another backing file (None: none), in memory and on disk; leaves `backing` to the caller.

        Everything written or filled before is durable before the header changes, and the header
        is durable on return.

        Fails to: the old backing file is still recorded, unless the last sync itself failed.
        """

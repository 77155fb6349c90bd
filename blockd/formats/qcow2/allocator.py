"""Which host clusters are in use: the refcount table and its blocks.

Allocating changes memory only; a checkpoint makes it durable before any map entry that relies on
it. Freeing is the other way round: `free` takes what a map no longer names *in memory*, and the
cluster goes through these stations before it can be used again:

    unmapped    the map on disk may still name it
    dropped     the map on disk is durable without it: the refcount falls
    withheld    the fallen refcount is written; a read planned earlier may still be under way. In memory the
                cluster has a refcount of 1 still, so that nobody takes it; what is written says 0
    free        no such read is left: the space is punched and may be allocated

A cluster may have several users: a snapshot too, or several compressed clusters. Each that lets go lowers
the refcount by one; the last two stations are for the cluster whose refcount has come to 0.

Source: qcow2 specification, "Host cluster management".
"""

import asyncio
import itertools
from array import array
from collections.abc import Iterator

from blockd.aio import Turns
from blockd.block.file_events import FileEvent
from blockd.block.node import ProtocolNode
from blockd.formats.qcow2.corruption import Corruption
from blockd.formats.qcow2.header import Header
from blockd.formats.qcow2.mapping import TableWrite
from blockd.formats.qcow2.plans import Plans
from blockd.formats.qcow2.refcount_changes import LargerTable, RefcountChanges
from blockd.formats.qcow2.refcount_width import RefcountWidth, find_zeroes, used_count
from blockd.formats.qcow2.runs import Run, append_joined
from blockd.formats.qcow2.unused_space import UnusedSpace
from blockd.formats.qcow2.withheld import Withheld
from blockd.formats.table_cache import TableCache
from blockd.units import MIB, align_up

_TABLE_OFFSET_MASK = 0xFFFF_FFFF_FFFF_FE00
# Blocks of 64 KiB clusters cover 2 GiB of file each, and with 16-bit refcounts take 64 KiB.
BLOCK_CACHE_COUNT_MAX = 64
BLOCK_CACHE_COUNT_MIN = 4
BLOCK_CACHE_SIZE_MAX = 64 * MIB
# Clusters waiting to become free; past this a checkpoint is due.
UNMAPPED_COUNT_MAX = 1 << 16
# How many clusters are freed in one step, and after how many steps everybody else has a turn.
FREED_AT_ONCE_MAX = 1 << 8
DROPS_A_TURN = 1 << 4


class Allocator:
    """Allocates and frees the host clusters of one image."""

    def __init__(self, file: ProtocolNode, header: Header, table: "array[int]", reserved: set[int]) -> None:
        self._file = file
        self._reserved = reserved
        self.cluster_bits = header.cluster_bits
        self.cluster_size = header.cluster_size
        self.table_offset = header.refcount_table_offset
        self.table = table
        self._changed_table: set[int] = set()
        self._width = RefcountWidth(header.refcount_order)
        self._one = self._width.repeated(1, 1)
        # Clusters one refcount block covers.
        self.block_span = self.cluster_size * 8 // self._width.bits
        cached_count = BLOCK_CACHE_SIZE_MAX // (self.block_span * self._one.itemsize)
        self.cache: TableCache[array[int]] = TableCache(
            max(BLOCK_CACHE_COUNT_MIN, min(cached_count, BLOCK_CACHE_COUNT_MAX))
        )
        self._blocks = self.cache.tables
        self._changed_blocks = self.cache.changed
        self._next = 0  # no cluster below is free, as far as known, nor one below the floor
        self._floor = 0
        # The same of whole folios of the file's cache, which begin at multiples of so many clusters.
        self.folio_clusters = max(1, file.folio_length >> self.cluster_bits)
        self._next_folio = 0
        self._unmapped: list[Run] = []
        self._unmapped_count = 0
        self._withheld = Withheld(self.block_span)
        self._unused = UnusedSpace(-(-file.size >> self.cluster_bits), self.cluster_size)
        self._plans = Plans(self.cluster_bits)
        self.plan, self.take_leaving = self._plans.plan, self._plans.take_leaving

    # -- allocating ---------------------------------------------------------------------------

    def allocate_nowait(self, cluster_count: int) -> Run | None:
        """Allocate neighbouring clusters, at least one and at most `cluster_count`.

        Returns None when a refcount block has to be made available first: see `extend`.
        """
        while True:
            block_index, start = divmod(self._next, self.block_span)
            entries = self._blocks.get(block_index)
            if entries is None:
                return None
            found = find_zeroes(entries, start, 1)
            if found is not None:
                break
            self._next = (block_index + 1) * self.block_span
        first = block_index * self.block_span
        end = found + 1
        limit = min(found + cluster_count, self.block_span)
        if not any(entries[end:limit]):
            end = limit  # nearly always
        while end < limit and not entries[end]:
            end += 1
        run = Run((first + found) << self.cluster_bits, end - found)
        self._require_no_metadata(run)
        entries[found:end] = self._one * (end - found)
        self._changed_blocks.add(block_index)
        self._next = first + end
        self._unused.note_allocated(first + found, first + end)
        return run

    def _require_no_metadata(self, run: Run) -> None:
        if not self._reserved.isdisjoint(self.host_offsets(run)):
            raise Corruption(
                self._file, f"metadata of the image at or behind {run.host_offset:#x} has a refcount of 0"
            )

    async def extend(self) -> bool:
        """Make the refcount block at the search position available; False: the table is full."""
        return await self._make_available(self._next // self.block_span)

    async def _make_available(self, block_index: int) -> bool:
        if block_index >= len(self.table):
            return False
        if self.table[block_index]:
            await self._block(block_index)
        else:
            self._file.announce(FileEvent.REFBLOCK_ALLOC)
            self._add_block(block_index)
        return True

    async def allocate_contiguous(self, cluster_count: int) -> Run | None:
        """Allocate exactly `cluster_count` neighbours; None: the refcount table is too small for that."""
        first, turns = self._next, Turns()
        while True:
            await turns.pass_on()
            for block_index in self._blocks_of(first, cluster_count):
                if not await self._make_available(block_index):
                    return None
            next_free = self._next_free(first)
            if next_free == first and (next_free := self._used_end(first, cluster_count)) == first:
                break
            first = next_free
        return self._allocated(first, cluster_count)

    def _allocated(self, first: int, cluster_count: int) -> Run:
        run = Run(first << self.cluster_bits, cluster_count)
        self._require_no_metadata(run)
        self._set_refcounts(run, 1)
        self._unused.note_allocated(first, first + cluster_count)
        return run

    def _blocks_of(self, first: int, cluster_count: int) -> range:
        return range(first // self.block_span, (first + cluster_count - 1) // self.block_span + 1)

    def _next_free(self, cluster: int) -> int:
        """The first cluster from this one on that is free, or where the next block begins."""
        block_index, start = divmod(cluster, self.block_span)
        entries = self._blocks.get(block_index)
        if entries is None:
            return cluster
        found = find_zeroes(entries, start, 1)
        return block_index * self.block_span + (self.block_span if found is None else found)

    def _used_end(self, first: int, cluster_count: int) -> int:
        """Behind the last of some clusters that is not free, or not known to be; `first` if all are free."""
        for block_index, start, end in reversed(list(self._parts(first, cluster_count))):
            entries = self._blocks.get(block_index)
            count = end - start if entries is None else used_count(entries[start:end])
            if count:
                return block_index * self.block_span + start + count
        return first

    def _parts(self, first: int, cluster_count: int) -> Iterator[tuple[int, int, int]]:
        """Clusters as (block, start in it, end in it)."""
        for block_index in self._blocks_of(first, cluster_count):
            base = block_index * self.block_span
            end = min(first + cluster_count - base, self.block_span)
            yield block_index, max(first - base, 0), end

    def _parts_of(self, run: Run) -> Iterator[tuple[int, int, int]]:
        return self._parts(self._clusters(run)[0], run.cluster_count)

    async def allocate_folios(self, cluster_count: int) -> Run | None:
        """Allocate whole folios for up to `cluster_count` neighbours; None: not even one is to be had.

        Nobody else writes to them as long as they are the caller's.
        """
        step = self.folio_clusters
        cluster = align_up(max(self._next, self._next_folio), step)
        if cluster_count < step or step > self.block_span:
            return None
        while True:
            block_index, start = divmod(cluster, self.block_span)
            if not await self._make_available(block_index):
                return None
            found = find_zeroes(self._blocks[block_index], start, step)
            if found is not None:
                break
            cluster = (block_index + 1) * self.block_span
        end = found + step
        limit = min(found + cluster_count - cluster_count % step, self.block_span)
        entries = self._blocks[block_index]
        while end < limit and not any(entries[end : end + step]):
            end += step
        first = block_index * self.block_span + found
        self._next_folio = first + end - found
        return self._allocated(first, end - found)

    def _set_refcounts(self, run: Run, refcount: int) -> None:
        value = self._width.repeated(refcount, 1)
        for block_index, start, end in self._parts_of(run):
            self._blocks[block_index][start:end] = value * (end - start)
            self._changed_blocks.add(block_index)

    def give_back(self, run: Run) -> None:
        """Undo an allocation that no map, in memory or on disk, has ever named."""
        if not self._is_described(run):
            self.free(run)  # a block of it left memory meanwhile: take the long way
            return
        self._set_refcounts(run, 0)
        self._note_free(self._clusters(run)[0])
        self._unused.note(self._clusters(run))

    def withhold(self, run: Run) -> bool:
        """Let free clusters be allocated by `allocate_withheld` alone, until `release`; False: not these."""
        if not self._is_described(run):
            return False
        for block_index, start, end in self._parts_of(run):
            self._blocks[block_index][start:end] = self._one * (end - start)
            self._withheld.add(block_index, start, end)
        return True

    def allocate_withheld(self, run: Run) -> bool:
        """Allocate clusters that are withheld; False: they cannot be had now, and are released."""
        self.release([run])
        if self._is_described(run):
            self._set_refcounts(run, 1)
            return True
        return False

    def _is_described(self, run: Run) -> bool:
        """Whether the refcounts of all clusters are in memory."""
        blocks = self._blocks_of(self._clusters(run)[0], run.cluster_count)
        return all(block_index in self._blocks for block_index in blocks)

    def _is_used(self, cluster: int) -> bool:
        """Whether a cluster is not free, or not known to be."""
        block_index, index = divmod(cluster, self.block_span)
        entries = self._blocks.get(block_index)
        return entries is None or entries[index] != 0

    def _note_free(self, cluster: int) -> None:
        cluster = max(cluster, self._floor)
        self._next = min(self._next, cluster)
        self._next_folio = min(self._next_folio, cluster)

    def keep_off(self, end: int) -> None:
        """From now on allocate nothing before `end` in the file; 0: anywhere again."""
        self._floor = self._next = self._next_folio = -(-end >> self.cluster_bits)

    def _clusters(self, run: Run) -> range:
        first = run.host_offset >> self.cluster_bits
        return range(first, first + run.cluster_count)

    def host_offsets(self, run: Run) -> range:
        """The host offsets of the clusters of a run."""
        end = run.host_offset + (run.cluster_count << self.cluster_bits)
        return range(run.host_offset, end, self.cluster_size)

    # -- refcount blocks ----------------------------------------------------------------------

    def _add_block(self, block_index: int) -> None:
        """Make a refcount block, kept in the first of the clusters that it describes itself."""
        entries = self._width.repeated(0, self.block_span)
        entries[0] = 1
        self.table[block_index] = (block_index * self.block_span) << self.cluster_bits
        self._reserved.add(self.table[block_index])
        self.cache.put(block_index, entries)
        self._changed_table.add(block_index)
        self._unused.note_allocated(block_index * self.block_span, block_index * self.block_span + 1)

    async def _block(self, block_index: int) -> "array[int]":
        """The refcounts of a block, read if need be.

        Needs:    what is done with them is done before anything else is waited for: they may be evicted then.
        """
        entries = self._blocks.get(block_index)
        if entries is None:
            entries = self.cache.load_nowait(block_index, lambda: self._read_nowait(block_index))
        if entries is None:
            entries = await self.cache.load(block_index, lambda: self._read(block_index))
        return entries

    def _read_nowait(self, block_index: int) -> "array[int] | None":
        data = self._file.read_nowait(self._checked_block_offset(block_index), self.cluster_size)
        return None if data is None else self._withheld.in_memory(block_index, self._width.unpack(data))

    async def _read(self, block_index: int) -> "array[int]":
        host_offset = self._checked_block_offset(block_index)
        self._file.announce(FileEvent.REFBLOCK_LOAD)
        data = await self._file.read(host_offset, self.cluster_size)
        return self._withheld.in_memory(block_index, self._width.unpack(data))

    def _checked_block_offset(self, block_index: int) -> int:
        host_offset = self.table[block_index] & _TABLE_OFFSET_MASK if block_index < len(self.table) else 0
        if not host_offset or host_offset % self.cluster_size or host_offset >= self._file.size:
            raise Corruption(
                self._file,
                f"refcount table entry {block_index} points to {host_offset:#x}, "
                "which is not a refcount block inside the file",
            )
        return host_offset

    # -- freeing ------------------------------------------------------------------------------

    def free(self, run: Run) -> None:
        """Start the way of clusters to be free again; the map in memory no longer names them."""
        append_joined(self._unmapped, run, self.cluster_bits)
        self._unmapped_count += run.cluster_count
        self._plans.end_epoch()

    @property
    def is_under_pressure(self) -> bool:
        """Whether so much waits for a checkpoint that one should come now."""
        return self._unmapped_count > UNMAPPED_COUNT_MAX or self.cache.is_under_pressure

    def take_unmapped(self) -> list[Run]:
        """Hand out what was freed so far; the maps as they are now no longer name it."""
        taken, self._unmapped, self._unmapped_count = self._unmapped, [], 0
        return taken

    def put_back_unmapped(self, freed: list[Run]) -> None:
        """The checkpoint failed: the maps on disk may still name these."""
        self._unmapped += freed
        self._unmapped_count += sum(run.cluster_count for run in freed)

    async def drop(self, freed: list[Run]) -> None:
        """Lower the refcounts of clusters that the durable maps no longer name.

        Fails to: what is left in `freed` was not dropped.
        """
        for count in itertools.count(1):
            if not freed:
                return
            if count % DROPS_A_TURN == 0:
                await asyncio.sleep(0)
            run = freed[-1]
            self._file.announce(FileEvent.CLUSTER_FREE)
            block_index, start = divmod(run.host_offset >> self.cluster_bits, self.block_span)
            end = min(start + min(run.cluster_count, FREED_AT_ONCE_MAX), self.block_span)
            dropped = self._drop_part(await self._block(block_index), block_index, start, end)
            if run.cluster_count == dropped:
                freed.pop()
            else:
                left_offset = run.host_offset + (dropped << self.cluster_bits)
                freed[-1] = Run(left_offset, run.cluster_count - dropped)

    def _drop_part(self, entries: "array[int]", block_index: int, start: int, end: int) -> int:
        """Lower the refcounts of some clusters of a block; returns of how many: as many as have the same."""
        entry, first = entries[start], block_index * self.block_span + start
        if not entry or self._withheld.find(block_index, start, start + 1) == start:
            where = f"the cluster at {first << self.cluster_bits:#x}"
            raise Corruption(self._file, f"{where} was in use with a refcount of 0; check the image")
        if entries[start:end] != self._width.repeated(entry, end - start):
            end = next(index for index in range(start, end) if entries[index] != entry)
        end = self._withheld.find(block_index, start, end)
        if entry == 1:
            self._withhold(Run(first << self.cluster_bits, end - start), block_index, start, end)
        else:
            entries[start:end] = self._width.repeated(entry - 1, end - start)
        self._changed_blocks.add(block_index)
        return end - start

    def _withhold(self, run: Run, block_index: int, start: int, end: int) -> None:
        self._reserved.difference_update(self.host_offsets(run))
        self._withheld.add(block_index, start, end)
        self._plans.leave(run)

    @property
    def has_leaving(self) -> bool:
        """Whether clusters with a fallen refcount wait for plans to end."""
        return self._plans.has_leaving

    def release(self, runs: list[Run]) -> None:
        """These may be allocated from now on."""
        for run in runs:
            for block_index, start, end in self._parts_of(run):
                self._release_part(block_index, start, end)
            self._note_free(self._clusters(run)[0])

    def _release_part(self, block_index: int, start: int, end: int) -> None:
        self._withheld.remove(block_index, start, end)
        if (entries := self._blocks.get(block_index)) is not None:
            entries[start:end] = self._width.repeated(0, end - start)  # as the disk has it

    async def free_leaked(self, clusters: range, refcount: int, excess: int) -> int:
        """Take users away from those of some clusters that have this refcount still; returns from how many.

        What a map has named, and is on its way to lose a user already, is left alone.

        Needs:    no checkpoint is under way; all clusters are described by one block.
        """
        block_index, start = divmod(clusters.start, self.block_span)
        entries = await self._block(block_index)
        freed = bytearray(len(clusters))  # flags
        for run in self._unmapped:
            part = self._clusters(run)
            for cluster in range(max(part.start, clusters.start), min(part.stop, clusters.stop)):
                freed[cluster - clusters.start] = 1
        found = [
            cluster
            for index, cluster in enumerate(clusters, start)
            if entries[index] == refcount
            and not freed[index - start]
            and self._withheld.find(block_index, index, index + 1) != index
        ]
        for cluster in found * excess:
            self.free(Run(cluster << self.cluster_bits, 1))
        return len(found)

    # -- unused space -------------------------------------------------------------------------

    async def used_end(self) -> int:
        """Where the last cluster ends that is in use, or may be named by a map on disk or by a plan."""
        for block_index in reversed(range(used_count(self.table))):
            if self.table[block_index] and (used := used_count(await self._block(block_index))):
                return (block_index * self.block_span + used) << self.cluster_bits
        return 0

    def take_unused(self) -> list[Run]:
        """Hand out what was given back or passed over since this was called last, and is free still.

        Shape:    runs, in order; what is not in memory any more is left out.
        """
        runs: list[Run] = []
        for clusters in self._unused.take():
            for is_used, group in itertools.groupby(clusters, self._is_used):
                if not is_used:
                    first, *others = group
                    runs.append(Run(first << self.cluster_bits, 1 + len(others)))
        return runs

    # -- checkpoints --------------------------------------------------------------------------

    @property
    def has_changes(self) -> bool:
        """Whether there is something that the disk does not have."""
        return bool(self.cache.changed or self._changed_table or self._unmapped)

    def take_changes(self) -> RefcountChanges:
        """Hand out everything that the disk does not have, and count it as written."""
        blocks, table = self.cache.take_changed(), sorted(self._changed_table)
        changes = RefcountChanges(
            [self._block_write(index) for index in blocks],
            [TableWrite(self.table_offset + index * 8, self.table[index : index + 1]) for index in table],
            blocks,
            table,
        )
        self._changed_table.clear()
        return changes

    def _block_write(self, block_index: int) -> TableWrite:
        pack = self._withheld.pack(block_index, self._width.pack)
        return TableWrite(self.table[block_index], self._blocks[block_index][:], pack)

    def changes_written(self, changes: RefcountChanges) -> None:
        """The disk has these changes now."""
        self.cache.write_succeeded(changes.block_indexes)

    def changes_failed(self, changes: RefcountChanges) -> None:
        """The disk may or may not have these changes: they have to be written again."""
        self.cache.write_failed(changes.block_indexes)
        self._changed_table.update(changes.table_indexes)

    # -- a larger refcount table ----------------------------------------------------------------

    def plan_larger_table(self) -> LargerTable:
        """Lay out a table that is larger, with all blocks that are durable."""
        return LargerTable.planned(
            self.table_offset, self.table, self._changed_table, self._width, self.cluster_bits
        )

    def use_larger_table(self, larger: "LargerTable") -> None:
        """The header on disk names the new table: use it, and free the old one."""
        self._reserved.difference_update(self.host_offsets(larger.old))
        self._reserved.update(self.host_offsets(larger.new))
        self._reserved.update(larger.entries[larger.first_block_index :][: len(larger.blocks)])
        self.table.extend(larger.entries[len(self.table) :])
        self.table_offset = larger.new.host_offset
        first = larger.first_block_index * self.block_span
        self._unused.note_allocated(first, self._clusters(larger.new).stop)
        for number, block in enumerate(larger.blocks):
            self.cache.put(larger.first_block_index + number, block.entries, is_changed=False)
        self.free(larger.old)

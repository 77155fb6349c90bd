"""Which host clusters are in use: the refcount table and its blocks.

Allocating changes memory only; a checkpoint makes it durable before any map entry that relies on
it. Freeing is the other way round: `free` takes what a map no longer names *in memory*, and the
cluster goes through these stations before it can be used again:

    unmapped    the map on disk may still name it
    dropped     the map on disk is durable without it: the refcount falls
    withheld    the fallen refcount is written; a read planned earlier may still be under way
    free        no such read is left: the space is punched and may be allocated

A cluster may have several users: a snapshot too, or several compressed clusters. Each that lets go lowers
the refcount by one; the last two stations are for the cluster whose refcount has come to 0.

Source: qcow2 specification, "Host cluster management".
"""

import contextlib
from array import array
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from blockd.block.file_events import FileEvent
from blockd.block.node import ProtocolNode
from blockd.formats.qcow2.corruption import Corruption
from blockd.formats.qcow2.header import Header
from blockd.formats.qcow2.mapping import TableWrite
from blockd.formats.qcow2.refcount_width import RefcountWidth
from blockd.units import MIB

_TABLE_OFFSET_MASK = 0xFFFF_FFFF_FFFF_FE00
# Blocks of 64 KiB clusters cover 2 GiB of file each, and with 16-bit refcounts take 64 KiB.
BLOCK_CACHE_COUNT_MAX = 64
BLOCK_CACHE_COUNT_MIN = 4
BLOCK_CACHE_SIZE_MAX = 64 * MIB
# Clusters waiting to become free; past this a checkpoint is due.
UNMAPPED_COUNT_MAX = 1 << 16


class Run(NamedTuple):
    """Neighbouring host clusters."""

    host_offset: int
    cluster_count: int


class Leaving(NamedTuple):
    """A cluster whose refcount has come to 0; plans of `epoch` and older may still name it."""

    host_offset: int
    epoch: int


class RefcountChanges(NamedTuple):
    """What a checkpoint has to write: blocks first, then the table entries of new blocks."""

    blocks: list[TableWrite]
    table_entries: list[TableWrite]
    block_indexes: list[int]
    table_indexes: list[int]


class Allocator:
    """Allocates and frees the host clusters of one image."""

    def __init__(self, file: ProtocolNode, header: Header, table: "array[int]", reserved: set[int]) -> None:
        self._file = file
        self._reserved = reserved
        self.cluster_bits = header.cluster_bits
        self.cluster_size = header.cluster_size
        self.table_offset = header.refcount_table_offset
        self.table = table
        self._blocks: dict[int, array[int]] = {}
        self._changed_blocks: set[int] = set()
        self._writing_blocks: set[int] = set()
        self._changed_table: set[int] = set()
        self._width = RefcountWidth(header.refcount_order)
        self._one = self._width.repeated(1, 1)
        # Clusters one refcount block covers.
        self.block_span = self.cluster_size * 8 // self._width.bits
        cached_count = BLOCK_CACHE_SIZE_MAX // (self.block_span * self._one.itemsize)
        self._block_count_max = max(BLOCK_CACHE_COUNT_MIN, min(cached_count, BLOCK_CACHE_COUNT_MAX))
        self._next = 0  # no cluster below is free, as far as known
        self._unmapped: list[Run] = []
        self._unmapped_count = 0
        self._withheld: set[int] = set()
        self._leaving: list[Leaving] = []
        self._epoch = 0
        self._plans: Counter[int] = Counter()

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
            found = self._find_free(entries, block_index, start)
            if found is not None:
                break
            self._next = (block_index + 1) * self.block_span
        first = block_index * self.block_span
        end = found + 1
        limit = min(found + cluster_count, self.block_span)
        if not self._withheld and not any(entries[end:limit]):
            end = limit  # nearly always
        while end < limit and not entries[end] and first + end not in self._withheld:
            end += 1
        run = Run((first + found) << self.cluster_bits, end - found)
        self._require_no_metadata(run)
        entries[found:end] = self._one * (end - found)
        self._changed_blocks.add(block_index)
        self._next = first + end
        return run

    def _require_no_metadata(self, run: Run) -> None:
        if not self._reserved.isdisjoint(self.host_offsets(run)):
            raise Corruption(
                self._file, f"metadata of the image at or behind {run.host_offset:#x} has a refcount of 0"
            )

    def _find_free(self, entries: "array[int]", block_index: int, start: int) -> int | None:
        try:
            while True:
                start = entries.index(0, start)
                if block_index * self.block_span + start not in self._withheld:
                    return start
                start += 1
        except ValueError:
            return None

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
        first = self._next
        while True:
            last = first + cluster_count - 1
            for block_index in range(first // self.block_span, last // self.block_span + 1):
                if not await self._make_available(block_index):
                    return None
            used = [cluster for cluster in range(first, last + 1) if self._is_used(cluster)]
            if not used:
                break
            first = used[-1] + 1
        run = Run(first << self.cluster_bits, cluster_count)
        self._require_no_metadata(run)
        self._set_refcounts(run, 1)
        return run

    def _is_used(self, cluster: int) -> bool:
        block_index, index = divmod(cluster, self.block_span)
        entries = self._blocks.get(block_index)
        return entries is None or entries[index] != 0 or cluster in self._withheld

    def _set_refcounts(self, run: Run, refcount: int) -> None:
        for cluster in self._clusters(run):
            block_index, index = divmod(cluster, self.block_span)
            self._blocks[block_index][index] = refcount
            self._changed_blocks.add(block_index)

    def give_back(self, run: Run) -> None:
        """Undo an allocation that no map, in memory or on disk, has ever named."""
        first, last = self._clusters(run)[0], self._clusters(run)[-1]
        if any(block not in self._blocks for block in (first // self.block_span, last // self.block_span)):
            self.free(run)  # its block left memory meanwhile: take the long way
            return
        self._set_refcounts(run, 0)
        self._next = min(self._next, first)

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
        self._blocks[block_index] = entries
        self._changed_blocks.add(block_index)
        self._changed_table.add(block_index)

    async def _block(self, block_index: int) -> "array[int]":
        entries = self._blocks.get(block_index)
        if entries is None:
            host_offset = self._checked_block_offset(block_index)
            data = self._file.read_nowait(host_offset, self.cluster_size)
            if data is None:
                self._file.announce(FileEvent.REFBLOCK_LOAD)
                data = await self._file.read(host_offset, self.cluster_size)
            # Another caller may have read it while this one waited; the first one counts.
            entries = self._blocks.setdefault(block_index, self._width.unpack(data))
            self._evict_one(block_index)
        return entries

    def _checked_block_offset(self, block_index: int) -> int:
        host_offset = self.table[block_index] & _TABLE_OFFSET_MASK if block_index < len(self.table) else 0
        if not host_offset or host_offset % self.cluster_size or host_offset >= self._file.size:
            raise Corruption(
                self._file,
                f"refcount table entry {block_index} points to {host_offset:#x}, "
                "which is not a refcount block inside the file",
            )
        return host_offset

    def _evict_one(self, kept: int) -> None:
        if len(self._blocks) > self._block_count_max:
            needed = self._changed_blocks | self._writing_blocks | {kept}
            if (index := next((index for index in self._blocks if index not in needed), None)) is not None:
                del self._blocks[index]

    # -- plans: reads under way that name clusters ----------------------------------------------

    @contextlib.contextmanager
    def plan(self) -> Iterator[None]:
        """While inside, no cluster that a map named on entry is used for anything else."""
        epoch = self._epoch
        self._plans[epoch] += 1
        try:
            yield
        finally:
            self._plans[epoch] -= 1
            if not self._plans[epoch]:
                del self._plans[epoch]

    # -- freeing ------------------------------------------------------------------------------

    def free(self, run: Run) -> None:
        """Start the way of clusters to be free again; the map in memory no longer names them."""
        self._unmapped.append(run)
        self._unmapped_count += run.cluster_count
        self._epoch += 1

    @property
    def is_under_pressure(self) -> bool:
        """Whether so much waits for a checkpoint that one should come now."""
        return (
            self._unmapped_count > UNMAPPED_COUNT_MAX or len(self._changed_blocks) * 2 > self._block_count_max
        )

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
        while freed:
            run = freed[-1]
            await self._drop_cluster(run.host_offset >> self.cluster_bits)
            if run.cluster_count == 1:
                freed.pop()
            else:
                freed[-1] = Run(run.host_offset + self.cluster_size, run.cluster_count - 1)

    async def _drop_cluster(self, cluster: int) -> None:
        self._file.announce(FileEvent.CLUSTER_FREE)
        host_offset = cluster << self.cluster_bits
        block_index, index = divmod(cluster, self.block_span)
        entries = await self._block(block_index)
        if not entries[index]:
            raise Corruption(
                self._file,
                f"the cluster at {host_offset:#x} was in use with a refcount of 0; check the image",
            )
        entries[index] -= 1
        self._changed_blocks.add(block_index)
        if not entries[index]:
            self._reserved.discard(host_offset)
            self._withheld.add(cluster)
            # Of several users the last to let go decides, whichever is dropped last: any plan so far may.
            self._leaving.append(Leaving(host_offset, self._epoch - 1))

    @property
    def has_leaving(self) -> bool:
        """Whether clusters with a fallen refcount wait for plans to end."""
        return bool(self._leaving)

    def take_leaving(self) -> list[Run]:
        """Hand out the withheld clusters that no plan can name any more.

        Shape:    neighbours joined, in order.
        """
        oldest = min(self._plans, default=self._epoch)
        ready = sorted(entry.host_offset for entry in self._leaving if entry.epoch < oldest)
        self._leaving = [entry for entry in self._leaving if entry.epoch >= oldest]
        runs: list[Run] = []
        for host_offset in ready:
            if runs and runs[-1].host_offset + (runs[-1].cluster_count << self.cluster_bits) == host_offset:
                runs[-1] = Run(runs[-1].host_offset, runs[-1].cluster_count + 1)
            else:
                runs.append(Run(host_offset, 1))
        return runs

    def release(self, runs: list[Run]) -> None:
        """These may be allocated from now on."""
        for run in runs:
            self._withheld.difference_update(self._clusters(run))
            self._next = min(self._next, self._clusters(run)[0])

    # -- checkpoints --------------------------------------------------------------------------

    def take_changes(self) -> RefcountChanges:
        """Hand out everything that the disk does not have, and count it as written."""
        blocks, table = sorted(self._changed_blocks), sorted(self._changed_table)
        changes = RefcountChanges(
            [self._block_write(self.table[index], self._blocks[index][:]) for index in blocks],
            [TableWrite(self.table_offset + index * 8, self.table[index : index + 1]) for index in table],
            blocks,
            table,
        )
        self._changed_blocks.clear()
        self._changed_table.clear()
        self._writing_blocks.update(blocks)
        return changes

    def _block_write(self, host_offset: int, entries: "array[int]") -> TableWrite:
        return TableWrite(host_offset, entries, self._width.pack)

    def changes_written(self, changes: RefcountChanges) -> None:
        """The disk has these changes now."""
        self._writing_blocks.difference_update(changes.block_indexes)

    def changes_failed(self, changes: RefcountChanges) -> None:
        """The disk may or may not have these changes: they have to be written again."""
        self._writing_blocks.difference_update(changes.block_indexes)
        self._changed_blocks.update(changes.block_indexes)
        self._changed_table.update(changes.table_indexes)

    # -- a larger refcount table ----------------------------------------------------------------

    def plan_larger_table(self) -> "LargerTable":
        """Lay out a table half as large again, right behind what the present one can describe.

        Blocks that are not durable yet are left out of it: the next checkpoint adds them.
        """
        old_count = len(self.table)
        old_clusters = old_count * 8 // self.cluster_size
        new_clusters = old_clusters + max(1, old_clusters // 2)
        block_count = 1
        while block_count * self.block_span < block_count + new_clusters:
            block_count += 1
        first = old_count * self.block_span
        table = self.table[:]
        for index in self._changed_table:
            table[index] = 0  # its block is not durable yet
        table.extend([(first + number) << self.cluster_bits for number in range(block_count)])
        table.extend([0] * (new_clusters * self.cluster_size // 8 - len(table)))
        return LargerTable(
            old=Run(self.table_offset, old_clusters),
            new=Run((first + block_count) << self.cluster_bits, new_clusters),
            entries=table,
            blocks=[
                self._block_write((first + number) << self.cluster_bits, entries)
                for number, entries in enumerate(
                    self._initial_blocks(block_count, block_count + new_clusters)
                )
            ],
            first_block_index=old_count,
        )

    def _initial_blocks(self, block_count: int, used: int) -> "list[array[int]]":
        counts = self._width.repeated(1, used)
        counts += self._width.repeated(0, block_count * self.block_span - used)
        return [counts[start : start + self.block_span] for start in range(0, len(counts), self.block_span)]

    def use_larger_table(self, larger: "LargerTable") -> None:
        """The header on disk names the new table: use it, and free the old one."""
        self._reserved.difference_update(self.host_offsets(larger.old))
        self._reserved.update(self.host_offsets(larger.new))
        self._reserved.update(larger.entries[larger.first_block_index :][: len(larger.blocks)])
        self.table.extend(larger.entries[len(self.table) :])
        self.table_offset = larger.new.host_offset
        for number, block in enumerate(larger.blocks):
            self._blocks[larger.first_block_index + number] = block.entries
        self.free(larger.old)


class LargerTable(NamedTuple):
    """A refcount table to move to, with the new blocks that describe the clusters of both."""

    old: Run
    new: Run
    entries: "array[int]"
    blocks: list[TableWrite]
    first_block_index: int

    def writes(self) -> list[TableWrite]:
        """All of it, for the disk."""
        return [*self.blocks, TableWrite(self.new.host_offset, self.entries)]

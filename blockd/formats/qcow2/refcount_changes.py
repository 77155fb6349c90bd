"""What is to be written when refcounts have changed."""

from array import array
from collections.abc import Iterable
from typing import NamedTuple, Self

from blockd.formats.qcow2.mapping import TableWrite
from blockd.formats.qcow2.refcount_width import RefcountWidth
from blockd.formats.qcow2.runs import Run


class RefcountChanges(NamedTuple):
    """What a checkpoint has to write: blocks first, then the table entries of new blocks."""

    blocks: list[TableWrite]
    table_entries: list[TableWrite]
    block_indexes: list[int]
    table_indexes: list[int]


class LargerTable(NamedTuple):
    """A refcount table to move to, with the new blocks that describe the clusters of both."""

    old: Run
    new: Run
    entries: "array[int]"
    blocks: list[TableWrite]
    first_block_index: int

    @classmethod
    def planned(
        cls,
        table_offset: int,
        table: "array[int]",
        not_durable: Iterable[int],
        width: RefcountWidth,
        cluster_bits: int,
    ) -> Self:
        """Lay out a table half as large again, right behind what the present one can describe.

        Blocks that are `not_durable` yet are left out of it: the next checkpoint adds them.
        """
        cluster_size, old_count = 1 << cluster_bits, len(table)
        span = cluster_size * 8 // width.bits
        old_clusters = old_count * 8 // cluster_size
        new_clusters = old_clusters + max(1, old_clusters // 2)
        block_count = 1
        while block_count * span < block_count + new_clusters:
            block_count += 1
        first = old_count * span
        entries = table[:]
        for index in not_durable:
            entries[index] = 0
        places = [(first + number) << cluster_bits for number in range(block_count)]
        entries.extend(places)
        entries.extend([0] * (new_clusters * cluster_size // 8 - len(entries)))
        counts = width.repeated(1, block_count + new_clusters)
        counts += width.repeated(0, block_count * span - len(counts))
        return cls(
            old=Run(table_offset, old_clusters),
            new=Run((first + block_count) << cluster_bits, new_clusters),
            entries=entries,
            blocks=[
                TableWrite(place, counts[number * span :][:span], width.pack)
                for number, place in enumerate(places)
            ],
            first_block_index=old_count,
        )

    def writes(self) -> list[TableWrite]:
        """All of it, for the disk."""
        return [*self.blocks, TableWrite(self.new.host_offset, self.entries)]

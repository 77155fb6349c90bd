"""Putting finished copies into a map, piece by piece, each inside one of its tables.

How an image allocates, and what an entry looks like, its format knows; that nothing is lost on the way when
a table cannot be had is the same for all.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Final, NamedTuple

from blockd.block.node import FillCounts


class Piece(NamedTuple):
    """Neighbouring empty clusters of the guest, and where in the file their copy is; None: all zeroes."""

    offset: int
    cluster_count: int
    host_offset: int | None


# Puts pieces that one table maps into the map, where their clusters are still empty and still wanted; what
# is not, it gives back. Counts clusters.
PublishPieces = Callable[[list[Piece]], Awaitable[FillCounts]]
# Undoes an allocation: host offset, count of clusters.
GiveBack = Callable[[int, int], None]

# So many pieces are published at once: in about a millisecond.
PIECE_COUNT_MAX: Final = 256


class Layout(NamedTuple):
    """How an image maps its disk, in powers of two of bytes, and whether it is told of zeroes."""

    cluster_bits: int
    table_bits: int  # what one table maps
    records_zeroes: bool


async def publish_pieces(
    pieces: list[Piece], layout: Layout, publish: PublishPieces, give_back: GiveBack
) -> FillCounts:
    """Publish all pieces, which are in order.

    Fails to: what is not published is given back.
    """
    cluster_bits, table_bits, records_zeroes = layout
    counts = FillCounts(0, 0, 0)
    if not records_zeroes:
        counts = FillCounts(0, sum(piece.cluster_count for piece in pieces if piece.host_offset is None), 0)
        pieces = [piece for piece in pieces if piece.host_offset is not None]
    waiting = list(_by_table(pieces, cluster_bits, table_bits))[::-1]
    try:
        while waiting:
            done = await publish(waiting[-1])
            waiting.pop()
            counts = FillCounts(*map(sum, zip(counts, done, strict=True)))
            if waiting:
                await asyncio.sleep(0)  # guests have their turn
    except BaseException:
        for batch in waiting:
            give_back_pieces(batch, give_back)
        raise
    return FillCounts(*(count << cluster_bits for count in counts))


def _by_table(pieces: list[Piece], cluster_bits: int, table_bits: int) -> Iterator[list[Piece]]:
    """The pieces, a few at a time, those together that one table maps."""
    batch: list[Piece] = []
    for whole in pieces:
        rest: Piece | None = whole
        while rest is not None:
            piece, rest = _split_at_table(rest, cluster_bits, table_bits)
            is_same_table = bool(batch) and batch[0].offset >> table_bits == piece.offset >> table_bits
            if batch and (not is_same_table or len(batch) == PIECE_COUNT_MAX):
                yield batch
                batch = []
            batch.append(piece)
    if batch:
        yield batch


def give_back_pieces(pieces: list[Piece], give_back: GiveBack) -> None:
    """Undo the allocations for pieces that are not published."""
    for piece in pieces:
        if piece.host_offset is not None:
            give_back(piece.host_offset, piece.cluster_count)


def _split_at_table(piece: Piece, cluster_bits: int, table_bits: int) -> tuple[Piece, Piece | None]:
    """The part of a piece that one table maps, and the rest."""
    table_end = ((piece.offset >> table_bits) + 1) << table_bits
    count = (table_end - piece.offset) >> cluster_bits
    if count >= piece.cluster_count:
        return piece, None
    host_offset = piece.host_offset
    rest_host_offset = None if host_offset is None else host_offset + (count << cluster_bits)
    rest = Piece(table_end, piece.cluster_count - count, rest_host_offset)
    return Piece(piece.offset, count, host_offset), rest

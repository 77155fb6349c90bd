"""Putting finished copies into a map, piece by piece, each inside one of its tables.

How an image allocates, and what an entry looks like, its format knows; that nothing is lost on the way when
a table cannot be had is the same for all.
"""

from collections.abc import Awaitable, Callable
from typing import NamedTuple

from blockd.block.node import FillCounts


class Piece(NamedTuple):
    """Neighbouring empty clusters of the guest, and where in the file their copy is; None: all zeroes."""

    offset: int
    cluster_count: int
    host_offset: int | None


# Puts a piece that one table maps into the map, where its clusters are still empty and still wanted; what
# is not, it gives back. Counts clusters.
PublishPiece = Callable[[Piece], Awaitable[FillCounts]]
# Undoes an allocation: host offset, count of clusters.
GiveBack = Callable[[int, int], None]


async def publish_pieces(
    pieces: list[Piece], cluster_bits: int, table_bits: int, publish: PublishPiece, give_back: GiveBack
) -> FillCounts:
    """Publish all pieces; a table maps `1 << table_bits` bytes.

    Fails to: what is not published is given back.
    """
    counts = FillCounts(0, 0, 0)
    waiting = pieces[::-1]
    try:
        while waiting:
            piece, rest = _split_at_table(waiting[-1], cluster_bits, table_bits)
            done = await publish(piece)
            waiting[-1:] = [rest] if rest is not None else []
            counts = FillCounts(*map(sum, zip(counts, done, strict=True)))
    except BaseException:
        give_back_pieces(waiting, give_back)
        raise
    return FillCounts(*(count << cluster_bits for count in counts))


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

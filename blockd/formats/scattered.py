"""Reading a few clusters that lie here and there, without a plan."""

from typing import Final

from blockd.block.node import Buffer, OverlayNode

# So many clusters are read or written one by one at once: more are cheaper with a plan for all of them.
CLUSTERS_NOWAIT_MAX: Final = 16


def read_clusters_nowait(node: OverlayNode, offset: int, length: int) -> Buffer | None:
    """Read a few clusters one after the other if that needs no waiting."""
    size, end = node.cluster_size, offset + length
    stop = offset - offset % size + size
    if stop >= end or length > CLUSTERS_NOWAIT_MAX * size:
        return None
    pieces: list[Buffer] = []
    while offset < end:
        piece = node.read_nowait(offset, min(stop, end) - offset)
        if piece is None:
            return None
        pieces.append(piece)
        offset, stop = stop, stop + size
    return b"".join(pieces)

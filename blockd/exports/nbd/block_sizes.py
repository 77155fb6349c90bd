"""The block sizes that an export advertises: those of the node that it is on, as QEMU tells them."""

from typing import NamedTuple

from blockd.block.node import BlockNode
from blockd.units import KIB, align_down
from blockd.wire.nbd import constants as nbd

# The unit the page cache works in.
_PREFERRED = 4 * KIB
# The most that NBD allows; clients refuse an export with more.
_MINIMUM_MAX = 64 * KIB


class BlockSizes(NamedTuple):
    """In bytes; requests of other sizes are carried out too."""

    minimum: int
    preferred: int
    maximum: int


def block_sizes(node: BlockNode, *, has_minimum: bool) -> BlockSizes:
    """Tell the sizes of requests to a disk that do not have to be widened or cut.

    `has_minimum`: False for clients that would not keep to it.
    """
    unit = min(node.request_alignment, _MINIMUM_MAX)
    minimum = unit if has_minimum else 1
    maximum = min(_transfer_max(node) or nbd.REQUEST_LENGTH_MAX, nbd.REQUEST_LENGTH_MAX)
    return BlockSizes(minimum, max(_PREFERRED, minimum), align_down(maximum, unit))


def _transfer_max(node: BlockNode) -> int:
    """The least of what it and the nodes below it move at once; 0 if none of them says."""
    if node.transfer_max:
        return node.transfer_max
    return min(filter(None, map(_transfer_max, node.children().values())), default=0)

"""Repair a qcow2 image that nobody has open: free what is leaked, rebuild refcounts, right the flags.

The maps (L1 and L2 tables) are what counts: which cluster is where is never changed, only how often
it is used according to the refcounts, and the COPIED flags that follow from that.
"""

from dataclasses import dataclass
from typing import Literal

from blockd.block.node import ProtocolNode
from blockd.formats.qcow2.check import CheckReport, check

RepairMode = Literal["leaks", "all"]


@dataclass(frozen=True)
class RepairReport:
    """What was found, what is left, and why nothing was changed if that is so."""

    before: CheckReport
    after: CheckReport
    refusal: str | None = None

    @property
    def leaks_fixed(self) -> int:
        return max(0, self.before.leaks - self.after.leaks)

    @property
    def corruptions_fixed(self) -> int:
        return max(0, self.before.corruptions - self.after.corruptions)


async def repair(file: ProtocolNode, mode: RepairMode = "all") -> RepairReport:
    """Repair the image in `file`, which nobody else uses.

    `leaks`: only give back space that nothing uses, which an image with corruptions does not get.
    What cannot be repaired without losing data is not tried: the report says it, and nothing is changed.

    Raises:   ImageError: the header is so wrong that nothing behind it can be looked at, or the file is
              too large. StorageError: the disk failed.
    Fails to: the content is the same, and the image can be repaired again.
    """
    before = await check(file)
    if not (before.corruptions or before.leaks or before.is_dirty or before.is_marked_corrupt):
        return RepairReport(before, before)
    return RepairReport(before, before, f"'{file.filename}': repair is not there yet ({mode})")

"""Repair a qcow2 image that nobody has open: free what is leaked, rebuild refcounts, right the flags.

The maps (L1 and L2 tables) are what counts: which cluster is where is never changed, only how often
it is used according to the refcounts, and the COPIED flags that follow from that.
"""

from blockd.block.node import ProtocolNode
from blockd.formats.check_report import CheckReport, Repair
from blockd.formats.qcow2.check import check


async def repair(file: ProtocolNode, mode: Repair = Repair.ALL) -> CheckReport:
    """Repair the image in `file`, which nobody else uses; durable on return.

    The report is of the image as it is then. What cannot be repaired without losing data is not tried:
    `refusal` says so, and nothing is changed.

    Raises:   ImageError: the header is so wrong that nothing behind it can be looked at, or the file is
              too large. StorageError: the disk failed.
    Fails to: the content is the same, and the image can be repaired again.
    """
    report = await check(file)
    if report.corruptions or report.leaks or report.is_dirty or report.is_marked_corrupt:
        report.refusal = f"'{file.filename}': repair is not there yet ({mode.value})"
    return report

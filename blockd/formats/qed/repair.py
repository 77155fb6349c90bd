"""Repair a QED image: take entries out that name nothing, give back what no table names.

    1  bad entries become unallocated       sync
    2  space of leaks given back            sync    (not if the entries are still wrong)
    3  need-check bit cleared               sync

A crash between any two writes leaves an image that still needs a check, and the next one goes on. A
cluster that two entries name cannot be repaired, for nobody knows whose it is: the bit stays then.

QED keeps no list of free clusters. Leaked ones at the end are cut off; into others holes are punched:
that gives their space back, but they stay leaks to whoever counts them.

Source:   QED specification, "Consistency checking".
"""

import struct
from collections.abc import Iterable

from blockd.aio import in_thread
from blockd.block.node import ProtocolNode
from blockd.errors import ImageError
from blockd.formats.check_report import CheckReport, Repair
from blockd.formats.qed import header as qed_header
from blockd.formats.qed.allocator import Run
from blockd.formats.qed.check import Found, examine, read_header

# Holes that a repair may leave for others to fill: past this they are forgotten, which costs space only.
_LEAK_COUNT_MAX = 1 << 16


async def repair(file: ProtocolNode, what: Repair) -> CheckReport:
    """Repair the image in `file`, which nobody else uses; tells what is left to be repaired.

    Raises:   ImageError: the image cannot be checked at all. StorageError: the disk failed.
    Fails to: an image that is as it was, or partly repaired, and still marked if it was.
    """
    found = await examine(file)
    if what is Repair.ALL:
        await _repair_entries(file, found)
    if not found.report.corruptions:
        await in_thread(_give_back, file, found)
        if what is Repair.ALL:
            await _finish(file, found)
    return found.report


async def recover(file: ProtocolNode) -> list[Run]:
    """Make an image that needs a check fit to be written; returns clusters that are free.

    Raises:   ImageError: there is damage that cannot be repaired.
    """
    found = await examine(file)
    await _repair_entries(file, found)
    report = found.report
    if report.corruptions:
        # Of very many only the first are described, and those may be just the ones that were repaired.
        first = f", the first: {report.findings[0]}" if report.findings else ""
        raise ImageError(
            f"'{file.filename}' was not closed cleanly and has {report.corruptions} errors in its tables "
            f"that cannot be repaired{first}; it can be opened read-only"
        )
    left = await in_thread(_give_back, file, found)
    await _finish(file, found)
    return left[:_LEAK_COUNT_MAX]


async def _repair_entries(file: ProtocolNode, found: Found) -> None:
    await in_thread(_clear_entries, file, found.bad_entries)
    report, repaired = found.report, set(found.bad_entries)
    report.corruptions -= len(repaired)
    report.corruptions_fixed += len(repaired)
    report.findings = [finding for finding in report.findings if finding.offset not in repaired]


async def _finish(file: ProtocolNode, found: Found) -> None:
    if found.report.is_dirty:
        await in_thread(_mark_clean, file)
        found.report.is_dirty = False


def _clear_entries(file: ProtocolNode, offsets: Iterable[int]) -> None:
    for offset in offsets:
        file.write_blocking(offset, bytes(8))
    file.sync_blocking()


def _mark_clean(file: ProtocolNode) -> None:
    features = read_header(file).features & ~qed_header.FEATURE_NEED_CHECK
    file.write_blocking(qed_header.FEATURES_FIELD, struct.pack("<Q", features))
    file.sync_blocking()


def _give_back(file: ProtocolNode, found: Found) -> list[Run]:
    """Give back the space of leaked clusters; those at the end are leaks no more. Returns the others."""
    report, size = found.report, read_header(file).cluster_size
    left: list[Run] = []
    for offset, count in reversed(found.leaks):
        if offset >= report.image_end_offset:
            file.truncate_blocking(offset)
            report.leaks -= count
            report.leaks_fixed += count
        else:
            file.punch_hole_blocking(offset, count * size)
            left.append(Run(offset, count))
    file.sync_blocking()
    return left

"""Repair a qcow2 image that nobody has open: free what is leaked, make refcounts anew, right the flags.

The maps (L1 and L2 tables) are what counts: which cluster is where is never changed, only how often
it is used according to the refcounts, and the COPIED flags, which follow from that.

Order on disk: new refcount tables durable → the header field that names them; all refcounts and flags
durable → (checked again, and nothing is wrong) → dirty and corrupt bits cleared. Each refcount and each
flag goes from what it was to what is right in one step, and depends on no other. So a crash at any
moment leaves no cluster in more danger than it was, and an image that can be repaired again; the bits go
last, so that an image that has them is. So does the bit that says that the image is in use, and with it what
the file has behind the last cluster.
"""

import itertools
import logging
import struct
from collections.abc import Iterator

from blockd.aio import in_thread
from blockd.block.node import ProtocolNode
from blockd.errors import ImageError
from blockd.formats.check_report import CheckReport, Repair
from blockd.formats.qcow2 import header as qcow2_header
from blockd.formats.qcow2.check import COMPRESSED, COPIED, OFFSET_MASK, Census
from blockd.formats.qcow2.check_tables import read_entries, used_entries
from blockd.formats.qcow2.mapping import pack_entries
from blockd.formats.qcow2.repair_refcounts import can_rewrite, new_structure, rewrite_blocks, write_structure

log = logging.getLogger(__name__)

# So many entries, 512 GiB in clusters of 64 KiB, are looked at in about two seconds; for more see leaks.py.
ENTRY_COUNT_MAX = 1 << 23

# So many clusters are looked at together for free ones, and so many ranges are freed: in half a second.
FREE_SPAN = 1024
FREE_RANGE_COUNT_MAX = 1 << 16

_IN_USE = qcow2_header.AUTOCLEAR_IN_USE
_CLEARED = qcow2_header.INCOMPATIBLE_DIRTY | qcow2_header.INCOMPATIBLE_CORRUPT


async def repair(file: ProtocolNode, mode: Repair = Repair.ALL) -> CheckReport:
    """Repair the image in `file`, which nobody else uses; durable on return.

    The report is of the image as it is then. What cannot be repaired without losing data is not tried:
    `refusal` says so, and nothing is changed.

    Raises:   ImageError: the header is so wrong that nothing behind it can be looked at, or the file is
              too large. StorageError: the disk failed.
    Fails to: the content is the same, and the image can be repaired again.
    Cancel:   as when it fails.
    """
    before = await Census.take(file)
    if not (_is_anything_wrong(before.report) or _was_left_open(before)):
        return before.report
    before.report.refusal = _refusal(before, mode)
    if before.report.refusal is not None:
        return before.report
    after = before
    if before.report.leaks or before.report.corruptions or before.refcounts.counts_past_end:
        await _run(_write_steps(before))
        after = await Census.take(file)
        after.report.leaks_fixed = max(0, before.report.leaks - after.report.leaks)
        after.report.corruptions_fixed = max(0, before.report.corruptions - after.report.corruptions)
    if after.report.leaks or after.report.corruptions:
        after.report.refusal = f"'{file.filename}' is still not right: {after.report.findings[0]}"
        return after.report
    await _run(_finish_steps(before, after))
    after.report.is_dirty = after.report.is_marked_corrupt = False
    return after.report


async def repair_before_writing(file: ProtocolNode) -> None:
    """Repair an image that was not closed cleanly, as has to be done before it is written to.

    Raises:   ImageError: that cannot be done; nothing was changed. StorageError: the disk failed.
    """
    report = await repair(file)
    if report.refusal is not None:
        raise ImageError(
            f"'{file.filename}' was not closed cleanly, and cannot be repaired: {report.refusal}"
        )


def takes_a_moment(entry_count: int) -> bool:
    """Whether an image can be looked through while it is opened; so many L2 entries it has."""
    return entry_count <= ENTRY_COUNT_MAX


async def give_back_leaks(file: ProtocolNode) -> bool:
    """Free what was leaked when an image was not closed; durable on return. False: it was not done.

    Raises:   as `repair`.
    """
    report = await repair(file, Repair.LEAKS)
    if report.refusal is not None:
        warn_of_leaks(file, report.refusal)
        return False
    if report.leaks_fixed:
        tell_freed(file, report.leaks_fixed)
    return True


def tell_freed(file: ProtocolNode, count: int) -> None:
    """Say what has become of leaks."""
    log.info("'%s' was not closed: %d leaked clusters are free", file.filename, count)


def warn_of_leaks(file: ProtocolNode, reason: str) -> None:
    """Say that leaks are not given back, and why."""
    log.warning(
        "'%s' was not closed, and may take more space than it needs: %s; repair it with: "
        "blockctl image check --repair all",
        file.filename,
        reason,
    )


def _is_anything_wrong(report: CheckReport) -> bool:
    return bool(report.corruptions or report.leaks or report.is_dirty or report.is_marked_corrupt)


def _was_left_open(census: Census) -> bool:
    """Whether the image was not closed. Version 2 cannot say that: its file is longer then."""
    if census.header.version < qcow2_header.ZERO_VERSION:
        return census.file.size > census.report.image_end_offset
    return bool(census.header.autoclear & _IN_USE)


def _refusal(census: Census, mode: Repair) -> str | None:
    if census.findings.obstacle is not None:
        others = census.findings.obstacle_count - 1
        more = f" (and {others} more like it)" if others else ""
        return f"this cannot be repaired without losing data: {census.findings.obstacle}{more}"
    if mode is Repair.LEAKS and census.report.corruptions:
        return (
            f"there are {census.report.corruptions} corruptions, so that it is not certain what is leaked: "
            "repair all"
        )
    return None


async def _run(steps: Iterator[bool]) -> None:
    while await in_thread(next, steps, False):
        pass


# -- writing --------------------------------------------------------------------------------------


def _write_steps(census: Census) -> Iterator[bool]:
    """Write refcounts and flags as the maps demand them; each step not too long for one thread hop."""
    file, header, refcounts = census.file, census.header, census.refcounts
    if can_rewrite(refcounts):
        yield from rewrite_blocks(file, header, refcounts)
    else:
        structure = new_structure(header, refcounts)
        yield True
        yield from write_structure(file, header, refcounts, structure)
        file.sync_blocking()
        yield True
        field = struct.pack(">QI", structure.table_offset, structure.table_clusters)
        file.write_blocking(qcow2_header.REFCOUNT_TABLE_FIELDS, field)
    yield from _write_flags(census)
    file.sync_blocking()


def _write_flags(census: Census) -> Iterator[bool]:
    """Set the COPIED flag where a cluster is used exactly once, clear it elsewhere."""
    for entry_offset, entry in used_entries(census.file, census.active_l1):
        wanted = _with_flag(census, entry)
        if wanted != entry:
            census.file.write_blocking(entry_offset, wanted.to_bytes(8, "big"))
    yield True
    for l2_offset, uses in census.l2_tables():
        if not uses.active or census.has_data_file:
            continue
        entries = read_entries(census.file, l2_offset, census.header.cluster_size // 8)
        before = entries[:]
        for index in range(0, len(entries), census.header.l2_entry_size // 8):
            if entries[index] & OFFSET_MASK and not entries[index] & COMPRESSED:
                entries[index] = _with_flag(census, entries[index])
        if entries != before:
            census.file.write_blocking(l2_offset, pack_entries(entries))
        yield True


def _with_flag(census: Census, entry: int) -> int:
    references = census.refcounts.references[(entry & OFFSET_MASK) >> census.header.cluster_bits]
    return entry | COPIED if references == 1 else entry & ~COPIED


def _finish_steps(before: Census, after: Census) -> Iterator[bool]:
    """Say in the header that all is well, and free the space of what was leaked.

    In an image that was in use that may also be what was reserved behind the end of the file, as it was then.
    """
    file, incompatible, autoclear = before.file, before.header.incompatible, before.header.autoclear
    was_left_open = _was_left_open(before)
    if was_left_open:
        file.trim_blocking(after.report.image_end_offset)
    if incompatible & _CLEARED or autoclear & _IN_USE:
        file.write_blocking(qcow2_header.INCOMPATIBLE_FIELD, _packed(incompatible & ~_CLEARED))
        if autoclear & _IN_USE:
            file.write_blocking(qcow2_header.AUTOCLEAR_FIELD, _packed(autoclear & ~_IN_USE))
        file.sync_blocking()
        yield True
    was_reserved = _free_ranges(after) if was_left_open else iter(())
    for ranges in itertools.chain(_leaked_ranges(before), was_reserved):
        for offset, length in ranges:
            file.punch_hole_blocking(offset, length)
        yield True


def _packed(bits: int) -> bytes:
    return bits.to_bytes(8, "big")


def _leaked_ranges(census: Census) -> Iterator[list[tuple[int, int]]]:
    """What nothing refers to, although it had a refcount: some of (offset, length) at a time."""
    bits, refcounts = census.header.cluster_bits, census.refcounts
    for clusters in refcounts.stored.ranges_not_as(refcounts.references):
        ranges: list[tuple[int, int]] = []
        for cluster in clusters:
            offset = cluster << bits
            is_leaked = refcounts.stored[cluster] and not refcounts.references[cluster]
            if not is_leaked or offset >= census.file.size:
                continue
            length = min(1 << bits, census.file.size - offset)
            if ranges and sum(ranges[-1]) == offset:
                ranges[-1] = (ranges[-1][0], ranges[-1][1] + length)
            else:
                ranges.append((offset, length))
        yield ranges


def _free_ranges(census: Census) -> Iterator[list[tuple[int, int]]]:
    """What is free inside the file: some of (offset, length) at a time, from the end on, up to a limit."""
    bits, references = census.header.cluster_bits, census.refcounts.references
    count = 0
    for first in reversed(range(0, census.report.image_end_offset >> bits, FREE_SPAN)):
        ranges: list[tuple[int, int]] = []
        offset = first << bits
        for is_used, group in itertools.groupby(references.get(first, FREE_SPAN), bool):
            length = len(list(group)) << bits
            if not is_used and offset < census.file.size:
                ranges.append((offset, min(length, census.file.size - offset)))
            offset += length
        count += len(ranges)
        if count > FREE_RANGE_COUNT_MAX:
            return
        yield ranges

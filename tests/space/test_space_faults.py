"""An operation on tables that fails in the middle: no cluster is lost, and none is used twice.

Each is tried with the first change of the file failing, then the second, and so on until none fails.
"""

import errno
import itertools
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from blockd.block.node import OverlayNode
from blockd.block.segments import SourcePlan
from blockd.errors import StorageError
from blockd.formats.raw.image import RawImage
from blockd.units import KIB
from tests.chains import read_all
from tests.doubles import FailingFile
from tests.model import stamp
from tests.recording import RecordingFile, Sync
from tests.streaming import check, open_overlay, overlay

CLUSTER = 4 * KIB
# What one table maps, of qcow2 and of QED with tables of one cluster.
TABLE_SPAN = CLUSTER // 8 * CLUSTER
SIZE = 3 * TABLE_SPAN
# More than an L1 table of one cluster names, in qcow2.
GROWN = {"qcow2": 600 * TABLE_SPAN, "qed": 100 * TABLE_SPAN}

Operation = Callable[[OverlayNode], Awaitable[None]]


async def make(image_format: str) -> tuple[FailingFile, OverlayNode]:
    """An image with data in one table, and clusters at the end that a fill has not come to need."""
    base = await RawImage.open(RecordingFile(stamp(1, 0, SIZE), "base"), node_name="base", read_only=True)
    file = FailingFile()
    options: dict[str, Any] = {"table_size": 1} if image_format == "qed" else {}
    image = await overlay(file, base, SIZE, cluster_size=CLUSTER, image_format=image_format, **options)
    await image.write(0, stamp(2, 0, 3 * CLUSTER))
    await image.flush()
    source = SourcePlan(8 * CLUSTER, await image.plan_read(8 * CLUSTER, 8 * CLUSTER))
    await image.fill([(8 * CLUSTER, 16 * CLUSTER)], source, lambda *_: False)
    return file, image


async def become_read_only(image: OverlayNode) -> None:
    await image.reopen(read_only=True)


async def grow(image: OverlayNode) -> None:
    await image.resize(GROWN[image.driver])


async def detach(image: OverlayNode) -> None:
    await image.change_backing(None, None)


CASES: list[tuple[str, Operation]] = [
    ("qcow2", become_read_only),
    ("qcow2", grow),
    ("qcow2", detach),
    ("qed", become_read_only),
    ("qed", grow),
    ("qed", detach),
]


def fail_at(file: FailingFile, number: int) -> None:
    """Fail the change of this number, syncs not counted: a sync that fails is final."""
    changes = itertools.count(1)
    file.fails = lambda change: errno.EIO if not isinstance(change, Sync) and next(changes) == number else 0


@pytest.mark.parametrize(("image_format", "operation"), CASES)
async def test_a_failed_operation_loses_and_mixes_up_nothing(image_format: str, operation: Operation) -> None:
    for number in itertools.count(1):
        file, image = await make(image_format)
        fail_at(file, number)
        try:
            await operation(image)
        except StorageError:
            assert file.fault_count
        file.work()
        if not file.fault_count:
            break
        if image.read_only:
            await image.reopen(read_only=False)
        await use_on(image)
        await require_all_used(file)
    assert number > 2


async def use_on(image: OverlayNode) -> None:
    """Write into a table that there was not yet, and over all that was there."""
    image.backing = None
    content = bytearray(stamp(3, 0, SIZE))
    await image.write(TABLE_SPAN, content[TABLE_SPAN : TABLE_SPAN + CLUSTER])
    await image.write(TABLE_SPAN + CLUSTER, content[TABLE_SPAN + CLUSTER : TABLE_SPAN + 40 * CLUSTER])
    await image.write(0, content[: 20 * CLUSTER])
    await image.flush()
    content[20 * CLUSTER : TABLE_SPAN] = bytes(TABLE_SPAN - 20 * CLUSTER)
    content[TABLE_SPAN + 40 * CLUSTER :] = bytes(2 * TABLE_SPAN - 40 * CLUSTER)
    assert (await read_all(image))[:SIZE] == content
    await image.close()


async def require_all_used(file: RecordingFile) -> None:
    report = await check(file)
    assert (report.corruptions, report.leaks) == (0, 0), report.findings
    assert report.image_end_offset == file.size
    again = await open_overlay(RecordingFile(bytes(file.disk)), None, read_only=True)
    assert (await read_all(again))[:CLUSTER] == stamp(3, 0, CLUSTER)

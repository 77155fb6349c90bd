"""Writes, zeroes, discards and growing tables on a file whose N-th operation fails, without any stream."""

import errno
import itertools
from collections.abc import Awaitable, Callable

import pytest

from blockd.block.file_events import FileEvent as Event
from blockd.filters.fault_rules import Fault, FaultRules, IoType, Rule
from tests.chains import read_all
from tests.faults.rig import CLUSTER, Rig, Site, rig
from tests.inline_threads import use_inline_threads

Workload = Callable[[Rig], Awaitable[None]]

COUNT = 200

WRITES = Site(Event.PWRITEV, IoType.WRITE)
READS = Site(Event.READ_AIO, IoType.READ)
TABLE_READS = Site(Event.L2_LOAD, IoType.READ)
HOLES = Site(Event.CLUSTER_FREE, IoType.DISCARD)


@pytest.fixture(autouse=True)
async def inline_threads() -> None:
    use_inline_threads()


async def some_writes(scene: Rig) -> None:
    await scene.write(3, 2)
    await scene.write(130.5, 0.5)
    await scene.flush()
    await scene.zero(3, 1)
    await scene.discard(4, 1)
    await scene.write(130, 1)
    await scene.flush()
    await scene.write(3, 1)
    await scene.write(10, 30)
    await scene.read(0, COUNT)
    await scene.flush()


async def growing(scene: Rig) -> None:
    """The disk becomes so large that it needs a larger L1 table."""
    await scene.resize(COUNT + 6000)
    if scene.disk.root.size == scene.model.size:
        await scene.write(COUNT + 4000, 1)
    await scene.flush()


CASES = [(some_writes, site) for site in (WRITES, READS, TABLE_READS, HOLES)] + [
    (growing, WRITES),
    (growing, Site(Event.L1_GROW_WRITE_TABLE, IoType.WRITE)),
    (growing, Site(Event.L1_GROW_ACTIVATE_TABLE, IoType.WRITE)),
]


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC], ids=["EIO", "ENOSPC"])
@pytest.mark.parametrize(
    ("workload", "site"), CASES, ids=[f"{workload.__name__}: {site}" for workload, site in CASES]
)
async def test_nth_operation_fails(workload: Workload, site: Site, code: int) -> None:
    for once in (True, False):
        for number in itertools.count(1):
            async with rig(site, number, code, once=once, cluster_count=COUNT) as scene:
                await workload(scene)
                was_met = scene.rules.fault_count > 0
                assert bool(scene.errors) == was_met, f"fault {number} was not told"
                assert {error.errno for error in scene.errors} <= {code}
                await scene.assert_valid()
                scene.mend()
                await assert_nothing_is_lost(scene)
            if not was_met:
                break
        assert number > 1


async def assert_nothing_is_lost(scene: Rig) -> None:
    if scene.disk.root.size < scene.model.size:
        await scene.resize(scene.model.size // CLUSTER)
    await scene.guest.read_all()
    await scene.guest.flush()
    await scene.assert_durable()
    await scene.disk.active.close()
    await scene.assert_valid()


async def test_refcount_table_that_cannot_grow_is_tried_again() -> None:
    """With clusters of 512 bytes one cluster of refcount table is enough for 8 MiB."""
    sites = [
        Site(Event.REFBLOCK_ALLOC_WRITE_TABLE, IoType.WRITE),
        Site(Event.REFBLOCK_ALLOC_SWITCH_TABLE, IoType.WRITE),
    ]
    for site in sites:
        async with rig(site, 1, errno.ENOSPC, once=True, cluster_count=18_000) as scene:
            for first in range(0, 18_000, 3000):
                await scene.write(first, 3000)
            assert [error.errno for error in scene.errors] == [errno.ENOSPC]
            await scene.flush()
            await assert_nothing_is_lost(scene)


async def test_header_that_cannot_be_written_keeps_the_backing() -> None:
    for code in (errno.EIO, errno.ENOSPC):
        async with rig(WRITES, 1, 0, once=True, cluster_count=COUNT) as scene:
            header = Rule(Event.NONE, Fault(code), io_types=frozenset({IoType.WRITE}), sector=0)
            scene.faults.rules = FaultRules([header])
            job = await scene.disk.start(None)
            await job.wait_ended()
            assert job.error is not None
            assert scene.disk.active.backing is scene.base
            assert (await scene.open_again(read_only=True)).backing_filename == "base.raw"
            await scene.guest.read_all()
            scene.mend()
            job = await scene.disk.start(None)
            await job.wait_ended()
            assert job.error is None
            whole = await scene.open_again(read_only=True)
            assert (whole.backing_filename, await read_all(whole)) == (None, bytes(scene.model.content))

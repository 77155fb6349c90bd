"""Throttle groups against a clock that only tests move: who passes when."""

import asyncio
from collections.abc import Coroutine

import pytest

from blockd.errors import RequestError
from blockd.filters.throttle import Throttle
from blockd.filters.throttle_group import NO_LIMITS, Direction, ThrottleGroup
from blockd.units import MIB
from tests.nbd.memory_node import MemoryNode
from tests.virtual_time import now, run

BLOCK = 4096


def about(seconds: float) -> object:
    """Waits are no shorter than a millisecond."""
    return pytest.approx(seconds, abs=0.01)


def disk(group: ThrottleGroup) -> Throttle:
    return Throttle(MemoryNode(MIB), group, node_name="throttled")


async def read(node: Throttle, length: int = BLOCK) -> None:
    """As a guest reads: at once if that can be."""
    if node.read_nowait(0, length) is None:
        await node.read(0, length)


async def write(node: Throttle, length: int = BLOCK) -> None:
    if not node.write_nowait(0, bytes(length)):
        await node.write(0, bytes(length))


async def keep_busy(*works: Coroutine[object, object, None]) -> None:
    await asyncio.gather(*works)


async def count_for(seconds: float, node: Throttle, *, depth: int = 4, length: int = BLOCK) -> int:
    """How many reads a guest with `depth` requests in flight gets done."""
    done = 0

    async def guest() -> None:
        nonlocal done
        while True:
            await read(node, length)
            done += 1
            await asyncio.sleep(0)

    try:
        async with asyncio.timeout(seconds):
            await asyncio.gather(*(guest() for _ in range(depth)))
    except TimeoutError:
        return done
    raise AssertionError("the guests never end")


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"iops-total": 100}, 1000),
        ({"iops-read": 1000}, 10000),
        ({"iops-total": 7}, 70),
        ({"bps-total": 40 * BLOCK}, 400),
        ({"bps-read": 10 * BLOCK, "iops-total": 1000}, 100),
        ({"iops-total": 100, "iops-size": 1024}, 250),
    ],
)
def test_rate_is_kept_over_ten_seconds(limits: dict[str, int], expected: int) -> None:
    async def main() -> int:
        return await count_for(10, disk(ThrottleGroup("g", limits, now)))

    # At the start a tenth of a second's worth passes at once, and one request more.
    assert expected <= run(main()) <= expected * 1.01 + 2


def test_no_second_has_more_than_its_share() -> None:
    """What was not used is not saved up: after a pause the guest gets no more than a slice at once."""

    async def main() -> list[int]:
        node = disk(ThrottleGroup("g", {"iops-total": 1000}, now))
        counts = []
        for _ in range(5):
            counts.append(await count_for(0.05, node, depth=64))
            await asyncio.sleep(10)
        return counts

    assert all(count <= 100 + 50 + 1 for count in run(main()))


@pytest.mark.parametrize(
    ("limits", "at_once", "in_five_seconds"),
    [
        # Without a burst rate: a tenth of a second's worth.
        ({"iops-total": 100}, 11, 511),
        # A burst rate for a second: that many, however fast.
        ({"iops-total": 100, "iops-total-max": 500}, 501, 1001),
        # For longer: at the burst rate, until the large bucket is full.
        ({"iops-total": 100, "iops-total-max": 500, "iops-total-max-length": 3}, 51, 2001),
    ],
)
def test_bursts(limits: dict[str, int], at_once: int, in_five_seconds: int) -> None:
    async def main() -> tuple[int, int]:
        node = disk(ThrottleGroup("g", limits, now))
        first = await count_for(0.0001, node, depth=1)
        return first, first + await count_for(5, node)

    first, all_of_them = run(main())
    assert first == at_once
    assert all_of_them == pytest.approx(in_five_seconds, abs=5)


def test_reads_and_writes_have_limits_of_their_own() -> None:
    async def main() -> tuple[float, float]:
        node = disk(ThrottleGroup("g", {"iops-write": 10}, now))
        for _ in range(1000):
            await read(node)
        after_reads = now()
        for _ in range(12):
            await write(node)
        return after_reads, now()

    assert run(main()) == (0.0, about(1.0))


def test_zeroes_and_discards_count_as_writes() -> None:
    async def main() -> float:
        node = disk(ThrottleGroup("g", {"bps-write": 10 * BLOCK}, now))
        for _ in range(6):
            await node.write_zeroes(0, BLOCK)
            await node.discard(0, BLOCK)
        return now()

    assert run(main()) == about(1.0)


def test_what_passes_at_once_needs_no_waiting() -> None:
    """While there is room, and only then, the fast path answers; a refused one is not counted."""

    async def main() -> None:
        group = ThrottleGroup("g", {"iops-total": 100}, now)
        node = disk(group)
        assert [node.read_nowait(0, BLOCK) is not None for _ in range(13)] == [True] * 11 + [False] * 2
        assert not node.write_nowait(0, bytes(BLOCK))
        assert node.kind_nowait(0, BLOCK) is None
        await asyncio.sleep(0.010001)
        assert node.write_nowait(0, bytes(BLOCK))
        # What the node below cannot do at once is not counted either.
        await asyncio.sleep(1)
        assert isinstance(node.child, MemoryNode)
        node.child.nowait = False
        for _ in range(100):
            assert node.read_nowait(0, BLOCK) is None
        assert group.has_room(Direction.READ)

    run(main())


def test_members_take_turns() -> None:
    """A member with many requests waiting does not keep one with few from getting its share."""

    async def main() -> tuple[int, int, int]:
        group = ThrottleGroup("g", {"iops-total": 1000}, now)
        greedy, modest, other = disk(group), disk(group), disk(group)
        counts = await asyncio.gather(
            count_for(10, greedy, depth=64), count_for(10, modest, depth=2), count_for(10, other, depth=2)
        )
        return counts[0], counts[1], counts[2]

    counts = run(main())
    assert sum(counts) == pytest.approx(10000, rel=0.02)
    assert max(counts) - min(counts) < 0.05 * sum(counts)


def test_nobody_is_overtaken_by_the_fast_path() -> None:
    async def main() -> list[str]:
        node = disk(ThrottleGroup("g", {"iops-total": 10}, now))
        order = []

        async def one(name: str) -> None:
            await read(node)
            order.append(name)

        for _ in range(2):
            assert node.read_nowait(0, BLOCK) is not None
        async with asyncio.TaskGroup() as tasks:
            for name in "abc":
                tasks.create_task(one(name))
                await asyncio.sleep(0.04)
        return order

    assert run(main()) == ["a", "b", "c"]


def test_new_limits_hold_from_now_on() -> None:
    async def main() -> tuple[float, float]:
        group = ThrottleGroup("g", {"iops-total": 1}, now)
        node = disk(group)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(keep_busy(*(read(node) for _ in range(10))))
            await asyncio.sleep(0.5)
            group.set_limits({"iops-total": 0})
        freed = now()
        group.set_limits({"bps-read": BLOCK})
        for _ in range(3):
            await read(node)
        return freed, now() - freed

    freed, limited = run(main())
    assert freed == 0.5
    assert limited == about(1.9)


def test_contradicting_limits_change_nothing() -> None:
    async def main() -> None:
        group = ThrottleGroup("g", {"iops-total": 100}, now)
        with pytest.raises(RequestError, match="cannot be used at the same time"):
            group.set_limits({"iops-read": 5})
        assert group.limits == {**NO_LIMITS, "iops-total": 100}

    run(main())


def test_released_member_waits_no_more() -> None:
    """A drain is not kept waiting: what waits passes, first in line or not; others go on waiting."""

    async def main() -> tuple[float, float]:
        group = ThrottleGroup("g", {"iops-total": 1}, now)
        drained, other = disk(group), disk(group)
        for _ in range(2):
            await read(drained)
        start = now()
        async with asyncio.TaskGroup() as tasks:
            first = tasks.create_task(read(drained))
            behind = tasks.create_task(read(other))
            more = [tasks.create_task(read(drained)) for _ in range(5)]
            await asyncio.sleep(0.25)
            with drained.released():
                await asyncio.gather(first, *more)
                await read(drained)
                passed = now() - start
            await behind
        return passed, now()

    passed, last = run(main())
    assert passed == pytest.approx(0.25)
    # All that passed is paid for: 9 reads before, of which 0.1 are free.
    assert last == about(8.9)


@pytest.mark.parametrize("cancelled", ["the first in line", "one behind", "both at once"])
def test_cancelled_request_does_not_hold_up_the_others(cancelled: str) -> None:
    async def main() -> float:
        node = disk(ThrottleGroup("g", {"iops-total": 1}, now))
        for _ in range(2):
            await read(node)
        async with asyncio.TaskGroup() as tasks:
            waiting = [tasks.create_task(read(node)) for _ in range(4)]
            await asyncio.sleep(0.1)
            if cancelled != "one behind":
                waiting[0].cancel()
            if cancelled != "the first in line":
                waiting[1].cancel()
        return now()

    # Cancelled requests are not counted.
    assert run(main()) == about(4.9 - (2 if cancelled == "both at once" else 1))


def test_lead_that_comes_with_the_cancellation_is_handed_on() -> None:
    async def main() -> float:
        node = disk(ThrottleGroup("g", {"iops-total": 10}, now))
        for _ in range(2):
            await read(node)
        async with asyncio.TaskGroup() as tasks:
            waiting = [tasks.create_task(read(node)) for _ in range(3)]
            await waiting[0]
            waiting[1].cancel()  # it has been given the lead, and has not run since
            await waiting[2]
        return now()

    assert run(main()) == about(0.2)


def test_joining_another_group() -> None:
    async def main() -> float:
        slow, fast = ThrottleGroup("slow", {"iops-total": 1}, now), ThrottleGroup("fast", {}, now)
        node = disk(slow)
        for _ in range(2):
            await read(node)
        node.join(fast)
        assert (slow.members, fast.members) == ([], [node])
        for _ in range(100):
            await read(node)
        await node.close()
        assert fast.members == []
        return now()

    assert run(main()) == about(0.9)

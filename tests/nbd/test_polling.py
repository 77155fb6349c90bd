"""The daemon stays awake for the next request where that makes answers faster, and nowhere else."""

import asyncio
import threading
from pathlib import Path

import pytest

from blockd.aio import in_thread, thread_calls
from blockd.exports.nbd.polling import INTERVAL_MAX_S, POLL_S, SHORT_TURN_S, Polling
from tests.control.running import running
from tests.nbd.memory_node import MemoryNode
from tests.nbd.serving import serving

ANSWER_S = 0.00005
WAKING_UP_S = 0.00005


class Guest:
    """Has one request in flight; a turn takes `asleep_s`, or `awake_s` if the daemon polls for it."""

    def __init__(self, asleep_s: float, awake_s: float, poll_s: float = POLL_S) -> None:
        self.asleep_s, self.awake_s = asleep_s, awake_s
        self.now = 1000.0
        self.polling = Polling(poll_s, self.monotonic)

    def monotonic(self) -> float:
        return self.now

    def work(self, duration_s: float) -> float:
        """Send requests for so long; returns the share of them for which the daemon stayed awake."""
        awake_count = count = 0
        until = self.now + duration_s
        while self.now < until:
            count += 1
            awake_count += self.polling.is_on
            self.now += self.awake_s if self.polling.is_on else self.asleep_s
            self.polling.turn_done()
        return awake_count / count


async def test_stays_awake_where_answers_are_faster() -> None:
    guest = Guest(ANSWER_S + WAKING_UP_S, ANSWER_S)
    guest.work(0.1)
    assert guest.work(10) > 0.95


@pytest.mark.parametrize("awake_s", [0.000100, 0.000095, 0.000150])
async def test_sleeps_where_answers_are_not_faster_by_a_tenth(awake_s: float) -> None:
    guest = Guest(0.000100, awake_s)
    guest.work(0.1)
    assert 0 < guest.work(10) < 0.06, "now and then it is tried"


async def test_changes_its_mind_within_seconds() -> None:
    """The guest's processor is busy from now on, or is no more."""
    guest = Guest(ANSWER_S + WAKING_UP_S, ANSWER_S)
    for faster, slower in ((0.00005, 0.0001), (0.0001, 0.00005), (0.00005, 0.0001)):
        guest.awake_s, guest.asleep_s = faster, slower
        guest.work(2)
        assert (guest.work(2) > 0.9) == (faster < slower)


async def test_nobody_is_kept_awake_for_a_guest_that_pauses_or_never_waits() -> None:
    for turn_s in (1.01 * INTERVAL_MAX_S, 0.99 * SHORT_TURN_S):
        guest = Guest(turn_s, turn_s / 2)
        guest.work(1)
        assert not guest.work(10)


async def test_never_where_it_is_off() -> None:
    assert not Guest(ANSWER_S + WAKING_UP_S, ANSWER_S, poll_s=0).work(10)


async def test_sleeps_when_nobody_asks_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the last reply on the loop comes round for as long as it polls, then it has nothing to do."""
    turns = Turns(monkeypatch)
    guest = Guest(ANSWER_S + WAKING_UP_S, ANSWER_S)
    guest.work(0.1)
    assert guest.polling.is_on
    for _ in range(10):
        await asyncio.sleep(0)
    assert turns.count == 10, "one look a turn, however many replies left"
    guest.now += POLL_S
    for _ in range(10):
        await asyncio.sleep(0)
    assert turns.count == 11


class Turns:
    """Counts the looks that the loop is asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        original = Polling._look

        def look(polling: Polling) -> None:
            self.count += 1
            original(polling)

        monkeypatch.setattr(Polling, "_look", look)


async def test_threads_get_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = Turns(monkeypatch)
    guest = Guest(ANSWER_S + WAKING_UP_S, ANSWER_S)
    may_end = threading.Event()
    call = asyncio.create_task(in_thread(may_end.wait))
    try:
        await asyncio.sleep(0)
        guest.work(0.1)
        for _ in range(10):
            await asyncio.sleep(0)
        assert turns.count == 1
    finally:
        may_end.set()
        await call
    guest.polling.turn_done()
    for _ in range(10):
        await asyncio.sleep(0)
    assert turns.count == 11


async def test_calls_in_threads_are_counted_to_their_end() -> None:
    def fail() -> None:
        raise ValueError

    with pytest.raises(ValueError, match=r"^$"):
        await in_thread(fail)
    call = asyncio.create_task(in_thread(int))
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert thread_calls.count == 0


async def test_every_turn_with_replies_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[None] = []
    monkeypatch.setattr(Polling, "turn_done", lambda _: done.append(None))
    async with serving(MemoryNode(65536), tmp_path) as disk:
        client = await disk.client()
        haggled = len(done)
        for number in range(10):
            await client.read(number * 512, 512)
        assert len(done) == haggled + 10


@pytest.mark.parametrize(("option", "poll_s"), [([], POLL_S), (["--nbd-poll", "50"], 0.00005)])
async def test_time_is_the_daemons(tmp_path: Path, option: list[str], poll_s: float) -> None:
    (tmp_path / "disk.raw").write_bytes(bytes(512))
    async with running(tmp_path, *option, "--device", f"vda={tmp_path / 'disk.raw'}") as daemon:
        assert daemon.services.exports.server is not None
        assert daemon.services.exports.server._polling._poll_s == poll_s

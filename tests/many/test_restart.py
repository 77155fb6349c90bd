"""What the journal costs: the same for each disk at a restart, in steps and in calls in threads."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from blockd import aio
from tests.control.running import running
from tests.many.steps import counted
from tests.many.test_graph_steps import Disks

COUNTS = (4, 12, 20)
# Two files: each is opened and locked. What is read of them is in the page cache.
CALLS_A_DISK = 2


@contextmanager
def noted_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """The calls in threads that begin inside the block."""
    calls: list[object] = []
    begin = aio.thread_calls.begin

    def noted() -> object:
        calls.append(call := begin())
        return call

    with monkeypatch.context() as patched:
        patched.setattr(aio.thread_calls, "begin", noted)
        yield calls


async def restart(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """How many steps a restart takes on the event loop, and how many calls in threads."""
    with noted_calls(monkeypatch) as calls, counted() as steps:
        async with running(folder, "--state-dir", folder / "state"):
            found = steps.count, len(calls)
    return found


async def test_a_restart_costs_the_same_for_each_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[tuple[int, int]] = []
    for count in COUNTS:
        folder = tmp_path / str(count)
        folder.mkdir()
        async with running(folder, "--state-dir", folder / "state") as daemon:
            disks = Disks(await daemon.qmp(), folder, is_shared=False)
            while disks.count < count:
                await disks.add()
        await restart(folder, monkeypatch)  # what is loaded late is loaded now
        found.append(await restart(folder, monkeypatch))
    (few_steps, few_calls), (steps, calls), (many_steps, many_calls) = found
    assert many_steps - steps <= 1.02 * (steps - few_steps)
    disk_count = COUNTS[2] - COUNTS[1]
    # A call that has nothing to do with disks may come in between; one more a disk would be as many as these.
    assert abs((many_calls - calls) - (calls - few_calls)) < disk_count
    assert many_calls - calls < (CALLS_A_DISK + 1) * disk_count


async def test_the_journal_takes_one_call_for_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is written, published and made durable in one."""
    async with running(tmp_path, "--state-dir", tmp_path / "state") as daemon:
        client = await daemon.qmp()
        await client.command("object-add", {"qom-type": "throttle-group", "id": "first"})
        with noted_calls(monkeypatch) as calls:
            await client.command("object-add", {"qom-type": "throttle-group", "id": "second"})
        assert len(calls) == 1
    assert '"second"' in "".join(path.read_text() for path in (tmp_path / "state").glob("*.json*"))

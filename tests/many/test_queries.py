"""What tells of everything is worked out in turns: nobody waits for long, however many disks there are."""

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from blockd import aio
from blockd.commands import node_info
from blockd.daemon import tracking
from blockd.drivers.nodes import Nodes
from blockd.web import metrics
from blockd.web.metrics import metrics_of
from blockd.web.status import DeviceStatus, GuestActivity, Operations, Sources, Status, json_of, status_of
from tests.control.running import running
from tests.many.steps import counted
from tests.many.test_graph_steps import Disks

FEW, MANY = 8, 32


class ShortTurns(aio.Turns):
    """Each is over after one step, so that what is done in one turn is what cannot be interrupted."""

    async def pass_on(self) -> None:
        await asyncio.sleep(0)


@pytest.fixture(autouse=True)
def short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aio, "Turns", ShortTurns)
    for module in (metrics, node_info, tracking):
        monkeypatch.setattr(module, "Turns", ShortTurns)


async def longest_turn(work: Coroutine[Any, Any, object]) -> int:
    """The most steps that were taken at a time while some work was done."""
    longest = 0
    with counted() as steps:
        task = asyncio.ensure_future(work)
        while not task.done():
            before = steps.count
            await asyncio.sleep(0)
            longest = max(longest, steps.count - before)
    await task
    return longest


def status(count: int) -> Status:
    nothing = Operations(count=0, byte_count=0, seconds=0.0, failed=0)
    guest = GuestActivity(read=nothing, write=nothing, discard=nothing, flush=nothing)
    devices = [
        DeviceStatus(name=f"disk{number}", node_name=f"node{number}", chain=[], exports=[], guest=guest)
        for number in range(count)
    ]
    return Status(version="1", uptime_seconds=1.0, devices=devices, jobs=[])


async def test_metrics_of_many_disks_are_those_of_each() -> None:
    text = (await metrics_of(status(MANY))).decode()
    lines = text.splitlines()
    for number in range(MANY):
        samples = [line for line in lines if f'device="disk{number}"' in line]
        assert len(samples) == 16
    described = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert len(described) == len(set(described))
    # What belongs to a family stands together, as the format wants it.
    families = [line.split()[2] if line.startswith("# HELP") else "" for line in lines]
    assert len([name for name in families if name]) == len(described)
    kinds = [line.split("{")[0] for line in lines if line.startswith("blockd_guest")]
    assert kinds == sorted(kinds, key=kinds.index)


async def test_status_is_written_as_a_whole() -> None:
    found = status(MANY)
    assert Status.model_validate_json(await json_of(found)) == found


async def test_the_longest_turn_of_the_web_status_does_not_grow() -> None:
    for write in (metrics_of, json_of):
        await write(status(FEW))  # what is loaded late is loaded now
        few, many = [await longest_turn(write(status(count))) for count in (FEW, MANY)]
        assert many <= 1.2 * few + 10 * MANY, write


async def test_the_longest_turn_of_a_query_does_not_grow(tmp_path: Path) -> None:
    queries: list[tuple[str, dict[str, object]]] = [
        ("query-named-block-nodes", {}),
        ("query-named-block-nodes", {"flat": True}),
        ("query-blockstats", {"query-nodes": True}),
    ]
    async with running(tmp_path) as daemon:
        client, services = await daemon.qmp(), daemon.services
        sources = Sources(services.devices, services.streams, services.jobs, services.exports, started=0.0)
        disks = Disks(client, tmp_path, is_shared=False)
        turns: dict[int, list[int]] = {}
        for count in (FEW, FEW + 1, MANY):  # what is loaded late is loaded with the first
            while disks.count < count:
                await disks.add()
            works = [client.command(command, arguments) for command, arguments in queries]
            turns[count] = [await longest_turn(work) for work in (*works, status_of(sources))]
    for few, many in zip(turns[FEW + 1], turns[MANY], strict=True):
        # Only a look at which nodes there are is taken of all at once.
        assert many <= few + 12 * (MANY - FEW), turns


def all_touched(nodes: Nodes) -> dict[str, None]:
    return dict.fromkeys(nodes)


async def test_the_longest_turn_of_the_journal_does_not_grow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor if all disks have changed, as after a transaction."""
    turns: dict[int, int] = {}
    async with running(tmp_path, "--state-dir", tmp_path / "state") as daemon:
        disks = Disks(await daemon.qmp(), tmp_path, is_shared=False)
        for count in (FEW, FEW + 1, MANY):
            while disks.count < count:
                await disks.add()
            with monkeypatch.context() as patched:
                patched.setattr(Nodes, "take_touched", all_touched)
                turns[count] = await longest_turn(daemon._recorder.save())
    # What was described in turns is compared at once.
    assert turns[MANY] <= turns[FEW + 1] + 80 * (MANY - FEW), turns

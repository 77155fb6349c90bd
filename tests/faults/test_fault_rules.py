"""The faults driver: what its rules mean, which options it takes, and that it agrees with QEMU's blkdebug."""

import asyncio
import errno
import json
import subprocess
from pathlib import Path

import pytest

from blockd.block.file_events import FileEvent as Event
from blockd.block.node import BlockNode
from blockd.drivers import NodeGraph
from blockd.errors import RequestError, StorageError
from blockd.filters.fault_rules import Fault, FaultRules, IoType, Rule, StateRule
from blockd.filters.faults import FaultsNode
from tests import qemu_img
from tests.conftest import StartDaemon
from tests.recording import RecordingFile

EIO, ENOSPC = Fault(errno.EIO), Fault(errno.ENOSPC)
NO_FAULT = Fault()


def test_rule_without_event_holds_from_the_start() -> None:
    rules = FaultRules([Rule(Event.NONE, EIO)])
    met = [rules.take(io_type) for io_type in IoType]
    assert met == [EIO] * 5 + [NO_FAULT]  # block-status has to be asked for


def test_event_arms_a_rule_until_another_rule_is_armed() -> None:
    rules = FaultRules([Rule(Event.L2_UPDATE, EIO), Rule(Event.L1_UPDATE, ENOSPC)])
    assert rules.take(IoType.WRITE) == NO_FAULT
    rules.announce(Event.L2_UPDATE)
    rules.announce(Event.COW_READ)
    assert [rules.take(IoType.WRITE), rules.take(IoType.READ)] == [EIO, EIO]
    rules.announce(Event.L1_UPDATE)
    assert rules.take(IoType.WRITE) == ENOSPC


def test_once_is_once() -> None:
    rules = FaultRules([Rule(Event.L2_UPDATE, EIO, once=True), Rule(Event.L2_UPDATE, ENOSPC, once=True)])
    rules.announce(Event.L2_UPDATE)
    assert [rules.take(IoType.WRITE) for _ in range(3)] == [EIO, ENOSPC, NO_FAULT]
    rules.announce(Event.L2_UPDATE)
    assert rules.take(IoType.WRITE) == NO_FAULT


def test_type_and_sector() -> None:
    rules = FaultRules([Rule(Event.NONE, EIO, io_types=frozenset({IoType.WRITE}), sector=3)])
    assert rules.take(IoType.READ, 0, 4096) == NO_FAULT
    assert rules.take(IoType.WRITE, 0, 3 * 512) == NO_FAULT
    assert rules.take(IoType.WRITE, 2048, 512) == NO_FAULT
    assert rules.take(IoType.WRITE, 0, 3 * 512 + 1) == EIO
    assert rules.take(IoType.WRITE, 3 * 512, 1) == EIO


def test_states_count() -> None:
    states = [StateRule(Event.L2_LOAD, 2, state=1), StateRule(Event.L2_LOAD, 3, state=2)]
    rules = FaultRules([Rule(Event.L2_LOAD, EIO, state=3, once=True)], states=states)
    met = []
    for _ in range(5):
        rules.announce(Event.L2_LOAD)
        met.append(rules.take(IoType.READ) == EIO)
    assert met == [False, False, True, False, False]


def test_delays_and_errors_are_apart() -> None:
    rules = FaultRules([Rule(Event.NONE, EIO)], [Rule(Event.NONE, Fault(delay_s=2.0), once=True)])
    assert [rules.take(IoType.READ), rules.take(IoType.READ)] == [Fault(errno.EIO, 2.0), EIO]


async def test_delayed_request_holds_nobody_else_and_ends_with_the_node() -> None:
    delay = Rule(Event.NONE, Fault(delay_s=3600.0), sector=0)
    node = FaultsNode(RecordingFile(bytes(4096)), FaultRules(delays=[delay]), node_name="faults")
    async with asyncio.TaskGroup() as tasks:
        late = tasks.create_task(node.read(0, 512))
        assert bytes(await node.read(512, 512)) == bytes(512)
        assert not late.done()
        await node.close()
    assert bytes(late.result()) == bytes(512)


# -- options ------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(1 << 20))
    return path


async def opened(graph: NodeGraph, disk: Path, **options: object) -> BlockNode:
    image = {"driver": "file", "filename": str(disk)}
    given = {name.replace("_", "-"): value for name, value in options.items()}
    return await graph.open({"driver": "blkdebug", "node-name": "n", "image": image, **given})


async def test_options_become_rules(disk: Path) -> None:
    graph = NodeGraph()
    node = await opened(
        graph,
        disk,
        inject_error=[
            {"event": "none", "iotype": "write", "sector": 1, "errno": errno.ENOSPC, "immediately": True},
            {"event": "none", "iotype": "flush", "once": True},
        ],
    )
    assert (node.driver, node.size) == ("blkdebug", 1 << 20)
    await node.write(0, bytes(512))
    with pytest.raises(StorageError, match=r"Could not write '.*disk.raw': No space left on device"):
        await node.write(0, bytes(1024))
    with pytest.raises(StorageError, match=r"Could not sync '.*disk.raw': Input/output error"):
        await node.flush()
    await graph.close()


BAD_OPTIONS: list[tuple[str, object, str]] = [
    ("inject-error", 3, "Invalid parameter type for 'inject-error', expected: array"),
    ("inject-error", [3], "Invalid parameter type for 'inject-error[0]', expected: object"),
    ("inject-error", [{"event": "foo"}], "Parameter 'event' does not accept value 'foo'"),
    ("inject-error", [{"errno": 5}], "Parameter 'inject-error[0].event' is missing"),
    (
        "inject-error",
        [{"event": "none", "errno": "x"}],
        "Invalid parameter type for 'inject-error[0].errno', expected: integer",
    ),
    ("inject-error", [{"event": "none", "bla": 1}], "Parameter 'inject-error[0].bla' is unexpected"),
    ("inject-error", [{"event": "none", "iotype": "x"}], "Parameter 'iotype' does not accept value 'x'"),
    ("set-state", [{"event": "none"}], "Parameter 'set-state[0].new_state' is missing"),
]


@pytest.mark.parametrize(("name", "value", "text"), BAD_OPTIONS, ids=[case[2] for case in BAD_OPTIONS])
async def test_wrong_options_are_refused(disk: Path, name: str, value: object, text: str) -> None:
    graph = NodeGraph()
    with pytest.raises(RequestError) as refused:
        await opened(graph, disk, **{name: value})
    assert refused.value.message == text
    assert not graph.nodes


@pytest.mark.parametrize(("name", "value", "text"), BAD_OPTIONS, ids=[case[2] for case in BAD_OPTIONS])
def test_qemu_refuses_the_same_options(disk: Path, name: str, value: object, text: str) -> None:
    options = {"driver": "blkdebug", "node-name": "n", "image": {"driver": "file", "filename": str(disk)}}
    command = ["qemu-storage-daemon", "--blockdev", json.dumps({**options, name: value})]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert result.stderr.strip().endswith(text)


async def test_delay_has_bounds(disk: Path) -> None:
    for milliseconds in (-1, 3_600_001):
        with pytest.raises(RequestError, match="Parameter 'milliseconds' must be between 0 and 3600000"):
            await opened(NodeGraph(), disk, delay=[{"event": "none", "milliseconds": milliseconds}])


# -- beside QEMU --------------------------------------------------------------------------------------

WRITES_ONCE = {"event": "none", "iotype": "write", "sector": 1, "errno": errno.ENOSPC, "once": True}
RULES: dict[str, dict[str, object]] = {
    "sector": {"inject-error": [{"event": "none", "iotype": "read", "sector": 3}]},
    "once": {"inject-error": [WRITES_ONCE]},
    "event": {"inject-error": [{"event": "read_aio", "errno": errno.ENOMEM}]},
    "state": {
        "inject-error": [{"event": "write_aio", "state": 2, "once": True, "iotype": "write"}],
        "set-state": [{"event": "write_aio", "state": 1, "new_state": 2}],
    },
}
REQUESTS = [
    "read 0 512",
    "read 1024 1024",
    "write 0 4096",
    "write 8192 512",
    "write 0 4096",
    "read 0 4096",
]


@pytest.mark.slow
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
async def test_same_requests_fail_as_in_qemu(
    disk: Path, start_daemon: StartDaemon, rules: dict[str, object]
) -> None:
    # Both have the disk open when the second one gets its requests.
    image = {"driver": "file", "filename": str(disk), "locking": "off"}
    file = {"driver": "blkdebug", "image": image, **rules}
    blockdev = json.dumps({"driver": "raw", "node-name": "r", "file": file})
    daemon = await start_daemon("--blockdev", blockdev, "--export", "nbd,id=e,node-name=r,name=x,writable=on")
    ours = _outcomes("-f", "raw", f"nbd+unix:///x?socket={daemon.nbd_path}")
    assert ours == _outcomes(f"json:{blockdev}")
    assert False in ours


def _outcomes(*image: str) -> list[bool]:
    """Whether each request succeeded."""
    commands = [word for request in REQUESTS for word in ("-c", request)]
    printed = qemu_img.qemu("qemu-io", *commands, *image, expect=None)
    lines = [line for line in printed.splitlines() if "bytes at offset" in line or "failed" in line]
    assert len(lines) == len(REQUESTS), printed
    return ["failed" not in line for line in lines]

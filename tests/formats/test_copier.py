"""The process that copies beside guests: the same bytes, and whatever becomes of it, nothing is lost."""

import array
import asyncio
import errno
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from blockd.aio import thread_calls
from blockd.block.accounting import GUEST_TIME_S, all_guests
from blockd.block.node import FillCounts, OverlayNode, Segment, Source
from blockd.block.segments import SourcePlan
from blockd.block.zero_clusters import packed_end
from blockd.errors import RequestError, StorageError
from blockd.filters.fault_rules import FaultRules
from blockd.filters.faults import FaultsNode
from blockd.protocols import cold, copier, copier_process, native_aio
from blockd.protocols.copier import Copier
from blockd.protocols.file import FileNode
from blockd.units import KIB, MIB
from tests import chains, qemu_img
from tests.chains import read_all
from tests.daemon_process import children_of, is_alive, wait_until_gone
from tests.inline_threads import steps

CLUSTER = 64 * KIB
LENGTH = 9 * MIB + CLUSTER  # pieces of 4 MiB, and a rest
CONTENT = random.Random(1).randbytes(LENGTH)
WAIT_S = 60.0

pytestmark = pytest.mark.usefixtures("without_cloning")


@pytest.fixture(autouse=True)
def own(monkeypatch: pytest.MonkeyPatch) -> Iterator[Copier]:
    """A copier for the test alone, while guests are at work."""
    one = Copier()
    monkeypatch.setattr(copier, "copier", one)
    monkeypatch.setattr(copier, "START_TIMEOUT_S", 100.0)  # a busy machine is no failure
    monkeypatch.setattr(all_guests, "last_ns", sys.maxsize)
    yield one
    for pid in processes():
        kill(pid)


def processes() -> list[int]:
    """Copiers of this process."""
    return [
        pid
        for pid in children_of(os.getpid())
        if is_alive(pid) and b"copier_process" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    wait_until_noticed(pid)


def wait_until_noticed(pid: int) -> None:
    """Wait until a copier has ended, and who attends to it knows that."""
    wait_until_gone(pid)
    for thread in threading.enumerate():
        if thread.name == copier.THREAD_NAME:
            thread.join(WAIT_S)


def with_zeroes(cluster_size: int, seed: int) -> tuple[bytes, list[int]]:
    """Some content, and where clusters in it are all zeroes: single ones, runs, the first, the last."""
    rng = random.Random(seed)
    zeroes = {0, LENGTH // cluster_size - 1}
    while len(zeroes) < LENGTH // cluster_size // 3:
        start = rng.randrange(LENGTH // cluster_size)
        zeroes.update(range(start, min(start + rng.randrange(1, 9), LENGTH // cluster_size)))
    content = bytearray(CONTENT)
    for number in zeroes:
        content[number * cluster_size : (number + 1) * cluster_size] = bytes(cluster_size)
    return bytes(content), sorted(number * cluster_size for number in zeroes)


@asynccontextmanager
async def files(folder: Path, source: bytes) -> AsyncIterator[tuple[FileNode, FileNode]]:
    """A source with that content, and an empty target."""
    nodes = []
    for name, content, read_only in (("source", source, True), ("target", b"", False)):
        (folder / name).write_bytes(content)
        nodes.append(await FileNode.open(str(folder / name), node_name=name, read_only=read_only))
    yield nodes[0], nodes[1]
    for node in nodes:
        await node.close()


# -- copies -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cluster_size", [4 * KIB, CLUSTER])
async def test_what_is_not_zero_is_written_and_what_is_zero_is_told(
    tmp_path: Path, cluster_size: int
) -> None:
    content, zeroes = with_zeroes(cluster_size, seed=cluster_size)
    async with files(tmp_path, content) as (source, target):
        plan = [Segment(LENGTH, source, 0)]
        assert await target.copy_apart(plan, MIB, LENGTH, cluster_size) == zeroes
        assert len(processes()) == 1
        assert bytes(await target.read(0, MIB + LENGTH)) == bytes(MIB) + content
    end = next(end for end in range(LENGTH, 0, -cluster_size) if end - cluster_size not in zeroes)
    assert (tmp_path / "target").stat().st_size == MIB + end
    assert (tmp_path / "target").stat().st_blocks * 512 < LENGTH


async def test_a_copy_is_put_together_from_files_and_zeroes(tmp_path: Path) -> None:
    """What a fragmented chain is; borders lie anywhere, and the plan ends before the last cluster does."""
    rng = random.Random(2)
    async with files(tmp_path, CONTENT) as (source, target):
        (tmp_path / "other").write_bytes(CONTENT[::-1])
        other = await FileNode.open(str(tmp_path / "other"), node_name="other", read_only=True)
        plan, expected = [], b""
        while len(expected) < LENGTH - 2 * CLUSTER:
            length, node = rng.randrange(1, 3 * CLUSTER), rng.choice([source, other, None])
            offset = rng.randrange(LENGTH - length)
            plan.append(Segment(length, node, offset))
            content = bytes(length) if node is None else CONTENT if node is source else CONTENT[::-1]
            expected += content[:length] if node is None else content[offset : offset + length]
        expected = expected.ljust(LENGTH, b"\0")
        zeroes = await target.copy_apart(plan, 0, LENGTH, CLUSTER)
        assert zeroes == [o for o in range(0, LENGTH, CLUSTER) if not any(expected[o : o + CLUSTER])]
        assert bytes(await target.read(0, LENGTH)) == expected
        await other.close()


@pytest.mark.parametrize("place_length", [CLUSTER, 4 * MIB, 6 * MIB + CLUSTER, LENGTH])
async def test_a_copy_ends_where_there_is_no_more_place(tmp_path: Path, place_length: int) -> None:
    content, zeroes = with_zeroes(CLUSTER, seed=place_length)
    async with files(tmp_path, content) as (source, target):
        plan = [Segment(LENGTH, source, 0)]
        found = await target.copy_apart(plan, 0, LENGTH, CLUSTER, place_length)
        assert found is not None
        end = packed_end(LENGTH, found, CLUSTER, place_length)
        assert found == [zero for zero in zeroes if zero < end]
        kept = b"".join(content[at : at + CLUSTER] for at in range(0, end, CLUSTER) if at not in zeroes)
        assert len(kept) == place_length or end == LENGTH
        assert (tmp_path / "target").read_bytes()[: len(kept)] == kept


async def test_many_copies_at_once(tmp_path: Path) -> None:
    """More than there are lanes: whoever finds none copies itself."""
    count = copier.LANE_COUNT + 2
    async with files(tmp_path, CONTENT) as (source, target):
        await target.copy_apart([Segment(MIB, source, 0)], count * MIB, MIB, CLUSTER)  # it has started
        copies = (
            target.copy_apart([Segment(MIB, source, k % 8 * MIB)], k * MIB, MIB, CLUSTER)
            for k in range(count)
        )
        assert await asyncio.gather(*copies) == [[]] * copier.LANE_COUNT + [None] * 2
        assert len(processes()) == 1
        assert bytes(await target.read(0, 8 * MIB)) == CONTENT[: 8 * MIB]


async def fill_all(image: OverlayNode, plan: list[Segment]) -> FillCounts:
    return await image.fill([(0, image.size)], SourcePlan(0, plan), lambda *_: True)


async def test_version_2_which_knows_no_zeroes_is_filled_with_data(tmp_path: Path) -> None:
    """What the process finds to be zeroes has no place, and a map of that version cannot say so."""
    chain = await chains.make(tmp_path, ["AB" * 20 + "0" * 4 + "CD" * 20, "-" * 84], CLUSTER, "raw")
    qemu_img.create(chain.active, 84 * CLUSTER, "compat=0.10", backing=chain.paths[0], backing_format="raw")
    async with chains.opened(chain) as image:
        assert (await fill_all(image, await image.plan_read(0, image.size))).zeroed == 0
        assert await read_all(image, CLUSTER) == chain.content
    chains.assert_same_in_qemu(chain, chain.content)


async def test_image_is_filled_as_by_threads(tmp_path: Path) -> None:
    chain = await chains.make(
        tmp_path, ["ABCDEFGHIJKLMNOPQRST" * 3 + "0" + "ABCDEF0", "-" * 10 + "!" + "-" * 57], CLUSTER
    )
    async with chains.opened(chain) as image:
        assert image.copies_apart
        counts = await fill_all(image, await image.plan_read(0, image.size))
        assert (counts.copied, counts.zeroed) == (65 * CLUSTER, 2 * CLUSTER)
        assert await read_all(image, CLUSTER) == chain.content
        await image.change_backing(None, None)
    assert len(processes()) == 1
    qemu_img.assert_sound(chain.active)
    assert qemu_img.content(chain.active) == chain.content


# -- where it is not for ----------------------------------------------------------------------


async def test_no_process_while_guests_do_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(all_guests, "last_ns", time.monotonic_ns() - int(1e9 * GUEST_TIME_S) - 1)
    async with files(tmp_path, CONTENT) as (source, target):
        assert not target.copies_apart
        assert await target.copy_apart([Segment(LENGTH, source, 0)], 0, LENGTH, CLUSTER) is None
    assert processes() == []


async def test_what_it_cannot_do_is_left_to_others(tmp_path: Path) -> None:
    async with files(tmp_path, CONTENT) as (source, target):
        faults = FaultsNode(source, FaultRules([]), node_name="faults")

        async def is_refused(node: Source, offset: int, length: int, cluster_size: int) -> bool:
            plan = [Segment(length, node, 0)]
            return await target.copy_apart(plan, offset, length, cluster_size) is None

        for _ in range(2):
            assert await is_refused(faults, 0, LENGTH, CLUSTER)  # it is to see everything
            assert await is_refused(source, 0, MIB // 2, CLUSTER)  # not worth while
            assert await is_refused(source, 512, LENGTH, CLUSTER)
            assert await is_refused(source, 0, MIB, 512)  # runs of clusters could be anywhere
            many = [Segment(KIB, source, 0)] * (LENGTH // KIB)
            assert await target.copy_apart(many, 0, LENGTH, CLUSTER) is None
            assert not await is_refused(source, 0, LENGTH, CLUSTER)  # then the same with all that it takes


async def test_without_direct_writes_threads_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cold, "_open_direct", lambda fd: cold._NO_DIRECT)
    async with files(tmp_path, CONTENT) as (source, target):
        assert await target.copy_apart([Segment(LENGTH, source, 0)], 0, LENGTH, CLUSTER) is None


# -- when something is wrong ------------------------------------------------------------------


async def test_failed_copies_are_made_again_and_say_what_is_wrong(tmp_path: Path) -> None:
    chain = await chains.make(tmp_path, ["ABCDEFGHIJKLMNOPQRSTUVWXYZABCDE", "-" * 31], CLUSTER, "raw")
    async with chains.opened(chain) as image:
        plan = await image.plan_read(0, image.size)
        os.truncate(chain.paths[0], 20 * CLUSTER)
        with pytest.raises(StorageError, match="cut short"):
            await fill_all(image, plan)
        assert len(processes()) == 1
        chain.paths[0].write_bytes(chain.content)
        await fill_all(image, plan)
        assert await read_all(image, CLUSTER) == chain.content


async def test_a_write_that_fails_is_told(tmp_path: Path, own: Copier) -> None:
    """Of a file that is not open for writing; the next copy is made as if nothing had been."""
    async with files(tmp_path, CONTENT):
        with (tmp_path / "source").open("rb") as source, (tmp_path / "target").open("r+b") as target:
            segments = [copier.FileSegment(source.fileno(), 0, LENGTH)]
            right = copier.TargetFile(os.open(tmp_path / "target", os.O_RDWR | os.O_DIRECT), target.fileno())
            wrong = copier.TargetFile(source.fileno(), target.fileno())
            assert own.start_blocking()
            answers = [await own.copy(file, 0, segments, CLUSTER) for file in (wrong, right, wrong, right)]
            os.close(right.direct_fd)
        assert answers == [None, [], None, []]
        assert (tmp_path / "target").read_bytes() == CONTENT
    assert len(processes()) == 1


async def test_a_request_that_cannot_be_sent(
    tmp_path: Path, own: Copier, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with files(tmp_path, CONTENT) as (source, target):
        plan = [Segment(LENGTH, source, 0)]
        assert await target.copy_apart(plan, 0, LENGTH, CLUSTER) == []

        def send_fds(*_: object) -> int:
            raise OSError(errno.ETOOMANYREFS, os.strerror(errno.ETOOMANYREFS))

        with monkeypatch.context() as patched:
            patched.setattr(socket, "send_fds", send_fds)
            assert await target.copy_apart(plan, 0, LENGTH, CLUSTER) is None
        assert await target.copy_apart(plan, 0, LENGTH, CLUSTER) == []


async def test_it_is_started_again_when_killed_but_then_only_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [1000.0]
    monkeypatch.setattr(copier, "copier", Copier(lambda: now[0]))
    async with files(tmp_path, CONTENT) as (source, target):
        plan = [Segment(LENGTH, source, 0)]
        for _ in range(copier.FAILURE_COUNT_MAX):
            assert await target.copy_apart(plan, 0, LENGTH, CLUSTER) == []
            kill(*processes())
        for number in range(2):
            now[0] += copier.RECOVERY_TIME_S - 0.1
            assert not target.copies_apart
            assert await target.copy_apart(plan, 0, LENGTH, CLUSTER) is None
            assert processes() == []
            now[0] += 0.1
            assert await target.copy_apart(plan, 0, LENGTH, CLUSTER) == []
            kill(*processes())
            assert caplog.text.count("status -9") == copier.FAILURE_COUNT_MAX + number + 1


class FullDisk(native_aio.Writes):
    """Writes that all fail, when they are waited for."""

    def __init__(self, count_max: int) -> None:
        self._numbers = list(range(count_max))
        self._given: list[int] = []

    def submit(self, write: native_aio.Write) -> int | None:
        self._given.append(self._numbers.pop())
        return self._given[-1]

    def wait(self) -> list[tuple[int, int]]:
        number = self._given.pop(0)
        self._numbers.append(number)
        return [(number, -errno.ENOSPC)]


def test_a_copy_fails_while_it_waits_for_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full: nothing is left to be read then, and the next copy is made as if nothing had been."""
    (tmp_path / "source").write_bytes(CONTENT[: 16 * KIB])
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, monkeypatch.context() as patched:
        patched.setattr(copier_process, "Writes", FullDisk)
        pump = copier_process.Pump([memoryview(bytearray(4 * KIB)) for _ in range(2)])
        for _ in range(2):
            opened = [os.open(tmp_path / "source", os.O_RDONLY) for _ in range(3)]
            request = array.array("q", [4 * KIB, 0, 0, 2, 0, 16 * KIB])
            pump.pump(copier_process.Copy(theirs, request, opened))
            while pump.is_writing:
                pump.wait()
            assert array.array("q", ours.recv(64)).tolist() == [copier_process.FAILED]


def test_without_room_for_its_writes_it_ends_with_one_line() -> None:
    """As when others have all that the machine allows (fs.aio-max-nr)."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    program = (
        "import sys; from blockd.protocols import copier_process, native_aio; native_aio._CALLS = None; "
        "copier_process.main(copier_process.EDITION, [int(sys.argv[1])])"
    )
    with ours, theirs:
        result = subprocess.run(
            [sys.executable, "-c", program, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            check=False,
        )
    assert result.returncode == 1
    assert result.stderr.startswith("no room for writes of its own: ")
    assert result.stderr.count("\n") == 1


async def test_what_ends_the_daemon_in_an_orderly_way_leaves_it_its_copies(tmp_path: Path) -> None:
    """A terminal, or who supervises services, signals all processes at once."""
    async with files(tmp_path, CONTENT) as (source, target):
        plan = [Segment(LENGTH, source, 0)]
        assert await target.copy_apart(plan, 0, LENGTH, CLUSTER) == []
        [pid] = processes()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(pid, number)
        assert await target.copy_apart(plan, 0, LENGTH, CLUSTER) == []
        assert processes() == [pid]


async def asked_in_vain(
    source: FileNode, target: FileNode, one: Copier
) -> tuple[int, "asyncio.Task[object]"]:
    """The process, which is stopped, and a copy that it has been asked for."""
    await target.copy_apart([Segment(MIB, source, 0)], 0, MIB, CLUSTER)
    [pid] = processes()
    os.kill(pid, signal.SIGSTOP)
    copy = asyncio.create_task(target.copy_apart([Segment(LENGTH, source, 0)], 0, LENGTH, CLUSTER))
    await until_asked(one)
    return pid, copy


async def until_asked(one: Copier) -> None:
    """Return when it has been asked for a copy."""
    while len(one._lanes) == copier.LANE_COUNT:
        await steps(1)


async def test_killed_in_the_midst_of_a_copy(tmp_path: Path, own: Copier) -> None:
    """It has the request and does nothing about it."""
    async with files(tmp_path, CONTENT) as (source, target):
        pid, copy = await asked_in_vain(source, target, own)
        kill(pid)
        assert await copy is None
        assert await target.copy_apart([Segment(LENGTH, source, 0)], 0, LENGTH, CLUSTER) == []
        assert processes() != [pid]


async def test_a_cancelled_copy_is_waited_for(tmp_path: Path, own: Copier) -> None:
    """Until then it may write: who cancelled it must not give its place to anything else."""
    async with files(tmp_path, CONTENT) as (source, target):
        pid, copy = await asked_in_vain(source, target, own)
        for _ in range(3):
            copy.cancel()
            await steps(5)
        assert not copy.done()
        os.kill(pid, signal.SIGCONT)
        with pytest.raises(asyncio.CancelledError):
            await copy
        assert len(own._lanes) == copier.LANE_COUNT
        assert (tmp_path / "target").read_bytes()[:LENGTH] == CONTENT
        assert await target.copy_apart([Segment(MIB, source, 0)], 0, MIB, CLUSTER) == []
        assert processes() == [pid]


async def test_copies_take_no_thread_when_all_is_prepared(tmp_path: Path, own: Copier) -> None:
    async with files(tmp_path, CONTENT) as (source, target):
        target.is_longer_allowed = True
        plan = [Segment(LENGTH, source, 0)]
        await target.copy_apart(plan, 0, LENGTH, CLUSTER)
        copy = asyncio.create_task(target.copy_apart(plan, 0, LENGTH, CLUSTER))
        await until_asked(own)
        assert thread_calls.count == 0
        assert await copy == []
        end = target._end
        with end._room_lock:  # a thread is at work on the file's end
            copy = asyncio.create_task(target.copy_apart(plan, 0, LENGTH, CLUSTER))
            await steps(5)
            assert thread_calls.count == 1
        assert await copy == []


async def test_the_file_is_locked_as_long_as_anything_may_be_written(tmp_path: Path, own: Copier) -> None:
    """Also when the daemon has gone: here it lets go of everything."""
    async with files(tmp_path, CONTENT) as (source, target):
        pid, copy = await asked_in_vain(source, target, own)
        os.close(target._fd)
        target._fd = os.open(os.devnull, os.O_RDWR)
        with pytest.raises(RequestError, match="lock"):
            await FileNode.open(str(tmp_path / "target"), node_name="again", read_only=False)
        os.kill(pid, signal.SIGCONT)
        assert await copy == []
        again = await FileNode.open(str(tmp_path / "target"), node_name="again", read_only=False)
        await again.close()


async def test_without_more_descriptors_threads_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = socket.socketpair
    pairs: list[tuple[socket.socket, socket.socket]] = []

    def socketpair(family: int, kind: int) -> tuple[socket.socket, socket.socket]:
        if len(pairs) == 3:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        pairs.append(real(family, kind))
        return pairs[-1]

    monkeypatch.setattr(socket, "socketpair", socketpair)
    async with files(tmp_path, CONTENT) as (source, target):
        assert await target.copy_apart([Segment(LENGTH, source, 0)], 0, LENGTH, CLUSTER) is None
        assert not target.copies_apart
    assert all(end.fileno() == -1 for pair in pairs for end in pair)
    assert "Too many open files" in caplog.text


@pytest.mark.parametrize("what", ["program", "python"])
async def test_where_it_cannot_start_threads_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    caplog.set_level(logging.WARNING)
    if what == "program":
        monkeypatch.setattr(copier, "_PROGRAM", "raise OSError(5, 'not today')  # {}")
    else:
        monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    chain = await chains.make(tmp_path, ["ABCDEFGHIJKLMNOPQRSTUVWXYZABCDE", "-" * 31], CLUSTER)
    async with chains.opened(chain) as image:
        await fill_all(image, await image.plan_read(0, image.size))
        assert await read_all(image, CLUSTER) == chain.content
        assert not image.copies_apart
    wait_until_noticed(0)
    assert "the process that copies beside guests ended" in caplog.text
    assert ("status 1: OSError: [Errno 5] not today" if what == "program" else "No such file") in caplog.text
    assert "Traceback" not in caplog.text


@pytest.mark.slow
async def test_it_ends_by_itself_and_is_started_again(tmp_path: Path, own: Copier) -> None:
    async with files(tmp_path, CONTENT) as (source, target):
        plan = [Segment(LENGTH, source, 0)]
        for _ in range(2):
            assert await target.copy_apart(plan, 0, LENGTH, CLUSTER) == []
            wait_until_noticed(*processes())
        assert target.copies_apart


def test_it_imports_little() -> None:
    """It is there soon: neither asyncio nor what the daemon needs."""
    program = f"import sys; sys.path.append({str(copier._ROOT)!r}); import {copier_process.__name__}"
    loaded = "; print(*(n for n in sys.modules if n in ('asyncio', 'subprocess', 'pydantic', 'logging')))"
    command = [sys.executable, "-I", "-S", "-c", program + loaded]
    assert subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip() == ""

"""add-cow images on files that fail: the N-th request of a kind to the image, its add-cow file or the base.

Each is told, nothing acknowledged is lost, the image stays valid, and when the fault is gone the stream
completes. After a failed sync of either file nothing is written any more.
"""

import errno
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple

import pytest

from blockd.errors import StorageError
from blockd.filters.fault_rules import Fault, FaultRules, IoType
from blockd.filters.faults import FaultsNode
from blockd.formats.raw.image import RawImage
from blockd.jobs import stream as stream_module
from blockd.jobs.job import OnError
from blockd.jobs.manager import JobManager
from blockd.jobs.states import JobStatus
from blockd.jobs.stream import StreamJob
from tests.chains import read_all
from tests.faults.rig import CountingRules, Rig
from tests.inline_threads import steps, use_inline_threads
from tests.model import ModelDisk, drawn
from tests.recording import RecordingFile
from tests.streaming import Observer, Streaming, open_overlay, overlay, streaming

CLUSTER = 4096
COUNT = 40


class Request(NamedTuple):
    """A kind of request to one of the files, which can fail."""

    io_type: IoType
    file: str

    def __str__(self) -> str:
        return f"{self.io_type} of the {self.file}"


REQUESTS = [
    Request(IoType.WRITE, "image"),
    Request(IoType.READ, "image"),
    Request(IoType.DISCARD, "image"),
    Request(IoType.WRITE_ZEROES, "image"),
    Request(IoType.WRITE, "add-cow file"),
    Request(IoType.READ, "add-cow file"),
    Request(IoType.READ, "base"),
]
SYNCS = [Request(IoType.FLUSH, "image"), Request(IoType.FLUSH, "add-cow file")]


class NthRequest(CountingRules):
    """Fail the `number`-th request of a kind, or all from then on."""

    def __init__(self, io_type: IoType, number: int, code: int, *, once: bool) -> None:
        super().__init__()
        self._io_type, self._number, self._code, self._once = io_type, number, code, once
        self._count = 0

    def take(self, io_type: IoType, offset: int = 0, length: int = 0) -> Fault:
        self._count += io_type is self._io_type
        is_due = self._count == self._number if self._once else self._count >= self._number
        if io_type is not self._io_type or not is_due:
            return Fault()
        self.fault_count += 1
        return Fault(self._code)


class AddCowRig(Rig):
    """A rig with the image in a file of its own."""

    image_faults: FaultsNode

    def mend(self) -> None:
        super().mend()
        self.image_faults.rules = FaultRules()


@asynccontextmanager
async def rig(request: Request, number: int, code: int, *, once: bool) -> AsyncIterator[AddCowRig]:
    """An image over a base, with some clusters in it, which is going to fail."""
    content = drawn(["BB0B" * (COUNT // 4)], CLUSTER)
    base_file = RecordingFile(content, "base.raw")
    recording = RecordingFile(name="disk.add-cow")
    data = recording.beside = RecordingFile(name="disk.data")
    plain_base = await RawImage.open(base_file, node_name="base", read_only=True)
    image = await overlay(recording, plain_base, len(content), cluster_size=CLUSTER, image_format="add-cow")
    await image.write(5 * CLUSTER, b"used" * CLUSTER)
    model = ModelDisk(content[: 5 * CLUSTER] + b"used" * CLUSTER + content[9 * CLUSTER :])
    await image.close()

    nodes = {
        name: FaultsNode(file, FaultRules(), node_name=f"{number}")
        for number, (name, file) in enumerate(
            {"image": data, "add-cow file": recording, "base": base_file}.items()
        )
    }
    base = await RawImage.open(nodes["base"], node_name="base", read_only=True)
    observer = Observer()
    async with JobManager(observer) as jobs:
        active = await open_overlay(nodes["add-cow file"], base, image_file=nodes["image"])
        rules = NthRequest(request.io_type, number, code, once=once)
        nodes[request.file].rules = rules
        disk = Streaming(active, jobs)
        parts = (recording, nodes["add-cow file"], nodes["base"])
        scene = AddCowRig(disk, rules, observer, model, base, *parts, cluster_size=CLUSTER)
        scene.image_faults = nodes["image"]
        yield scene


@pytest.fixture(autouse=True)
async def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """No threads, and several copies and checkpoints on a small disk."""
    use_inline_threads()
    monkeypatch.setattr(stream_module, "COPY_LENGTH", CLUSTER)
    monkeypatch.setattr(stream_module, "WINDOW_LENGTH", 6 * CLUSTER)
    monkeypatch.setattr(stream_module, "CHECKPOINT_LENGTH", 8 * CLUSTER)


async def stream_through(scene: AddCowRig, on_error: OnError) -> StreamJob:
    """A guest uses the disk while it is streamed, until the stream has stopped or ended."""
    await scene.write(1.5, 2)
    job = await scene.start(on_error)
    await steps(3)
    await scene.write(12, 1)
    await scene.write(20.5, 1)
    await scene.discard(9, 2)
    await scene.zero(25, 3)
    await scene.read(30, 4)
    await scene.flush()
    while job.status not in (JobStatus.PAUSED, JobStatus.CONCLUDED, JobStatus.NULL):
        await steps(1)
    return job


async def complete(scene: AddCowRig, job: StreamJob) -> None:
    """The fault is gone: let the stream go on, or begin anew."""
    scene.mend()
    if job.status is JobStatus.PAUSED:
        job.resume()
        await job.wait_ended()
    if scene.disk.active.backing is not None:
        job = await scene.start(OnError.REPORT)
        await job.wait_ended()
        assert job.error is None


@pytest.mark.slow
@pytest.mark.parametrize("on_error", [OnError.REPORT, OnError.STOP], ids=str)
@pytest.mark.parametrize("request_", REQUESTS, ids=str)
async def test_nth_request_fails_under_a_stream(
    request_: Request, on_error: OnError, caplog: pytest.LogCaptureFixture
) -> None:
    for once, code in [(True, errno.EIO), (False, errno.ENOSPC)]:
        for number in itertools.count(1):
            caplog.clear()
            async with rig(request_, number, code, once=once) as scene:
                job = await stream_through(scene, on_error)
                # Copy-on-read and checkpoints that fail cost nobody anything, and are only logged.
                was_told = bool(scene.errors or scene.job_errors or scene.has_failed_job or caplog.records)
                was_met = scene.rules.fault_count > 0
                assert was_told == was_met, f"fault {number}"
                await scene.assert_valid()
                await complete(scene, job)
                await assert_all_is_well(scene)
            if not was_met:
                break
        assert number > 1


async def assert_all_is_well(scene: AddCowRig) -> None:
    """The guest reads what it wrote; the plain image alone holds it."""
    await scene.guest.read_all()
    await scene.guest.flush()
    await scene.assert_durable()
    await scene.disk.active.close()
    whole = await scene.open_again(read_only=True)
    assert whole.backing_filename is None
    assert await read_all(whole) == scene.model.content
    assert scene.recording.beside is not None
    assert scene.recording.beside.disk == scene.model.content


@pytest.mark.parametrize("request_", SYNCS, ids=str)
async def test_nth_sync_fails_under_a_stream(request_: Request) -> None:
    """Neither file is written any more then; what is on the disk is right in the next life."""
    for number in itertools.count(1):
        async with rig(request_, number, errno.EIO, once=True) as scene:
            job = await stream_through(scene, OnError.REPORT)
            if not scene.rules.fault_count:
                assert job.error is None
                break
            assert "completed" not in scene.observer.told
            again = await scene.open_again(read_only=False)
            content = await read_all(again)
            assert list(scene.model.after_crash().problems(content)) == []
            async with streaming(again) as disk:
                job = await disk.start(None)
                await job.wait_ended()
            assert job.error is None
            assert await read_all(again) == content
            await assert_stopped(scene)
    assert number > 2


async def assert_stopped(scene: AddCowRig) -> None:
    """Reads go on; nothing is accepted that cannot become durable."""
    await scene.guest.read_all()
    data = scene.recording.beside
    assert data is not None
    lengths = len(scene.recording.log), len(data.log)
    for change in (scene.write, scene.zero, scene.discard):
        for first in (5, COUNT - 1):
            scene.errors.clear()
            await change(first, 1)
            assert [error.errno for error in scene.errors] == [errno.EIO]
    scene.errors.clear()
    await scene.flush()
    await scene.resize(COUNT + 1)
    assert [error.errno for error in scene.errors] == [errno.EIO] * 3
    assert (len(scene.recording.log), len(data.log)) == lengths
    with pytest.raises(StorageError):
        await scene.disk.active.close()

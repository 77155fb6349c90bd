"""A disk that is full: guests are told, a stream stops or fails, and both go on when there is space."""

import random

import pytest

from blockd.errors import ErrorKind, StorageError
from blockd.formats.qcow2.check import check
from blockd.formats.raw.image import RawImage
from blockd.jobs.job import OnError
from tests.chains import read_all
from tests.doubles import FailingFile
from tests.guest import Guest, RootDisk
from tests.inline_threads import steps, use_inline_threads
from tests.model import ModelDisk, drawn
from tests.recording import RecordingFile
from tests.streaming import Streaming, open_overlay, overlay, streaming

CLUSTER = 1024
COUNT = 200  # two L2 tables


@pytest.fixture(autouse=True)
async def inline_threads() -> None:
    use_inline_threads()


def guest_of(disk: Streaming, model: ModelDisk) -> Guest:
    return Guest(RootDisk(disk.root), model, random.Random(0), cluster_size=CLUSTER)


async def make() -> tuple[FailingFile, RawImage, ModelDisk]:
    content = drawn(["B" * COUNT], CLUSTER)
    base = await RawImage.open(RecordingFile(content, "base.raw"), node_name="base", read_only=True)
    return FailingFile(), base, ModelDisk(content)


async def test_full_disk_stops_the_stream_which_goes_on_when_there_is_space() -> None:
    file, base, model = await make()
    active = await overlay(file, base, model.size, cluster_size=CLUSTER)
    async with streaming(active) as disk:
        file.fill_up(40 * CLUSTER)
        job = await disk.start(None, on_error=OnError.ENOSPC)
        while job.io_status.value == "ok":
            await steps(1)
        assert (job.io_status.value, job.status.value) == ("nospace", "paused")
        guest = guest_of(disk, model)
        with pytest.raises(StorageError) as caught:
            await guest.write(100 * CLUSTER, 60 * CLUSTER)
        assert caught.value.kind is ErrorKind.NO_SPACE
        await guest.read_all()

        file.work()
        job.resume()
        await job.wait_ended()
        assert job.error is None
        await guest.read_all()
        await active.close()
    report = await check(RecordingFile(bytes(file.disk)))
    assert (report.corruptions, report.leaks) == (0, 0)
    whole = await open_overlay(RecordingFile(bytes(file.disk)), None, read_only=True)
    assert await read_all(whole) == model.content


@pytest.mark.parametrize("on_error", [OnError.REPORT, OnError.IGNORE])
async def test_full_disk_fails_the_stream_and_keeps_the_backing(on_error: OnError) -> None:
    file, base, model = await make()
    active = await overlay(file, base, model.size, cluster_size=CLUSTER)
    async with streaming(active) as disk:
        file.fill_up(40 * CLUSTER)
        job = await disk.start(None, on_error=on_error)
        await job.wait_ended()
        assert job.error is not None
        assert job.error.kind is ErrorKind.NO_SPACE
        assert (disk.active.backing, disk.active.backing_filename) == (base, "base.raw")
        await guest_of(disk, model).read_all()
        file.work()
    await active.close()
    assert (await check(RecordingFile(bytes(file.disk)))).corruptions == 0

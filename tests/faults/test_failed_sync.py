"""After a failed sync the kernel may have dropped what was written: nothing is written any more, by anyone.

Only a new life, which reads what really is on the disk, writes again (promise 6).
"""

import errno
import itertools
import json
import struct
from pathlib import Path

import pytest

from blockd.block.file_events import FileEvent as Event
from blockd.errors import StorageError
from blockd.filters.fault_rules import IoType
from blockd.formats.raw.image import RawImage
from blockd.jobs.job import OnError
from blockd.jobs.states import JobStatus
from blockd.jobs.stream import StreamJob
from blockd.protocols.nbd_client import NbdClient
from tests import qemu_img
from tests.chains import read_all
from tests.conftest import StartDaemon
from tests.faults.rig import CLUSTER, Rig, Site, nth, rig
from tests.inline_threads import steps, use_inline_threads
from tests.streaming import streaming

SYNCS = Site(Event.FLUSH_TO_DISK, IoType.FLUSH)
COUNT = 150
MIB = 1 << 20


@pytest.fixture
async def inline_threads() -> None:
    use_inline_threads()


async def some_writes(scene: Rig) -> None:
    await scene.write(3, 2)
    await scene.flush()
    await scene.discard(3, 1)
    await scene.write(80.5, 2)
    await scene.flush()
    await scene.write(4.5, 0.5)


async def assert_stopped(scene: Rig) -> None:
    """Reads go on; nothing is accepted that cannot become durable, not even what only changes the map."""
    await scene.guest.read_all()
    log_length = len(scene.recording.log)
    for change in (scene.write, scene.zero, scene.discard):
        for first in (3, 120):  # clusters of its own, and unallocated ones
            scene.errors.clear()
            await change(first, 1)
            assert [error.errno for error in scene.errors] == [errno.EIO]
    scene.errors.clear()
    await scene.flush()
    await scene.resize(COUNT + 1)
    assert [error.errno for error in scene.errors] == [errno.EIO] * 3
    assert len(scene.recording.log) == log_length


async def assert_next_life_is_right(scene: Rig) -> None:
    """Opened again the disk holds what a crash may leave, and the stream completes."""
    await scene.assert_valid()
    again = await scene.open_again(read_only=False)
    content = await read_all(again)
    assert list(scene.model.after_crash().problems(content)) == []
    async with streaming(again) as disk:
        job = await disk.start(None)
        await job.wait_ended()
        assert job.error is None
        async with disk.root.request() as node:
            await node.write(0, bytes(CLUSTER))
    assert await read_all(again) == bytes(CLUSTER) + content[CLUSTER:]


@pytest.mark.usefixtures("inline_threads")
async def test_nth_sync_fails_under_a_guest() -> None:
    for number in itertools.count(1):
        async with rig(SYNCS, number, errno.EIO, once=True, cluster_count=COUNT) as scene:
            await some_writes(scene)
            if not scene.rules.fault_count:
                break
            assert scene.errors
            await assert_next_life_is_right(scene)
            await assert_stopped(scene)
            with pytest.raises(StorageError):
                await scene.disk.active.close()
    assert number > 3


@pytest.mark.usefixtures("inline_threads")
@pytest.mark.parametrize("on_error", [OnError.REPORT, OnError.IGNORE, OnError.STOP, OnError.ENOSPC], ids=str)
async def test_nth_sync_fails_under_a_stream(on_error: OnError) -> None:
    """Up to the very last one, for the header: the job never says that it completed."""
    for number in itertools.count(1):
        async with rig(SYNCS, number, errno.EIO, once=True, cluster_count=COUNT) as scene:
            await scene.write(1.5, 2)
            job = await scene.start(on_error)
            await steps(5)
            await scene.flush()
            await until_settled(job)
            if not scene.rules.fault_count:
                assert job.error is None
                break
            assert "completed" not in scene.observer.told
            if job.status is JobStatus.PAUSED:
                job.resume()
                await until_settled(job)
                assert job.status is JobStatus.PAUSED  # it can never succeed in this life
                job.cancel()
                await job.wait_ended()
            assert scene.disk.active.backing is scene.base
            await assert_next_life_is_right(scene)
            await assert_stopped(scene)
    assert number > 3


async def until_settled(job: StreamJob) -> None:
    while job.status not in (JobStatus.PAUSED, JobStatus.CONCLUDED, JobStatus.NULL):
        await steps(1)


@pytest.mark.usefixtures("inline_threads")
async def test_raw_image_stops_too() -> None:
    async with rig(SYNCS, 1, errno.EIO, once=True, cluster_count=COUNT) as scene:
        raw = await RawImage.open(scene.faults, node_name="raw", read_only=False)
        await raw.write(0, bytes(512))
        for attempt in (raw.flush(), raw.write(0, bytes(512)), raw.discard(0, 512)):
            with pytest.raises(StorageError):
                await attempt
        assert not raw.write_nowait(0, bytes(512))
        assert len(await raw.read(0, 512)) == 512


# -- a whole daemon -----------------------------------------------------------------------------------


async def test_nbd_guest_gets_eio_for_good(tmp_path: Path, start_daemon: StartDaemon) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(struct.pack(">Q", 0xB1) * (MIB // 8))
    active = qemu_img.create(tmp_path / "active.qcow2", MIB, backing=base, backing_format="raw")
    daemon = await start_daemon(
        *("--blockdev", f"file,node-name=f,filename={active}"),
        *("--blockdev", json.dumps({"driver": "blkdebug", "node-name": "d", "image": "f", **nth(SYNCS, 5)})),
        *("--blockdev", "qcow2,node-name=q,file=d"),
        *("--export", "nbd,id=e,node-name=q,name=vda,writable=on"),
    )
    client = await NbdClient.connect_unix(str(daemon.nbd_path), "vda")
    await client.write(0, bytes(512))
    await client.flush()  # four syncs: the header's mark, data and refcounts, a new table, the map
    await client.write(0, b"1" * 512)
    with pytest.raises(StorageError) as caught:
        await client.flush()
    assert caught.value.errno == errno.EIO
    for attempt in (
        client.write(0, b"2" * 512),
        client.write(MIB // 2, b"2" * 512, fua=True),
        client.trim(0, MIB // 2),
        client.write_zeroes(0, MIB // 2),
        client.flush(),
    ):
        with pytest.raises(StorageError) as caught:
            await attempt
        assert caught.value.errno == errno.EIO
    assert bytes(await client.read(0, 520)) == b"1" * 512 + base.read_bytes()[:8]

    async with await daemon.qmp() as qmp:
        await qmp.command("block-stream", {"device": "q", "job-id": "j"})
        event = await qmp.event("BLOCK_JOB_COMPLETED")
        assert "error" in event
    await client.disconnect()
    assert await daemon.stop() == 1
    qemu_img.assert_sound(active)
    assert qemu_img.content(active)[512:] == base.read_bytes()[512:]

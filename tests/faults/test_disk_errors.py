"""Every kind of operation fails at its first, second, third time, until a run meets no fault any more.

The habit is SQLite's. Each fault comes once or for ever, as an I/O error or a full disk, and meets a
stream under every on-error policy: it is told, nothing acknowledged is lost, the image stays valid, and
when the fault is gone the stream completes.
"""

import errno
import itertools
from collections.abc import Mapping
from pathlib import Path

import pytest

from blockd.block.file_events import FileEvent as Event
from blockd.errors import ErrorKind, StorageError
from blockd.filters.fault_rules import IoType
from blockd.jobs import stream as stream_module
from blockd.jobs.job import IoStatus, OnError
from blockd.jobs.states import JobStatus
from blockd.jobs.stream import StreamJob
from tests import qemu_img
from tests.chains import read_all
from tests.faults.rig import CLUSTER, Rig, Site, rig
from tests.inline_threads import steps, use_inline_threads

COUNT = 300  # five L2 tables and two refcount blocks
# Cluster size and count.
GEOMETRIES = {"qcow2": (CLUSTER, COUNT), "qed": (4096, 108)}

SITES = [
    Site(Event.PWRITEV, IoType.WRITE),
    Site(Event.L2_UPDATE, IoType.WRITE),
    Site(Event.L2_ALLOC_WRITE, IoType.WRITE),
    Site(Event.L1_UPDATE, IoType.WRITE),
    Site(Event.REFBLOCK_UPDATE, IoType.WRITE),
    Site(Event.REFBLOCK_ALLOC_HOOKUP, IoType.WRITE),
    Site(Event.CLUSTER_ALLOC, IoType.WRITE),
    Site(Event.CLUSTER_FREE, IoType.DISCARD),
    Site(Event.COR_WRITE, IoType.WRITE),
    Site(Event.WRITE_AIO, IoType.WRITE),
    Site(Event.READ_AIO, IoType.READ),
    Site(Event.L2_LOAD, IoType.READ),
    Site(Event.REFBLOCK_LOAD, IoType.READ),
    Site(Event.READ_AIO, IoType.READ, "base"),
]
QED_CASES = [
    (Site(Event.PWRITEV, IoType.WRITE), OnError.STOP),
    (Site(Event.L2_UPDATE, IoType.WRITE), OnError.STOP),
    (Site(Event.L2_UPDATE, IoType.WRITE), OnError.REPORT),
    (Site(Event.CLUSTER_ALLOC, IoType.WRITE), OnError.STOP),
    (Site(Event.WRITE_AIO, IoType.WRITE), OnError.STOP),
    (Site(Event.READ_AIO, IoType.READ), OnError.STOP),
    (Site(Event.READ_AIO, IoType.READ, "base"), OnError.REPORT),
]
# Where writing and filling of subclusters go their own ways.
SUBCLUSTER_SITES = [
    Site(Event.CLUSTER_ALLOC, IoType.WRITE),
    Site(Event.COR_WRITE, IoType.WRITE),
    Site(Event.WRITE_AIO, IoType.WRITE),
    Site(Event.L2_UPDATE, IoType.WRITE),
]
POLICIES = [OnError.REPORT, OnError.IGNORE, OnError.STOP, OnError.ENOSPC]
CODES = [errno.EIO, errno.ENOSPC]


@pytest.fixture(autouse=True)
async def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """No threads, and several copies and checkpoints on a small disk."""
    use_inline_threads()
    monkeypatch.setattr(stream_module, "COPY_LENGTH", 32 * CLUSTER)
    monkeypatch.setattr(stream_module, "WINDOW_LENGTH", 96 * CLUSTER)
    monkeypatch.setattr(stream_module, "CHECKPOINT_LENGTH", 64 * CLUSTER)


# -- streams ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("on_error", POLICIES, ids=str)
@pytest.mark.parametrize("site", SITES, ids=str)
async def test_nth_operation_fails_under_a_stream(
    site: Site, on_error: OnError, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for once, code in itertools.product([True, False], CODES):
        image = await fail_one_after_the_other(site, on_error, code, caplog, once=once)
    (tmp_path / "active.qcow2").write_bytes(image)
    qemu_img.assert_sound(tmp_path / "active.qcow2")


@pytest.mark.slow
@pytest.mark.parametrize(("site", "on_error"), QED_CASES, ids=str)
async def test_nth_operation_fails_under_a_stream_into_qed(
    site: Site, on_error: OnError, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for once, code in ((True, errno.EIO), (False, errno.ENOSPC)):
        image = await fail_one_after_the_other(site, on_error, code, caplog, once=once, image_format="qed")
    (tmp_path / "active.qed").write_bytes(image)
    qemu_img.assert_sound(tmp_path / "active.qed", "qed")


@pytest.mark.slow
@pytest.mark.parametrize("site", SUBCLUSTER_SITES, ids=str)
async def test_nth_operation_fails_with_subclusters(
    site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A subcluster is as large as a cluster elsewhere."""
    options = {"extended_l2": True, "cluster_size": 32 * CLUSTER}
    for once in (True, False):
        image = await fail_one_after_the_other(
            site, OnError.REPORT, errno.ENOSPC, caplog, once=once, options=options
        )
        (tmp_path / "active.qcow2").write_bytes(image)
        verdict = qemu_img.check(tmp_path / "active.qcow2")
        assert verdict is not None
        assert (verdict.corruptions, verdict.leaks) == (0, 0)


async def fail_one_after_the_other(
    site: Site,
    on_error: OnError,
    code: int,
    caplog: pytest.LogCaptureFixture,
    *,
    once: bool,
    image_format: str = "qcow2",
    options: Mapping[str, object] | None = None,
) -> bytes:
    """The first, the second, the third … operation fails, until none does; returns the last image file."""
    cluster_size, cluster_count = GEOMETRIES[image_format]
    for number in itertools.count(1):
        caplog.clear()
        async with rig(
            site,
            number,
            code,
            once=once,
            image_format=image_format,
            cluster_size=cluster_size,
            cluster_count=cluster_count,
            options=options,
        ) as scene:
            await stream_through(scene, on_error, code)
            # Copy-on-read and checkpoints that fail cost nobody anything, and are only logged.
            was_told = bool(scene.errors or scene.job_errors or scene.has_failed_job or caplog.records)
            was_met = scene.rules.fault_count > 0
            assert was_told == was_met, f"fault {number}"
            await assert_all_is_well(scene)
        if not was_met:
            break
    assert number > 1
    return bytes(scene.recording.disk)


@pytest.mark.parametrize("on_error", POLICIES, ids=str)
async def test_first_write_of_a_map_fails_under_a_stream(on_error: OnError) -> None:
    for code in CODES:
        async with rig(SITES[1], 1, code, once=False, cluster_count=COUNT) as scene:
            await stream_through(scene, on_error, code)
            await assert_all_is_well(scene)
            assert scene.rules.fault_count > 0


async def stream_through(scene: Rig, on_error: OnError, code: int) -> None:
    """A guest uses the disk while it is streamed; whatever fails, the stream completes in the end."""
    await scene.write(1.5, 2)
    job = await scene.start(on_error)
    await steps(3)
    await scene.write(40, 1)
    await scene.write(90.5, 1)
    await scene.discard(20, 2)
    await scene.zero(30, 3)
    await scene.read(100, 4)
    await scene.flush()
    await stopped_or_ended(job)
    if job.status is JobStatus.PAUSED:
        await check_stopped(scene, job, on_error, code)
    elif job.error is not None:
        await check_failed(scene, job, on_error, code)
    scene.mend()
    if scene.disk.active.backing is not None:
        again = await scene.start(OnError.REPORT)
        await again.wait_ended()
        assert again.error is None


async def stopped_or_ended(job: StreamJob) -> None:
    while job.status not in (JobStatus.PAUSED, JobStatus.CONCLUDED, JobStatus.NULL):
        await steps(1)


async def check_stopped(scene: Rig, job: StreamJob, on_error: OnError, code: int) -> None:
    assert on_error is OnError.STOP or (on_error, code) == (OnError.ENOSPC, errno.ENOSPC)
    assert job.io_status is (IoStatus.NOSPACE if code == errno.ENOSPC else IoStatus.FAILED)
    assert scene.job_errors[-1].endswith("error: stop")
    await scene.assert_valid()
    before = scene.rules.fault_count
    job.resume()
    await stopped_or_ended(job)
    if job.status is JobStatus.PAUSED:
        assert scene.rules.fault_count > before, "stopped without a fault"
        scene.mend()
        job.resume()
        await job.wait_ended()
    assert (job.error, job.io_status) == (None, IoStatus.OK)


async def check_failed(scene: Rig, job: StreamJob, on_error: OnError, code: int) -> None:
    assert isinstance(job.error, StorageError)
    assert job.error.errno == code
    assert job.error.kind is (ErrorKind.NO_SPACE if code == errno.ENOSPC else ErrorKind.IO)
    expected = "ignore" if on_error is OnError.IGNORE else "report"
    assert {told.rpartition(" ")[2] for told in scene.job_errors} <= {expected}
    assert scene.observer.told.count("failed") == 1
    await scene.assert_valid()
    again = await scene.open_again(read_only=True)
    assert again.backing is scene.base
    assert (scene.disk.active.backing, scene.disk.active.backing_filename) == (scene.base, "base.raw")


async def assert_all_is_well(scene: Rig) -> None:
    """The guest reads what it wrote; flushed and closed, the image alone holds it, without its base."""
    await scene.guest.read_all()
    await scene.guest.flush()
    await scene.assert_durable()
    await scene.disk.active.close()
    await scene.assert_valid()
    whole = await scene.open_again(read_only=True)
    assert whole.backing_filename is None
    assert await read_all(whole) == scene.model.content

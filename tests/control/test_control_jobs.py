"""The life of a job: order of what its observer is told, and races of the verbs as named schedules."""

import asyncio
import errno

import pytest

from blockd.errors import BlockdError, RequestError, StorageError
from blockd.jobs.job import IoStatus, OnError
from blockd.jobs.manager import JobManager
from blockd.jobs.states import JobStatus
from tests.control.fakes import Recorder, ScriptedJob, settle

SUCCESS = ["created", "running", "waiting", "pending", "COMPLETED ok", "done", "concluded", "null"]
CANCELLED = ["created", "running", "aborting", "CANCELLED", "done", "concluded", "null"]


def eio() -> StorageError:
    return StorageError("Could not read 'b': Input/output error")


def start(manager: JobManager, job: ScriptedJob, recorder: Recorder) -> ScriptedJob:
    job.on_done = recorder.done
    manager.start(job)
    return job


async def test_success_in_order() -> None:
    recorder = Recorder()
    async with JobManager(recorder) as manager:
        job = start(manager, ScriptedJob(), recorder)
        assert recorder.lines == ["created", "running"]
        job.step(2)
        await job.wait_ended()
        assert recorder.lines == SUCCESS
        assert (job.offset, job.length, job.done_chunks, list(manager)) == (2, 2, [0, 1], [])


async def test_length_is_real_before_the_job_ran() -> None:
    recorder = Recorder()
    async with JobManager(recorder) as manager:
        job = start(manager, ScriptedJob(chunk_count=7), recorder)
        assert (job.offset, job.length) == (0, 7)


async def test_reported_error_fails_the_job() -> None:
    recorder = Recorder()
    async with JobManager(recorder) as manager:
        job = ScriptedJob()
        job.failures = {1: [eio()]}
        start(manager, job, recorder).step(2)
        await job.wait_ended()
    assert recorder.lines == [
        *("created", "running", "ERROR read report", "aborting"),
        *("COMPLETED Could not read 'b': Input/output error", "done", "concluded", "null"),
    ]
    assert (job.offset, job.done_chunks) == (1, [0])


async def test_ignored_errors_go_on_and_fail_at_the_end() -> None:
    recorder = Recorder()
    async with JobManager(recorder) as manager:
        job = ScriptedJob(on_error=OnError.IGNORE)
        job.failures = {0: [eio()], 1: [eio()]}
        start(manager, job, recorder).step(2)
        await job.wait_ended()
    assert recorder.lines[:5] == [
        *("created", "running", "ERROR read ignore", "ERROR read ignore", "aborting"),
    ]
    assert recorder.lines[5].startswith("COMPLETED Could not read")
    assert job.offset == job.length


@pytest.mark.parametrize(
    ("policy", "code", "io_status"),
    [
        (OnError.STOP, errno.EIO, IoStatus.FAILED),
        (OnError.STOP, errno.ENOSPC, IoStatus.NOSPACE),
        (OnError.ENOSPC, errno.ENOSPC, IoStatus.NOSPACE),
        (OnError.AUTO, errno.ENOSPC, IoStatus.NOSPACE),
    ],
)
async def test_stop_pauses_and_resume_tries_the_same_chunk(
    policy: OnError, code: int, io_status: IoStatus
) -> None:
    recorder = Recorder()
    async with JobManager(recorder) as manager:
        job = ScriptedJob(on_error=policy)
        job.failures = {0: [StorageError("no", errno=code)]}
        start(manager, job, recorder).step()
        await settle(lambda: job.status is JobStatus.PAUSED)
        assert recorder.lines == ["created", "running", "ERROR read stop", "paused"]
        assert (job.io_status, job.is_user_paused, job.busy, job.done_chunks) == (io_status, True, False, [])
        job.resume()
        assert job.io_status is IoStatus.OK
        job.step(2)
        await job.wait_ended()
        assert recorder.lines == ["created", "running", "ERROR read stop", "paused", *SUCCESS[1:]]
        assert job.done_chunks == [0, 1]


@pytest.mark.parametrize("policy", [OnError.ENOSPC, OnError.AUTO])
async def test_enospc_and_auto_report_other_errors(policy: OnError) -> None:
    recorder = Recorder()
    async with JobManager(recorder) as manager:
        job = ScriptedJob(on_error=policy)
        job.failures = {0: [eio()]}
        start(manager, job, recorder).step()
        await job.wait_ended()
    assert "ERROR read report" in recorder.lines


async def test_manual_finalize_and_dismiss() -> None:
    recorder = Recorder()
    async with JobManager(recorder) as manager:
        job = start(manager, ScriptedJob(auto_finalize=False, auto_dismiss=False), recorder)
        job.step(2)
        await settle(lambda: "PENDING" in recorder.lines)
        assert recorder.lines[2:] == ["waiting", "pending", "PENDING"]
        await job.finalize()
        assert recorder.lines[5:] == ["COMPLETED ok", "done", "concluded"]
        assert list(manager) == [job]
        manager.dismiss(job)
        assert recorder.lines[8:] == ["null"]
        assert list(manager) == []


async def test_failing_commit_fails_the_job_after_pending() -> None:
    recorder = Recorder()
    async with JobManager(recorder) as manager:
        job = ScriptedJob()
        job.commit_error = eio()
        start(manager, job, recorder).step(2)
        await job.wait_ended()
    assert recorder.lines[2:6] == ["waiting", "pending", "aborting", f"COMPLETED {eio().message}"]


@pytest.mark.parametrize("outcome", ["success", "failure", "cancel", "clean fails"])
async def test_clean_runs_once_before_the_end_is_told(outcome: str) -> None:
    recorder = Recorder()

    async def clean() -> None:
        await asyncio.sleep(0)
        recorder.lines.append("clean")
        if outcome == "clean fails":
            raise BlockdError("not restored")

    async with JobManager(recorder) as manager:
        job = ScriptedJob()
        job.clean = clean
        if outcome == "failure":
            job.failures = {0: [eio()]}
        start(manager, job, recorder)
        if outcome == "cancel":
            job.cancel()
        job.step(2)
        await job.wait_ended()
    end = next(line for line in recorder.lines if line.startswith(("COMPLETED", "CANCELLED")))
    assert recorder.lines.count("clean") == 1
    assert recorder.lines.index("clean") < recorder.lines.index(end)
    assert recorder.lines.count("done") == 1
    assert (end == "COMPLETED not restored") == (outcome == "clean fails")


async def test_internal_error_fails_only_its_job(caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder()

    class Broken(ScriptedJob):
        async def run(self) -> None:
            raise ZeroDivisionError("secret detail")

    async with JobManager(recorder) as manager:
        other = start(manager, ScriptedJob("other"), Recorder())
        job = start(manager, Broken("broken"), recorder)
        await job.wait_ended()
        other.step(2)
        await other.wait_ended()
        assert other.error is None
    assert "COMPLETED internal error, see the log" in recorder.lines
    assert "secret detail" in caplog.text


async def test_on_done_that_raises_is_logged_and_the_job_concludes(caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder()
    async with JobManager(recorder) as manager:
        job = ScriptedJob()

        def on_done(_: object) -> None:
            raise ZeroDivisionError

        job.on_done = on_done
        manager.start(job)
        job.step(2)
        await job.wait_ended()
    assert recorder.lines == [line for line in SUCCESS if line != "done"]
    assert "on_done failed" in caplog.text


# -- races: one verb at each place where the job can stand ------------------------------------


async def test_cancel_before_the_first_step_of_the_task() -> None:
    recorder = Recorder()
    async with JobManager(recorder) as manager:
        job = start(manager, ScriptedJob(), recorder)
        job.cancel()
        await job.wait_ended()
    assert recorder.lines == CANCELLED
    assert not job.was_cleaned_up  # the body never began


async def test_cancel_at_every_await_of_the_body() -> None:
    for turns in range(1, 12):
        recorder = Recorder()
        async with JobManager(recorder) as manager:
            job = start(manager, ScriptedJob(chunk_count=3), recorder)
            job.step(3)
            for _ in range(turns):
                await asyncio.sleep(0)
            try:
                job.cancel()
            except RequestError:
                assert recorder.lines[2:4] == ["waiting", "pending"]
            await job.wait_ended()
        assert recorder.lines in (CANCELLED, SUCCESS)
        assert job.is_cancelled == (recorder.lines == CANCELLED)


async def test_cancel_as_the_last_io_finishes() -> None:
    """The body is about to run to its end: it is cancelled all the same, and not half of each."""
    recorder = Recorder()
    async with JobManager(recorder) as manager:
        job = start(manager, ScriptedJob(chunk_count=1), recorder)
        await settle()
        job.step()
        job.cancel()
        await job.wait_ended()
    assert recorder.lines == CANCELLED


async def test_cancel_from_within_the_body_that_then_returns() -> None:
    recorder = Recorder()

    class SelfCancelling(ScriptedJob):
        async def run(self) -> None:
            self.cancel()

    async with JobManager(recorder) as manager:
        job = start(manager, SelfCancelling(), recorder)
        await job.wait_ended()
    assert recorder.lines == CANCELLED


async def test_cancel_while_paused_runs_first() -> None:
    recorder = Recorder()
    async with JobManager(recorder) as manager:
        job = start(manager, ScriptedJob(), recorder)
        job.pause()
        await settle(lambda: job.status is JobStatus.PAUSED)
        job.cancel()
        await job.wait_ended()
    assert recorder.lines == ["created", "running", "paused", *CANCELLED[1:]]


async def test_cancel_while_pending_aborts() -> None:
    recorder = Recorder()
    async with JobManager(recorder) as manager:
        job = start(manager, ScriptedJob(auto_finalize=False), recorder)
        job.step(2)
        await settle(lambda: "PENDING" in recorder.lines)
        job.cancel()
        with pytest.raises(RequestError, match="cannot accept command verb 'finalize'"):
            await job.finalize()
        await job.wait_ended()
    assert recorder.lines[5:] == CANCELLED[2:]


async def test_cancel_during_commit_is_refused_and_the_job_completes() -> None:
    recorder = Recorder()
    async with JobManager(recorder) as manager:
        job = ScriptedJob()
        job.commit_gate = asyncio.Event()
        start(manager, job, recorder).step(2)
        await settle(lambda: job.status is JobStatus.PENDING)
        with pytest.raises(RequestError, match="in state 'pending' cannot accept command verb 'cancel'"):
            job.cancel()
        job.commit_gate.set()
        await job.wait_ended()
    assert recorder.lines == SUCCESS


async def test_cancel_twice_is_one_cancel() -> None:
    recorder = Recorder()
    async with JobManager(recorder) as manager:
        job = start(manager, ScriptedJob(), recorder)
        await settle()
        job.cancel()
        job.cancel()
        await job.wait_ended()
    assert recorder.lines == CANCELLED


async def test_finalize_twice() -> None:
    recorder = Recorder()
    async with JobManager(recorder) as manager:
        job = ScriptedJob(auto_finalize=False)
        job.commit_gate = asyncio.Event()
        start(manager, job, recorder).step(2)
        await settle(lambda: "PENDING" in recorder.lines)
        async with asyncio.TaskGroup() as group:
            group.create_task(job.finalize())
            await settle()
            with pytest.raises(RequestError, match="cannot accept command verb 'finalize'"):
                await job.finalize()
            job.commit_gate.set()
    assert recorder.lines.count("COMPLETED ok") == 1


async def test_pause_and_resume_before_the_pause_point_leave_no_trace() -> None:
    recorder = Recorder()
    async with JobManager(recorder) as manager:
        job = start(manager, ScriptedJob(), recorder)
        await settle(lambda: job.busy)
        job.pause()
        job.resume()
        job.step(2)
        await job.wait_ended()
    assert recorder.lines == SUCCESS


async def test_pause_takes_effect_after_the_io_in_flight() -> None:
    recorder = Recorder()
    async with JobManager(recorder) as manager:
        job = start(manager, ScriptedJob(), recorder)
        await settle(lambda: job.busy)
        await settle()
        job.pause()
        assert (job.status, job.is_user_paused) == (JobStatus.RUNNING, True)
        job.step(2)
        await settle(lambda: job.status is JobStatus.PAUSED)
        assert job.done_chunks == [0]
        with pytest.raises(RequestError, match="Job is already paused"):
            job.pause()
        job.resume()
        with pytest.raises(RequestError, match="Can't resume a job that was not paused"):
            job.resume()
        await job.wait_ended()
    assert job.done_chunks == [0, 1]


async def test_pause_of_the_last_chunk_does_not_outlive_the_body() -> None:
    recorder = Recorder()
    async with JobManager(recorder) as manager:
        job = start(manager, ScriptedJob(chunk_count=1), recorder)
        await settle()
        job.pause()
        job.step()
        await job.wait_ended()
    assert recorder.lines == SUCCESS


async def test_a_throttled_job_pauses_and_cancels_at_once() -> None:
    recorder = Recorder()
    async with JobManager(recorder) as manager:
        job = ScriptedJob(speed=1)
        job.bytes_per_chunk = 10**6  # eleven days
        start(manager, job, recorder).step(2)
        await settle(lambda: job.done_chunks == [0])
        await settle()
        job.pause()
        assert job.status is JobStatus.PAUSED
        job.cancel()
        await job.wait_ended()
    assert recorder.lines[2:5] == ["paused", "running", "aborting"]


async def test_another_speed_ends_the_wait_for_the_old_one() -> None:
    recorder = Recorder()
    async with JobManager(recorder) as manager:
        job = ScriptedJob(speed=1)
        job.bytes_per_chunk = 10**6
        start(manager, job, recorder).step(2)
        await settle(lambda: job.done_chunks == [0])
        await settle()
        with pytest.raises(RequestError, match="Parameter 'speed' expects a non-negative value"):
            job.set_speed(-1)
        job.set_speed(0)
        await job.wait_ended()
    assert recorder.lines == SUCCESS


# -- the manager -------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", ["", "x y", "9j", "-a", "ä", "j\n"])
async def test_malformed_ids_are_refused(bad: str) -> None:
    async with JobManager(Recorder()) as manager:
        with pytest.raises(RequestError) as caught:
            manager.start(ScriptedJob(bad))
        assert caught.value.message == f"Invalid job ID '{bad}'"
        assert list(manager) == []


async def test_ids_are_unique_until_dismissed() -> None:
    recorder = Recorder()
    async with JobManager(recorder) as manager:
        job = start(manager, ScriptedJob(auto_dismiss=False), recorder)
        job.step(2)
        await job.wait_ended()
        with pytest.raises(RequestError, match="Job ID 'j' already in use"):
            manager.start(ScriptedJob())
        manager.dismiss(job)
        manager.start(ScriptedJob())


async def test_leaving_the_manager_cancels_what_runs_and_waits_for_what_commits() -> None:
    recorders = [Recorder() for _ in range(4)]
    jobs = [ScriptedJob(f"j{index}", auto_dismiss=index != 3) for index in range(4)]
    async with JobManager(Recorder()) as manager:
        for job, recorder in zip(jobs, recorders, strict=True):
            start(manager, job, recorder)
        jobs[1].pause()
        jobs[2].commit_gate = asyncio.Event()
        jobs[2].step(2)
        jobs[3].step(2)
        await jobs[3].wait_ended()
        asyncio.get_running_loop().call_soon(jobs[2].commit_gate.set)
    assert [job.is_cancelled for job in jobs] == [True, True, False, False]
    assert [recorder.lines for recorder in recorders] == [["done"]] * 4


async def test_cancellation_from_outside_is_not_taken_for_the_jobs_own() -> None:
    """Something else tore the task group down: no event claims that a client cancelled the job."""
    recorder = Recorder()
    async with JobManager(recorder) as manager:
        job = start(manager, ScriptedJob(), recorder)
        await settle()
        task = next(task for task in asyncio.all_tasks() if task.get_name() == "job j")
        task.cancel()
        await job.wait_ended()
    assert recorder.lines == ["created", "running"]
    assert job.was_cleaned_up


async def test_an_error_in_the_daemon_cancels_the_jobs_in_order() -> None:
    recorder = Recorder()
    with pytest.raises(ExceptionGroup):
        async with JobManager(recorder) as manager:
            start(manager, ScriptedJob(), recorder)
            await settle()
            raise ZeroDivisionError
    assert recorder.lines == CANCELLED

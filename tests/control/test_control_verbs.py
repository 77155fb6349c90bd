"""Every pair of verbs, in every state of a job, at every await, by two clients.

And whatever a mistake of ours does to one job, the others and the guests go on.

The jobs wait for nothing but turns of the event loop, at every place where a job may wait: so a turn's number
names a moment of their life, and every pair of moments is tried with every pair of verbs.
"""

import asyncio
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest

from blockd.errors import RequestError, StorageError
from blockd.jobs.group import JobGroup
from blockd.jobs.job import Action, Job, OnError
from blockd.jobs.manager import JobManager
from blockd.jobs.states import TRANSITIONS, JobStatus, JobVerb
from blockd.jobs.stream import StreamJob
from blockd.protocols.nbd_client import NbdClient
from tests import qemu_img
from tests.chains import make
from tests.conftest import StartDaemon
from tests.control.running import running

# By when a job that nobody disturbs has ended, and long after a job that was disturbed has.
TURN_COUNT_MAX = 200
VERBS = [*JobVerb]


class Config(NamedTuple):
    """What the jobs are like."""

    name: str
    auto_finalize: bool = True
    is_stopped_by_error: bool = False
    job_count: int = 1


CONFIGS = [
    Config("plain"),
    Config("manual", auto_finalize=False),
    Config("stopped", is_stopped_by_error=True),
    Config("group", job_count=2),
    Config("manual group", auto_finalize=False, job_count=2),
]


class Witness:
    """An observer that holds every change against the table."""

    def __init__(self) -> None:
        self.statuses: dict[str, JobStatus] = {}
        self.ends: Counter[str] = Counter()
        self.visited: set[JobStatus] = set()

    def status_changed(self, job: Job) -> None:
        before = self.statuses.get(job.id, JobStatus.UNDEFINED)
        assert job.status in TRANSITIONS[before], f"{before} → {job.status}"
        self.statuses[job.id] = job.status
        self.visited.add(job.status)

    def error_met(self, job: Job, operation: str, action: Action) -> None:
        """Nothing follows from it here."""

    def pending(self, job: Job) -> None:
        assert job.status is JobStatus.PENDING

    def ended(self, job: Job) -> None:
        self.ends[job.id] += 1


class SteppedJob(Job):
    """Waits once at each place where a job may wait."""

    type = "stream"

    def __init__(self, job_id: str, config: Config) -> None:
        on_error = OnError.STOP if config.is_stopped_by_error else OnError.REPORT
        super().__init__(job_id, length=2, auto_finalize=config.auto_finalize, on_error=on_error)
        self.clean = self._clean
        self.on_done = self._done
        self.counts: Counter[str] = Counter()
        self._failure = StorageError("no") if config.is_stopped_by_error else None

    async def run(self) -> None:
        for chunk in range(2):
            await self.pause_point()
            await asyncio.sleep(0)
            failure, self._failure = self._failure, None
            if failure is not None:
                assert await self.handle_error(failure, "read") is Action.STOP
            self.set_progress(chunk + 1, 2)

    async def commit(self) -> None:
        await asyncio.sleep(0)
        self.counts["committed"] += 1

    async def _clean(self) -> None:
        await asyncio.sleep(0)
        self.counts["cleaned"] += 1

    def _done(self, _job: Job) -> None:
        self.counts["done"] += 1


async def record(_job: Job, tell: Callable[[], None]) -> None:
    """Write down the end of a job, slowly."""
    await asyncio.sleep(0)
    tell()
    await asyncio.sleep(0)


class Client:
    """Asks one thing of the first job, and keeps what was answered."""

    def __init__(self, verb: JobVerb) -> None:
        self.verb = verb
        self.is_accepted: bool | None = None

    async def ask(self, manager: JobManager, job: Job) -> None:
        self.is_accepted = False
        with suppress(RequestError):
            await self._ask(manager, job)
            self.is_accepted = True

    async def _ask(self, manager: JobManager, job: Job) -> None:
        match self.verb:
            case JobVerb.CANCEL:
                job.cancel()
            case JobVerb.PAUSE:
                job.pause()
            case JobVerb.RESUME:
                job.resume()
            case JobVerb.SET_SPEED:
                job.set_speed(1 << 40)
            case JobVerb.COMPLETE:
                job.complete()
            case JobVerb.FINALIZE:
                await job.finalize()
            case JobVerb.DISMISS:
                manager.dismiss(job)


Schedule = list[tuple[int, Client]]


async def live(config: Config, schedule: Schedule, *, turn_count: int = 0) -> tuple[Witness, int]:
    """Let the jobs live, with what clients ask at which turn; returns when they ended, and when that was.

    From `turn_count` on somebody helps the jobs to their end, who resumes and finalizes.
    """
    witness, group = Witness(), JobGroup()
    async with JobManager(witness) as manager, asyncio.TaskGroup() as clients:
        manager._record_end = record  # as with a journal; without one jobs end where they are
        jobs = [SteppedJob(f"job{number}", config) for number in range(config.job_count)]
        for job in jobs:
            if config.job_count > 1:
                group.add(job)
        for job in jobs:
            manager.start(job)
        turn = 0
        while any(witness.statuses[job.id] is not JobStatus.NULL for job in jobs):
            for at, client in schedule:
                if at == turn:
                    clients.create_task(client.ask(manager, jobs[0]))
            if turn >= turn_count:
                help_on(clients, jobs)
            turn += 1
            assert turn < TURN_COUNT_MAX, f"stuck: {witness.statuses}"
            await asyncio.sleep(0)
        check(witness, jobs, [client for _, client in schedule])
        assert list(manager) == []
        manager._record_end = None
    return witness, turn


def help_on(clients: asyncio.TaskGroup, jobs: list[SteppedJob]) -> None:
    async def finalize(job: Job) -> None:
        with suppress(RequestError):
            await job.finalize()

    for job in jobs:
        with suppress(RequestError):
            job.resume()
        if job.status is JobStatus.PENDING and not job.auto_finalize:
            clients.create_task(finalize(job))


def check(witness: Witness, jobs: list[SteppedJob], clients: list[Client]) -> None:
    """What must hold of ended jobs whatever clients asked."""
    for job in jobs:
        assert job.error is None, job.error
        assert witness.ends[job.id] == 1
        assert job.counts == {"cleaned": 1, "done": 1} | ({} if job.is_cancelled else {"committed": 1})
    assert len({job.is_cancelled for job in jobs}) == 1, "one of a group completed, another one did not"
    accepted = {client.verb for client in clients if client.is_accepted}
    assert jobs[0].is_cancelled == (JobVerb.CANCEL in accepted)
    assert not {JobVerb.CANCEL, JobVerb.FINALIZE} <= accepted, "both were promised"


async def length_of(config: Config) -> int:
    """How many turns the jobs take."""
    return (await live(config, []))[1]


def schedules(turn_count: int, verbs: tuple[JobVerb, JobVerb]) -> Iterator[Schedule]:
    for first in range(turn_count):
        for second in range(first, turn_count):
            yield [(first, Client(verbs[0])), (second, Client(verbs[1]))]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
async def test_every_pair_of_verbs_at_every_pair_of_moments(
    config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    turn_count = await length_of(config)
    visited: set[JobStatus] = set()
    for verbs in itertools.product(VERBS, VERBS):
        for schedule in schedules(turn_count + 2, verbs):
            try:
                witness, _ = await live(config, schedule, turn_count=turn_count + 4)
            except BaseExceptionGroup as errors:
                moments = [(turn, client.verb.value) for turn, client in schedule]
                raise AssertionError(f"{config.name}: {moments}") from errors
            visited |= witness.visited
    assert visited == {
        *(JobStatus.CREATED, JobStatus.RUNNING, JobStatus.PAUSED, JobStatus.WAITING, JobStatus.PENDING),
        *(JobStatus.ABORTING, JobStatus.CONCLUDED, JobStatus.NULL),
    }
    assert caplog.text == ""


# -- mistakes of ours --------------------------------------------------------------------------


class Mistake(Exception):
    """What nobody expects."""


class Mistakes:
    """Raises at the N-th place where it is asked."""

    def __init__(self, number: int, error: BaseException) -> None:
        self.left = number
        self.error = error

    def maybe(self) -> None:
        self.left -= 1
        if not self.left:
            raise self.error


class MistakenJob(SteppedJob):
    """Meets a mistake at the N-th of its steps, whatever that is."""

    def __init__(self, config: Config, mistakes: Mistakes) -> None:
        super().__init__("job0", config)
        self._mistakes = mistakes

    async def run(self) -> None:
        self._mistakes.maybe()
        await super().run()
        self._mistakes.maybe()

    async def commit(self) -> None:
        self._mistakes.maybe()
        await super().commit()

    def _move(self, status: JobStatus) -> None:
        if self.status not in (JobStatus.UNDEFINED, JobStatus.CREATED):
            self._mistakes.maybe()
        super()._move(status)

    async def _clean(self) -> None:
        await super()._clean()
        self._mistakes.maybe()

    def _done(self, job: Job) -> None:
        super()._done(job)
        self._mistakes.maybe()


@pytest.mark.parametrize("error", [AssertionError("x"), Mistake("x")], ids=repr)
@pytest.mark.parametrize("config", CONFIGS[:3], ids=lambda config: config.name)
async def test_a_mistake_anywhere_in_a_job_fails_that_job_alone(
    config: Config, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    """At the first, second, … of its steps until none is left: it ends once, and gives its disk back."""
    caplog.set_level(logging.ERROR)
    for number in itertools.count(1):
        caplog.clear()
        mistakes = Mistakes(number, error)
        job, other = MistakenJob(config, mistakes), SteppedJob("other", CONFIGS[0])
        witness = Observer()
        async with JobManager(witness) as manager, asyncio.TaskGroup() as clients:
            manager._record_end = record
            manager.start(job)
            manager.start(other)
            for _ in range(TURN_COUNT_MAX):
                with suppress(AssertionError, Mistake):  # met by the client who resumes; it tries again
                    help_on(clients, [job])
                await asyncio.sleep(0)
            manager._record_end = None
            assert list(manager) == [], number
        assert other.error is None
        assert (job.counts["cleaned"], job.counts["done"], witness.ends[job.id]) == (1, 1, 1), number
        if mistakes.left > 0:
            break
        assert "Traceback" in caplog.text, number
    assert number > 5
    assert caplog.text == ""


async def test_a_cancellation_that_nobody_sent_to_the_job_fails_it(caplog: pytest.LogCaptureFixture) -> None:
    """Something that the work waited for was cancelled by itself: without an end the disk would stay busy."""

    class Bereft(SteppedJob):
        async def run(self) -> None:
            gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            gone.cancel()
            await gone

    job = Bereft("job0", CONFIGS[0])
    async with JobManager(Witness()) as manager:
        manager.start(job)
        await job.wait_ended()
        assert list(manager) == []
    assert job.error is not None
    assert job.counts == {"cleaned": 1, "done": 1}
    assert "internal error in state running" in caplog.text


class Observer(Witness):
    """Does not mind impossible changes."""

    def status_changed(self, job: Job) -> None:
        self.visited.add(job.status)


@pytest.mark.parametrize("method", ["status_changed", "pending", "ended"])
async def test_an_observer_that_raises_does_not_harm_the_job(
    method: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_observer: Witness, _job: Job) -> None:
        raise Mistake("not told")

    monkeypatch.setattr(Witness, method, fail)
    job = SteppedJob("job0", CONFIGS[1])
    async with JobManager(Witness()) as manager, asyncio.TaskGroup() as clients:
        manager.start(job)
        for _ in range(TURN_COUNT_MAX):
            help_on(clients, [job])
            await asyncio.sleep(0)
        assert list(manager) == []
    assert (job.error, job.counts["committed"]) == (None, 1)
    assert "not told" in caplog.text


async def test_guests_keep_their_disk_whatever_an_assertion_in_its_stream_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(_job: StreamJob) -> None:
        raise AssertionError("what cannot be")

    monkeypatch.setattr(StreamJob, "_stream", fail)
    chain = await make(tmp_path, ["ABCDEFGH", "-X--0---"])
    async with running(tmp_path, "--device", f"vda={chain.active}") as daemon:
        client, guest = await daemon.qmp(), await daemon.guest("vda")
        await client.command("block_stream", device="vda")
        await guest.write(0, b"on it goes")
        end = await client.event("BLOCK_JOB_COMPLETED")
        assert end["error"] == "internal error, see the log"
        await client.event("JOB_STATUS_CHANGE", status="null")
        await guest.flush()
        assert bytes(await guest.read(0, 10)) == b"on it goes"
        assert len(await client.command("query-named-block-nodes")) == 4
    assert "what cannot be" in caplog.text
    qemu_img.assert_sound(chain.active)


async def test_cancel_and_pause_in_one_write_leave_the_daemon_alone(
    tmp_path: Path, start_daemon: StartDaemon
) -> None:
    """As reported: with the stream at its pause point, or copying, or waiting for its rate."""
    chain = await make(tmp_path, ["ABCDEFGH" * 8, "-X--0---" * 8])
    daemon = await start_daemon("--device", f"vda={chain.active}")
    client = await daemon.qmp()
    guest = await NbdClient.connect_unix(str(daemon.nbd_path), "vda")
    for number in range(20):
        await client.command("block_stream", device="vda", speed=number % 2)
        words = [
            b'{"execute":"block_stream_cancel","arguments":{"device":"vda"}}',
            b'{"execute":"block-job-pause","arguments":{"device":"vda"}}',
        ]
        await client.send(b"\n".join(words) + b"\n")
        await client.event("JOB_STATUS_CHANGE", status="null")
        await guest.write(0, b"alive")
    assert await daemon.stop() == 0
    assert daemon.stderr == ""

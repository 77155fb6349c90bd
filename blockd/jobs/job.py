"""A job: background work with a state that clients watch and steer.

A subclass is the work. It implements `run`, and tells and asks its job at the top of its loop:

    async def run(self) -> None:
        while offset < end:
            await self.pause_point(copied)      # the one place for rate, pause and cancel
            try:
                ...                             # no I/O is pending when the loop comes round
            except StorageError as error:
                action = await self.handle_error(error, "read")
                if action is Action.REPORT:
                    raise
                if action is Action.STOP:       # resumed meanwhile: the same chunk again
                    continue
            self.set_progress(offset, end)

After `run` comes `commit` (make the result durable), then `clean` (restore the graph, whatever
happened), and only then is the job reported as completed. A job knows nothing of QMP: it tells a
`JobObserver`, and one `on_done` that is called exactly once.

Cancel:   `Job.cancel` cancels the task at whatever `run` awaits; `run` cleans up and lets
          CancelledError pass. `commit` is never cancelled: from there on the job completes.
          `Job.suspend` cancels it in the same way, and then the job has no end: nobody is told of one.
"""

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from enum import StrEnum
from typing import Protocol

from blockd.errors import BlockdError, ErrorKind, RequestError, StorageError
from blockd.jobs.states import TRANSITIONS, VERBS, JobStatus, JobVerb
from blockd.ratelimit import RateLimit

log = logging.getLogger(__name__)


class OnError(StrEnum):
    """What a job does when the world fails."""

    REPORT = "report"
    IGNORE = "ignore"
    STOP = "stop"
    ENOSPC = "enospc"
    AUTO = "auto"


class Action(StrEnum):
    """What the policy made of one error."""

    REPORT = "report"
    IGNORE = "ignore"
    STOP = "stop"


class IoStatus(StrEnum):
    """Why a job is paused by itself, if it is."""

    OK = "ok"
    FAILED = "failed"
    NOSPACE = "nospace"


class JobObserver(Protocol):
    """Who is told what happens to a job, in order; the methods must not raise."""

    def status_changed(self, job: "Job") -> None: ...

    def error_met(self, job: "Job", operation: str, action: Action) -> None: ...

    def pending(self, job: "Job") -> None:
        """The job waits for `finalize`."""

    def ended(self, job: "Job") -> None:
        """The job completed, failed (`job.error`) or was cancelled (`job.is_cancelled`)."""


# Told that a job has ended; writes that down, and calls what tells it, once. Or it does neither: then
# another run will.
RecordEnd = Callable[["Job", Callable[[], None]], Awaitable[None]]


class JobGroup:
    """Jobs that complete together or not at all; each is told of its group before it is started."""

    def __init__(self) -> None:
        self._members: list[Job] = []
        self._arrived_count = 0
        self._all_arrived = asyncio.Event()

    def add(self, job: "Job") -> None:
        self._members.append(job)
        job.group = self

    @property
    def is_finalized_by_itself(self) -> bool:
        return all(job.auto_finalize for job in self._members)

    async def meet(self) -> None:
        """Return when all have done their work."""
        self._arrived_count += 1
        if self._arrived_count == len(self._members):
            self._all_arrived.set()
        await self._all_arrived.wait()

    def finalize(self) -> None:
        """One is finalized, so all are."""
        for job in self._members:
            job.finalize_asked.set()

    def cancel(self) -> None:
        """One failed or was cancelled: cancel the others."""
        for job in self._members:
            if job.can_be_cancelled:
                job.cancel()


class Job(ABC):
    """One piece of background work; `JobManager.start` brings it to life."""

    type: str

    def __init__(
        self,
        job_id: str,
        *,
        length: int,
        speed: int = 0,
        on_error: OnError = OnError.REPORT,
        auto_finalize: bool = True,
        auto_dismiss: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.id = job_id
        self.offset = 0
        self.length = length
        self.on_error = on_error
        self.auto_finalize = auto_finalize
        self.auto_dismiss = auto_dismiss
        self.io_status = IoStatus.OK
        self.status = JobStatus.UNDEFINED
        self.error: BlockdError | None = None
        self.group: JobGroup | None = None
        # Called once, when the job has ended in whatever way and all is restored.
        self.on_done: Callable[[Job], None] | None = None
        # Restores the graph; called once after `commit`, or after whatever went wrong.
        self.clean: Callable[[], Awaitable[None]] | None = None
        # The plain image that is the whole result: its add-cow file is not needed any more.
        self.plain_image: str | None = None
        self.is_cancelled = False
        self.is_suspended = False
        self.is_user_paused = False
        # The body is working, not waiting at its pause point.
        self.busy = False
        self.speed = speed
        self._rate_limit = RateLimit(clock)
        self._rate_limit.set_speed(speed)
        self._ignored: StorageError | None = None
        self._observer: JobObserver | None = None
        self._record_end: RecordEnd
        self._task: asyncio.Task[object] | None = None
        self._is_cancellable = True
        self._throttle: asyncio.Timeout | None = None
        self._resumed = asyncio.Event()
        self.finalize_asked = asyncio.Event()
        self._has_ended = asyncio.Event()

    # -- the work -----------------------------------------------------------------------------

    @abstractmethod
    async def run(self) -> None:
        """Do the work; returning means success, raising BlockdError failure."""

    async def commit(self) -> None:  # noqa: B027  (a job without a result has nothing to commit)
        """Make the result durable; the last step that can fail."""

    def set_progress(self, offset: int, length: int) -> None:
        """Say that `offset` of `length` bytes are done."""
        self.offset = offset
        self.length = length

    async def pause_point(self, byte_count: int = 0) -> None:
        """Let others run; wait as long as the rate (for `byte_count` bytes just copied) or a pause demands.

        Needs:    no I/O of the job is pending.
        """
        self.busy = False
        self._pause_if_asked()
        if byte_count and self.speed and not self.is_user_paused:
            await self._wait_for_rate(byte_count)
        else:
            await asyncio.sleep(0)
        while self.is_user_paused:
            self._pause_if_asked()
            self._resumed.clear()
            await self._resumed.wait()
        self.busy = True

    async def handle_error(self, error: StorageError, operation: str) -> Action:
        """Apply the on-error policy to a failed ``read`` or ``write``.

        REPORT: the caller raises `error`. IGNORE: go on; the job fails at its end. STOP: returns
        when the job is resumed; try the same again.
        """
        action = self._action_for(error)
        log.warning("job %s: %s failed, action %s: %s", self.id, operation, action, error.message)
        self._tell().error_met(self, operation, action)
        if action is Action.IGNORE:
            self._ignored = self._ignored or error
        elif action is Action.STOP:
            self.is_user_paused = True
            if self.io_status is IoStatus.OK:
                full = error.kind is ErrorKind.NO_SPACE
                self.io_status = IoStatus.NOSPACE if full else IoStatus.FAILED
            await self.pause_point()
        return action

    def _action_for(self, error: StorageError) -> Action:
        if self.on_error in (OnError.ENOSPC, OnError.AUTO):
            return Action.STOP if error.kind is ErrorKind.NO_SPACE else Action.REPORT
        return Action(self.on_error.value)

    async def _wait_for_rate(self, byte_count: int) -> None:
        """Wait for the rate limit, until a pause or another speed interrupts."""
        try:
            async with asyncio.timeout(None) as self._throttle:
                await self._rate_limit.wait(byte_count)
        except TimeoutError:
            pass
        finally:
            self._throttle = None

    def _interrupt_throttle(self) -> None:
        if self._throttle is not None:
            self._throttle.reschedule(asyncio.get_running_loop().time())

    # -- the verbs ----------------------------------------------------------------------------

    def pause(self) -> None:
        """Make the job wait at its next pause point."""
        self._require(JobVerb.PAUSE)
        if self.is_user_paused:
            raise RequestError("Job is already paused")
        self.is_user_paused = True
        self._pause_if_asked()
        self._interrupt_throttle()

    def resume(self) -> None:
        """Take a pause back, whether a client asked for it or an error."""
        if not self.is_user_paused:
            raise RequestError("Can't resume a job that was not paused")
        self._require(JobVerb.RESUME)
        self.io_status = IoStatus.OK
        self._unpause()

    def set_speed(self, speed: int) -> None:
        """Limit the job to `speed` bytes per second; 0 lifts the limit."""
        self._require(JobVerb.SET_SPEED)
        if speed < 0:
            raise RequestError("Parameter 'speed' expects a non-negative value")
        self.speed = speed
        self._rate_limit.set_speed(speed)
        self._interrupt_throttle()

    def cancel(self) -> None:
        """Make the job end as soon as possible; a second time changes nothing."""
        if not self.can_be_cancelled:
            raise self._refusal(JobVerb.CANCEL)
        if self.is_cancelled:
            return
        self.is_cancelled = True
        self._unpause()
        if self._task is not None:
            self._task.cancel()

    def complete(self) -> None:
        """End a job that is ready; no job that exists so far ever is."""
        self._require(JobVerb.COMPLETE)

    async def finalize(self) -> None:
        """Let a pending job commit; returns when it has ended."""
        self._require(JobVerb.FINALIZE)
        if self.finalize_asked.is_set() or self.is_cancelled:
            raise self._refusal(JobVerb.FINALIZE)
        self.finalize_asked.set()
        if self.group is not None:
            self.group.finalize()
        await self._has_ended.wait()

    def dismiss(self) -> None:
        """Forget a concluded job (see `JobManager.dismiss`)."""
        self._require(JobVerb.DISMISS)
        self._move(JobStatus.NULL)

    def suspend(self) -> None:
        """Stop the job where it is, to be started again in another run; one that commits ends first."""
        self.is_suspended = True
        if self._is_cancellable:
            if self.status is JobStatus.RUNNING:
                self._move(JobStatus.PAUSED)
            if self._task is not None:
                self._task.cancel()

    async def wait_ended(self) -> None:
        """Return when the job is concluded, its observer and `on_done` told, or when it is suspended."""
        await self._has_ended.wait()

    @property
    def is_block_job(self) -> bool:
        """Whether clients see it among the block jobs too, with their commands and events."""
        return self.type != "create"

    @property
    def can_be_cancelled(self) -> bool:
        return self.status in VERBS[JobVerb.CANCEL] and self._is_cancellable

    def _require(self, verb: JobVerb) -> None:
        if self.status not in VERBS[verb]:
            raise self._refusal(verb)

    def _refusal(self, verb: JobVerb) -> RequestError:
        return RequestError(f"Job '{self.id}' in state '{self.status}' cannot accept command verb '{verb}'")

    def _pause_if_asked(self) -> None:
        if self.is_user_paused and not self.busy and self.status is JobStatus.RUNNING:
            self._move(JobStatus.PAUSED)

    def _unpause(self) -> None:
        self.is_user_paused = False
        if self.status is JobStatus.PAUSED:
            self._move(JobStatus.RUNNING)
        self._resumed.set()

    # -- the life -----------------------------------------------------------------------------

    def create(self, observer: JobObserver, record_end: RecordEnd) -> None:
        """Enter the world; from here on the observer is told, of the end when that is recorded."""
        self._observer = observer
        self._record_end = record_end
        self._move(JobStatus.CREATED)

    def begin(self) -> None:
        """Start running; `supervise` follows in the job's own task."""
        self.busy = True
        self._move(JobStatus.RUNNING)

    def conclude(self, observer: JobObserver) -> None:
        """Be a job whose end was told in an earlier run, and which was not dismissed."""
        self._observer = observer
        self._is_cancellable = False
        self.status = JobStatus.CONCLUDED
        self._has_ended.set()

    async def supervise(self) -> None:
        """Live from running to concluded; what the work raises ends here as `error`.

        Cancel:   from outside: the job ends where it is and nobody is told.
        """
        self._task = asyncio.current_task()
        try:
            if not self.is_suspended:
                await self._live()
                await self._end()
        finally:
            self._has_ended.set()

    async def _live(self) -> None:
        if await self._attempt(self._run_body):
            self._move(JobStatus.WAITING)
            if self.group is None or await self._attempt(self.group.meet):
                self._move(JobStatus.PENDING)
                if self._is_finalized_by_itself or await self._attempt(self._wait_for_finalize):
                    await self._attempt(self.commit, cancellable=False)
        self.busy = False
        self._abort_if_failed()
        if self.group is not None and self.status is JobStatus.ABORTING:
            self.group.cancel()
        if self.clean is not None:
            await self._attempt(self.clean, cancellable=False)
        self._abort_if_failed()

    async def _end(self) -> None:
        try:
            await self._record_end(self, self._tell_end)
        except Exception:
            log.exception("job %s: its end could not be recorded", self.id)
            if self.status not in (JobStatus.CONCLUDED, JobStatus.NULL):
                self._tell_end()

    async def _run_body(self) -> None:
        await self.pause_point()
        await self.run()
        if self._ignored is not None:
            raise self._ignored

    async def _wait_for_finalize(self) -> None:
        self.busy = False
        if not self.auto_finalize:
            self._tell().pending(self)
        await self.finalize_asked.wait()

    @property
    def _is_finalized_by_itself(self) -> bool:
        return self.auto_finalize if self.group is None else self.group.is_finalized_by_itself

    async def _attempt(self, step: Callable[[], Awaitable[None]], *, cancellable: bool = True) -> bool:
        """Take one step of the job's life; tell whether it succeeded and was not cancelled."""
        self._is_cancellable = cancellable
        try:
            if not (cancellable and self.is_cancelled):
                await step()
            if cancellable and self.is_cancelled:
                await asyncio.sleep(0)  # a cancellation that came too late for `step` arrives here
        except asyncio.CancelledError:
            self._swallow_own_cancellation()
        except BlockdError as error:
            self.error = self.error or error
        except Exception:
            log.exception("job %s: internal error", self.id)
            self.error = self.error or BlockdError("internal error, see the log")
        finally:
            self._is_cancellable = False
        return self.error is None and not self.is_cancelled

    def _swallow_own_cancellation(self) -> None:
        """Go on after a cancellation that `cancel` asked for; pass on one that came from outside."""
        if not self.is_cancelled or self._task is None or self._task.uncancel() > 0:
            raise asyncio.CancelledError

    def _abort_if_failed(self) -> None:
        has_failed = self.error is not None or self.is_cancelled
        if has_failed and self.status is not JobStatus.ABORTING:
            self._move(JobStatus.ABORTING)

    def _tell_end(self) -> None:
        self._tell().ended(self)
        if self.on_done is not None:
            try:
                self.on_done(self)
            except Exception:
                log.exception("job %s: its on_done failed", self.id)
        self._move(JobStatus.CONCLUDED)
        if self.auto_dismiss:
            self._move(JobStatus.NULL)

    def _move(self, status: JobStatus) -> None:
        assert status in TRANSITIONS[self.status], f"job {self.id}: {self.status} → {status}"
        self.status = status
        self._tell().status_changed(self)

    def _tell(self) -> JobObserver:
        assert self._observer is not None, "the job was not started"
        return self._observer

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
Fails to: `supervise` is where every mistake of a job ends. Whatever raises what in whatever state, the job
          fails, `clean` gives the guests their disk back, and the end is recorded and told.
"""

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from enum import StrEnum
from typing import Protocol

from blockd.errors import BlockdError, ErrorKind, Operation, RequestError, StorageError
from blockd.few_lines import FewLines
from blockd.jobs.group import JobGroup
from blockd.jobs.states import TRANSITIONS, VERBS, JobStatus, JobType, JobVerb
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
    """Who is told what happens to a job, in order; what a method raises is logged, and the job goes on."""

    def status_changed(self, job: "Job") -> None: ...

    def error_met(self, job: "Job", operation: Operation, action: Action) -> None: ...

    def pending(self, job: "Job") -> None:
        """The job waits for `finalize`."""

    def ended(self, job: "Job") -> None:
        """The job completed, failed (`job.error`) or was cancelled (`job.is_cancelled`)."""


# Told that a job has ended; writes that down, and calls what tells it, once. Or it does neither: then
# another run will.
RecordEnd = Callable[["Job", Callable[[], None]], Awaitable[None]]


class Job(ABC):
    """One piece of background work; `JobManager.start` brings it to life."""

    type: JobType

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
        self._failures = FewLines(log)
        self._observer: JobObserver | None = None
        self._record_end: RecordEnd
        self._task: asyncio.Task[object] | None = None
        self._is_cancellable = True
        self._throttle: asyncio.Timeout | None = None
        self._resumed = asyncio.Event()
        self._is_decided = asyncio.Event()
        self._has_ended = asyncio.Event()
        self._has_paused_or_ended = asyncio.Event()

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
        self._end_if_asked()
        self._pause_if_asked()
        if byte_count and self.speed and not self.is_user_paused:
            await self._wait_for_rate(byte_count)
        else:
            await asyncio.sleep(0)
        while self.is_user_paused:
            self._end_if_asked()
            self._pause_if_asked()
            self._resumed.clear()
            await self._resumed.wait()
        self.busy = True

    def _end_if_asked(self) -> None:
        """Raise the cancellation that `cancel` or `suspend` asked for.

        A task group whose own tasks fail at the same moment drops the cancellation it was sent.
        """
        if self.is_cancelled or self.is_suspended:
            raise asyncio.CancelledError

    async def handle_error(self, error: StorageError, operation: Operation) -> Action:
        """Apply the on-error policy to a failed ``read`` or ``write``.

        REPORT: the caller raises `error`. IGNORE: go on; the job fails at its end. STOP: returns
        when the job is resumed; try the same again. A job that is to end has no policy any more.
        """
        self._end_if_asked()
        action = self._action_for(error)
        self._failures.warn("job %s: %s failed, action %s: %s", self.id, operation, action, error.message)
        self._tell(lambda observer: observer.error_met(self, operation, action))
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
        if self._throttle is not None and not self._throttle.expired():  # else it is interrupted already
            self._throttle.reschedule(asyncio.get_running_loop().time())

    @property
    def error_text(self) -> str | None:
        """What clients are told of a job that has failed, or that was cancelled and has ended."""
        if self.error is not None:
            return self.error.brief if self.is_block_job else self.error.message
        has_ended = self.status in (JobStatus.ABORTING, JobStatus.CONCLUDED)
        return "Operation canceled" if self.is_cancelled and has_ended else None

    @property
    def error_detail(self) -> str | None:
        """What else is known of an error: which image, what was done to it."""
        if self.error is None or self.error.message == self.error_text:
            return None
        return self.error.message

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
        self.begin_to_finalize()
        await self.wait_ended()

    def begin_to_finalize(self) -> None:
        """Let a pending job commit."""
        self._require(JobVerb.FINALIZE)
        members = self.group.members if self.group is not None else [self]
        if self.is_to_commit or any(job.is_cancelled for job in members):
            raise self._refusal(JobVerb.FINALIZE)
        for job in members:
            job.decide_to_commit()

    def decide_to_commit(self) -> None:
        """Have the job commit when it comes to that: from here on it cannot be cancelled."""
        self._is_decided.set()

    def dismiss(self) -> None:
        """Forget a concluded job (see `JobManager.dismiss`)."""
        self._require(JobVerb.DISMISS)
        self._move(JobStatus.NULL)

    def suspend(self) -> None:
        """Stop the job where it is, to be started again in another run; one that commits ends first."""
        self.is_suspended = True
        if self._is_cancellable and not self.is_to_commit:
            if self.status is JobStatus.RUNNING:
                self._move(JobStatus.PAUSED)
            if self._task is not None:
                self._task.cancel()

    async def wait_ended(self) -> None:
        """Return when the job is concluded, its observer and `on_done` told, or when it is suspended."""
        await self._has_ended.wait()

    async def wait_paused_or_ended(self) -> None:
        """Return as `wait_ended`, or when the job has come to a pause, which may last."""
        await self._has_paused_or_ended.wait()

    @property
    def is_block_job(self) -> bool:
        """Whether clients see it among the block jobs too, with their commands and events."""
        return self.type != "create"

    @property
    def can_be_cancelled(self) -> bool:
        is_open = self._is_cancellable and not self.is_to_commit and not self.is_suspended
        return is_open and self.status in VERBS[JobVerb.CANCEL]

    @property
    def is_to_commit(self) -> bool:
        """Whether it was decided, by a client or by the job's group, that the job commits."""
        return self._is_decided.is_set()

    def _require(self, verb: JobVerb) -> None:
        if self.status not in VERBS[verb] or self.is_suspended:
            raise self._refusal(verb)

    def _refusal(self, verb: JobVerb) -> RequestError:
        return RequestError(f"Job '{self.id}' in state '{self.status}' cannot accept command verb '{verb}'")

    def _pause_if_asked(self) -> None:
        """Pause a job at its pause point, unless it was told to end, which its task is about to see."""
        is_to_pause = self.is_user_paused and not (self.is_cancelled or self.is_suspended)
        if is_to_pause and not self.busy and self.status is JobStatus.RUNNING:
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
        self._set_ended()

    async def supervise(self) -> None:
        """Live from running to concluded; what the work raises ends here as `error`.

        Cancel:   from outside: the job ends where it is and nobody is told.
        """
        self._task = asyncio.current_task()
        try:
            if not self.is_suspended:
                try:
                    await self._live()
                except Exception as error:
                    self._fail_inside(error)
                await self._restore()
                await self._record_end(self, self._tell_end)
        finally:
            self._set_ended()

    def _set_ended(self) -> None:
        self._has_ended.set()
        self._has_paused_or_ended.set()

    async def _live(self) -> None:
        """Do the work and commit it."""
        if await self._attempt(self._run_body):
            self._move(JobStatus.WAITING)
            if self.group is None or await self._attempt(self.group.meet):
                self._move(JobStatus.PENDING)
                if self._is_finalized_by_itself or await self._attempt(self._wait_for_finalize):
                    await self._attempt(self.commit, cancellable=False)

    async def _restore(self) -> None:
        """Put the graph back, whatever became of the work."""
        self.busy = False
        self._abort_if_failed()
        if self.group is not None and self.status is JobStatus.ABORTING:
            self.group.cancel()
        if self.clean is not None:
            await self._attempt(self.clean, cancellable=False)
        self._abort_if_failed()

    async def _run_body(self) -> None:
        await self.pause_point()
        await self.run()
        if self._ignored is not None:
            raise self._ignored

    async def _wait_for_finalize(self) -> None:
        self.busy = False
        if not self.auto_finalize:
            self._tell(lambda observer: observer.pending(self))
        await self._is_decided.wait()

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
        except asyncio.CancelledError as error:
            self._take_cancellation(error)
        except BlockdError as error:
            self.error = self.error or error
        except Exception as error:
            self._fail_inside(error)
        finally:
            self._is_cancellable = False
        if cancellable and self.is_suspended and not self.is_to_commit:
            raise asyncio.CancelledError  # an error that met the suspension is met again by the next run
        return self.error is None and not self.is_cancelled

    def _take_cancellation(self, error: asyncio.CancelledError) -> None:
        """Go on after a cancellation that `cancel` asked for; pass on one that came from outside.

        One that nobody sent to the job's task is a mistake of the work, which waited for what was cancelled.
        """
        assert self._task is not None, "only the job's own task takes steps"
        if not self._task.cancelling():
            self._fail_inside(error)
        elif not self.is_cancelled or self._task.uncancel() > 0:
            raise asyncio.CancelledError

    def _fail_inside(self, error: BaseException) -> None:
        """Take a mistake of ours for the job's error: guests and other jobs have nothing to do with it."""
        log.error("job %s: internal error in state %s", self.id, self.status, exc_info=error)
        self.error = self.error or BlockdError("internal error, see the log")

    def _abort_if_failed(self) -> None:
        has_failed = self.error is not None or self.is_cancelled
        if has_failed and self.status is not JobStatus.ABORTING:
            self._set_status(JobStatus.ABORTING)

    def _tell_end(self) -> None:
        self._tell(lambda observer: observer.ended(self))
        if self.on_done is not None:
            try:
                self.on_done(self)
            except Exception:
                log.exception("job %s: its on_done failed", self.id)
        self._set_status(JobStatus.CONCLUDED)
        if self.auto_dismiss:
            self._set_status(JobStatus.NULL)

    def _move(self, status: JobStatus) -> None:
        assert status in TRANSITIONS[self.status], f"job {self.id}: {self.status} → {status}"
        self._set_status(status)

    def _set_status(self, status: JobStatus) -> None:
        """Change the status whatever the table says: the way to the end is open from wherever a bug led."""
        self.status = status
        if status is JobStatus.PAUSED:
            self._has_paused_or_ended.set()
        self._tell(lambda observer: observer.status_changed(self))

    def _tell(self, tell: Callable[[JobObserver], None]) -> None:
        assert self._observer is not None, "the job was not started"
        try:
            tell(self._observer)
        except Exception:
            log.exception("job %s: its observer failed", self.id)

"""Keeps the journal at the state of the daemon.

Nobody has to say what changed: after every command, before its reply, and wherever else it matters, the
state is taken and compared with the last one that was written. What matters is the order:

    a switch    new image durable → guests held → graph changed → journal → guests go on → event, reply
    a command   done → journal → reply
    a job       result durable → graph restored → journal → completion told

A job of an earlier run may end before anyone has come back to hear of it. Its end waits for the first client
then, and stays in the journal.

The journal's models are loaded by those daemons only that have a journal.
"""

# ruff: noqa: PLC0415

import asyncio
import logging
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from blockd.aio import in_thread
from blockd.commands.context import Services
from blockd.daemon.options import ServedMonitor
from blockd.daemon.state_dir import StateDir
from blockd.errors import StorageError
from blockd.jobs.job import Job, RecordEnd
from blockd.jobs.states import JobStatus

if TYPE_CHECKING:
    from blockd.daemon.state import MonitorRecord, State
    from blockd.qmp.table import Command

log = logging.getLogger(__name__)


class Recorder:
    """Writes the journal in a state directory, once it was told to `begin` and until it is closed.

    Without a directory it does nothing, and jobs end with the daemon.
    """

    def __init__(self, state_dir: StateDir | None, earlier: "State | None") -> None:
        # What the last run was; None: there was none.
        self.earlier = earlier
        # What does not follow from the running daemon; see `State`.
        self.given = dict(earlier.given) if earlier is not None else {}
        self.monitors: list[MonitorRecord] = earlier.monitors if earlier is not None else []
        self.image_paths: list[str] = []
        self._state_dir = state_dir
        self._services: Services
        self._is_heard: asyncio.Event
        self._is_on = False
        self._gives_up = False
        self._restored: frozenset[Job] = frozenset()
        self._written: State | None = None
        self._writing = asyncio.Lock()

    @classmethod
    async def open(cls, path: str | None, stack: AsyncExitStack) -> "Recorder":
        """Lock a state directory until `stack` is closed, and read what is in it.

        Raises:   BlockdError: it cannot be used, or its journal not be understood.
        """
        if path is None:
            return cls(None, None)
        from blockd.daemon.state import parse_state

        state_dir = await in_thread(StateDir.open, path)
        stack.callback(state_dir.close)
        text = await in_thread(state_dir.load)
        return cls(state_dir, parse_state(text, path) if text is not None else None)

    def watch(self, services: Services, is_heard: asyncio.Event) -> None:
        """Be told of what is to be recorded; `is_heard` is set when somebody hears events."""
        self._services = services
        self._is_heard = is_heard
        services.devices.record = self.save

    def note_monitors(self, monitors: Iterable[ServedMonitor]) -> None:
        """Where QMP is served in this run."""
        if self._state_dir is not None:
            from blockd.daemon.snapshot import monitor_records

            self.monitors = monitor_records(monitors)

    def begin(self) -> None:
        """Write from now on: what was recorded before is running again."""
        self._restored = frozenset(self._services.jobs)
        self._is_on = self._state_dir is not None

    def release(self) -> None:
        """Let go of the jobs whose end nobody has come to hear: the next run tells."""
        self._gives_up = not self._is_heard.is_set()
        self._is_heard.set()

    async def close(self) -> None:
        """Write no more: what is taken down from now on is to come back."""
        try:
            await self.save()
        except StorageError as error:
            log.error("the journal may be out of date: %s", error.message)
        self._is_on = False

    # -- writing ------------------------------------------------------------------------------

    async def save(self) -> None:
        """Make the journal durable if anything has changed.

        Raises:   StorageError: it could not be written.
        """
        async with self._writing:
            if self._state_dir is None or not self._is_on or (state := self._take()) == self._written:
                return
            await in_thread(self._state_dir.write_new, state.model_dump(mode="json"))
            self._written = None
            await in_thread(self._state_dir.publish)
            await in_thread(self._state_dir.sync)
            self._written = state

    def recorded(self, command: "Command[Services]") -> "Command[Services]":
        """The same command, whose reply waits for the journal."""
        if self._state_dir is None or command.name.startswith("query-"):
            return command

        async def handler(*arguments: object) -> object:
            try:
                return await command.handler(*arguments)
            finally:
                await self.save()

        return replace(command, handler=handler)

    @property
    def record_end(self) -> RecordEnd | None:
        """What the ends of jobs go through; None: jobs end with the daemon."""
        return self._record_end if self._state_dir is not None else None

    async def _record_end(self, job: Job, tell: Callable[[], None]) -> None:
        """Write down that the end of a job was told, and tell it; or leave both to the next run."""
        if job in self._restored or not self._is_on:
            await self._is_heard.wait()
            if self._gives_up:
                return
        async with self._writing:
            try:
                await self._save_end(job, tell)
            except StorageError as error:
                log.error("job %s: its end may be told again after a restart: %s", job.id, error.message)
            if job.status not in (JobStatus.CONCLUDED, JobStatus.NULL):
                tell()

    async def _save_end(self, job: Job, tell: Callable[[], None]) -> None:
        if self._state_dir is None or not self._is_on:
            return
        state = self._take(ending=job)
        await in_thread(self._state_dir.write_new, state.model_dump(mode="json"))
        self._written = None
        # On the loop, so that next to nothing is in between: a kill there tells nobody, the other way round
        # it would be told twice. The content is durable already, so the rename has nothing to wait for.
        self._state_dir.publish()
        tell()
        await in_thread(self._state_dir.sync)
        self._written = state

    def _take(self, ending: Job | None = None) -> "State":
        from blockd.daemon.snapshot import take_state

        return take_state(
            self._services,
            ending,
            given=self.given,
            monitors=self.monitors,
            image_paths=self.image_paths,
        )

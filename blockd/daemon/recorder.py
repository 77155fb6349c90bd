"""Keeps the journal at the state of the daemon.

After every command, before its reply, and wherever else it matters, the state is brought up to date
(tracking.py), and what has changed since the last time is added to the journal. What matters is the order:

    a switch    new image durable → guests held → graph changed → journal → guests go on → event, reply
    a command   done → journal → reply
    a job       result durable → graph restored → journal → completion told

The state is taken when no change is half done: under `Devices.changing`, which whoever changes holds.
What an earlier run had and this one could not bring back stays in the journal.

A job of an earlier run may end before anyone has come back to hear of it. Its end waits for the first client
then, and stays in the journal.

The journal's models are loaded by those daemons only that have a journal.
"""

# ruff: noqa: PLC0415

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from blockd.aio import in_thread, uninterrupted
from blockd.block.node import BlockNode
from blockd.commands.context import Services
from blockd.daemon.changes import Changes, Json, RecordedState
from blockd.daemon.options import ServedMonitor
from blockd.daemon.state_dir import StateDir
from blockd.devices.turns import NoTurn
from blockd.errors import BlockdError, StorageError
from blockd.jobs.job import Job, RecordEnd
from blockd.jobs.states import JobStatus

if TYPE_CHECKING:
    from blockd.daemon.left_out import Unplaced
    from blockd.daemon.snapshot import Rest
    from blockd.daemon.staged_file import KeptWrites
    from blockd.daemon.state import MonitorRecord, StagedRecord, State, Things
    from blockd.daemon.tracking import Tracker
    from blockd.qmp.table import Command

log = logging.getLogger(__name__)

# Commands that only look, besides those that are called query-.
_LOOKING = ("block_stream_status", "qom-get", "qom-list")
# Those that end or hold up what goes on: it may be what has filled the file system.
_STOPPING = (
    *("quit", "block_stream_cancel", "block-job-cancel", "job-cancel"),
    *("block-job-pause", "job-pause", "acknowledge-lost-writes"),
)
# Those that write the journal before what they have changed is used, or else change nothing: if it cannot be
# written once more, that is about something else, and an error would have their client remove the new image.
_RECORDING = ("block_switch", "blockdev-snapshot", "blockdev-snapshot-sync", "transaction", "blockdev-reopen")
# How long the last journal waits for a change under way.
_CLOSE_TIMEOUT_S = 10.0


class Recorder:
    """Writes the journal in a state directory, once it was told to `begin` and until it is closed.

    Without a directory it does nothing, and jobs end with the daemon.
    """

    def __init__(
        self, state_dir: StateDir | None, earlier: "State | None", members: Json | None = None
    ) -> None:
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
        # What the journal is going to be (at first what was found), and what of that it does not say yet.
        self._state = RecordedState(members or {})
        self._changes = Changes()
        # What keeps it up to date, from the first time on.
        self._tracker: Tracker | None = None
        # The journal may be something else than `_state`: it is being written, or could not be.
        self._is_behind = state_dir is not None
        # Why it could not be written, as far as the log has told.
        self._told: str | None = None
        self._last: State | None = None
        self._writing = asyncio.Lock()
        # What an earlier run knew of guests' writes to images that are left out; None: no earlier run.
        self._unplaced: Unplaced | None = None
        # The files with such that the journal names; None: not known yet, a kill may have left others.
        self._named: set[str] | None = None

    @classmethod
    @uninterrupted
    async def open(cls, path: str | None, stack: AsyncExitStack) -> "Recorder":
        """Lock a state directory until `stack` is closed, and read what is in it.

        Raises:   BlockdError: it cannot be used, or its journal not be understood.
        """
        if path is None:
            return cls(None, None)
        from blockd.daemon.left_out import merged
        from blockd.daemon.state import parse_state

        state_dir = await in_thread(StateDir.open, path)
        stack.push_async_callback(in_thread, state_dir.close)
        members = await in_thread(state_dir.load)
        return cls(state_dir, None if members is None else merged(parse_state(members, path)), members)

    def watch(self, services: Services, is_heard: asyncio.Event) -> None:
        """Be told of what is to be recorded; `is_heard` is set when somebody hears events."""
        self._services = services
        self._is_heard = is_heard
        services.devices.record = self.save_locked

    def note_monitors(self, monitors: Iterable[ServedMonitor]) -> None:
        """Where QMP is served in this run."""
        if self._state_dir is not None:
            from blockd.daemon.snapshot import monitor_records

            self.monitors = monitor_records(monitors)

    @property
    def qmp_paths(self) -> tuple[str, ...]:
        """The unix sockets at which QMP is served."""
        from blockd.daemon.state import UnixPlace

        places = [monitor.place for monitor in self.monitors]
        return tuple(place.path for place in places if isinstance(place, UnixPlace))

    async def start(self) -> None:
        """Write the first journal of this run.

        If that of an earlier run stays as it is, what it says is served all the same.

        Raises:   StorageError: it could not be written, and there is none of an earlier run.
        """
        try:
            await self.save()
        except StorageError as error:
            if self.earlier is None:
                raise
            self._told = error.message
            log.warning(
                "%s: disks are served as it says, and commands that change something are refused until it "
                "can be written",
                error.message,
            )

    def begin(self) -> None:
        """Write from now on: what was recorded before is running again."""
        self._restored = frozenset(self._services.jobs)
        if self.earlier is not None:
            from blockd.daemon.left_out import Unplaced

            self._unplaced = Unplaced(self.earlier, self._services)
        self._is_on = self._state_dir is not None

    def release(self) -> None:
        """Let go of the jobs whose end nobody has come to hear: the next run tells."""
        self._gives_up = not self._is_heard.is_set()
        self._is_heard.set()

    async def close(self) -> None:
        """Write no more, but for `finish`: what is taken down from now on is to come back."""
        self._told = None
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                await self.save()
        except BlockdError as error:
            self.tell(error)
        except TimeoutError:
            log.error("the journal may be out of date: a change did not come to its end")
        except Exception:
            log.exception("the journal may be out of date")
        self._last = self._take() if self._is_on else None
        self._is_on = False

    # -- staged writes ------------------------------------------------------------------------

    @property
    def keeps_staged(self) -> bool:
        """Whether what is staged can be kept for the next run, once the recorder is closed."""
        return self._last is not None

    async def load_staged(self) -> "list[KeptWrites]":
        """Read what the last run has kept of guests' writes."""
        from blockd.daemon.staged_file import KeptWrites, is_whole, unpack

        found: list[KeptWrites] = []
        for record in self.earlier.staged if self.earlier is not None else ():
            assert self._state_dir is not None, "the earlier run had a journal"
            pieces = None
            try:
                content = await in_thread(self._state_dir.read_staged, record.file)
                pieces = list(unpack(content)) if is_whole(record, content) else None
            except StorageError as error:
                log.error("%s", error.message)
            found.append(KeptWrites(record, pieces))
        return found

    async def write_staged(self, image: BlockNode, length: int, content: bytes) -> "StagedRecord":
        """Write down what is staged for an image; `finish` makes it count.

        Raises:   StorageError: it cannot be written.
        """
        from blockd.daemon.staged_file import births_of, record_of

        assert self._state_dir is not None, "there is a journal"
        births: tuple[str, ...] = ()
        with contextlib.suppress(StorageError):  # what cannot be told cannot be compared either
            births = await births_of(image)
        record = record_of(image, births, length, content)
        await in_thread(self._state_dir.write_staged, record.file, content)
        return record

    async def finish(self, staged: "Iterable[StagedRecord]") -> None:
        """Record what is kept of staged writes, in place of what was before, and what is lost.

        Needs:    the recorder is closed.
        Raises:   StorageError: it cannot be written; the journal is as before.
        """
        assert self._last is not None and self._state_dir is not None, "the recorder is closed"
        now = self._take()
        unplaced = self._unplaced.staged if self._unplaced is not None else []
        changes = {"staged": [*unplaced, *staged], "lost_writes": now.lost_writes}
        self._last = self._last.model_copy(update=changes)
        async with self._writing:
            self._state.become(self._changes, self._last.members())
            if self._changes or self._is_behind or self._state_dir.has_changes:
                await self._write(is_whole=True)

    # -- writing ------------------------------------------------------------------------------

    async def save(self) -> None:
        """Make the journal durable if anything has changed, when no change is under way.

        Raises:   StorageError: it could not be written, or a change does not come to its end.
        """
        if self._state_dir is not None:
            try:
                async with self._services.devices.change():
                    await self.save_locked()
            except NoTurn as error:
                raise StorageError(f"Could not write the journal: {error.message}") from error

    @uninterrupted
    async def save_locked(self) -> None:
        """The same for who holds `Devices.changing`, and has made a change whole.

        Raises:   StorageError: it could not be written.
        """
        async with self._writing:
            if self._state_dir is not None and self._is_on:
                await self._update()
                if self._changes or self._is_behind:
                    await self._write()

    @uninterrupted
    async def _write(self, *, is_whole: bool = False) -> None:
        self._is_behind = True
        await in_thread(self._write_blocking, is_whole=is_whole)
        await self._note_written()

    def _write_blocking(self, *, is_whole: bool) -> None:
        assert self._state_dir is not None, "there is a journal"
        self._state_dir.prepare(self._changes, self._state.members, is_whole=is_whole)
        self._state_dir.publish()
        self._state_dir.sync()

    @uninterrupted
    async def _note_written(self) -> None:
        """The journal says all that has changed."""
        self._changes, self._is_behind, self._told = Changes(), False, None
        await self._remove_unused()

    def tell(self, error: BlockdError) -> None:
        """Log that the journal could not be written, unless that is known for the same reason."""
        if error.message != self._told:
            log.error("the journal may be out of date: %s", error.message)
        self._told = error.message

    @uninterrupted
    async def _remove_unused(self) -> None:
        """Remove the files that the journal does not name; it is durable."""
        assert self._state_dir is not None, "there is a journal"
        named = {record["file"] for record in self._state.values["staged"]}
        if named != self._named:
            await in_thread(self._state_dir.remove_unused, named)
            self._named = named

    def recorded(self, command: "Command[Services]") -> "Command[Services]":
        """The same command, whose reply waits for the journal.

        One that fails may have changed something all the same; its own error is what its client is told.
        While the journal cannot be written, nothing more is changed that a restart would not know of.
        """
        if self._state_dir is None or command.name.startswith("query-") or command.name in _LOOKING:
            return command

        async def handler(*arguments: object) -> object:
            if command.name not in _STOPPING:
                await self._require_journal()
            try:
                result = await command.handler(*arguments)
            except BaseException:
                with contextlib.suppress(StorageError):
                    await self._save_or_tell()
                raise
            try:
                await self._save_or_tell()
            except StorageError as error:
                if command.name not in _RECORDING:
                    text = (
                        f"{error.message}; {command.name} was carried out, but a restart would not know of it"
                    )
                    raise StorageError(text, errno=error.errno) from error
            return result

        return replace(command, handler=handler)

    async def _require_journal(self) -> None:
        """Write what could not be written before.

        Raises:   StorageError: it still cannot be.
        """
        if self._is_on and self._is_behind and not self._writing.locked():
            try:
                await self._save_or_tell()
            except StorageError as error:
                raise StorageError(
                    f"{error.message}; nothing was changed, as a restart would not know of it",
                    errno=error.errno,
                ) from error

    async def _save_or_tell(self) -> None:
        try:
            await self.save()
        except StorageError as error:
            self.tell(error)
            raise

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
        async with self._services.devices.changing, self._writing:
            try:
                await self._save_end(job, tell)
            except StorageError as error:
                log.error("job %s: its end may be told again after a restart: %s", job.id, error.message)
            if job.status not in (JobStatus.CONCLUDED, JobStatus.NULL):
                tell()

    @uninterrupted
    async def _save_end(self, job: Job, tell: Callable[[], None]) -> None:
        if self._state_dir is None or not self._is_on:
            return
        await self._update(ending=job)
        self._is_behind = True
        await in_thread(self._state_dir.prepare, self._changes, self._state.members)
        # Next to nothing is in between, a cancellation neither: a kill there tells nobody, the other way
        # round it would be told twice.
        published: list[str] = []
        try:
            await in_thread(self._publish, published)
        finally:
            if published:
                tell()
        await in_thread(self._state_dir.sync)
        await self._note_written()

    def _publish(self, published: list[str]) -> None:
        assert self._state_dir is not None
        self._state_dir.publish()
        published.append(self._state_dir.path)

    async def _update(self, ending: Job | None = None) -> None:
        """Bring `_state` up to date; `_changes` are what the journal does not say yet."""
        from blockd.daemon.tracking import Tracker

        if self._tracker is not None:
            await self._tracker.update(self._state, self._changes, self._rest(), ending)
            return
        # Everything is touched, for nobody has looked before.
        tracker = Tracker(self._services)
        tracker.begin()
        self._state.become(self._changes, self._take(ending).members())
        self._tracker = tracker

    def _take(self, ending: Job | None = None) -> "State":
        from blockd.daemon.snapshot import take_state

        return take_state(self._services, ending, self._rest())

    def _rest(self) -> "Rest":
        from blockd.daemon.snapshot import Rest

        left_out = self._left_out()
        if self._unplaced is not None:
            self._unplaced.lose_given_up()
        return Rest(self.given, self.monitors, self.image_paths, self._unplaced, left_out)

    def _left_out(self) -> "Things | None":
        from blockd.daemon.left_out import records_of

        left_out = self._services.left_out
        if self.earlier is None or not any(left_out):
            return None
        return records_of(left_out, self.earlier, self._services)

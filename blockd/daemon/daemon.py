"""Start and end of the daemon, in reading order.

    start   graph → jobs → exports → QMP → the journal → the options, one by one → pidfile → clients
    end     jobs end, their events sent → QMP answers and disconnects → journal → guests leave → their last
            writes → images closed

Sockets listen when it is their turn among the options, so that others may be started beside us. Clients that
connect early are greeted by QMP and wait for the rest: QMP's commands, and NBD altogether, are answered when
all that the options say is there. Whatever fails at start ends the same way, and who waits is disconnected.
What does not end is left behind (ending.py).

What is slow to load, the models of QMP and of the journal, is loaded when everybody can connect already, or
when it is needed.
"""

# ruff: noqa: PLC0415

import asyncio
import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager
from typing import TYPE_CHECKING

from blockd.aio import in_thread, task_group, thread_calls
from blockd.block.housekeeping import Housekeeper
from blockd.block.image_paths import ImagePaths
from blockd.commands.context import Services
from blockd.commands.telling import EventTeller
from blockd.config import Address, Config, InetAddress, MovedDevice, Served, StoppedJob, UnixAddress
from blockd.daemon.collecting import collecting_little
from blockd.daemon.ending import IMAGES_PATIENCE_S, Ending
from blockd.daemon.options import Starter
from blockd.daemon.pidfile import Pidfile
from blockd.daemon.recorder import Recorder
from blockd.daemon.settling import settle
from blockd.devices.device import Devices
from blockd.devices.exports import Exports
from blockd.devices.left_out import LeftOut
from blockd.devices.streams import Streams
from blockd.drivers import NodeGraph
from blockd.errors import BlockdError, RequestError
from blockd.exports.nbd.listeners import Place
from blockd.exports.nbd.polling import POLL_S
from blockd.filenames import absolute, check_path
from blockd.jobs.job import Job
from blockd.jobs.manager import JobManager
from blockd.jobs.states import JobStatus
from blockd.jobs.stream import GUEST_LATENCY_S
from blockd.objects import Objects
from blockd.qmp.events import EventBus
from blockd.qmp.server import QmpServer

if TYPE_CHECKING:
    from blockd.qmp.table import CommandTable

log = logging.getLogger(__name__)

_ENDED = (JobStatus.CONCLUDED, JobStatus.NULL)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Daemon:
    """One run of blockd."""

    def __init__(self) -> None:
        self.stopped: list[StoppedJob] = []
        """The jobs that the end of `run` has kept from doing their work."""
        self.moved: list[MovedDevice] = []
        """Disks that a switch or a snapshot has moved; empty with a journal, which remembers that."""
        self._begun: dict[str, str] = {}
        self._stop_asked = asyncio.Event()
        # Set when all is there that clients may ask for.
        self._is_ready = asyncio.Event()
        self._recorder: Recorder
        self._collecting: ExitStack

    def stop(self) -> None:
        """Make `run` come to its end."""
        self._stop_asked.set()

    async def run(
        self,
        config: Config,
        when_ready: Callable[[Served], None],
        when_ending: Callable[[], None] = lambda: None,
    ) -> bool:
        """Do what `config` says, tell `when_ready` what is served, and serve until a signal or `quit`.

        `when_ending` is called when that comes. Returns whether the end was clean: if not, the log says why.

        Raises:   BlockdError: an option could not be done; everything that was started is ended again.
        """
        failure: BlockdError | None = None
        ending = Ending()
        async with AsyncExitStack() as stack:
            self._collecting = stack.enter_context(ExitStack())
            services, qmp = await self._open(config, stack)
            tasks = await stack.enter_async_context(asyncio.TaskGroup())
            own = await stack.enter_async_context(AsyncExitStack())  # of what has no other owner

            async def begin() -> None:
                nonlocal failure
                failure = await self._begin(config, services, qmp, own, when_ready)

            starting = tasks.create_task(begin())
            stopping = tasks.create_task(self._stop_asked.wait())
            await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
            if not stopping.done() and failure is None:
                await stopping
            stopping.cancel()
            if failure is None:
                when_ending()
            stack.enter_context(ending)
            await ending.step("the start", starting)
            if not self._is_ready.is_set():
                qmp.drop_waiting()
            await self._end(services, qmp, own, tasks, ending)
        if failure is not None:
            raise failure
        return ending.is_clean

    async def _begin(
        self,
        config: Config,
        services: Services,
        qmp: QmpServer[Services],
        own: AsyncExitStack,
        when_ready: Callable[[Served], None],
    ) -> BlockdError | None:
        """Do what `config` says; an error is returned, as task groups would wrap what is raised."""
        try:
            await self._start(config, services, Starter(services, qmp, self._recorder.given, own), qmp)
            if config.pidfile is not None:
                await Pidfile.create(config.pidfile, own)
            self._is_ready.set()
            self._begun = {device.name: device.active.filename for device in services.devices}
            when_ready(_served(services, () if config.options else self._recorder.qmp_paths))
            await self._load_rest(qmp)
            self._collecting.enter_context(collecting_little())
        except BlockdError as error:
            return error
        except MemoryError:
            return BlockdError("out of memory")
        return None

    async def _load_rest(self, qmp: QmpServer[Services]) -> None:
        """Load what guests did not have to wait for; they keep their disks if that fails."""
        try:
            await qmp.commands.tables()
        except BlockdError as error:
            log.warning("%s; the next QMP request tries again", error)

    async def _end(
        self,
        services: Services,
        qmp: QmpServer[Services],
        own: AsyncExitStack,
        tasks: asyncio.TaskGroup,
        ending: Ending,
    ) -> None:
        """Close everything, the images last; what hangs is left behind."""
        self._recorder.release()
        has_journal = self._recorder.record_end is not None
        jobs = [job for job in services.jobs if job.status not in _ENDED]
        if not has_journal:
            # Jobs are cancelled; the requests of guests that wait for a slow source would keep them.
            await ending.step("NBD clients", tasks.create_task(services.exports.end()))
        await ending.step("jobs", tasks.create_task(services.jobs.stop_all()))
        if not has_journal:
            # While clients can still hear of a loss.
            await ending.step("guest writes", tasks.create_task(settle(services, self._recorder)))
        await ending.step("QMP clients", tasks.create_task(qmp.close()))
        await ending.step("jobs", tasks.create_task(services.jobs.stop_all()))  # that these have started
        # What a command has done is in the journal before its reply, the last command too.
        await ending.step("the journal", tasks.create_task(self._recorder.close()))
        await ending.step("NBD clients", tasks.create_task(services.exports.disconnect()))
        await ending.step("guest writes", tasks.create_task(settle(services, self._recorder)))
        await ending.step("the pidfile or HTTP", tasks.create_task(own.aclose()))
        await ending.step("NBD clients", tasks.create_task(services.exports.close()))
        self.stopped = _stopped(jobs)
        if not has_journal:
            self.moved = self._moved(services)
        await ending.step("images", tasks.create_task(services.graph.close()), IMAGES_PATIENCE_S)
        if not ending.left:
            # Such as a look at a file whose server is gone: a process that ends in order waits for it.
            await ending.step("calls that nobody waits for", tasks.create_task(thread_calls.wait_over()))
        if ending.left:
            ending.abandon(services.graph.unclosed)

    def _moved(self, services: Services) -> list[MovedDevice]:
        active = {device.name: device.active.filename for device in services.devices}
        return [
            MovedDevice(name, absolute(active[name]))
            for name, begun in self._begun.items()
            if active.get(name, begun) != begun
        ]

    async def _open(self, config: Config, stack: AsyncExitStack) -> tuple[Services, QmpServer[Services]]:
        """Bring the parts together; what is entered first is closed last."""
        self._recorder = await Recorder.open(config.state_dir, stack)
        self._handle_signals(stack)
        events = EventBus()
        objects = Objects()
        image_paths = await in_thread(ImagePaths, self._image_paths(config))
        housekeeper = Housekeeper(await stack.enter_async_context(task_group()))
        graph = NodeGraph(image_paths, objects.throttle_group, housekeeper.begin)
        stack.push_async_callback(graph.close)
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        devices = Devices(graph)
        teller = EventTeller(events)
        devices.on_lost = teller.writes_lost
        exports = Exports(
            devices, tasks, teller.export_deleted, self._is_ready, _seconds(config.nbd_poll_us, POLL_S)
        )
        stack.push_async_callback(exports.close)
        jobs = await stack.enter_async_context(JobManager(teller, self._recorder.record_end))

        def quit_() -> None:
            qmp.stop()  # what was sent after `quit` is not run
            self.stop()

        streams = Streams(devices, jobs, _seconds(config.guest_latency_us, GUEST_LATENCY_S))
        services = Services(graph, devices, streams, jobs, exports, events, quit_, objects, LeftOut())
        qmp = await stack.enter_async_context(
            QmpServer(self._load_commands, events, services, is_ready=self._is_ready)
        )
        self._recorder.watch(services, qmp.is_heard)
        return services, qmp

    def _load_commands(self) -> "CommandTable[Services]":
        import blockd.daemon.late  # noqa: F401
        from blockd.commands.table import COMMANDS, build_models_of_streams

        build_models_of_streams()
        return COMMANDS.wrapped(self._recorder.recorded)

    def _image_paths(self, config: Config) -> list[str]:
        earlier = self._recorder.earlier
        if earlier is not None and not config.options:
            return earlier.image_paths
        return [absolute(check_path(path)) for path in config.image_paths]

    def _handle_signals(self, stack: AsyncExitStack) -> None:
        loop = asyncio.get_running_loop()
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, self._on_signal, number)
            stack.callback(loop.remove_signal_handler, number)

    def _on_signal(self, number: signal.Signals) -> None:
        log.info("ending: signal=%s", number.name)
        self.stop()

    async def _start(
        self, config: Config, services: Services, starter: Starter, qmp: QmpServer[Services]
    ) -> None:
        recorder, earlier = self._recorder, self._recorder.earlier
        recorder.image_paths = self._image_paths(config)
        with _naming(f"--state-dir {config.state_dir}"):
            if earlier is not None:
                from blockd.daemon.restoring import restore

                staged = await recorder.load_staged()
                await restore(services, earlier, staged, is_strict=config.is_restore_strict)
            elif config.state_dir is not None and not config.options:
                raise RequestError("nothing to serve: there is no journal yet; give a disk, see --help")
            recorder.begin()
        for step in (starter.start, starter.export, starter.accept):
            for given in config.options:
                with _naming(given.where):
                    await step(given)
                await services.devices.adjust_locks()  # nobody is in others' way for what is not used
        with _naming(f"--state-dir {config.state_dir}"):
            if config.options:
                recorder.note_monitors(starter.monitors)
            else:
                from blockd.daemon.restoring import restore_monitors

                await restore_monitors(qmp, recorder.monitors)
            await recorder.start()


def _stopped(jobs: list[Job]) -> list[StoppedJob]:
    """Those of some jobs that have not done their work; each has ended, or is kept for the next start."""
    return [
        StoppedJob(job.type, job.id, job.offset, job.length, is_kept=job.status not in _ENDED)
        for job in jobs
        if job.is_cancelled or job.status not in _ENDED
    ]


def _served(services: Services, qmp: tuple[str, ...]) -> Served:
    server = services.exports.server
    return Served(
        devices=tuple(device.name for device in services.devices),
        nbd=tuple(map(_address_of, server.places)) if server is not None else (),
        exports=tuple(reversed([offer.export.name for offer in services.exports])),
        qmp=qmp,
    )


def _address_of(place: Place) -> Address:
    return UnixAddress(place) if isinstance(place, str) else InetAddress(*place)


def _seconds(microseconds: int | None, otherwise: float) -> float:
    return otherwise if microseconds is None else microseconds / 1e6


@contextmanager
def _naming(argument: str) -> Iterator[None]:
    """Have errors say which option they come from."""
    try:
        yield
    except BlockdError as error:
        raise RequestError(f"{argument}: {error.message}", kind=error.kind) from error

"""Start and end of the daemon, in reading order.

    start   graph → jobs → exports → QMP → the journal → the options, one by one → pidfile
    end     jobs end, their events sent → journal → QMP answers and disconnects → NBD → images closed

Whatever fails at start ends the same way.

What is slow to load, the models of QMP and of the journal, is loaded when everybody can connect already, or
when it is needed.
"""

# ruff: noqa: PLC0415

import asyncio
import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from blockd.block.image_paths import ImagePaths
from blockd.commands.context import Services
from blockd.commands.telling import EventTeller
from blockd.config import Config
from blockd.daemon.options import Starter
from blockd.daemon.pidfile import Pidfile
from blockd.daemon.recorder import Recorder
from blockd.devices.device import Devices
from blockd.devices.exports import Exports
from blockd.devices.streams import Streams
from blockd.drivers import NodeGraph
from blockd.errors import BlockdError, RequestError
from blockd.exports.nbd.polling import POLL_S
from blockd.jobs.manager import JobManager
from blockd.jobs.stream import GUEST_LATENCY_S
from blockd.objects import Objects
from blockd.qmp.events import EventBus
from blockd.qmp.server import QmpServer

if TYPE_CHECKING:
    from blockd.qmp.table import CommandTable

log = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Daemon:
    """One run of blockd."""

    def __init__(self) -> None:
        self._stop_asked = asyncio.Event()
        self._recorder: Recorder

    def stop(self) -> None:
        """Make `run` come to its end."""
        self._stop_asked.set()

    async def run(
        self, config: Config, when_ready: Callable[[], None], when_ending: Callable[[], None] = lambda: None
    ) -> None:
        """Do what `config` says, call `when_ready`, serve until a signal or `quit`, and call `when_ending`.

        Raises:   BlockdError: an option could not be done; everything that was started is ended again.
        """
        failure: BlockdError | None = None
        async with AsyncExitStack() as stack:
            services, qmp = await self._open(config, stack)
            try:
                starter = Starter(services, qmp, self._recorder.given, stack)
                await self._start(config, services, starter, qmp)
                if config.pidfile is not None:
                    stack.callback(Pidfile.create(config.pidfile).remove)
                when_ready()
                await qmp.commands.tables()
                await self._stop_asked.wait()
                when_ending()
            except BlockdError as error:
                failure = error  # not through the task groups, which would wrap it
            self._recorder.release()
            await services.jobs.stop_all()
            await self._recorder.close()
        if failure is not None:
            raise failure

    async def _open(self, config: Config, stack: AsyncExitStack) -> tuple[Services, QmpServer[Services]]:
        """Bring the parts together; what is entered first is closed last."""
        self._recorder = await Recorder.open(config.state_dir, stack)
        self._handle_signals(stack)
        events = EventBus()
        objects = Objects()
        graph = NodeGraph(ImagePaths(self._image_paths(config)), objects.throttle_group)
        stack.push_async_callback(graph.close)
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        devices = Devices(graph)
        teller = EventTeller(events)
        exports = Exports(devices, tasks, teller.export_deleted, _seconds(config.nbd_poll_us, POLL_S))
        stack.push_async_callback(_close_exports, exports)
        jobs = await stack.enter_async_context(JobManager(teller, self._recorder.record_end))

        def quit_() -> None:
            qmp.stop()  # what was sent after `quit` is not run
            self.stop()

        streams = Streams(devices, jobs, _seconds(config.guest_latency_us, GUEST_LATENCY_S))
        services = Services(graph, devices, streams, jobs, exports, events, quit_, objects)
        qmp = await stack.enter_async_context(QmpServer(self._load_commands, events, services))
        self._recorder.watch(services, qmp.is_heard)
        return services, qmp

    def _load_commands(self) -> "CommandTable[Services]":
        from blockd.commands.table import COMMANDS, build_models_of_streams

        build_models_of_streams()
        return COMMANDS.wrapped(self._recorder.recorded)

    def _image_paths(self, config: Config) -> list[str]:
        earlier = self._recorder.earlier
        if earlier is not None and not config.options:
            return earlier.image_paths
        return [str(Path(path).absolute()) for path in config.image_paths]

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

                await restore(services, earlier)
            elif config.state_dir is not None and not config.options:
                raise RequestError("nothing to serve: there is no journal yet; give a disk, see --help")
            recorder.begin()
        for step in (starter.start, starter.export, starter.accept):
            for given in config.options:
                with _naming(given.where):
                    await step(given)
        with _naming(f"--state-dir {config.state_dir}"):
            if config.options:
                recorder.note_monitors(starter.monitors)
            else:
                from blockd.daemon.restoring import restore_monitors

                await restore_monitors(qmp, recorder.monitors)
            await recorder.save()


def _seconds(microseconds: int | None, otherwise: float) -> float:
    return otherwise if microseconds is None else microseconds / 1e6


@contextmanager
def _naming(argument: str) -> Iterator[None]:
    """Have errors say which option they come from."""
    try:
        yield
    except BlockdError as error:
        raise RequestError(f"{argument}: {error.message}", kind=error.kind) from error


async def _close_exports(exports: Exports) -> None:
    if exports.server is not None:
        await exports.stop_server()

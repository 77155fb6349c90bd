"""A real daemon in a process of its own, for tests that kill it or talk to it as a user would."""

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.qmp_client import QmpClient

START_TIMEOUT_S = 100.0
STOP_TIMEOUT_S = 100.0


class DaemonProcess:
    """One `blockd` with its sockets in `folder`; several runs of it can follow each other.

    Without `own_sockets` the arguments are all there is: no --qmp, no --nbd. `program` is what Python runs,
    in `environment`.
    """

    def __init__(
        self,
        folder: Path,
        *arguments: str | Path,
        own_sockets: bool = True,
        program: Sequence[str] = ("-m", "blockd.cli.daemon"),
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        self.folder = folder
        self.program = program
        self.environment = environment
        self.qmp_path = folder / "qmp.sock"
        self.nbd_path = folder / "nbd.sock"
        self.pidfile = folder / "blockd.pid"
        self._stdout_path = folder / "blockd.stdout"
        self._stderr_path = folder / "blockd.stderr"
        sockets = ["--qmp", str(self.qmp_path), "--nbd", str(self.nbd_path)] if own_sockets else []
        self.arguments = [*sockets, "--pidfile", str(self.pidfile), *map(str, arguments)]
        self._process: asyncio.subprocess.Process | None = None

    # -- life ---------------------------------------------------------------------------------

    async def start(self) -> Self:
        """Start, and return when the daemon has written its pidfile: then all its sockets are ready.

        Raises:   AssertionError: the daemon ended or was not ready in time; with what it said.
        """
        await self.launch()
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await self._ready()
        except TimeoutError:
            await self.kill()
            raise AssertionError(f"blockd was not ready after {START_TIMEOUT_S} s:\n{self.stderr}") from None
        return self

    async def launch(self) -> None:
        """Start without waiting for anything."""
        # What an earlier run left behind when it was killed.
        self.pidfile.unlink(missing_ok=True)
        with self._stdout_path.open("ab") as stdout, self._stderr_path.open("ab") as stderr:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, *self.program, *self.arguments),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                cwd=self.folder,
                env=dict(self.environment),
            )

    async def _ready(self) -> None:
        while not (self.pidfile.exists() and self.pidfile.read_text().strip()):
            if self.process.returncode is not None:
                raise AssertionError(f"blockd ended with {self.process.returncode}:\n{self.stderr}")
            await asyncio.sleep(0.01)

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.is_running:
            await self.stop()

    async def stop(self, signal_number: int = signal.SIGTERM) -> int:
        """Ask the daemon to end, and return its exit status.

        Raises:   AssertionError: it did not end in time (it is killed then).
        """
        if self.is_running:
            self.process.send_signal(signal_number)
        return await self.wait()

    async def wait(self) -> int:
        """Wait until the daemon has ended by itself, and return its exit status."""
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                return await self.process.wait()
        except TimeoutError:
            await self.kill()
            raise AssertionError(f"blockd did not end within {STOP_TIMEOUT_S} s:\n{self.stderr}") from None

    async def kill(self) -> None:
        """End the daemon as a crash would: SIGKILL, nothing is cleaned up.

        What copied for it ends with it, a moment later: who supervises daemons waits for all their processes.
        """
        copiers = self.copiers()
        if self.is_running:
            self.process.kill()
        await self.process.wait()
        for pid in copiers:
            await asyncio.to_thread(wait_until_gone, pid)

    def copiers(self) -> list[int]:
        """The processes that copy for it, one at most."""
        return children_of(self.process.pid) if self.is_running else []

    @property
    def process(self) -> asyncio.subprocess.Process:
        assert self._process is not None, "the daemon was not started"
        return self._process

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    @property
    def pid(self) -> int:
        return self.process.pid

    # -- what it said and what it uses --------------------------------------------------------

    @property
    def stdout(self) -> str:
        return self._stdout_path.read_text()

    @property
    def stderr(self) -> str:
        return self._stderr_path.read_text()

    @property
    def resident_bytes(self) -> int:
        """Memory in use."""
        pages = Path(f"/proc/{self.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGESIZE")

    # -- talking to it ------------------------------------------------------------------------

    async def qmp(self, *, negotiate: bool = True) -> QmpClient:
        """Open a QMP session."""
        return await QmpClient.connect(self.qmp_path, negotiate=negotiate)

    def nbd_uri(self, export: str = "") -> str:
        """The NBD URI of an export, for qemu-img, nbdinfo, fio and the like."""
        return f"nbd+unix:///{export}?socket={self.nbd_path}"


def children_of(pid: int) -> list[int]:
    """Processes that any thread of a process has started."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has ended
            found += map(int, task.read_text().split())
    return found


def is_alive(pid: int) -> bool:
    """Whether a process is there, and not only its number because nobody has asked how it ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until_gone(pid: int) -> None:
    """Wait until a process has ended."""
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while is_alive(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.001)

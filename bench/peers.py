"""The programs that are compared, what each can do, and how each is told to serve an image.

The two daemons take the same command line, so only the program differs. Servers that speak NBD alone get what
comes nearest.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from bench.qmp import Qmp

START_TIMEOUT_S = 30.0
POLL_INTERVAL_S = 0.001
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
# As installed: Python keeps what it compiled, whatever whoever measures told it.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


@dataclass(frozen=True)
class Image:
    """An image file and the images below it."""

    path: Path
    format: str
    backing: "Image | None" = None
    # Whether the space of what is trimmed is given back.
    discards: bool = False

    def options(self, prefix: str = "") -> str:
        """The image as the value of --blockdev."""
        words = [
            f"{prefix}driver={self.format}",
            f"{prefix}file.driver=file",
            f"{prefix}file.filename={self.path}",
        ]
        if self.discards:
            words += [f"{prefix}discard=unmap", f"{prefix}file.discard=unmap"]
        if self.backing is not None:
            words.append(self.backing.options(f"{prefix}backing."))
        return ",".join(words)

    def members(self) -> dict[str, Any]:
        """The image as arguments of blockdev-add, without a name."""
        file = {"driver": "file", "filename": str(self.path)}
        backing = {"backing": self.backing.members()} if self.backing is not None else {}
        return {"driver": self.format, "file": file} | backing


class Work(Enum):
    """What a row asks of a peer."""

    QMP = "commands: streams, jobs"
    SUBCLUSTERS = "streams into images with extended L2 entries"
    QCOW2 = "a guest's reads and writes of a qcow2 image, with or without a backing file"
    RAW = "a guest's reads and writes of a raw file"


class Sockets(NamedTuple):
    """Where a peer is to listen."""

    qmp: Path
    nbd: Path


@dataclass(frozen=True)
class Peer:
    """A program under test: `arguments` tells it to serve an image to guests as `disk`."""

    name: str
    program: tuple[str, ...]
    arguments: Callable[[Image, Sockets], list[str]]
    does: frozenset[Work]


def _daemon(image: Image, sockets: Sockets) -> list[str]:
    return [
        *("--blockdev", f"node-name=disk,{image.options()}"),
        *("--chardev", f"socket,id=qmp,path={sockets.qmp},server=on,wait=off"),
        *("--monitor", "chardev=qmp"),
        *("--nbd-server", f"addr.type=unix,addr.path={sockets.nbd}"),
        *("--export", "nbd,id=disk,node-name=disk,name=disk,writable=on"),
    ]


def _qemu_nbd(image: Image, sockets: Sockets) -> list[str]:
    return [
        *("--persistent", "--shared=8", f"--socket={sockets.nbd}", "--export-name=disk"),
        *(f"--format={image.format}", str(image.path)),
    ]


def _nbdkit(image: Image, sockets: Sockets) -> list[str]:
    return ["--foreground", f"--unix={sockets.nbd}", "file", str(image.path)]


BLOCKD = Peer("blockd", (sys.executable, "-m", "blockd.cli.daemon"), _daemon, frozenset(Work))
# It could serve raw files too: what it does with them is known from its qcow2 images, and takes time.
QSD = Peer("qemu-storage-daemon", ("qemu-storage-daemon",), _daemon, frozenset({Work.QMP, Work.QCOW2}))
QEMU_NBD = Peer("qemu-nbd", ("qemu-nbd",), _qemu_nbd, frozenset({Work.QCOW2}))
NBDKIT = Peer("nbdkit", ("nbdkit",), _nbdkit, frozenset({Work.RAW}))


def installed_peers() -> list[Peer]:
    """blockd, and what else is installed."""
    return [BLOCKD] + [peer for peer in (QSD, QEMU_NBD, NBDKIT) if shutil.which(peer.program[0])]


class Running:
    """A started peer, which serves an image as `disk`."""

    def __init__(
        self, process: subprocess.Popen[bytes], nbd_path: Path, qmp: Qmp | None, *, started: float
    ) -> None:
        self._process = process
        self._qmp = qmp
        self.nbd_path = nbd_path
        self.nbd_uri = f"nbd+unix:///disk?socket={nbd_path}"
        # Until it has answered the first command, or takes guests if it takes no commands.
        self.start_s = time.perf_counter() - started
        self.greeting_s = qmp.greeted - started if qmp is not None else self.start_s

    @property
    def qmp(self) -> Qmp:
        """Its QMP session; the node is called `disk` too."""
        assert self._qmp is not None, "only who does QMP gets work that takes QMP"
        return self._qmp

    def kill(self) -> None:
        """End it as a crash would."""
        self._process.kill()
        self._process.wait()

    def cpu_seconds(self) -> float:
        """Processor time used so far, user and system, all threads; of processes that it started, too."""
        fields = [_stat_fields(pid) for pid in self._pids()]
        own, *_ = fields
        # Those that have ended count, too: what became of them is added to their parent's figures.
        ticks = sum(int(field[11]) + int(field[12]) for field in fields) + int(own[13]) + int(own[14])
        return ticks / TICKS_PER_S

    def memory_bytes(self, field: str = "VmRSS") -> int:
        """Resident memory now (`VmRSS`) or at most so far (`VmHWM`), with that of processes it started."""
        return sum(_status_bytes(pid, field) for pid in self._pids())

    def _pids(self) -> list[int]:
        """The peer, and what it has started."""
        children = Path(f"/proc/{self._process.pid}/task").glob("*/children")
        return [self._process.pid, *(int(pid) for file in children for pid in file.read_text().split())]

    def end(self) -> None:
        """Ask it to end, and wait until it has."""
        if self._process.poll() is None:
            if self._qmp is not None:
                self._qmp.command("quit")
            else:
                self._process.terminate()
        if self._qmp is not None:
            self._qmp.close()
        self._process.wait(START_TIMEOUT_S)


def _stat_fields(pid: int) -> list[str]:
    """What the kernel tells of a process, from its state on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _status_bytes(pid: int, field: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"the kernel does not tell {field}")


@contextmanager
def running(peer: Peer, image: Image, folder: Path) -> Iterator[Running]:
    """Start a peer on an image; it is asked to quit at the end.

    Raises:   RuntimeError: it did not start; with what it said.
    """
    sockets = Sockets(folder / "qmp.sock", folder / "nbd.sock")
    log_path = folder / f"{peer.name}.log"
    command = [*peer.program, *peer.arguments(image, sockets)]
    for path in sockets:
        path.unlink(missing_ok=True)
    with log_path.open("wb") as log:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=ENVIRONMENT)
    try:
        qmp = _connect(process, sockets.qmp, log_path, Qmp) if Work.QMP in peer.does else None
        if qmp is None:
            _connect(process, sockets.nbd, log_path, _knock)
        daemon = Running(process, sockets.nbd, qmp, started=started)
        yield daemon
        daemon.end()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _knock(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as guest:
        guest.connect(str(path))


Connected = TypeVar("Connected")


def _connect(
    process: subprocess.Popen[bytes], path: Path, log_path: Path, connect: Callable[[Path], Connected]
) -> Connected:
    """Connect as soon as the peer listens."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            return connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            time.sleep(POLL_INTERVAL_S)
    raise RuntimeError(f"{log_path.stem} did not start:\n{log_path.read_text()}")

"""The daemons that are compared. They take the same command line, so only the program differs."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.qmp import Qmp

START_TIMEOUT_S = 30.0
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
# As installed: Python keeps what it compiled, whatever whoever measures told it.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


@dataclass(frozen=True)
class Peer:
    """A storage daemon under test."""

    name: str
    command: tuple[str, ...]


BLOCKD = Peer("blockd", (sys.executable, "-m", "blockd.cli.daemon"))
QSD = Peer("qemu-storage-daemon", ("qemu-storage-daemon",))


def installed_peers() -> list[Peer]:
    """blockd, and qemu-storage-daemon where it is installed."""
    return [BLOCKD] + [peer for peer in (QSD,) if shutil.which(peer.command[0])]


@dataclass(frozen=True)
class Image:
    """An image file and the images below it."""

    path: Path
    format: str
    backing: "Image | None" = None

    def options(self, prefix: str = "") -> str:
        """The image as the value of --blockdev."""
        words = [
            f"{prefix}driver={self.format}",
            f"{prefix}file.driver=file",
            f"{prefix}file.filename={self.path}",
        ]
        if self.backing is not None:
            words.append(self.backing.options(f"{prefix}backing."))
        return ",".join(words)

    def members(self) -> dict[str, Any]:
        """The image as arguments of blockdev-add, without a name."""
        file = {"driver": "file", "filename": str(self.path)}
        backing = {"backing": self.backing.members()} if self.backing is not None else {}
        return {"driver": self.format, "file": file} | backing


class Running:
    """A started daemon: an image under the node name `disk`, exported under the same name."""

    def __init__(self, process: subprocess.Popen[bytes], qmp: Qmp, nbd_path: Path, start_s: float) -> None:
        self._process = process
        self.qmp = qmp
        self.nbd_path = nbd_path
        self.nbd_uri = f"nbd+unix:///disk?socket={nbd_path}"
        self.start_s = start_s

    def kill(self) -> None:
        """End it as a crash would."""
        self._process.kill()
        self._process.wait()

    def cpu_seconds(self) -> float:
        """Processor time used so far, user and system, all threads."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS_PER_S

    def memory_bytes(self, field: str = "VmRSS") -> int:
        """Resident memory now (`VmRSS`) or at most so far (`VmHWM`)."""
        for line in Path(f"/proc/{self._process.pid}/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
        raise ValueError(f"the kernel does not tell {field}")


@contextmanager
def running(peer: Peer, image: Image, folder: Path) -> Iterator[Running]:
    """Start a peer on an image; it is asked to quit at the end.

    Raises:   RuntimeError: it did not start; with what it said.
    """
    qmp_path, nbd_path, log_path = folder / "qmp.sock", folder / "nbd.sock", folder / f"{peer.name}.log"
    command = [
        *peer.command,
        *("--blockdev", f"node-name=disk,{image.options()}"),
        *("--chardev", f"socket,id=qmp,path={qmp_path},server=on,wait=off"),
        *("--monitor", "chardev=qmp"),
        *("--nbd-server", f"addr.type=unix,addr.path={nbd_path}"),
        *("--export", "nbd,id=disk,node-name=disk,name=disk,writable=on"),
    ]
    for path in (qmp_path, nbd_path):
        path.unlink(missing_ok=True)
    with log_path.open("wb") as log:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=ENVIRONMENT)
    try:
        qmp = _connect(process, qmp_path, log_path)
        yield Running(process, qmp, nbd_path, time.perf_counter() - started)
        if process.poll() is None:
            qmp.command("quit")
        qmp.close()
        process.wait(START_TIMEOUT_S)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _connect(process: subprocess.Popen[bytes], path: Path, log_path: Path) -> Qmp:
    """Connect as soon as the daemon listens."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            return Qmp(path)
        except (FileNotFoundError, ConnectionRefusedError):
            time.sleep(0.001)
    raise RuntimeError(f"{log_path.stem} did not start:\n{log_path.read_text()}")

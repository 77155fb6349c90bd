"""Every error of every call, one a life of a daemon: `python -m tests.faults.errno_sweep` tries them all.

A life is a start with a journal and a pidfile, a guest that writes, a stream, a switch, another stream, and
a stop. One that nothing happens to tells which calls there are on files and sockets (`calls.c` knows those).
Then each of them fails once with each error of `ERRORS`. After each:

    the daemon has ended by itself, with status 0 or 1, and without a traceback
    status 1 is explained by one line
    the images are sound, and hold what their guest was told is safe
"""

import argparse
import asyncio
import atexit
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from errno import (
    EACCES,
    EAGAIN,
    EBADF,
    EDQUOT,
    EINVAL,
    EIO,
    EMFILE,
    ENFILE,
    ENOBUFS,
    ENODEV,
    ENOENT,
    ENOLCK,
    ENOMEM,
    ENOSPC,
    ENOSYS,
    EOPNOTSUPP,
    EPERM,
    EROFS,
    ESTALE,
    errorcode,
)
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tests import qemu_img
from tests.faults import calls
from tests.faults.preloaded import Preloaded, PreloadedLife, preloaded
from tests.qmp_client import QmpClient, QmpError

LIFE_TIMEOUT_S = 90.0
SIZE = "8M"

_FILE = (EIO, EACCES, EINVAL, ESTALE, ENOMEM)
_WRITE = (EIO, ENOSPC, EDQUOT, EROFS)
_LOCK = (ENOLCK, EINVAL, EOPNOTSUPP, ENOSYS, EACCES, EAGAIN, EIO)
_SOCKET = (EACCES, EMFILE, ENOMEM, EINVAL)
# Which errors each call can have, if only on odd filesystems or under odd security modules.
ERRORS: dict[str, tuple[int, ...]] = {
    "open": (EIO, EACCES, EPERM, ENOENT, EMFILE, ENFILE, EROFS, ENOMEM, ESTALE),
    **dict.fromkeys(("stat", "lstat", "fstat", "access", "readlink"), (EIO, EACCES, ENOMEM, ESTALE)),
    **dict.fromkeys(("preadv", "pread", "preadv-nowait", "lseek", "fstatvfs", "ioctl"), _FILE),
    **dict.fromkeys(("pwrite", "pwritev", "write"), _WRITE),
    **dict.fromkeys(("ftruncate", "fallocate"), (*_WRITE, EPERM, EOPNOTSUPP, ENODEV)),
    **dict.fromkeys(("fsync", "fdatasync", "sync_file_range"), (EIO, ENOSPC, EINVAL, EROFS)),
    **dict.fromkeys(("lock", "ask-lock", "flock"), _LOCK),
    **dict.fromkeys(("mkdir", "rename", "unlink", "chmod", "fchmod"), (*_WRITE, EACCES, EPERM, ENOENT)),
    # Left out: `fstat`, `getsockopt` and `close` of open sockets, which have no such errors in Linux; `pipe`,
    # without which libuv aborts.
    **dict.fromkeys(("socket", "bind", "listen", "connect"), (*_SOCKET, EIO)),
    "socketpair": (EMFILE, ENFILE, ENOMEM),
    "getsockname": (ENOBUFS,),
    **dict.fromkeys(("setsockopt", "accept", "dup2"), (EMFILE, ENOMEM)),
    "thread": (EAGAIN,),
    "fork": (EAGAIN, ENOMEM),
    "io-setup": (EAGAIN, ENOMEM, ENOSYS, EPERM),
    "io-submit": (EAGAIN, EIO, ENOSPC, EINVAL),
    "close": (EIO, ENOSPC, EBADF),
    "read": (EIO,),
}


class Fault(NamedTuple):
    """The call that fails, and how."""

    call: str
    number: int
    error: int

    def __str__(self) -> str:
        return f"{self.call}:{self.number}:{errorcode[self.error]}"


class Life:
    """One daemon, its images and what became of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stderr = ""
        self.status: int | None = None
        self.safe: list[str] = []

    async def live(self, daemon: Preloaded, fault: Fault | None, log: Path | None = None) -> None:
        """Do all of it, or as much as can be done."""
        fail = f"{fault.call}:{fault.number}:{fault.error}" if fault is not None else None
        folder = self.folder
        names = {"qmp": "q", "nbd": "n", "pidfile": "pid", "state-dir": "state"}
        options = [word for option, name in names.items() for word in (f"--{option}", f"{folder}/{name}")]
        process = await daemon.live(
            ["--device", f"a={folder}/a.qcow2", *options],
            calls.environment(folder, log=log, fail=fail),
            folder / "stderr",
        )
        try:
            async with asyncio.timeout(LIFE_TIMEOUT_S):
                await self._use(process)
                if process.returncode is None:
                    process.send_signal(signal.SIGTERM)
                self.status = await process.wait()
        except TimeoutError:
            process.send_signal(signal.SIGKILL)
            await process.wait()
        self.stderr = (folder / "stderr").read_text()

    async def _use(self, process: PreloadedLife) -> None:
        while not (self.folder / "pid").exists() or not (self.folder / "pid").read_text():
            if process.returncode is not None:
                return
            await asyncio.sleep(0.01)
        with contextlib.suppress(OSError, EOFError, QmpError):
            async with await QmpClient.connect(self.folder / "q") as qmp:
                await self._write("-P 1 1M 1M")
                await self._stream(qmp)
                with contextlib.suppress(QmpError):
                    await qmp.command("block_switch", device="a", filename=f"{self.folder}/b.qcow2")
                await self._write("-P 2 3M 64k")
                await self._stream(qmp)

    async def _write(self, what: str) -> None:
        words = ["qemu-io", "-f", "raw", "-c", f"write {what}", "-c", "flush"]
        guest = await asyncio.create_subprocess_exec(
            *words, f"nbd+unix:///a?socket={self.folder}/n", stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        await guest.communicate()
        if not guest.returncode:
            self.safe.append(what)

    async def _stream(self, qmp: QmpClient) -> None:
        with contextlib.suppress(QmpError):
            await qmp.command("block_stream", device="a")
            await qmp.event("JOB_STATUS_CHANGE", status="null")

    def faults(self) -> Iterator[str]:
        """What is wrong with how it went."""
        if self.status not in (0, 1):
            yield f"status {self.status}"
        if any(line.lstrip(" |").startswith("Traceback") for line in self.stderr.splitlines()):
            yield "traceback"
        lines = self.stderr.splitlines()
        if self.status == 1 and not (lines and lines[-1].startswith("blockd: ")):
            yield "no explanation"
        if any(not line.startswith("blockd: ") for line in lines):
            yield "more than a line"
        yield from self._images()

    def _images(self) -> Iterator[str]:
        for name in ("a.qcow2", "b.qcow2"):
            verdict = qemu_img.check(self.folder / name)
            if verdict is None or verdict.corruptions:
                yield f"{name} is not sound"
        state = self.folder / "state" / "journal.json"
        is_switched = state.exists() and "b.qcow2" in state.read_text()
        active = self.folder / ("b.qcow2" if is_switched else "a.qcow2")
        reads = [word for what in ("-P 7 6M 1M", *self.safe) for word in ("-c", f"read {what}")]
        found = subprocess.run(["qemu-io", "-r", *reads, active], capture_output=True, text=True, check=False)
        if found.returncode or "verification failed" in found.stdout:
            yield f"{active.name} lacks something: {found.stdout}{found.stderr}"


@cache
def _images() -> Path:
    """A folder with the images that all lives begin with; they name each other by names in their folder."""
    folder = Path(tempfile.mkdtemp(prefix="errno-sweep-images-"))
    atexit.register(shutil.rmtree, folder)
    base = folder / "base.raw"
    qemu_img.qemu("qemu-img", "create", "-q", "-f", "raw", base, SIZE)
    qemu_img.write(base, "write -P 7 4M 4M", image_format="raw")
    for name, backing, backing_format in (("a", "base.raw", "raw"), ("b", "a.qcow2", "qcow2")):
        names: list[str | Path] = ["-b", backing, "-F", backing_format, folder / f"{name}.qcow2"]
        qemu_img.qemu("qemu-img", "create", "-q", "-f", "qcow2", *names)
    return folder


def make_images(folder: Path) -> None:
    shutil.copytree(_images(), folder, dirs_exist_ok=True)


async def life(place: Path, daemon: Preloaded, fault: Fault | None, log: Path | None = None) -> Life:
    """Live once, in a folder of its own."""
    folder = Path(tempfile.mkdtemp(dir=place))
    make_images(folder)
    lived = Life(folder)
    await lived.live(daemon, fault, log)
    return lived


async def counted(place: Path) -> Counter[str]:
    """How often each call is made in a life to which nothing happens."""
    log = place / "calls.log"
    async with preloaded() as daemon:
        lived = await life(place, daemon, None, log)
    wrong = list(lived.faults())
    assert not wrong and lived.status == 0, f"{wrong}\n{lived.stderr}"
    assert len(lived.safe) == 2
    return Counter(call.name for call in calls.logged(log))


def all_faults(counts: Counter[str]) -> list[Fault]:
    return [
        Fault(call, number, error)
        for call, errors in ERRORS.items()
        for number in range(1, counts[call] + 1)
        for error in errors
    ]


async def sweep(place: Path, faults: list[Fault], at_once: int = 2) -> list[str]:
    """Try faults; returns what is wrong, in a line each and with what the daemon said."""
    waiting, wrong = list(reversed(faults)), []

    async def work() -> None:
        async with preloaded() as daemon:
            while waiting:
                fault = waiting.pop()
                lived = await life(place, daemon, fault)
                if lived.status is None:  # it hangs, or somebody else has had the machine
                    shutil.rmtree(lived.folder)
                    lived = await life(place, daemon, fault)
                found = list(lived.faults())
                if found:
                    wrong.append(f"{fault}: {'; '.join(found)}: {lived.folder}\n{lived.stderr}")
                    print(wrong[-1], flush=True)
                else:
                    shutil.rmtree(lived.folder)
                if len(waiting) % 50 == 0:
                    print(f"{len(waiting)} to go, after {fault}", flush=True)

    await asyncio.gather(*(work() for _ in range(at_once)))
    return wrong


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", default="1/1", help="N/M: every M-th fault, from the N-th on")
    parser.add_argument("--call", help="only faults of this call")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    part, parts = map(int, options.part.split("/"))
    place = Path(tempfile.mkdtemp(prefix="errno-sweep-"))
    counts = await counted(place)
    faults = [fault for fault in all_faults(counts) if options.call in (None, fault.call)]
    print(f"calls: {dict(counts)}\n{len(faults)} faults; trying part {options.part} in {place}")
    wrong = await sweep(place, faults[part - 1 :: parts], options.jobs)
    print(f"{len(wrong)} went wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))

"""Kill a daemon again and again while it streams, under guests, and look for stale pages.

    make direct-cycles CYCLES=5000

What copies past the page cache must not meet what writes through it: the kernel would keep pages of before,
or lose an error into the next sync. In each cycle a stream, mostly with small clusters, begins or goes on.
Guests read everything, and write back what they know where the stream is. Another program reads the image's
file, so that the kernel reads ahead, in folios as large as can be, over what is being copied. The daemon is
killed when the stream has come so far and guests have written so often. Half of the time the next one is
started at once, while the last copies are perhaps still being written.

Guests have to read what was written, whatever life wrote it; the image has to be the same read through the
page cache and past it; and no sync of it may fail, whoever asks for one.
"""

import argparse
import asyncio
import contextlib
import gc
import mmap
import os
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from blockd.cli.daemon import main as blockd_main
from blockd.commands import table
from blockd.daemon import daemon
from blockd.errors import BlockdError
from blockd.protocols.nbd_client import NbdClient
from blockd.units import KIB, MIB
from tests import qemu_img
from tests.daemon_process import children_of, wait_until_gone
from tests.qmp_client import QmpClient

BLOCK = 4 * KIB
# Small ones are copied by threads; to whole ones the copier copies, too.
CLUSTER_SIZES = (BLOCK, BLOCK, 64 * KIB)
LENGTH = 32 * MIB
# No folio is larger.
FOLIO = 2 * MIB
# The image's file has its space from the start, more than is ever used, until a daemon cuts off what it lost.
FILE_LENGTH = 48 * MIB
READ_LENGTH = 256 * KIB
WRITER_COUNT = 2
# A life: how far the stream comes, and how often guests write after that.
ADVANCE_MAX, WRITE_COUNT_MAX = 8 * MIB, 50
LIFE_MAX_S = 20.0
# An image that some lives have been writing is made anew.
LIVES_MAX = 8
START_TIMEOUT_S = 60.0
LOOK_INTERVAL_S = 0.002
# Guests pause as long, or a busy machine has little time for the stream.
PAUSE_S = 0.001
# Linux 5.14; `mmap` has no name for it.
MADV_POPULATE_READ = 22


# Loaded before any life begins, for all of them.
LOADED = (daemon, table)


class Difference(Exception):
    """Something is not as it was written."""


class NotStarted(Exception):
    """The daemon ended at once."""


class Folder(NamedTuple):
    """Where it all happens."""

    path: Path
    content: bytes

    @property
    def base(self) -> Path:
        return self.path / "base.raw"

    @property
    def active(self) -> Path:
        return self.path / "active.qcow2"

    def make_active(self, cluster_size: int) -> None:
        self.active.unlink(missing_ok=True)
        qemu_img.create(
            self.active, LENGTH, f"cluster_size={cluster_size}", backing=self.base, backing_format="raw"
        )
        with self.active.open("rb+") as file:
            os.posix_fallocate(file.fileno(), 0, FILE_LENGTH)


# -- the daemon -------------------------------------------------------------------------------


def start_daemon(folder: Folder) -> int:
    """A daemon in a process that has all its modules already: it is there in a moment."""
    for name in ("qmp.sock", "nbd.sock", "pid"):
        (folder.path / name).unlink(missing_ok=True)
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        log = os.open(folder.path / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        status = _run_daemon(folder)
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        os._exit(status)


def _run_daemon(folder: Folder) -> int:
    sockets = ["--qmp", str(folder.path / "qmp.sock"), "--nbd", str(folder.path / "nbd.sock")]
    disk = ["--device", f"vda={folder.active}"]
    # On a busy machine copies would be short ones, which threads make.
    patience = ["--guest-latency", "1000000"]
    sys.argv[1:] = [*sockets, "--pidfile", str(folder.path / "pid"), *disk, *patience]
    return blockd_main()


def has_ended(pid: int) -> bool:
    """Whether a process that was started here has ended; `kill` takes notice of it."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def kill(pid: int) -> list[int]:
    """End it; tells which processes of it may still be writing."""
    copiers = children_of(pid)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return copiers


# -- guests -----------------------------------------------------------------------------------


class Stream:
    """What guests know of the stream."""

    def __init__(self) -> None:
        self.offset = 0
        self.is_done = False
        self.write_count = 0


async def use(folder: Folder, pid: int, rng: random.Random) -> bool:
    """Stream under guests, some of the way; tells whether the stream was completed."""
    qmp, client = await _connect(folder, pid)
    async with qmp, client:
        stream = Stream()
        guests = [_writer(client, folder.content, rng, stream) for _ in range(WRITER_COUNT)]
        guests += [_reader(client, folder.content, rng), _life(qmp, rng, stream)]
        tasks = [asyncio.create_task(guest) for guest in guests]
        await asyncio.wait(tasks, timeout=LIFE_MAX_S, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, Exception):
                raise result
        return stream.is_done


async def _connect(folder: Folder, pid: int) -> tuple[QmpClient, NbdClient]:
    pidfile = folder.path / "pid"
    async with asyncio.timeout(START_TIMEOUT_S):
        while not (pidfile.exists() and pidfile.read_text()):
            if has_ended(pid):
                raise NotStarted
            await asyncio.sleep(LOOK_INTERVAL_S)
    qmp = await QmpClient.connect(folder.path / "qmp.sock")
    return qmp, await NbdClient.connect_unix(str(folder.path / "nbd.sock"), "vda")


async def _life(qmp: QmpClient, rng: random.Random, stream: Stream) -> None:
    """Stream until that has come so far, and guests have written so often since."""
    advance, write_count = rng.randrange(ADVANCE_MAX), rng.randrange(WRITE_COUNT_MAX)
    # Copies are made in another way, and to other places, while guests are at work.
    begins_beside_guests, start = rng.random() < 0.5, None
    while begins_beside_guests and not stream.write_count:  # noqa: ASYNC110
        await asyncio.sleep(LOOK_INTERVAL_S)
    await qmp.command("block_stream", device="vda")
    while jobs := await qmp.command("query-block-jobs"):
        stream.offset = jobs[0]["offset"]
        start = stream.offset if start is None else start
        if stream.offset - start < advance:
            stream.write_count = 0
        elif stream.write_count >= write_count:
            return
        await asyncio.sleep(LOOK_INTERVAL_S)
    ended = await qmp.event("BLOCK_JOB_COMPLETED")
    if "error" in ended:
        raise Difference(f"the stream failed: {ended['error']}")
    stream.is_done = True


async def _reader(client: NbdClient, content: bytes, rng: random.Random) -> None:
    """Read everything, from anywhere on."""
    position = rng.randrange(0, LENGTH, READ_LENGTH)
    while True:
        await _read(client, content, position, READ_LENGTH)
        await asyncio.sleep(2 * PAUSE_S)
        position = (position + READ_LENGTH) % LENGTH


async def _writer(client: NbdClient, content: bytes, rng: random.Random, stream: Stream) -> None:
    """Write again what is there, from anywhere on that the stream has not reached."""
    offset = rng.randrange(stream.offset // BLOCK, LENGTH // BLOCK) * BLOCK
    while True:
        await client.write(offset, content[offset : offset + BLOCK])
        stream.write_count += 1
        if rng.random() < 0.02:
            await client.flush()
        await asyncio.sleep(PAUSE_S)
        offset = (offset + BLOCK) % LENGTH


async def _read(client: NbdClient, content: bytes, offset: int, length: int) -> None:
    data = await client.read(offset, length)
    if data != content[offset : offset + length]:
        raise Difference(f"a guest read something else at {offset}")


class ReadAhead:
    """Another program that reads the image's file, so that the kernel reads ahead in large folios."""

    def __init__(self, mapped: mmap.mmap) -> None:
        self._mapped = mapped
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_over.wait(PAUSE_S):
            for folio in range(0, FILE_LENGTH, FOLIO):
                with contextlib.suppress(OSError):  # the file is shorter by now
                    self._mapped.madvise(MADV_POPULATE_READ, folio, mmap.PAGESIZE)


@contextlib.contextmanager
def mapping(path: Path) -> Iterator[mmap.mmap]:
    """A new image's whole file in memory; it stays mapped as long as the file was when it was new."""
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), FILE_LENGTH, access=mmap.ACCESS_READ) as mapped,
    ):
        mapped.madvise(mmap.MADV_HUGEPAGE)
        yield mapped


# -- the judge --------------------------------------------------------------------------------


class Judge:
    """Looks at a file that others write; it is told, as any opener, of every write that failed since."""

    def __init__(self, path: Path) -> None:
        self._cached_fd = os.open(path, os.O_RDONLY)
        self._direct_fd = os.open(path, os.O_RDONLY | os.O_DIRECT)

    def close(self) -> None:
        os.close(self._cached_fd)
        os.close(self._direct_fd)

    def judge(self) -> None:
        """Compare what is in the page cache with what is on the disk.

        Raises:   Difference: they are not the same.
        """
        try:
            os.fdatasync(self._cached_fd)
        except OSError as error:
            raise Difference(f"a sync failed: {error.strerror}") from error
        with mmap.mmap(-1, FOLIO) as stored:
            for offset in range(0, FILE_LENGTH, FOLIO):
                cached = os.pread(self._cached_fd, FOLIO, offset)
                count = os.preadv(self._direct_fd, [stored], offset)
                if cached != stored[:count]:
                    raise Difference(
                        f"the page cache has something else than the disk at {offset:#x} or after"
                    )


def live(folder: Folder, mapped: mmap.mmap, rng: random.Random) -> tuple[bool, list[int]]:
    """One life of the daemon; tells whether the stream was completed, and what may still be writing.

    Raises:   Difference: something was found.
              NotStarted: the image is still locked by what may be writing since the last life.
    """
    pid, is_done = start_daemon(folder), False
    try:
        with ReadAhead(mapped):
            is_done = asyncio.run(use(folder, pid, rng))
    except BlockdError as error:
        raise Difference(f"a guest met an error: {error.message}") from error
    finally:
        copiers = kill(pid)
    return is_done, copiers


def stream_into_new_image(folder: Folder, rng: random.Random, life_count: int) -> int:
    """Stream until that is done, in so many lives at most; tells how many there were.

    Raises:   Difference: something was found.
    """
    folder.make_active(rng.choice(CLUSTER_SIZES))
    copiers: list[int] = []
    with contextlib.closing(Judge(folder.active)) as judge, mapping(folder.active) as mapped:
        for life in range(1, life_count + 1):
            try:
                is_done, copiers = live(folder, mapped, rng)
            except NotStarted:
                if not copiers:
                    raise Difference("the daemon did not start") from None
                is_done = False
            if is_done or life == life_count or rng.random() < 0.5:
                for copier in copiers:
                    wait_until_gone(copier)
                copiers = []
                judge.judge()
            if is_done:
                break
    return life


def run(path: Path, cycle_count: int, seed: int) -> int:
    """Run so many cycles, print what is found, and tell how often something was."""
    gc.freeze()  # what was loaded, daemons need not look through, and so not copy
    rng = random.Random(seed)
    folder = Folder(path, rng.randbytes(LENGTH))
    folder.base.write_bytes(folder.content)
    found_count = done_count = 0
    while done_count < cycle_count:
        try:
            done_count += stream_into_new_image(folder, rng, min(LIVES_MAX, cycle_count - done_count))
        except Difference as difference:
            done_count += 1
            found_count += 1
            print(f"after {done_count} cycles: {difference}", flush=True)
    return found_count


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cycles", type=int, default=500, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where the images are made (default: a temporary one)")
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found_count = run(Path(folder), options.cycles, options.seed)
    duration_s = time.monotonic() - began
    print(f"{options.cycles} cycles in {duration_s:.0f} s: {found_count} differences")
    return 1 if found_count else 0


if __name__ == "__main__":
    sys.exit(main())

"""Other programs that hold an image open, as long as a test wants: each made ready before it is used."""

import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from tests.qemu_img import TIMEOUT_S, qemu

Hold = Callable[[Path, str, bool], AbstractContextManager[None]]

_BLOCKD = """
import asyncio, sys
from blockd.drivers import NodeGraph

async def main(path, image_format, read_only):
    await NodeGraph().open_image(path, image_format, read_only=read_only == "ro")
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.read)

asyncio.run(main(*sys.argv[1:]))
"""


@contextmanager
def _asking(command: list[str], question: str, answer: str) -> Iterator[None]:
    """Run a program that says something when it has the image, and ends with its input."""
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(question)
        process.stdin.flush()
        said = ""
        while answer not in said:
            line = process.stdout.readline()
            assert line, said
            said += line
        yield
    finally:
        process.stdin.close()
        process.wait(TIMEOUT_S)
        process.stdout.close()


def qemu_io(path: Path, image_format: str, read_only: bool) -> AbstractContextManager[None]:
    access = ["-r"] if read_only else []
    return _asking(["qemu-io", *access, "-f", image_format, str(path)], "length\n", "MiB")


def second_blockd(path: Path, image_format: str, read_only: bool) -> AbstractContextManager[None]:
    access = "ro" if read_only else "rw"
    return _asking([sys.executable, "-c", _BLOCKD, str(path), image_format, access], "", "ready")


@contextmanager
def _daemon(folder: Path, *command: str) -> Iterator[None]:
    """Run a program that goes to the background when it has the image, and kill it: nothing waits then."""
    pidfile = folder / "holder.pid"
    qemu(*command, str(pidfile))
    pid = int(pidfile.read_text())
    handle = os.pidfd_open(pid)
    try:
        yield
    finally:
        signal.pidfd_send_signal(handle, signal.SIGKILL)
        _wait_for_end(handle)
        os.close(handle)
        pidfile.unlink(missing_ok=True)


def _wait_for_end(handle: int) -> None:
    # A process descriptor is readable when the process has ended, and with it its locks.
    ready, _, _ = select.select([handle], [], [], TIMEOUT_S)
    assert ready, "the holder did not end"


def qemu_nbd(path: Path, image_format: str, read_only: bool) -> AbstractContextManager[None]:
    access = ["-r"] if read_only else []
    socket = str(path.parent / "holder.sock")
    return _daemon(
        path.parent,
        "qemu-nbd",
        "--fork",
        "-t",
        "-k",
        socket,
        *access,
        "-f",
        image_format,
        str(path),
        "--pid-file",
    )


def qsd(path: Path, image_format: str, read_only: bool) -> AbstractContextManager[None]:
    access = "on" if read_only else "off"
    node = f"driver={image_format},node-name=n,read-only={access},file.driver=file,file.filename={path}"
    server = f"addr.type=unix,addr.path={path.parent / 'holder.sock'}"
    writable = "off" if read_only else "on"
    return _daemon(
        path.parent,
        *("qemu-storage-daemon", "--daemonize", "--blockdev", node, "--nbd-server", server),
        *("--export", f"type=nbd,id=e,node-name=n,writable={writable}", "--pidfile"),
    )


HOLDERS: dict[str, Hold] = {
    "qemu-io": qemu_io,
    "qemu-nbd": qemu_nbd,
    "qemu-storage-daemon": qsd,
    "a second blockd": second_blockd,
}

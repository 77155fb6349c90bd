"""qemu-storage-daemon, the reference: a QMP socket of a fresh one."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

START_TIMEOUT_S = 100.0
STOP_TIMEOUT_S = 100.0


@asynccontextmanager
async def qsd(folder: Path) -> AsyncIterator[Path]:
    """Run qemu-storage-daemon in `folder` and yield the path of its QMP socket.

    It serves one QMP client at a time. It may have crashed when it is stopped: some versions do.
    """
    path, pidfile, log = folder / "qsd.qmp", folder / "qsd.pid", folder / "qsd.log"
    chardev = f"socket,id=c,path={path},server=on,wait=off"
    with log.open("wb") as stderr:
        process = await asyncio.create_subprocess_exec(
            *("qemu-storage-daemon", "--chardev", chardev, "--monitor", "c", "--pidfile", str(pidfile)),
            stderr=stderr,
            cwd=folder,
        )
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            while not pidfile.exists():
                assert process.returncode is None, log.read_text()
                await asyncio.sleep(0.005)
        yield path
    finally:
        if process.returncode is None:
            process.terminate()
        async with asyncio.timeout(STOP_TIMEOUT_S):
            await process.wait()

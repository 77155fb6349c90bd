"""A daemon that is loaded once and forked for each of its lives: `errno_sweep` has some two thousand of them.

The program reads an order a line, lives that life, and answers with two lines: the process, and when it has
ended, how. It runs under `calls.c`, which begins anew in each life.
"""

import asyncio
import contextlib
import ctypes
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from tests.faults import calls


class Preloaded:
    """The program, for one life at a time."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def live(self, arguments: list[str], environment: dict[str, str], stderr: Path) -> "PreloadedLife":
        """Begin a life; the one before has ended."""
        assert self._process.stdin is not None
        order = {"arguments": arguments, "environment": environment, "stderr": str(stderr)}
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        pid = await self._answer()
        return PreloadedLife(pid, asyncio.ensure_future(self._answer()))

    async def _answer(self) -> int:
        assert self._process.stdout is not None
        return int(await self._process.stdout.readline())


@contextlib.asynccontextmanager
async def preloaded() -> AsyncIterator[Preloaded]:
    """Have a daemon loaded inside."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "tests.faults.preloaded"),
        env={**os.environ, "LD_PRELOAD": str(calls.library()), "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    try:
        yield Preloaded(process)
    finally:
        process.stdin.close()
        await process.wait()


class PreloadedLife:
    """A process that is not ours to wait for."""

    def __init__(self, pid: int, ended: asyncio.Future[int]) -> None:
        self.pid = pid
        self._ended = ended

    @property
    def returncode(self) -> int | None:
        return self._ended.result() if self._ended.done() else None

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(self.pid, number)

    async def wait(self) -> int:
        return await asyncio.shield(self._ended)


# -- the program -------------------------------------------------------------------------------


def _main() -> int:
    import uvloop  # noqa: PLC0415

    from blockd.cli import daemon, options  # noqa: F401, PLC0415
    from blockd.commands.table import build_models_of_streams  # noqa: PLC0415
    from blockd.daemon import Daemon, restoring  # noqa: F401, PLC0415

    build_models_of_streams()
    uvloop.new_event_loop().close()
    orders = open(0, "rb", buffering=0, closefd=False)  # noqa: SIM115  (a life needs no part of the next one)
    while order := orders.readline():
        pid = os.fork()
        if pid == 0:
            _become(**json.loads(order))
            return daemon.main()
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    return 0


def _become(arguments: list[str], environment: dict[str, str], stderr: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    null = os.open(os.devnull, os.O_RDWR)
    errors = os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for number, target in enumerate((null, null, errors)):
        os.dup2(target, number)
    os.close(null)
    os.close(errors)
    sys.argv = ["blockd", *arguments]
    ctypes.CDLL(None).calls_begin()


if __name__ == "__main__":
    sys.exit(_main())

"""A daemon in surroundings that nobody tests by hand: it runs, or says in one line why not."""

import asyncio
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from blockd.cli.limits import ADDRESS_SPACE_MIN
from tests import qemu_img
from tests.daemon_process import STOP_TIMEOUT_S, is_alive
from tests.faults import calls
from tests.qmp_client import QmpClient

MODULE = ("-m", "blockd.cli.daemon")
EAGAIN = 11


def command(folder: Path, *more: str) -> list[str]:
    disk = qemu_img.create(folder / "disk.qcow2", 1 << 20)
    sockets = ["--qmp", f"{folder}/q", "--nbd", f"{folder}/n", "--pidfile", f"{folder}/pid"]
    return [sys.executable, *MODULE, "--device", f"vda={disk}", *sockets, *more]


def run(
    arguments: list[str], before: Callable[[], None], environment: dict[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run a program with `before` done in its process."""
    return subprocess.run(
        arguments,
        preexec_fn=before,
        env=environment,
        capture_output=True,
        text=True,
        timeout=STOP_TIMEOUT_S,
        check=False,
    )


# -- standard streams ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)])
async def test_background_without_standard_streams(tmp_path: Path, closed: tuple[int, ...]) -> None:
    def close() -> None:
        for fd in closed:
            os.close(fd)

    arguments = command(tmp_path, "--daemonize", "--state-dir", f"{tmp_path}/state")
    result = await asyncio.to_thread(run, arguments, close)
    assert result.returncode == 0
    pid = int((tmp_path / "pid").read_text())
    assert is_alive(pid)
    for fd in range(3):
        assert Path(f"/proc/{pid}/fd/{fd}").readlink() == Path("/dev/null")
    async with await QmpClient.connect(tmp_path / "q") as qmp:
        assert [entry["device"] for entry in await qmp.command("query-block")] == ["vda"]
        await qmp.command("quit")
    async with asyncio.timeout(STOP_TIMEOUT_S):
        while is_alive(pid):  # noqa: ASYNC110  (it is nobody's child any more)
            await asyncio.sleep(0.01)
    await asyncio.to_thread(qemu_img.assert_sound, tmp_path / "disk.qcow2")


@pytest.mark.parametrize("kind", ["full disk", "closed pipe"])
async def test_nobody_can_read_that_it_is_ready(tmp_path: Path, kind: str) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with open("/dev/full" if kind == "full disk" else write_end, "wb") as out:  # noqa: PTH123
        daemon = await asyncio.create_subprocess_exec(
            *command(tmp_path), stdout=out, stderr=asyncio.subprocess.PIPE
        )
    async with asyncio.timeout(STOP_TIMEOUT_S):
        while not (tmp_path / "pid").exists() and daemon.returncode is None:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        async with await QmpClient.connect(tmp_path / "q") as client:
            await client.command("quit")
        _, stderr = await daemon.communicate()
    assert (daemon.returncode, stderr) == (0, b"")


@pytest.mark.parametrize("words", ["daemon --help", "daemon --version", "blockctl image info IMAGE"])
def test_what_is_printed_finds_no_room(tmp_path: Path, words: str) -> None:
    disk = qemu_img.create(tmp_path / "disk.qcow2", 1 << 20)
    program, *arguments = words.replace("IMAGE", str(disk)).split()
    with open("/dev/full", "wb") as out:  # noqa: PTH123
        result = subprocess.run(
            [sys.executable, "-m", f"blockd.cli.{program}", *arguments],
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    name = "blockd" if program == "daemon" else program
    text = f"{name}: Could not write to standard output: No space left on device\n"
    assert (result.returncode, result.stderr) == (1, text)


async def test_what_is_printed_gets_into_no_image(tmp_path: Path) -> None:
    """The first file that is opened is the image, and what is wrong is found out later."""
    arguments = command(tmp_path, "--export", "nbd,id=e,node-name=none")
    before = (tmp_path / "disk.qcow2").read_bytes()

    def close() -> None:
        for fd in range(3):
            os.close(fd)

    result = await asyncio.to_thread(run, arguments, close)
    assert result.returncode == 1
    assert (tmp_path / "disk.qcow2").read_bytes() == before


# -- limits -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2, 5, 8])
async def test_too_few_threads(tmp_path: Path, number: int) -> None:
    environment = calls.environment(tmp_path, fail=f"thread:{number}+:{EAGAIN}")
    result = await asyncio.to_thread(run, command(tmp_path), lambda: None, environment)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == (
        "blockd: Could not start 8 threads: the limit on processes or on memory is too low\n"
    )
    assert not list(tmp_path.glob("?"))


@pytest.mark.slow
async def test_no_more_threads_than_the_first_ones(tmp_path: Path) -> None:
    """Everything is done by these few: more calls than threads wait for them."""
    environment = calls.environment(tmp_path, fail=f"thread:9+:{EAGAIN}")
    daemon = await asyncio.create_subprocess_exec(
        *command(tmp_path), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    async with asyncio.timeout(STOP_TIMEOUT_S):
        while not (tmp_path / "pid").exists():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    guest = "write -P 7 0 256k", *[f"aio_read -P 7 {n * 4096} 4096" for n in range(40)], "aio_flush"
    options = [word for line in guest for word in ("-c", line)]
    uri = f"nbd+unix:///vda?socket={tmp_path}/n"
    await asyncio.to_thread(subprocess.run, ["qemu-io", "-f", "raw", *options, uri], check=True, timeout=100)
    daemon.send_signal(signal.SIGTERM)
    _, stderr = await daemon.communicate()
    assert (daemon.returncode, stderr) == (0, b"")


@pytest.mark.parametrize("size", [ADDRESS_SPACE_MIN // 2, ADDRESS_SPACE_MIN - 1])
async def test_small_address_space(tmp_path: Path, size: int) -> None:
    limit = size, size
    before = lambda: resource.setrlimit(resource.RLIMIT_AS, limit)  # noqa: E731
    result = await asyncio.to_thread(run, command(tmp_path), before)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == (
        f"blockd: the limit on the address space is {size >> 20} MiB, and blockd needs 1024 MiB: raise it "
        "with ulimit -v; to limit memory, use a memory cgroup\n"
    )


@pytest.mark.slow
async def test_address_space_that_is_just_enough(tmp_path: Path) -> None:
    limit = ADDRESS_SPACE_MIN, ADDRESS_SPACE_MIN
    before = lambda: resource.setrlimit(resource.RLIMIT_AS, limit)  # noqa: E731
    result = await asyncio.to_thread(run, command(tmp_path, "--daemonize"), before)
    assert (result.returncode, result.stderr) == (0, "")
    async with await QmpClient.connect(tmp_path / "q") as qmp:
        await qmp.command("quit")

"""What the README shows, run as it stands there."""

import asyncio
import os
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from tests import qemu_img
from tests.missing import require_programs
from tests.programs import run
from tests.qmp_client import QmpClient
from tests.walls import PROJECT

README = (PROJECT / "README.md").read_text()
START_TIMEOUT_S = 100.0


def _blocks(mark: str) -> list[tuple[str, str]]:
    """The code blocks under `<!-- mark … -->`, each with the rest of its mark."""
    found: list[tuple[str, str]] = re.findall(rf"<!-- {mark}(.*?) -->\n```sh\n(.*?)```", README, re.DOTALL)
    return found


@pytest.fixture(autouse=True)
def _programs_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")


@asynccontextmanager
async def _in_background(command: str, folder: Path, socket: str) -> AsyncIterator[None]:
    """Run a daemon that quits by itself; goes on when it answers on `socket`."""
    daemon = await asyncio.create_subprocess_shell(f"exec {command}", cwd=folder)
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            while not await _answers(folder / socket):
                assert daemon.returncode is None, "the daemon ended"
                await asyncio.sleep(0.01)
        yield
        assert await asyncio.wait_for(daemon.wait(), START_TIMEOUT_S) == 0
    finally:
        if daemon.returncode is None:
            daemon.kill()
            await daemon.wait()


async def _answers(socket: Path) -> bool:
    try:
        async with await QmpClient.connect(socket):
            return True
    except (FileNotFoundError, ConnectionRefusedError):
        return False


async def test_every_command_of_the_tour_works(tmp_path: Path) -> None:
    require_programs("nbdinfo", "qemu-img", "qemu-io", "socat")
    (_, make_images), (background, start), *visits, (after, look) = _blocks("tour")
    assert (background, after) == (": background", ": after the end")
    await run("bash", "-euo", "pipefail", "-c", make_images, cwd=tmp_path)
    async with _in_background(start.strip(), tmp_path, "blockd.qmp"):
        said = []
        for _, visit in visits:
            # A reader takes the time that the stream before takes.
            while "no stream" not in await run("blockctl", "status", expect=None, cwd=tmp_path):
                pass
            said.append(await run("bash", "-euo", "pipefail", "-c", visit, cwd=tmp_path))
    assert "read 1048576/1048576 bytes at offset 0" in said[0]
    assert '"return": [{"' in said[1] or '"return": []' in said[1]
    assert '"event": "BLOCK_STREAM_COMPLETED"' in said[1]
    assert "stream completed" in said[2]
    assert "copy.qcow2 (qcow2)" in said[3]
    seen = await run("bash", "-euo", "pipefail", "-c", look, cwd=tmp_path)
    assert seen.count("No errors were found on the image") == 2
    assert "file format: qed" in seen
    assert "backing file" not in seen


@pytest.mark.parametrize("program", ["blockd", "qemu-storage-daemon"])
async def test_only_the_name_of_the_program_changes(tmp_path: Path, program: str) -> None:
    require_programs(program)
    qemu_img.create(tmp_path / "disk.qcow2", 1 << 20)
    [(_, command)] = _blocks("same command line")
    assert command.startswith("blockd ")
    async with _in_background(command.replace("blockd", program, 1).strip(), tmp_path, "qmp.sock"):
        await run("qemu-io", "-f", "raw", "-c", "write 0 64k", f"nbd+unix:///disk?socket={tmp_path}/nbd.sock")
        async with await QmpClient.connect(tmp_path / "qmp.sock") as client:
            # qemu-storage-daemon sometimes ends before its reply is out.
            with suppress(EOFError, ConnectionResetError):
                await client.command("quit")

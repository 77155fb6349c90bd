"""The scripts in examples/ do what they say, with the real programs they use."""

import os
import sys
from pathlib import Path

import pytest

from tests import qemu_img
from tests.conftest import StartDaemon
from tests.missing import require_programs
from tests.programs import run
from tests.walls import PROJECT

EXAMPLES = PROJECT / "examples"
MIB = 1 << 20


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    """An empty qcow2 overlay of a raw base with data."""
    base = tmp_path / "base.raw"
    base.write_bytes(os.urandom(8 * MIB))
    return qemu_img.create(tmp_path / "disk.qcow2", 8 * MIB, backing=base, backing_format="raw")


@pytest.fixture(autouse=True)
def _programs_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """blockd and blockctl as installed beside this Python."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")


async def test_socat_session_streams_to_the_end(start_daemon: StartDaemon, overlay: Path) -> None:
    require_programs("socat")
    daemon = await start_daemon("--device", f"vda={overlay}")
    said = await run(EXAMPLES / "socat-session.sh", daemon.qmp_path, "vda")
    assert "BLOCK_STREAM_COMPLETED" in said
    await daemon.stop()
    qemu_img.assert_same(overlay, "qcow2", overlay.with_name("base.raw"), "raw")
    assert "backing" not in qemu_img.qemu("qemu-img", "info", overlay)


async def test_qemu_qmp_client_streams_to_the_end(start_daemon: StartDaemon, overlay: Path) -> None:
    daemon = await start_daemon("--device", f"vda={overlay}")
    said = await run(sys.executable, EXAMPLES / "qemu_qmp_client.py", daemon.qmp_path, "vda")
    assert "vda stands alone now" in said
    said = await run(sys.executable, EXAMPLES / "qemu_qmp_client.py", daemon.qmp_path, "vdz", expect=1)
    assert "Device 'vdz' not found" in said


async def test_live_block_copy_moves_the_guest_to_a_copy(start_daemon: StartDaemon, overlay: Path) -> None:
    daemon = await start_daemon("--device", f"vda={overlay}")
    copy = overlay.with_name("copy.qcow2")
    said = await run(EXAMPLES / "live_block_copy.sh", "vda", copy, daemon.qmp_path)
    assert f"vda now runs on {copy}" in said
    await run("qemu-io", "-f", "raw", "-c", "write -P 9 1M 64k", daemon.nbd_uri("vda"))
    await daemon.stop()
    qemu_img.assert_sound(copy)
    expected = bytearray(overlay.with_name("base.raw").read_bytes())
    expected[MIB : MIB + 65536] = b"\x09" * 65536
    assert qemu_img.content(copy) == expected
    assert "backing" not in qemu_img.qemu("qemu-img", "info", copy)


async def test_raw_copy_moves_the_guest_to_a_plain_file(start_daemon: StartDaemon, tmp_path: Path) -> None:
    source, copy = tmp_path / "disk.raw", tmp_path / "copies" / "disk.raw"
    copy.parent.mkdir()
    with source.open("wb") as file:
        file.write(os.urandom(2 * MIB))
        file.truncate(64 * MIB)
    daemon = await start_daemon("--device", f"vda={source}", "--image-paths", str(tmp_path))
    said = await run(EXAMPLES / "raw_copy.sh", "vda", copy, daemon.qmp_path)
    assert f"vda now runs on {copy}" in said
    assert copy.stat().st_blocks * 512 <= 2 * MIB, "holes are data in the copy"
    await run("qemu-io", "-f", "raw", "-c", "write -P 9 1M 64k", daemon.nbd_uri("vda"))
    await daemon.stop()
    expected = bytearray(source.read_bytes())
    expected[MIB : MIB + 65536] = b"\x09" * 65536
    assert copy.read_bytes() == expected
    assert list(copy.parent.iterdir()) == [copy]


async def test_qemu_guest_builds_a_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRY_RUN", "1")
    said = await run(EXAMPLES / "qemu_guest.sh", "vda", "some.sock", "-nographic")
    assert said.startswith("qemu-system-x86_64 ")
    assert "driver=nbd,node-name=disk,export=vda,server.type=unix,server.path=some.sock" in said
    assert said.endswith(" -nographic\n")


async def test_qemu_guest_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    said = await run("/bin/sh", EXAMPLES / "qemu_guest.sh", "vda", expect=127)
    assert "qemu-system-x86_64 is not installed" in said
    assert "export=vda,server.type=unix,server.path=blockd.nbd" in said

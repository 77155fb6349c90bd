"""Names through symbolic links: `..` leads where the kernel says, never to the decoys that text would find.

vms/vm1 -> ../pool/vm1
pool/vm1/d.qcow2  <-  n.qcow2  <-  ../base/m.qcow2  <-  b.raw
vms/base/m.qcow2  the decoy: what `vms/vm1/../base/m.qcow2` is when `..` is taken away as text
"""

import os
from pathlib import Path

import pytest

from blockd.daemon import state_dir
from blockd.daemon.state_dir import StateDir
from blockd.drivers.sharing import files_of
from blockd.protocols.file_status import status_of_name
from tests import qemu_img
from tests.control.running import Running, running

SIZE = 1 << 20


@pytest.fixture
def links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The chain of above, in what is the working folder then."""
    for folder in ("pool/vm1", "pool/base", "vms/base"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "vms" / "vm1").symlink_to("../pool/vm1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pool" / "base" / "b.raw").write_bytes(b"b" * SIZE)
    for name, backing, backing_format in [
        ("pool/base/m.qcow2", "b.raw", "raw"),
        ("pool/vm1/n.qcow2", "../base/m.qcow2", "qcow2"),
        ("pool/vm1/d.qcow2", "n.qcow2", "qcow2"),
    ]:
        qemu_img.create(tmp_path / name, SIZE, backing=Path(backing), backing_format=backing_format)
    qemu_img.create(tmp_path / "vms" / "base" / "m.qcow2", SIZE)
    return tmp_path


def identities(*names: str) -> set[tuple[int, int]]:
    return {status_of_name(name).identity for name in names}


def opened(daemon: Running) -> set[tuple[int, int]]:
    """Which files the daemon has open."""
    nodes = daemon.services.graph.nodes.values()
    return {file.identity() for node in nodes for file in files_of(node)}


CHAIN = ("pool/vm1/d.qcow2", "pool/vm1/n.qcow2", "pool/base/m.qcow2", "pool/base/b.raw")


async def test_restart_finds_the_same_files(links: Path) -> None:
    options = ["--image-paths", "pool", "--state-dir", "st"]
    async with running(links, "--device", "vda=vms/vm1/d.qcow2", *options) as daemon:
        assert opened(daemon) == identities(*CHAIN)
    async with running(links, "--state-dir", "st") as daemon:
        assert opened(daemon) == identities(*CHAIN)


@pytest.mark.parametrize("base", ["vms/vm1/../base/m.qcow2", "../base/m.qcow2", "pool/base/m.qcow2"])
async def test_stream_records_a_name_that_leads_to_its_base(links: Path, base: str) -> None:
    async with running(links, "--device", "vda=vms/vm1/d.qcow2", "--image-paths", "pool") as daemon:
        client = await daemon.qmp()
        await client.command("block_stream", {"device": "vda", "base": base})
        await client.event("BLOCK_STREAM_COMPLETED")
        assert opened(daemon) == identities("pool/vm1/d.qcow2", "pool/base/m.qcow2", "pool/base/b.raw")
    recorded = qemu_img.info(links / "pool" / "vm1" / "d.qcow2")["backing-filename"]
    assert recorded == "../base/m.qcow2"
    assert qemu_img.content(links / "vms" / "vm1" / "d.qcow2") == b"b" * SIZE


async def test_sockets_are_recorded_where_they_are(links: Path) -> None:
    """The server is started again after a move of the working folder: its socket has the same place."""
    options = ["--device", "vda=pool/vm1/n.qcow2", "--image-paths", "pool", "--state-dir", "st"]
    async with running(links, *options) as daemon:
        client = await daemon.qmp()
        await client.command("nbd-server-stop")
        address = {"type": "unix", "data": {"path": "vms/vm1/../nbd"}}
        await client.command("nbd-server-start", {"addr": address})
        assert (links / "pool" / "nbd").is_socket()
    assert not (links / "pool" / "nbd").exists()
    (links / "elsewhere").mkdir()
    os.chdir(links / "elsewhere")
    async with running(links, "--state-dir", "../st"):
        assert (links / "pool" / "nbd").is_socket()


def test_new_state_directory_is_made_durable_in_its_folder(
    links: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[int, int]] = []
    fsync = os.fsync

    def note(fd: int) -> None:
        status = os.fstat(fd)
        synced.append((status.st_dev, status.st_ino))
        fsync(fd)

    monkeypatch.setattr(state_dir.os, "fsync", note)  # type: ignore[attr-defined]
    StateDir.open("vms/vm1/../st").close()
    assert (links / "pool" / "st").is_dir()
    assert identities("pool") <= set(synced)

"""Bad input to a real daemon: one clear error each, nothing lost, and the daemon lives."""

import asyncio
import os
import random
import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from blockd.errors import StorageError
from blockd.protocols.nbd_client import NbdClient
from blockd.units import KIB, MIB
from tests import chains, qemu_img
from tests.chains import Chain
from tests.conftest import StartDaemon
from tests.daemon_process import DaemonProcess
from tests.qmp_client import QmpClient, QmpError

LAYERS = ["ABCDEFGH", "-M0-N---"]
LARGE_COMMAND_LEFT_MAX = 24 * MIB


@dataclass
class Served:
    """A daemon with one disk, and a QMP session with it."""

    daemon: DaemonProcess
    qmp: QmpClient
    chain: Chain

    async def assert_unharmed(self) -> None:
        """The daemon answers, and the disk holds what it held."""
        assert (await self.qmp.command("query-version"))["package"].startswith("blockd")
        async with await NbdClient.connect_unix(str(self.daemon.nbd_path), "vda") as client:
            assert bytes(await client.read(0, client.size)) == self.chain.content

    async def stream(self) -> None:
        """Whatever happened: a stream still works."""
        await self.qmp.command("block_stream", device="vda")
        end = await self.qmp.event("BLOCK_JOB_COMPLETED", device="vda")
        assert "error" not in end, end


@pytest.fixture
async def served(tmp_path: Path, start_daemon: StartDaemon) -> Served:
    chain = chains.make_with_qemu(tmp_path, LAYERS)
    daemon = await start_daemon("--device", f"vda={chain.active}")
    return Served(daemon, await daemon.qmp(), chain)


# -- commands ---------------------------------------------------------------------------------------


def missing(folder: Path) -> Path:
    return folder / "missing.qcow2"


def no_image(folder: Path) -> Path:
    path = folder / "text.qcow2"
    path.write_bytes(b"this is no image\n" * 100)
    return path


def empty(folder: Path) -> Path:
    path = folder / "empty.qcow2"
    path.touch()
    return path


def cut_short(folder: Path) -> Path:
    path = qemu_img.create(folder / "cut.qcow2", MIB)
    os.truncate(path, 100)
    return path


def a_folder(folder: Path) -> Path:
    path = folder / "folder.qcow2"
    path.mkdir()
    return path


def a_fifo(folder: Path) -> Path:
    path = folder / "fifo.qcow2"
    os.mkfifo(path)
    return path


def backing_missing(folder: Path) -> Path:
    base = qemu_img.create(folder / "gone.qcow2", MIB)
    path = qemu_img.create(folder / "orphan.qcow2", MIB, backing=base)
    base.unlink()
    return path


def loop(folder: Path) -> Path:
    first, second = folder / "first.qcow2", folder / "second.qcow2"
    for path, backing in ((first, second), (second, first)):
        link = ("-u", "-b", backing.name, "-F", "qcow2")
        qemu_img.qemu("qemu-img", "create", "-q", "-f", "qcow2", *link, path, "1M")
    return first


def its_own_backing(folder: Path) -> Path:
    path = folder / "self.qcow2"
    link = ("-u", "-b", path.name, "-F", "qcow2")
    qemu_img.qemu("qemu-img", "create", "-q", "-f", "qcow2", *link, path, "1M")
    return path


BAD_IMAGES: dict[Callable[[Path], Path], str] = {
    missing: "No such file",
    no_image: "not a qcow2 image",
    empty: "not a qcow2 image",
    cut_short: "cut short|not a qcow2 image",
    a_folder: "[Ii]s a directory|not a regular file",
    a_fifo: "not a regular file",
    backing_missing: "gone.qcow2",
    loop: "first.qcow2|second.qcow2",
    its_own_backing: "self.qcow2",
}


async def test_bad_images_are_refused_by_name_while_running(served: Served, tmp_path: Path) -> None:
    for make, said in BAD_IMAGES.items():
        folder = tmp_path / make.__name__
        folder.mkdir()
        path = make(folder)
        file = {"driver": "file", "filename": str(path)}

        with pytest.raises(QmpError, match=said):
            await served.qmp.command("blockdev-add", {"driver": "qcow2", "node-name": "bad", "file": file})
        with pytest.raises(QmpError):
            await served.qmp.command("block_switch", device="vda", filename=str(path))
        names = {node["node-name"] for node in await served.qmp.command("query-named-block-nodes")}
        assert "bad" not in names
        await served.assert_unharmed()


async def test_switch_names_the_overlay_whose_backing_is_missing(served: Served, tmp_path: Path) -> None:
    path = backing_missing(tmp_path)

    with pytest.raises(QmpError, match=path.name):
        await served.qmp.command("block_switch", device="vda", filename=str(path))


@pytest.mark.parametrize(
    "make", [missing, no_image, backing_missing, loop], ids=lambda make: getattr(make, "__name__", "")
)
async def test_bad_image_is_refused_by_name_at_the_start(
    tmp_path: Path, make: Callable[[Path], Path]
) -> None:
    path = make(tmp_path)
    daemon = DaemonProcess(tmp_path, "--device", f"vda={path}")
    await daemon.launch()

    assert await daemon.wait() == 1
    assert path.stem in daemon.stderr
    assert "Traceback" not in daemon.stderr
    assert len(daemon.stderr.strip().splitlines()) == 1
    assert not daemon.qmp_path.exists()


REFUSED: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "stream of an unknown device": (
        "block_stream",
        {"device": "nope"},
        "DeviceNotFound",
        "Device 'nope' not found",
    ),
    "status of an unknown device": (
        "block_stream_status",
        {"device": "nope"},
        "DeviceNotFound",
        "Device 'nope' not found",
    ),
    "cancel of an unknown device": (
        "block_stream_cancel",
        {"device": "nope"},
        "DeviceNotFound",
        "Device 'nope' not found",
    ),
    "switch of an unknown device": (
        "block_switch",
        {"device": "nope", "filename": "x"},
        "DeviceNotFound",
        "Device 'nope' not found",
    ),
    "base not in the chain": (
        "block_stream",
        {"device": "vda", "base": "/etc/passwd"},
        "GenericError",
        "Can't find '/etc/passwd' in the backing chain",
    ),
    "empty base": (
        "block_stream",
        {"device": "vda", "base": ""},
        "GenericError",
        "Can't find '' in the backing chain",
    ),
    "nothing to cancel": (
        "block_stream_cancel",
        {"device": "vda"},
        "DeviceNotActive",
        "No active stream on device 'vda'",
    ),
    "negative speed": (
        "block_stream",
        {"device": "vda", "speed": -1},
        "GenericError",
        "Parameter 'speed' expects a non-negative value",
    ),
    "unknown format": (
        "block_switch",
        {"device": "vda", "filename": "/tmp/x", "format": "nonsense"},
        "GenericError",
        "nonsense",
    ),
}


async def test_wrong_commands_are_refused_and_change_nothing(served: Served) -> None:
    before = [path.read_bytes() for path in served.chain.paths]

    for name, (command, arguments, error_class, said) in REFUSED.items():
        with pytest.raises(QmpError) as caught:
            await served.qmp.command(command, arguments)
        assert caught.value.error_class == error_class, name
        assert said in caught.value.description, name
        assert served.qmp.event_names() == [], name
        await served.assert_unharmed()
    assert [path.read_bytes() for path in served.chain.paths] == before


async def test_switch_to_what_is_no_overlay_of_the_active_image(served: Served, tmp_path: Path) -> None:
    other = qemu_img.create(tmp_path / "other.qcow2", len(served.chain.content))
    elsewhere = qemu_img.create(tmp_path / "else.qcow2", len(served.chain.content), backing=other)
    small = tmp_path / "small.qcow2"
    link = ("-u", "-b", served.chain.active, "-F", "qcow2")
    qemu_img.qemu("qemu-img", "create", "-q", "-f", "qcow2", *link, small, str(4 * KIB))

    for path in (other, elsewhere, small, served.chain.active):
        with pytest.raises(QmpError):
            await served.qmp.command("block_switch", device="vda", filename=str(path))
        await served.assert_unharmed()
    await served.stream()


# -- rude clients -----------------------------------------------------------------------------------


async def test_garbage_on_both_sockets_disturbs_nobody(served: Served) -> None:
    rng = random.Random(1)
    await served.qmp.command("block_stream", device="vda", speed=1)  # for ever, until told otherwise
    for socket in (served.daemon.qmp_path, served.daemon.nbd_path):
        for number in range(30):
            reader, writer = await asyncio.open_unix_connection(socket)
            start = rng.choice([b"", b'{"execute": "qmp_capabilities"}', b"IHAVEOPT"])
            writer.write(start + rng.randbytes(rng.choice([1, 100, 5000])))
            if number % 3 == 0:
                writer.write_eof()
                async with asyncio.timeout(100):
                    while await reader.read(65536):
                        pass
            writer.transport.abort()
    await served.assert_unharmed()
    await served.qmp.command("block-job-set-speed", device="vda", speed=0)
    assert "error" not in await served.qmp.event("BLOCK_JOB_COMPLETED", device="vda")
    await served.assert_unharmed()


async def test_client_that_leaves_in_the_middle_of_a_command(served: Served) -> None:
    """After any part of it, or right behind it without waiting for the answer."""
    stream = b'{"execute": "block_stream", "arguments": {"device": "vda", "speed": 1}}'
    switch = b'{"execute": "block_switch", "arguments": {"device": "vda", "filename": "nothing"}}'
    for command in (
        stream[: len(stream) - 1],
        switch,
        b'{"execute": "query-named-block-nodes"}' * 50,
        stream,
    ):
        for length in (*range(1, min(len(command), 60), 7), len(command)):
            client = await served.daemon.qmp()
            await client.send(command[:length])
            await client.close()
        await served.assert_unharmed()
    for job in await served.qmp.command("query-jobs"):
        await served.qmp.command("block-job-set-speed", device=job["id"], speed=0)
        await served.qmp.event("JOB_STATUS_CHANGE", id=job["id"], status="null")
    await served.assert_unharmed()


async def test_guest_that_leaves_in_the_middle_of_a_write(served: Served) -> None:
    """What it had not finished may be there or not; all else is untouched, and the stream goes on."""
    await served.qmp.command("block_stream", device="vda", speed=1)
    size = len(served.chain.content)
    for _ in range(5):
        client = await NbdClient.connect_unix(str(served.daemon.nbd_path), "vda")
        write = asyncio.ensure_future(client.write(0, served.chain.content[: size // 2]))
        await asyncio.sleep(0)
        client._transport.abort()
        with pytest.raises(StorageError):
            await write
    await served.qmp.command("block-job-set-speed", device="vda", speed=0)
    await served.qmp.event("BLOCK_JOB_COMPLETED", device="vda")
    await served.assert_unharmed()


# -- no space -----------------------------------------------------------------------------------------


async def test_file_that_cannot_grow_fails_the_stream_and_nothing_else(served: Served) -> None:
    """A file size limit stands in for a full disk; afterwards there is room and the stream goes through."""
    size_now = served.chain.active.stat().st_size
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.prlimit(served.daemon.pid, resource.RLIMIT_FSIZE, (size_now, hard))
    await served.qmp.command("block_stream", device="vda")
    end = await served.qmp.event("BLOCK_JOB_COMPLETED", device="vda")
    assert "error" in end
    await served.assert_unharmed()
    async with await NbdClient.connect_unix(str(served.daemon.nbd_path), "vda") as client:
        with pytest.raises(StorageError):
            await client.write(0, served.chain.content[: 4 * served.chain.cluster_size])
    await served.assert_unharmed()

    resource.prlimit(served.daemon.pid, resource.RLIMIT_FSIZE, (hard, hard))
    await served.stream()
    await served.assert_unharmed()
    await served.qmp.close()
    assert await served.daemon.stop() == 0
    served.chain.paths[0].unlink()
    qemu_img.assert_sound(served.chain.active)
    assert qemu_img.content(served.chain.active) == served.chain.content


@pytest.mark.slow
async def test_memory_of_a_large_command_goes_back(start_daemon: StartDaemon) -> None:
    """Also if the client says nothing more."""
    daemon = await start_daemon()
    async with await daemon.qmp() as client:
        before = daemon.resident_bytes
        with pytest.raises(QmpError, match="more than 10000 values"):
            await client.command("query-status", {"x": [{}] * 600_000})
        async with asyncio.timeout(60):
            while daemon.resident_bytes > before + LARGE_COMMAND_LEFT_MAX:  # noqa: ASYNC110  (another process)
                await asyncio.sleep(0.05)

"""Image locks: who may open an image beside whom, with QEMU's programs and with blockd itself, both ways."""

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from blockd.block.node import BlockNode
from blockd.block.permissions import CONSISTENT_READ, WRITE
from blockd.drivers import NodeGraph
from blockd.drivers.permissions import Claim
from blockd.errors import RequestError, StorageError
from blockd.protocols import file, image_lock
from blockd.protocols.file import FileNode
from blockd.protocols.image_lock import NO_CLAIM, LockMode, change_claim, claim_for
from blockd.protocols.new_file import new_file
from blockd.units import MIB
from tests import qemu_img
from tests.conftest import StartDaemon
from tests.control.running import WAIT_S, refusal, running
from tests.locks.holders import HOLDERS, Hold
from tests.loop_device import can_loop, loop_device
from tests.qmp_client import QmpError

FORMATS = ("qcow2", "raw")
WRITE_LOCK = r'Failed to get (shared )?"write" lock'


@pytest.fixture(params=FORMATS)
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / f"disk.{request.param}"
    qemu_img.qemu("qemu-img", "create", "-q", "-f", request.param, path, "1M")
    return path


def format_of(path: Path) -> str:
    return path.suffix[1:]


@asynccontextmanager
async def opened(path: Path, *, read_only: bool, **told: object) -> AsyncIterator[BlockNode]:
    """The image open in this process, and used as an export does."""
    graph = NodeGraph()
    file = {
        "driver": "file",
        "filename": str(path),
        **({"locking": told.pop("locking")} if "locking" in told else {}),
    }
    options = {"driver": format_of(path), "node-name": "image", "read-only": read_only, "file": file, **told}
    try:
        node = await graph.open(options)
        await used(graph, node, read_only=read_only)
        yield node
    finally:
        await graph.close()


async def used(graph: NodeGraph, node: BlockNode, *, read_only: bool) -> Claim:
    claim = Claim(node, CONSISTENT_READ if read_only else CONSISTENT_READ | WRITE)
    await graph.nodes.locks.take(graph.permissions.require(claim))
    graph.permissions.claim(claim)
    return claim


def run(*command: str | Path) -> tuple[int, str]:
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=qemu_img.TIMEOUT_S, check=False)
    return done.returncode, done.stdout + done.stderr


async def test_who_ends_a_moment_later_is_waited_for(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the process that copied for a daemon which was killed."""
    with ExitStack() as holder:
        fd = os.open(image, os.O_RDWR)
        holder.callback(os.close, fd)
        change_claim(fd, "holder", NO_CLAIM, claim_for(LockMode.USUAL, read_only=False))

        def refused_once(*arguments: Any) -> None:
            try:
                change_claim(*arguments)
            except RequestError:
                holder.close()
                raise

        monkeypatch.setattr("blockd.protocols.used_file.change_claim", refused_once)
        async with opened(image, read_only=False) as free:
            assert free.size == MIB


# -- another program has it -------------------------------------------------------------------------


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
async def test_image_that_another_program_writes_is_refused(image: Path, hold: Hold) -> None:
    with hold(image, format_of(image), False):
        for read_only in (False, True):
            with pytest.raises(RequestError, match=WRITE_LOCK) as caught:
                async with opened(image, read_only=read_only):
                    pass
            assert f"Is another process using the image [{image}]?" in caught.value.message
        async with opened(image, read_only=True, **{"force-share": True}) as shared:
            assert shared.size == MIB
        async with opened(image, read_only=False, locking="off") as unlocked:
            assert unlocked.size == MIB
    async with opened(image, read_only=False) as free:
        assert free.size == MIB


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
async def test_image_that_another_program_reads_can_be_read_too(image: Path, hold: Hold) -> None:
    with hold(image, format_of(image), True):
        async with opened(image, read_only=True) as shared:
            assert shared.size == MIB
        if format_of(image) == "qcow2":  # QEMU lets others write to a raw image that it only reads
            with pytest.raises(RequestError, match=WRITE_LOCK):
                async with opened(image, read_only=False):
                    pass


@pytest.mark.parametrize("hold", [HOLDERS[name] for name in ("qemu-io", "qemu-nbd", "a second blockd")])
async def test_block_device_is_locked_like_a_file(
    tmp_path: Path, hold: Hold, record_property: Callable[[str, object], None]
) -> None:
    """Tried where block devices can be made; the report says so."""
    with_device = can_loop(tmp_path)
    record_property("with_block_device", with_device)
    content = tmp_path / "disk.raw"
    content.write_bytes(bytes(MIB))
    path = tmp_path / "disk"
    with loop_device(content) if with_device else nullcontext(content) as device:
        path.symlink_to(device)
        options = {
            "driver": "host_device" if with_device else "file",
            "node-name": "disk",
            "filename": str(path),
        }
        with hold(path, "raw", False):
            for read_only in (False, True):
                graph = NodeGraph()
                node = await graph.open(options | {"read-only": read_only})
                with pytest.raises(RequestError, match=WRITE_LOCK):
                    await used(graph, node, read_only=read_only)
                await graph.close()
        graph = NodeGraph()
        await used(graph, await graph.open(options), read_only=False)
        with pytest.raises(AssertionError, match=WRITE_LOCK), hold(path, "raw", False):
            pass
        await graph.close()
        with hold(path, "raw", False):
            pass


# -- blockd has it ----------------------------------------------------------------------------------


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
async def test_image_that_blockd_writes_is_refused_to_another_program(image: Path, hold: Hold) -> None:
    async with opened(image, read_only=False):
        for read_only in (False, True) if format_of(image) == "qcow2" else (False,):
            with pytest.raises(AssertionError, match=WRITE_LOCK), hold(image, format_of(image), read_only):
                pass
    with hold(image, format_of(image), False):
        pass


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
async def test_image_that_blockd_reads_can_be_read_by_another_program(image: Path, hold: Hold) -> None:
    async with opened(image, read_only=True):
        with hold(image, format_of(image), True):
            pass
        with (
            pytest.raises(AssertionError, match='Failed to get "write" lock'),
            hold(image, format_of(image), False),
        ):
            pass


async def test_force_share_and_no_locking_keep_nobody_out(image: Path) -> None:
    for told in ({"force-share": True, "read_only": True}, {"locking": "off", "read_only": False}):
        async with opened(image, **told):
            qemu_img.write(image, "write 0 64k", image_format=format_of(image))


async def test_force_share_is_for_readers(image: Path) -> None:
    with pytest.raises(RequestError, match="force-share=on can only be used with read-only images"):
        async with opened(image, read_only=False, **{"force-share": True}):
            pass


async def test_shared_base_is_shared_and_kept_from_writers(tmp_path: Path) -> None:
    base = qemu_img.create(tmp_path / "base.qcow2", MIB)
    one, other = (qemu_img.create(tmp_path / f"{name}.qcow2", MIB, backing=base) for name in ("one", "other"))
    async with opened(one, read_only=False):
        qemu_img.write(other, "write 0 64k")
        async with opened(other, read_only=False):
            status, said = run("qemu-io", "-f", "qcow2", "-c", "write 0 64k", base)
            assert status and 'Failed to get "write" lock' in said


async def test_force_share_of_a_chain_is_for_all_of_it(tmp_path: Path) -> None:
    base = qemu_img.create(tmp_path / "base.qcow2", MIB)
    overlay = qemu_img.create(tmp_path / "top.qcow2", MIB, backing=base)
    async with opened(overlay, read_only=True, **{"force-share": True}):
        qemu_img.write(base, "write 0 64k")


async def test_what_another_node_of_the_daemon_uses_is_told_by_its_name(image: Path) -> None:
    graph = NodeGraph()
    file = {"driver": "file", "filename": str(image)}
    first, second = [await graph.open({**file, "node-name": name}) for name in ("first", "second")]
    await used(graph, first, read_only=False)
    for read_only in (False, True):
        with pytest.raises(
            RequestError, match="Failed to get \"write\" lock: the file is in use by node 'first'"
        ):
            await used(graph, second, read_only=read_only)
    await graph.close()


async def test_new_file_is_locked_while_it_is_made(tmp_path: Path) -> None:
    path = tmp_path / "new.raw"
    async with new_file(str(path)) as file:
        file.truncate_blocking(MIB)
        status, said = run("qemu-io", "-f", "raw", "-c", "write 0 64k", path)
        assert status and 'Failed to get "write" lock' in said
    qemu_img.write(path, "write 0 64k", image_format="raw")


def test_bytes_are_those_that_qemu_locks(tmp_path: Path) -> None:
    """A map of the file's bytes as the kernel has them, the same for both."""
    path = qemu_img.create(tmp_path / "disk.qcow2", MIB)

    def locked() -> set[tuple[str, int]]:
        found = set()
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()
            if words[1] == "OFDLCK" and words[5].endswith(f":{path.stat().st_ino}"):
                found |= {(words[3], byte) for byte in range(int(words[6]), int(words[7]) + 1)}
        return found

    for read_only in (False, True):
        with HOLDERS["qemu-io"](path, "qcow2", read_only):
            by_qemu = locked()
        with HOLDERS["a second blockd"](path, "qcow2", read_only):
            assert locked() == by_qemu != set()


# -- without a gap ----------------------------------------------------------------------------------


class Stranger:
    """Tries to get in as a writer around every step that locks, unlocks or replaces a descriptor."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._path = path
        self.tries = self.successes = 0
        self._is_trying = False
        for owner, name in ((image_lock, "_fcntl"), (os, "dup2"), (os, "close")):
            monkeypatch.setattr(owner, name, self._around(getattr(owner, name)))

    def _around(self, step: Callable[..., object]) -> Callable[..., object]:
        def stepped(*args: object, **kwargs: object) -> object:
            self._try()
            try:
                return step(*args, **kwargs)
            finally:
                self._try()

        return stepped

    def _try(self) -> None:
        if self._is_trying:
            return
        self._is_trying = True
        fd = os.open(self._path, os.O_RDWR)
        try:
            self.tries += 1
            change_claim(fd, "stranger", NO_CLAIM, claim_for(LockMode.USUAL, read_only=False))
            self.successes += 1
        except RequestError:
            pass
        finally:
            os.close(fd)
            self._is_trying = False


async def test_reopening_moves_the_lock_without_a_gap(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = await FileNode.open(str(image), node_name="file", read_only=False)
    stranger = Stranger(image, monkeypatch)
    for read_only in (True, False, True):
        await file.reopen(read_only=read_only)
    assert stranger.tries > 20
    assert stranger.successes == 0
    monkeypatch.undo()
    async with opened(image, read_only=True):  # it is a reader's lock now
        pass
    await file.close()


async def test_reader_that_cannot_become_a_writer_stays_a_reader(image: Path) -> None:
    file = await FileNode.open(str(image), node_name="file", read_only=True)
    async with opened(image, read_only=True):
        with pytest.raises(RequestError, match='Failed to get "write" lock'):
            await file.reopen(read_only=False)
        assert file.read_only
        async with opened(image, read_only=True):
            pass
    await file.reopen(read_only=False)
    await file.write(0, b"x" * 512)
    with pytest.raises(RequestError, match=WRITE_LOCK):
        async with opened(image, read_only=True):
            pass
    await file.close()


async def test_who_looks_at_an_image_does_not_keep_it_read_only_when_a_switch_is_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not locked for writing then, for a moment; its guest is to go on writing."""
    image = qemu_img.create(tmp_path / "disk.qcow2", MIB)
    overlay = qemu_img.create(tmp_path / "over.qcow2", MIB, backing=image)
    async with running(tmp_path, "--device", f"vda={image}") as daemon:
        client, guest, other = await daemon.qmp(), await daemon.guest("vda"), NodeGraph()
        loop, is_refused = asyncio.get_running_loop(), asyncio.Event()

        async def fail() -> None:
            await other.open_image(str(image), "qcow2", read_only=True)
            raise StorageError("the journal cannot be written")

        def change(*arguments: Any) -> None:
            try:
                change_claim(*arguments)
            except RequestError:
                loop.call_soon_threadsafe(is_refused.set)
                raise

        monkeypatch.setattr(image_lock, "PATIENCE_S", WAIT_S)
        monkeypatch.setattr(file, "change_claim", change)
        daemon.services.devices.record = fail
        switching = asyncio.create_task(refusal(client, "block_switch", device="vda", filename=str(overlay)))
        await is_refused.wait()
        await other.close()
        assert (await switching)[1] == "the journal cannot be written"
        await guest.write(0, b"guest")
        await guest.flush()


async def test_switch_and_reopen_move_the_locks(tmp_path: Path, start_daemon: StartDaemon) -> None:
    base = qemu_img.create(tmp_path / "base.qcow2", MIB)
    overlay = qemu_img.create(tmp_path / "overlay.qcow2", MIB, backing=base)
    daemon = await start_daemon("--device", f"vda={base}")
    qmp = await daemon.qmp()

    def may(*access: str) -> dict[str, bool]:
        return {
            path.name: run("qemu-io", *access, "-f", "qcow2", "-c", "read 0 512", path)[0] == 0
            for path in (base, overlay)
        }

    # QEMU makes an overlay of an image in use, and so does blockctl.
    qemu_img.create(overlay, MIB, backing=base)
    assert may("-r") == {"base.qcow2": False, "overlay.qcow2": False}  # the base is its backing
    await qmp.command("block_switch", device="vda", filename=str(overlay))
    assert may() == {"base.qcow2": False, "overlay.qcow2": False}
    assert may("-r") == {"base.qcow2": True, "overlay.qcow2": False}
    with pytest.raises(QmpError, match="lock"):
        await qmp.command("block_switch", device="vda", filename=str(overlay))
    await qmp.command("block_stream", device="vda")
    await qmp.event("BLOCK_JOB_COMPLETED", device="vda")
    assert may() == {"base.qcow2": True, "overlay.qcow2": False}


async def test_daemon_that_is_killed_leaves_no_lock(image: Path, start_daemon: StartDaemon) -> None:
    daemon = await start_daemon("--device", f"vda={image}")
    await daemon.kill()
    qemu_img.write(image, "write 0 64k", image_format=format_of(image))

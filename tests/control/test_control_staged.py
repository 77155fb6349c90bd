"""Streams that end while guest writes are staged: nothing is lost unless a client says so."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from blockd.devices import draining, streams
from blockd.errors import StorageError
from blockd.formats.qcow2.image import Qcow2Image
from blockd.protocols.nbd_client import NbdClient
from tests import qemu_img
from tests.chains import Chain, make
from tests.control.running import Running, refusal, running, until
from tests.qmp_client import QmpClient
from tests.slow_source import (
    CLUSTER,
    LAYERS,
    STAGED_LENGTH,
    options,
    read_parts,
    speed_up,
    with_parts,
    write_parts,
)

FULL = StorageError("Could not write 'disk': No space left on device", errno=28)


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MERGE_WAIT_S", 0.05)
    monkeypatch.setattr(draining, "RETRY_S", 0.001)


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> list[StorageError]:
    """While it holds an error, nothing can be copied into an image."""
    errors = [FULL]
    fill = Qcow2Image.fill

    async def failing(image: Qcow2Image, *arguments: Any, **options: Any) -> object:
        if errors:
            raise errors[0]
        return await fill(image, *arguments, **options)

    monkeypatch.setattr(Qcow2Image, "fill", failing)
    return errors


class Scene:
    """A daemon, an operator, two guests, and a part of a cluster that one of them has written."""

    def __init__(self, daemon: Running, qmp: QmpClient, chain: Chain, guests: list[NbdClient]) -> None:
        self.daemon = daemon
        self.qmp = qmp
        self.chain = chain
        self.guests = guests

    async def status(self) -> dict[str, Any]:
        [found] = await self.qmp.command("block_stream_status")
        return dict(found)

    async def all_is_there(self) -> None:
        """The filter goes by itself; what was written is found, and another stream completes."""
        await until(lambda: not list(self.daemon.services.streams))
        assert await self.qmp.command("block_stream_status") == []
        assert bytes(await self.guests[0].read(0, self.guests[0].size)) == with_parts(self.chain)
        for guest in self.guests:
            await guest.flush()


@asynccontextmanager
async def cancelled_stream(folder: Path) -> AsyncIterator[Scene]:
    """The stream of a disk is cancelled just after a guest has written a part of a cluster."""
    chain = await make(folder, LAYERS, base_format="raw")
    async with running(folder, *options(chain)) as daemon:
        qmp = await daemon.qmp()
        guests = [await daemon.guest("vda") for _ in range(2)]
        await guests[0].read(0, CLUSTER)  # what the limit allows at once
        await qmp.command("block_stream", {"device": "vda", "on-error": "stop"})
        await write_parts(guests[0])
        await qmp.command("block_stream_cancel", device="vda")
        await qmp.event("BLOCK_JOB_CANCELLED")
        yield Scene(daemon, qmp, chain, guests)
    qemu_img.assert_sound(chain.active)


async def test_a_slow_source_keeps_neither_the_cancel_waiting_nor_the_writes_from_the_image(
    tmp_path: Path,
) -> None:
    async with cancelled_stream(tmp_path) as scene:
        status = await scene.status()
        assert (status["status"], status["staged"], status["io-status"]) == ("concluded", STAGED_LENGTH, "ok")
        assert "staged-error" not in status
        await read_parts(scene.guests[1])
        error_class, text = await refusal(scene.qmp, "block_switch", device="vda", filename="x.qcow2")
        assert (error_class, "are staged until they can be merged" in text) == ("GenericError", True)
        await speed_up(scene.qmp)
        await scene.all_is_there()


async def test_a_full_target_is_told_and_merged_when_there_is_space(
    tmp_path: Path, full: list[StorageError]
) -> None:
    async with cancelled_stream(tmp_path) as scene:
        [inserted] = scene.daemon.services.streams
        await until(lambda: inserted.front.staging_error is FULL)
        status = await scene.status()
        assert (status["staged"], status["io-status"]) == (STAGED_LENGTH, "nospace")
        assert status["staged-error"] == FULL.message
        for guest in [*scene.guests, *scene.guests]:
            with pytest.raises(StorageError):
                await guest.flush()
            await read_parts(guest)
        await speed_up(scene.qmp)
        full.clear()
        await scene.all_is_there()


async def test_what_is_given_up_is_told_to_every_connection(tmp_path: Path, full: list[StorageError]) -> None:
    async with cancelled_stream(tmp_path) as scene:
        [inserted] = scene.daemon.services.streams
        await until(lambda: inserted.front.staging_error is FULL)
        _, text = await refusal(scene.qmp, "block_stream_cancel", device="vda")
        assert f"would be lost: {STAGED_LENGTH} bytes" in text
        assert FULL.message in text
        await scene.qmp.command("block_stream_cancel", device="vda", force=True)
        lost = await scene.qmp.event("BLOCK_WRITES_LOST")
        why = f"given up: {FULL.message}"
        assert lost == {"device": "vda", "node-name": "disk", "len": STAGED_LENGTH, "error": why}
        assert await scene.qmp.command("query-lost-writes") == [
            {"device": "vda", "node-name": "disk", "error": why}
        ]
        scene.guests.append(await scene.daemon.guest("vda"))
        await speed_up(scene.qmp)
        for guest in scene.guests:
            await guest.read(0, 512)
            with pytest.raises(StorageError):
                await guest.flush()
            await guest.flush()
        await scene.qmp.command("acknowledge-lost-writes", device="vda")
        assert await scene.qmp.command("query-lost-writes") == []
        _, text = await refusal(scene.qmp, "acknowledge-lost-writes", node_name="disk")
        assert text == "Node 'disk' has lost no acknowledged writes"
        content = bytes(await scene.guests[0].read(0, scene.guests[0].size))
        assert content == scene.chain.content
        await until(lambda: not list(scene.daemon.services.streams))


async def test_another_stream_takes_over_what_is_staged(tmp_path: Path) -> None:
    async with cancelled_stream(tmp_path) as scene:
        front = next(iter(scene.daemon.services.streams)).front
        await scene.qmp.command("block_stream", {"device": "vda"})
        [stream] = scene.daemon.services.streams.running
        assert stream.front is front
        assert 0 < (await scene.status())["staged"] <= STAGED_LENGTH
        await write_parts(scene.guests[1])
        await speed_up(scene.qmp)
        await scene.qmp.event("BLOCK_JOB_COMPLETED")
        await scene.all_is_there()


async def test_user_of_a_filter_that_stays_goes_on_below_it(tmp_path: Path) -> None:
    async with cancelled_stream(tmp_path) as scene:
        front = next(iter(scene.daemon.services.streams)).front
        export = {"type": "nbd", "id": "f", "name": "f", "node-name": front.node_name}
        await scene.qmp.command("block-export-add", export)
        guest = await scene.daemon.guest("f")
        await scene.qmp.command("block_stream", {"device": "vda"})
        await speed_up(scene.qmp)
        await scene.qmp.event("BLOCK_JOB_COMPLETED")
        await scene.all_is_there()
        assert bytes(await guest.read(0, guest.size)) == with_parts(scene.chain)
        active = scene.daemon.services.devices.get("vda").active.node_name
        exports = await scene.qmp.command("query-block-exports")
        assert {one["id"]: one["node-name"] for one in exports} == {"f": active, "e": active}
        await scene.qmp.command("block-export-del", id="f", mode="hard")

"""Writes staged for a slow source: a stop neither loses them nor waits for them."""

import asyncio
import shutil
import signal
import time
from pathlib import Path

import pytest

from blockd.daemon import settling
from blockd.errors import StorageError
from blockd.protocols.nbd_client import NbdClient
from tests import qemu_img
from tests.chains import Chain, make
from tests.conftest import StartDaemon
from tests.qmp_client import QmpClient
from tests.slow_source import (
    CLUSTER,
    LAYERS,
    OFFSETS,
    STAGED_LENGTH,
    options,
    read_parts,
    speed_up,
    with_parts,
    write_parts,
)
from tests.state.restarts import Restarts

PROGRAM = [str(Path(__file__).with_name("staged_daemon.py"))]
# What else a stop takes, on a loaded machine.
STOP_MAX_S = 20.0
STEP_COUNT_MAX = 40


async def disk(folder: Path) -> tuple[Chain, Restarts]:
    folder.mkdir(exist_ok=True)
    chain = await make(folder, LAYERS, base_format="raw")
    return chain, Restarts(folder, *options(chain), program=PROGRAM)


async def staged(guest: NbdClient, client: QmpClient) -> None:
    """A stream waits for its source, and a guest has written a part of a cluster."""
    await guest.read(0, CLUSTER)  # what the limit allows at once
    await client.command("block_stream", {"device": "vda"})
    await write_parts(guest)


async def stopped_with_staged_writes(daemon: Restarts, *, cancelled: bool = False) -> None:
    client = await daemon.run()
    async with await daemon.guest() as guest:
        await staged(guest, client)
        if cancelled:
            await client.command("block_stream_cancel", device="vda")
            await client.event("BLOCK_JOB_CANCELLED")
    began = time.monotonic()
    assert await daemon.stop() == 0
    assert time.monotonic() - began < STOP_MAX_S
    daemon.be_alone()


def kept_files(folder: Path) -> list[Path]:
    return list((folder / "state").glob("staged*"))


# -- with a state directory --------------------------------------------------------------------


async def test_another_image_under_the_same_name_gets_none_of_them(tmp_path: Path) -> None:
    chain, daemon = await disk(tmp_path)
    await stopped_with_staged_writes(daemon)
    right = chain.active.rename(tmp_path / "right.qcow2")
    qemu_img.create(chain.active, len(chain.content), backing=chain.paths[0], backing_format="raw")
    client = await daemon.run()
    [reason] = [
        str(thing["reason"]) for thing in await client.command("query-left-out") if thing["type"] == "node"
    ]
    assert "is another file than that for which guest writes are kept in" in reason
    assert await client.command("query-lost-writes") == []
    assert await daemon.stop() == 0
    daemon.be_alone()
    assert len(kept_files(tmp_path)) == 1
    right.rename(chain.active)
    client = await daemon.run()
    assert await client.command("query-left-out") == []
    await speed_up(client)
    await client.event("BLOCK_JOB_COMPLETED")
    assert await daemon.content() == with_parts(chain)
    assert await daemon.stop() == 0


async def test_a_stop_keeps_them_and_the_stream_goes_on_with_them(tmp_path: Path) -> None:
    chain, daemon = await disk(tmp_path)
    await stopped_with_staged_writes(daemon)
    assert len(kept_files(tmp_path)) == 1
    client = await daemon.run()
    async with await daemon.guest() as guest:
        await read_parts(guest)
        await speed_up(client)
        await guest.flush()
    await client.event("BLOCK_JOB_COMPLETED")
    assert await daemon.content() == with_parts(chain)
    assert await daemon.stop() == 0
    assert kept_files(tmp_path) == []
    qemu_img.assert_sound(chain.active)


async def test_those_of_a_cancelled_stream_are_kept_too_through_several_stops(tmp_path: Path) -> None:
    chain, daemon = await disk(tmp_path)
    await stopped_with_staged_writes(daemon, cancelled=True)
    for _ in range(2):
        await daemon.run()
        async with await daemon.guest() as guest:
            await read_parts(guest)
        assert await daemon.stop() == 0
        assert len(kept_files(tmp_path)) == 1
    client = await daemon.run()
    [status] = await client.command("block_stream_status")
    assert 0 < status["staged"] < STAGED_LENGTH
    await speed_up(client)
    while await client.command("block_stream_status"):  # noqa: ASYNC110  (the daemon tells nobody)
        await asyncio.sleep(0.01)
    while kept_files(tmp_path):  # noqa: ASYNC110  (it goes a moment later, when the journal names it no more)
        await asyncio.sleep(0.01)
    await daemon.kill()
    await daemon.run()
    assert await daemon.content() == with_parts(chain)
    assert await daemon.stop() == 0


async def test_a_kill_of_the_next_run_loses_nothing(tmp_path: Path) -> None:
    chain, daemon = await disk(tmp_path)
    await stopped_with_staged_writes(daemon)
    for _ in range(2):
        await daemon.run()
        await daemon.kill()
    client = await daemon.run()
    await speed_up(client)
    await client.event("BLOCK_JOB_COMPLETED")
    assert await daemon.content() == with_parts(chain)
    assert await daemon.stop() == 0


@pytest.mark.parametrize("what", ["the part", "the cluster", "discard"])
async def test_they_never_come_back_over_what_is_newer(tmp_path: Path, what: str) -> None:
    """The next run is killed when something newer is durable, and before its journal says so."""
    chain, daemon = await disk(tmp_path)
    await stopped_with_staged_writes(daemon)
    before = shutil.copytree(tmp_path / "state", tmp_path / "state before")
    content = bytearray(with_parts(chain))
    client = await daemon.run()
    async with await daemon.guest() as guest:
        start = OFFSETS[0] // CLUSTER * CLUSTER
        match what:
            case "the part":
                await guest.write(OFFSETS[0], b"newer")
                content[OFFSETS[0] : OFFSETS[0] + 5] = b"newer"
            case "the cluster":
                await guest.write(start, b"n" * CLUSTER)
                content[start : start + CLUSTER] = b"n" * CLUSTER
            case _:
                await guest.trim(start, CLUSTER)
                content[start : start + CLUSTER] = bytes(CLUSTER)
        await speed_up(client)
        await guest.flush()
    await daemon.kill()
    shutil.rmtree(tmp_path / "state")
    before.rename(tmp_path / "state")
    client = await daemon.run()
    await speed_up(client)
    assert await daemon.content() == content
    assert await daemon.stop() == 0


async def test_a_file_that_is_damaged_is_a_loss_that_flushes_tell_until_it_is_acknowledged(
    tmp_path: Path,
) -> None:
    chain, daemon = await disk(tmp_path)
    await stopped_with_staged_writes(daemon)
    [file] = kept_files(tmp_path)
    file.write_bytes(file.read_bytes()[:-1])
    await daemon.run()
    assert f"'{file.name}' is damaged" in daemon.stderr
    assert await daemon.stop() == 0  # nobody was there to be told
    client = await daemon.run()
    async with await daemon.guest() as guest, await daemon.guest() as other:
        await speed_up(client)
        for each in (guest, other):
            with pytest.raises(StorageError):
                await each.flush()
            await each.flush()
    assert await daemon.content() == chain.content
    assert await daemon.stop() == 0
    client = await daemon.run()
    [loss] = await client.command("query-lost-writes")
    assert (loss["device"], loss["node-name"]) == ("vda", "disk")
    await client.command("acknowledge-lost-writes", {"device": "vda"})
    assert daemon.journal["lost-writes"] == []
    async with await daemon.guest() as guest:
        await guest.flush()
    assert await daemon.stop() == 0


async def test_kill_at_every_step_of_keeping_them(tmp_path: Path) -> None:
    """They are there again or they are not, as after any kill without a flush; once kept, they are."""
    found = []
    for step in range(1, STEP_COUNT_MAX):
        folder = tmp_path / str(step)
        chain, daemon = await disk(folder)
        client = await daemon.run()
        async with await daemon.guest() as guest:
            await staged(guest, client)
            (folder / "crash-at").write_text(str(step))
            is_killed = await daemon.stop() == -signal.SIGKILL
        (folder / "crash-at").unlink()
        client = await daemon.run()
        await speed_up(client)
        content = await daemon.content()
        assert content in (chain.content, with_parts(chain)), step
        found.append(content == with_parts(chain))
        assert await daemon.stop() == 0
        qemu_img.assert_sound(chain.active)
        if not is_killed:
            break
    assert found == sorted(found)  # the later, the safer
    assert set(found) == {False, True}


# -- without one -------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["stop", "cancel and stop"])
async def test_without_a_state_directory_a_stop_is_bounded_and_tells_the_loss(
    tmp_path: Path, start_daemon: StartDaemon, end: str
) -> None:
    chain = await make(tmp_path, LAYERS, base_format="raw")
    daemon = await start_daemon(*options(chain))
    client = await daemon.qmp()
    async with await NbdClient.connect_unix(str(daemon.nbd_path), "vda") as guest:
        await staged(guest, client)
        flush = asyncio.ensure_future(guest.flush())
        if end != "stop":
            await client.command("block_stream_cancel", device="vda")
            await client.event("BLOCK_JOB_CANCELLED")
        began = time.monotonic()
        daemon.process.terminate()
        with pytest.raises(StorageError):
            await flush
        lost = await client.event("BLOCK_WRITES_LOST")
        assert lost["device"] == "vda"
        assert 0 < lost["len"] <= STAGED_LENGTH
        assert await daemon.wait() == 1
        assert time.monotonic() - began < settling.MERGE_LIMIT_S + STOP_MAX_S
    assert "acknowledged writes are lost" in daemon.stderr
    qemu_img.assert_sound(chain.active)


async def test_what_can_be_merged_in_time_is(tmp_path: Path, start_daemon: StartDaemon) -> None:
    chain = await make(tmp_path, LAYERS, base_format="raw")
    daemon = await start_daemon(*options(chain))
    client = await daemon.qmp()
    async with await NbdClient.connect_unix(str(daemon.nbd_path), "vda") as guest:
        await staged(guest, client)
        daemon.process.terminate()
        await client.event("BLOCK_JOB_CANCELLED")
        await speed_up(client)
        assert await daemon.wait() == 0
    assert "acknowledged writes are lost" not in daemon.stderr
    assert qemu_img.content(chain.active) == with_parts(chain)

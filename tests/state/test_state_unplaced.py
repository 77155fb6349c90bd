"""What an earlier run has kept of a disk, or knows to be lost of it, while the disk itself is not there."""

import asyncio
import json
import signal
from pathlib import Path

import pytest

from blockd.errors import StorageError
from tests.chains import Chain, make
from tests.qmp_client import QmpClient
from tests.slow_source import (
    CLUSTER,
    LAYERS,
    OFFSETS,
    PART,
    STAGED_LENGTH,
    options,
    speed_up,
    with_parts,
    write_parts,
)
from tests.state.restarts import Restarts
from tests.state.test_state_staged import disk, kept_files, stopped_with_staged_writes

pytestmark = pytest.mark.slow

# Of the stop: around the moment when the new file counts and the old one goes.
STEPS = range(8, 12)
LOST = "acknowledged writes are lost"


def take_away(chain: Chain) -> Path:
    """Have the disk left out: its base is missing."""
    return chain.paths[0].rename(chain.paths[0].with_suffix(".away"))


async def run_without_it(daemon: Restarts) -> None:
    """Runs of which the journal is written again, though not with the disk."""
    for _ in range(2):
        client = await daemon.run()
        assert "disk" in [thing["name"] for thing in await client.command("query-left-out")]
        await client.command("object-add", {"qom-type": "throttle-group", "id": "t"})
        await client.command("object-del", id="t")
        assert await daemon.stop() == 0


async def lose_what_is_kept(daemon: Restarts) -> QmpClient:
    [file] = kept_files(daemon.folder)
    file.unlink()
    return await daemon.run()


async def add_disk(client: QmpClient, chain: Chain) -> None:
    """Make a disk under the names of the one that is left out."""
    arguments = options(chain)
    for option, value in zip(arguments[::2], arguments[1::2], strict=True):
        command = {"--blockdev": "blockdev-add", "--export": "block-export-add"}.get(option)
        if command is not None:
            await client.command(command, json.loads(value))


async def assert_told(daemon: Restarts) -> None:
    async with await daemon.guest() as guest:
        with pytest.raises(StorageError, match=LOST):
            await guest.flush()
        await guest.flush()


async def test_staged_writes_come_back_with_the_disk(tmp_path: Path) -> None:
    chain, daemon = await disk(tmp_path)
    await stopped_with_staged_writes(daemon, cancelled=True)
    away = take_away(chain)
    await run_without_it(daemon)
    away.rename(chain.paths[0])
    client = await daemon.run()
    await speed_up(client)
    assert await daemon.content() == with_parts(chain)
    assert await daemon.stop() == 0


async def test_a_loss_is_told_when_the_disk_is_back(tmp_path: Path) -> None:
    chain, daemon = await disk(tmp_path)
    await stopped_with_staged_writes(daemon, cancelled=True)
    await lose_what_is_kept(daemon)
    assert await daemon.stop() == 0  # nobody was there to be told
    away = take_away(chain)
    await run_without_it(daemon)
    away.rename(chain.paths[0])
    await daemon.run()
    await assert_told(daemon)
    assert await daemon.stop() == 0


async def test_another_disk_of_that_name_gets_none_of_it(tmp_path: Path) -> None:
    chain, daemon = await disk(tmp_path)
    await stopped_with_staged_writes(daemon, cancelled=True)
    take_away(chain)
    (tmp_path / "other").mkdir()
    other = await make(tmp_path / "other", LAYERS, base_format="raw")
    client = await daemon.run()
    await add_disk(client, other)
    lost = await client.event("BLOCK_WRITES_LOST")
    assert (lost["device"], lost["node-name"], lost["len"]) == ("", "disk", len(OFFSETS) * len(PART))
    async with await daemon.guest() as guest:
        await guest.flush()  # of another disk's loss
    assert await daemon.stop() == 0
    client = await daemon.run()
    await speed_up(client)
    assert await daemon.content() == other.content
    assert await daemon.stop() == 0


async def test_the_same_disk_made_anew_has_lost_it_and_says_so(tmp_path: Path) -> None:
    chain, daemon = await disk(tmp_path)
    await stopped_with_staged_writes(daemon, cancelled=True)
    away = take_away(chain)
    client = await daemon.run()
    away.rename(chain.paths[0])
    await add_disk(client, chain)
    assert (await client.event("BLOCK_WRITES_LOST"))["node-name"] == "disk"
    assert kept_files(tmp_path) == []
    await assert_told(daemon)
    assert await daemon.stop() == 0


async def test_a_loss_outlives_the_export_of_a_disk_without_a_device_name(tmp_path: Path) -> None:
    chain, daemon = await disk(tmp_path)
    at = daemon.arguments.index("--device")
    del daemon.arguments[at : at + 2]
    client = await daemon.run()
    async with await daemon.guest() as guest:
        await guest.read(0, CLUSTER)  # what the limit allows at once
        await client.command("block-stream", {"job-id": "j", "device": "disk"})
        await write_parts(guest)
        await client.command("block-job-cancel", device="j")
        await client.event("BLOCK_JOB_CANCELLED")
    assert await daemon.stop() == 0
    daemon.be_alone()
    client = await lose_what_is_kept(daemon)
    export = json.loads(options(chain)[-1])
    await client.command("block-export-del", id=export["id"])
    for _ in range(2):
        assert [record["node"] for record in daemon.journal["lost-writes"]] == ["disk"]
        assert await daemon.stop() == 0
        client = await daemon.run()
    await client.command("block-export-add", export)
    [loss] = await client.command("query-lost-writes")
    assert (loss["device"], loss["node-name"]) == ("", "disk")
    await assert_told(daemon)
    assert await daemon.stop() == 0


async def test_kill_when_what_is_left_of_it_is_kept_loses_none_of_it(tmp_path: Path) -> None:
    """What one run has kept, the next has merged in part, and keeps the rest."""
    found = []
    for step in STEPS:
        folder = tmp_path / str(step)
        chain, daemon = await disk(folder)
        await stopped_with_staged_writes(daemon, cancelled=True)
        client = await daemon.run()
        while (await client.command("block_stream_status"))[0]["staged"] == STAGED_LENGTH:  # noqa: ASYNC110
            await asyncio.sleep(0.01)  # what the limit allows at once is merged
        (folder / "crash-at").write_text(str(step))
        found.append(await daemon.stop())
        (folder / "crash-at").unlink()
        client = await daemon.run()
        await speed_up(client)
        assert await daemon.content() == with_parts(chain), step
        assert await daemon.stop() == 0
    assert found[0] == -signal.SIGKILL

"""query-blockstats counts what guests do, whatever way their requests take."""

import asyncio
from pathlib import Path

import pytest

from blockd.errors import StorageError
from blockd.protocols.file import FileNode
from tests import qemu_img
from tests.chains import make
from tests.control.running import running
from tests.qmp_client import Json, QmpClient

LAYERS = ["AB0-A-AB", "-C-C--0-"]
CLUSTER = 65536
SIZE = 8 * CLUSTER


async def stats_of(client: QmpClient) -> Json:
    (device,) = await client.command("query-blockstats")
    assert device["device"] == "vda"
    return device["stats"]


async def test_every_kind_of_request_counts(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path, "--device", f"vda={chain.active}") as daemon:
        client, guest = await daemon.qmp(), await daemon.guest("vda")
        before = await stats_of(client)
        assert "idle_time_ns" not in before
        assert not any(before[name] for name in before if name not in ("timed_stats",))
        for number in range(10):
            await guest.read(number * 512, 4096)  # at once, once the tables are in memory
        await guest.read(0, SIZE)
        await guest.write(CLUSTER, b"x" * 512)  # in place
        await guest.write(4 * CLUSTER, b"x" * 1000)  # allocating
        await guest.write(5 * CLUSTER, bytes(2 * CLUSTER))  # received apart
        await guest.write_zeroes(7 * CLUSTER, CLUSTER)
        await guest.trim(0, CLUSTER)
        await guest.flush()
        await guest.flush()
        found = await stats_of(client)
        expected = {
            "rd_operations": 11,
            "rd_bytes": 10 * 4096 + SIZE,
            "wr_operations": 4,
            "wr_bytes": 512 + 1000 + 3 * CLUSTER,
            "wr_highest_offset": SIZE,
            "unmap_operations": 1,
            "unmap_bytes": CLUSTER,
            "flush_operations": 2,
        }
        assert {name: found[name] for name in expected} == expected
        for kind in ("rd", "wr", "unmap", "flush"):
            assert 0 < found[f"{kind}_total_time_ns"] < 60e9
        assert found["idle_time_ns"] > 0


async def test_many_at_once_from_two_guests(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path, "--device", f"vda={chain.active}") as daemon:
        client = await daemon.qmp()
        guests = [await daemon.guest("vda") for _ in range(2)]
        await asyncio.gather(*(guest.read(n % 64 * 512, 512) for guest in guests for n in range(500)))
        await asyncio.gather(*(guest.write(CLUSTER, b"x" * 512) for guest in guests for _ in range(100)))
        found = await stats_of(client)
        assert (found["rd_operations"], found["rd_bytes"]) == (1000, 1000 * 512)
        assert (found["wr_operations"], found["wr_bytes"]) == (200, 200 * 512)


async def test_what_fails_counts_as_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path, "--device", f"vda={chain.active}") as daemon:
        client, guest = await daemon.qmp(), await daemon.guest("vda")

        def fail(file: FileNode, offset: int, buffer: memoryview) -> None:
            raise StorageError("the disk is broken")

        with monkeypatch.context() as patch:
            patch.setattr(FileNode, "readinto_blocking", fail)
            patch.setattr(FileNode, "read_nowait", lambda *_: None)
            with pytest.raises(StorageError):
                await guest.read(0, 4096)
        for request in (guest.read(SIZE, 512), guest.write(SIZE, b"x" * 512), guest.trim(SIZE, 512)):
            with pytest.raises(StorageError):
                await request
        found = await stats_of(client)
        assert (found["failed_rd_operations"], found["rd_operations"], found["rd_bytes"]) == (1, 0, 0)
        invalid = [found[f"invalid_{kind}_operations"] for kind in ("rd", "wr", "unmap", "flush")]
        assert invalid == [1, 1, 1, 0]


async def test_counters_are_the_disks_whatever_serves_it(tmp_path: Path) -> None:
    """They go on through a switch and a stream; nodes show those of the disk they serve."""
    chain = await make(tmp_path, LAYERS)
    copy = qemu_img.create(tmp_path / "copy.qcow2", SIZE, backing=chain.active)
    async with running(tmp_path, "--device", f"vda={chain.active}") as daemon:
        client, guest = await daemon.qmp(), await daemon.guest("vda")
        await guest.read(0, 512)
        await client.command("block_switch", device="vda", filename=str(copy))
        await client.command("block_stream", device="vda", speed=1)
        await guest.read(0, 512)
        node = daemon.services.devices.get("vda").node
        (device,) = await client.command("query-blockstats")
        assert (device["node-name"], device["stats"]["rd_operations"]) == (node.node_name, 2)
        assert device["backing"]["stats"]["rd_operations"] == 0
        assert device["backing"]["backing"]["parent"]["stats"]["wr_highest_offset"] == 0
        nodes = await client.command("query-blockstats", {"query-nodes": True})
        counts = {entry["node-name"]: entry["stats"]["rd_operations"] for entry in nodes}
        assert counts.pop(node.node_name) == 2
        assert set(counts.values()) == {0}
        assert not any("backing" in entry for entry in nodes)

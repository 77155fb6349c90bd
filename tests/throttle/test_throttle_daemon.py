"""The throttle driver and its groups in a whole daemon."""

import asyncio
from pathlib import Path

import pytest

from tests import qemu_img
from tests.chains import make
from tests.control.running import Running, refusal, running
from tests.qmp_client import QmpClient

LAYERS = ["AB0-A-AB", "-C-C--0-"]
CLUSTER = 65536


async def throttled(client: QmpClient, path: Path, **limits: int) -> None:
    """A node `disk` behind the throttle node `th` of group `g`, exported as `th`."""
    names = {name.replace("_", "-"): value for name, value in limits.items()}
    await client.command("object-add", {"qom-type": "throttle-group", "id": "g", "limits": names})
    file = {"driver": "file", "filename": str(path)}
    inner = {"driver": "qcow2", "node-name": "disk", "file": file}
    await client.command(
        "blockdev-add", {"driver": "throttle", "node-name": "th", "throttle-group": "g", "file": inner}
    )
    export = {"type": "nbd", "id": "e", "node-name": "th", "writable": True}
    await client.command("block-export-add", export)


async def test_guest_is_kept_within_limits_that_change_under_it(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        await throttled(client, chain.active, bps_total=1)
        guest = await daemon.guest("th")
        assert await guest.read(0, CLUSTER) == chain.content[:CLUSTER]
        waiting = asyncio.gather(*(guest.read(number * CLUSTER, CLUSTER) for number in range(8)))
        done, _ = await asyncio.wait([waiting], timeout=0.1)
        assert not done
        limits = {"path": "g", "property": "limits"}
        await client.command("qom-set", {**limits, "value": {"bps-total": 0}})
        assert b"".join(await waiting) == chain.content
        assert (await client.command("qom-get", limits))["bps-total"] == 0


async def test_group_in_use_stays(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        await throttled(client, chain.active)
        found = await refusal(client, "object-del", id="g")
        assert found == ("GenericError", "object 'g' is in use, can not be deleted")
        assert (await refusal(client, "blockdev-del", node_name="th"))[1] == "Node th is in use"
        await client.command("block-export-del", id="e")
        await client.command("blockdev-del", {"node-name": "th"})
        await client.command("object-del", id="g")
        found = await refusal(
            client, "blockdev-add", driver="throttle", node_name="th", throttle_group="g", file="x"
        )
        assert found[1] == "Cannot find device='x' nor node-name='x'"


async def snapshot_of(daemon: Running) -> list[str]:
    """Which nodes requests to the export come through, top first."""
    device = next(iter(daemon.services.exports)).device
    node = device.root.top
    names = [node.driver]
    while (below := node.children().get("file")) is not None:
        names.append(below.driver)
        node = below
    return names


async def test_stream_under_a_throttled_guest(tmp_path: Path) -> None:
    """The job's filter goes below the throttle: the guest stays limited, the job is not."""
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        await throttled(client, chain.active, iops_total=1)
        guest = await daemon.guest("th")
        await guest.write(0, b"guest")
        await client.command("block-stream", {"job-id": "j", "device": "disk", "speed": 1})
        assert await snapshot_of(daemon) == ["throttle", "copy-on-read", "qcow2", "file"]
        waiting = asyncio.gather(*(guest.read(0, 512) for _ in range(3)))
        await client.command("block-job-set-speed", device="j", speed=0)
        # The drains of the job do not wait for what the guest may not read yet.
        await client.event("JOB_STATUS_CHANGE", status="null")
        assert await snapshot_of(daemon) == ["throttle", "qcow2", "file"]
        assert await waiting == [b"guest" + chain.content[5:512]] * 3
    assert qemu_img.content(chain.active)[5:] == chain.content[5:]


async def test_switch_under_a_throttled_guest(tmp_path: Path) -> None:
    """The guest waits for its limits, the switch does not, and the new image is as limited as the old one."""
    chain = await make(tmp_path, LAYERS)
    copy = qemu_img.create(tmp_path / "copy.qcow2", 2 * len(chain.content), backing=chain.active)
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        await throttled(client, chain.active, bps_total=1)
        guest = await daemon.guest("th")
        daemon.services.devices.add("vda", daemon.services.graph["th"])
        await guest.read(0, CLUSTER)
        async with asyncio.TaskGroup() as tasks:
            slow = tasks.create_task(guest.write(0, b"slow"))
            await client.command("block_switch", device="vda", filename=str(copy))  # not 65536 s later
            await slow
        assert await snapshot_of(daemon) == ["throttle", "qcow2", "file"]
        device = daemon.services.devices.get("vda")
        assert (device.active.filename, device.node.node_name) == (str(copy), "th")
        assert device.node.size == 2 * len(chain.content)
        await client.command("qom-set", path="g", property="limits", value={"iops-total": 0})
        assert await guest.read(4, 1000) == chain.content[4:1004]
    assert qemu_img.content(copy)[: len(chain.content)] == b"slow" + chain.content[4:]


async def test_resize_below_is_seen_above(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS[:1])
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        await throttled(client, chain.active)
        await client.command("block-export-del", id="e")
        await client.command("block_resize", {"node-name": "disk", "size": 2 * len(chain.content)})
        await client.command("block-export-add", {"type": "nbd", "id": "e", "node-name": "th"})
        guest = await daemon.guest("th")
        assert await guest.read(len(chain.content), 512) == bytes(512)


async def test_throttled_backing_file(tmp_path: Path) -> None:
    """A throttle between two images of a chain: what is read through it counts, also by a stream."""
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        limits = {"bps-read": 1}
        await client.command("object-add", {"qom-type": "throttle-group", "id": "g", "limits": limits})
        files = [{"driver": "file", "filename": str(path)} for path in chain.paths]
        below = {"driver": "qcow2", "node-name": "base", "file": files[0]}
        throttle = {"driver": "throttle", "node-name": "th", "throttle-group": "g", "file": below}
        top = {"driver": "qcow2", "node-name": "top", "file": files[1], "backing": throttle}
        await client.command("blockdev-add", top)
        await client.command("block-stream", {"job-id": "j", "device": "top"})
        await client.event("JOB_STATUS_CHANGE", status="running")
        group = daemon.services.objects.throttle_group("g")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await client.event("BLOCK_JOB_COMPLETED")
        group.set_limits({"bps-read": 0})
        await client.event("JOB_STATUS_CHANGE", status="null")
    assert qemu_img.content(chain.active) == chain.content

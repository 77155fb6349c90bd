"""Formats on files that a throttle group limits."""

import asyncio
from pathlib import Path

from blockd.protocols.nbd_client import NbdClient
from tests import qemu_img
from tests.chains import make
from tests.control.running import running
from tests.daemon_process import DaemonProcess
from tests.iotests_ideas.nodes import Options, add, export, file, finished, stream, throttle
from tests.qmp_client import QmpClient

LAYERS = ["AB0-A-AB", "-C-C--0-"]
CLUSTER = 65536
LIMITS = {"path": "g", "property": "limits"}


async def add_image(client: QmpClient, path: Path, **limits: int) -> None:
    """An image `n`, exported, on the throttled file `t`."""
    names: Options = {name.replace("_", "-"): value for name, value in limits.items()}
    await client.command("object-add", {"qom-type": "throttle-group", "id": "g", "limits": names})
    await add(client, throttle("t", file(path), "g"), {"driver": "qcow2", "node-name": "n", "file": "t"})
    await export(client, "n")


async def test_what_guests_and_streams_do_comes_through_the_throttle(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        await add_image(client, chain.active)
        guest = await daemon.guest("n")
        await guest.write(2 * CLUSTER + 512, b"guest" * 100)
        await stream(client, "j", "n")
        assert "error" not in await finished(client, "j")
        expected = bytearray(chain.content)
        expected[2 * CLUSTER + 512 : 2 * CLUSTER + 1012] = b"guest" * 100
        assert await guest.read(0, len(expected)) == expected
        await guest.write_zeroes(CLUSTER, CLUSTER)
        await guest.trim(0, CLUSTER)
        await guest.flush()
    expected[: 2 * CLUSTER] = bytes(2 * CLUSTER)
    assert qemu_img.content(chain.active) == expected
    qemu_img.qemu("qemu-img", "check", "-q", chain.active)


async def test_the_limits_are_those_of_the_file(tmp_path: Path) -> None:
    """Reads and writes wait until there is room, and so does what the format does in threads."""
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        await add_image(client, chain.active)
        guest = await daemon.guest("n")
        await guest.read(3 * CLUSTER, 512)
        await client.command("qom-set", {**LIMITS, "value": {"bps-total": 1}})
        await guest.read(3 * CLUSTER, 512)
        requests = [guest.read(CLUSTER, 512), guest.write(CLUSTER, b"w" * 512), guest.write(0, b"new")]
        waiting = asyncio.gather(*requests)
        done, _ = await asyncio.wait([waiting], timeout=0.1)
        assert not done
        await client.command("qom-set", {**LIMITS, "value": {"bps-total": 0}})
        await waiting


async def test_what_is_to_be_written_at_the_end_does_not_wait(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS)
    daemon = DaemonProcess(tmp_path)
    await daemon.start()
    async with await daemon.qmp() as client:
        await add_image(client, chain.active)
        async with await NbdClient.connect_unix(str(daemon.nbd_path), "n") as guest:
            await guest.write(0, b"w" * 4 * CLUSTER)
            await client.command("qom-set", {**LIMITS, "value": {"bps-total": 1}})
            await guest.read(0, CLUSTER)
    assert await daemon.stop() == 0
    assert qemu_img.content(chain.active) == b"w" * 4 * CLUSTER + chain.content[4 * CLUSTER :]
    qemu_img.qemu("qemu-img", "check", "-q", chain.active)


async def test_it_is_reopened_with_its_image(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        await client.command("object-add", {"qom-type": "throttle-group", "id": "g"})
        inner = throttle("t", file(chain.active), "g")
        node: Options = {"driver": "qcow2", "node-name": "n", "file": inner}
        await add(client, node)
        base = daemon.services.graph["n"].backing
        assert base is not None
        for read_only in (True, False, True, False):
            options = {**node, "backing": base.node_name, "read-only": read_only}
            await client.command("blockdev-reopen", options=[options])
            below = daemon.services.graph["t"]
            assert [one.read_only for one in (below, *below.children().values())] == [read_only] * 2
        await export(client, "n")
        guest = await daemon.guest("n")
        await guest.write(0, b"again")
    assert qemu_img.content(chain.active)[:5] == b"again"

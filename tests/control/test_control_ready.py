"""Sockets that listen before the disks are there: who connects early waits, and gets what was asked for."""

import asyncio
import json
from pathlib import Path

import pytest

from blockd.cli.options import parse_command_line
from blockd.drivers import NodeGraph
from blockd.exports.nbd import server
from blockd.protocols.nbd_client import NbdClient
from tests.chains import make
from tests.control.running import Running, until
from tests.qmp_client import QmpClient

LAYERS = ["ABCDEFGH", "-X--0---"]
SIZE = 8 * 65536


class Gate:
    """Holds the opening of images until it is told otherwise."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_reached, self.may_pass = asyncio.Event(), asyncio.Event()
        open_image = NodeGraph.open_image

        async def wait(graph: NodeGraph, *arguments: object, **options: object) -> object:
            self.is_reached.set()
            await self.may_pass.wait()
            return await open_image(graph, *arguments, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(NodeGraph, "open_image", wait)


def words(folder: Path, active: Path) -> list[str]:
    return ["--qmp", f"{folder}/qmp.sock", "--nbd", f"{folder}/nbd.sock", "--device", f"vda={active}"]


async def test_clients_that_come_early_are_answered_when_all_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long that takes: the time that an NBD client has to choose does not run yet."""
    monkeypatch.setattr(server, "HAGGLING_LIMIT_S", 0.01)
    chain = await make(tmp_path, LAYERS)
    gate, daemon, ready = Gate(monkeypatch), Running(tmp_path), asyncio.Event()
    config = parse_command_line(words(tmp_path, chain.active)).config
    async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
        tasks.create_task(daemon.run(config, lambda _: ready.set()))
        await gate.is_reached.wait()
        client = await daemon.qmp()  # greeted and negotiated
        assert (await client.command("query-version"))["package"]
        query = tasks.create_task(client.command("query-block"))
        oob = tasks.create_task(ask_out_of_band(daemon.qmp_path))
        guest = tasks.create_task(NbdClient.connect_unix(str(daemon.nbd_path), "vda"))
        await asyncio.sleep(0.1)  # more than the guest has to choose
        assert not (query.done() or oob.done() or guest.done() or ready.is_set())
        gate.may_pass.set()
        assert [block["device"] for block in await query] == ["vda"]
        assert "return" in await oob
        assert await (await guest).read(0, SIZE) == chain.content
        await daemon.leave()
        daemon.stop()


async def ask_out_of_band(path: Path) -> dict[str, object]:
    async with await QmpClient.connect(path, negotiate=False) as client:
        await client.command("qmp_capabilities", enable=["oob"])
        await client.send(json.dumps({"exec-oob": "query-jobs", "id": "o"}).encode())
        while (reply := await client.receive()).get("id") != "o":
            pass
        return reply


async def test_clients_that_wait_are_let_go_when_the_start_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, daemon = Gate(monkeypatch), Running(tmp_path)
    config = parse_command_line(words(tmp_path, tmp_path / "none.qcow2")).config
    run = asyncio.create_task(daemon.run(config, lambda _: None))
    async with asyncio.timeout(60):
        await gate.is_reached.wait()
        client = await daemon.qmp()
        query = asyncio.create_task(client.command("query-block"))
        guest = asyncio.create_task(NbdClient.connect_unix(str(daemon.nbd_path), "vda"))
        await until(daemon.nbd_path.exists)
        gate.may_pass.set()
        done, _ = await asyncio.wait([run, query, guest])
    assert all(task.exception() is not None for task in done)

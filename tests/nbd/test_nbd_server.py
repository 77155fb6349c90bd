"""Listeners, the export table and the connection limit."""

import asyncio
import os
import socket
import stat
from pathlib import Path

import pytest

from blockd.block.root import Root
from blockd.errors import RequestError
from blockd.exports.nbd.export import Export
from blockd.exports.nbd.server import NbdServer
from blockd.protocols.nbd_client import NbdClient
from tests.missing import require_listening
from tests.nbd.memory_node import MemoryNode
from tests.nbd.serving import Serving, serving, until


def export(node: MemoryNode, name: str, export_id: str = "") -> Export:
    return Export(name, Root(node), True, export_id=export_id or name)


# -- unix sockets -----------------------------------------------------------------------------


async def test_the_socket_is_for_its_owner_only(node: MemoryNode, tmp_path: Path) -> None:
    async with serving(node, tmp_path) as at:
        assert stat.S_IMODE(Path(at.path).stat().st_mode) == 0o600
        assert at.server.addresses == [f"nbd+unix:///?socket={at.path}"]


async def test_a_live_socket_is_never_replaced(node: MemoryNode, tmp_path: Path) -> None:
    async with serving(node, tmp_path) as at:
        with pytest.raises(RequestError, match="another process listens on it"):
            await at.server.listen_unix(at.path)
        async with await at.client() as client:
            assert client.size == node.size


async def test_a_stale_socket_is_replaced(node: MemoryNode, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "nbd.sock"))
    async with serving(node, tmp_path) as at, await at.client() as client:
        assert client.size == node.size


async def test_a_file_that_is_no_socket_is_left_alone(node: MemoryNode, tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("data")
    async with serving(node, tmp_path) as at:
        with pytest.raises(RequestError, match="is not a socket"):
            await at.server.listen_unix(str(path))
    assert path.read_text() == "data"


async def test_a_socket_of_somebody_else_is_not_removed(node: MemoryNode, tmp_path: Path) -> None:
    path = tmp_path / "second.sock"
    async with serving(node, tmp_path) as at:
        await at.server.listen_unix(str(path))
        path.unlink()
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(path))
            await at.server.close()
        assert path.exists()


@pytest.mark.parametrize("name", ["missing/nbd.sock", "x" * 200, "with\0nul"])
async def test_impossible_paths_are_refused(node: MemoryNode, tmp_path: Path, name: str) -> None:
    async with serving(node, tmp_path) as at:
        with pytest.raises(RequestError, match="Failed to bind socket to"):
            await at.server.listen_unix(str(tmp_path / name))


# -- tcp and inherited sockets ----------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
async def test_tcp_on_loopback(node: MemoryNode, tmp_path: Path, host: str) -> None:
    require_listening(host)
    async with serving(node, tmp_path) as at:
        await at.server.listen_tcp(host, 0)
        port = int(at.server.addresses[-1].rpartition(":")[2])
        async with await NbdClient.connect_tcp(host, port, "disk") as client:
            await client.write(0, b"over tcp")
        with pytest.raises(RequestError, match="in use"):
            await at.server.listen_tcp(host, port)
    assert node.data[:8] == b"over tcp"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "no such host"])
async def test_other_addresses_are_refused(node: MemoryNode, tmp_path: Path, host: str) -> None:
    async with serving(node, tmp_path) as at:
        with pytest.raises(RequestError, match="Could not listen on"):
            await at.server.listen_tcp(host, 0)
        assert len(at.server.addresses) == 1


async def test_an_inherited_socket(node: MemoryNode, tmp_path: Path) -> None:
    path = str(tmp_path / "inherited.sock")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path)
    listening.listen()
    async with serving(node, tmp_path) as at:
        at.server.listen_fd(listening.detach())
        async with await NbdClient.connect_unix(path) as client:
            assert client.size == node.size
    assert Path(path).exists()  # whoever made it may want to remove it


async def test_descriptors_that_cannot_listen_are_refused(node: MemoryNode, tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    unconnected = socket.socket(socket.AF_UNIX)
    async with serving(node, tmp_path) as at:
        for fd in (read_end, unconnected.fileno(), 10_000):
            with pytest.raises(RequestError, match=f"file descriptor {fd}"):
                at.server.listen_fd(fd)
    os.close(read_end)
    os.close(write_end)
    unconnected.close()


# -- exports ----------------------------------------------------------------------------------


async def test_exports_come_and_go(node: MemoryNode, tmp_path: Path) -> None:
    async with serving(node, tmp_path) as at:
        async with await at.client("") as client:  # the only one there is
            assert client.size == node.size
        at.server.add_export(export(MemoryNode(8192), "second"))
        assert list(at.server.exports) == ["disk", "second"]
        async with await at.client("second") as client:
            assert client.size == 8192
        with pytest.raises(RequestError, match="export '' not present"):
            await at.client("")
        await at.server.remove_export("second")
        with pytest.raises(RequestError, match="export 'second' not present"):
            await at.client("second")


async def test_wrong_exports_are_refused(node: MemoryNode, tmp_path: Path) -> None:
    read_only = MemoryNode(4096, read_only=True)
    async with serving(node, tmp_path) as at:
        for wrong, message in (
            (export(node, "disk", "new-id"), "NBD server already has export named 'disk'"),
            (export(node, "new", "disk-id"), "Block export id 'disk-id' is already in use"),
            (export(node, "n" * 4097), "too long"),
            (export(read_only, "ro"), "Cannot export read-only node as writable"),
        ):
            with pytest.raises(RequestError, match=message):
                at.server.add_export(wrong)
        assert list(at.server.exports) == ["disk"]
        with pytest.raises(RequestError, match="Export 'nothing' is not found"):
            await at.server.remove_export("nothing")


async def test_an_export_in_use_is_removed_only_by_force(node: MemoryNode, tmp_path: Path) -> None:
    node.gate.clear()
    async with serving(node, tmp_path) as at, await at.client() as client, asyncio.TaskGroup() as tasks:
        with pytest.raises(RequestError, match="export 'disk-id' still in use"):
            await at.server.remove_export("disk-id")
        flush = tasks.create_task(ended(client))
        await node.wait_for_waiting(1)
        await at.server.remove_export("disk-id", force=True)
        assert at.server.connection_count == 0
        assert node.waiting == 0
        await flush
        at.server.add_export(export(node, "disk", "disk-id"))
        async with await at.client() as again:
            assert again.size == node.size


async def ended(client: NbdClient) -> None:
    with pytest.raises(Exception, match="closed"):
        await client.flush()


# -- connections ------------------------------------------------------------------------------


async def test_beyond_the_connection_limit_clients_wait(node: MemoryNode, tmp_path: Path) -> None:
    async with serving(node, tmp_path, max_connections=2) as at:
        first, second = await at.client(), await at.client()
        async with asyncio.TaskGroup() as tasks:
            waiting = [tasks.create_task(at.client()) for _ in range(3)]
            assert await first.read(0, 1) == b"\0"
            assert at.server.connection_count == 2
            assert not any(task.done() for task in waiting)
            await first.disconnect()
            await second.disconnect()
            for task in waiting:
                await (await task).disconnect()


async def test_close_ends_everything_and_can_be_repeated(node: MemoryNode, tmp_path: Path) -> None:
    node.gate.clear()
    async with serving(node, tmp_path, max_connections=1) as at:
        client = await at.client()
        async with asyncio.TaskGroup() as tasks:
            flush = tasks.create_task(ended(client))
            await node.wait_for_waiting(1)
            waiting = await asyncio.open_unix_connection(at.path)  # beyond the limit
            await at.server.close()
            await flush
        assert await waiting[0].read() == b""
        waiting[1].close()
        await at.server.close()
        assert at.server.addresses == []
        with pytest.raises(RequestError, match="Could not connect"):
            await at.client()


async def test_an_accepted_client_is_gone_when_the_server_closes_at_once(
    node: MemoryNode, tmp_path: Path
) -> None:
    async with serving(node, tmp_path) as at:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(at.path)
            await until(lambda: bool(at.server.connection_count))
            await at.server.close()


def test_plain_asyncio_serves_too(tmp_path: Path) -> None:
    async def use(at: Serving) -> None:
        async with await at.client() as client:
            await client.write(0, b"x" * (3 << 20))
            assert await client.read(1 << 20, 4) == b"xxxx"

    async def serve() -> None:
        async with serving(MemoryNode(4 << 20), tmp_path) as at:
            await use(at)

    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
        runner.run(serve())


async def test_a_server_in_a_foreign_task_group_ends_with_it(node: MemoryNode, tmp_path: Path) -> None:
    """The daemon stops by cancelling: nothing may outlive that."""

    async def run(started: asyncio.Event) -> None:
        async with asyncio.TaskGroup() as tasks, NbdServer(tasks) as server:
            await server.listen_unix(str(tmp_path / "nbd.sock"))
            server.add_export(export(node, "disk"))
            started.set()
            await asyncio.Event().wait()

    async with asyncio.TaskGroup() as tasks:
        started = asyncio.Event()
        running = tasks.create_task(run(started))
        await started.wait()
        client = await NbdClient.connect_unix(str(tmp_path / "nbd.sock"))
        running.cancel()
    await client.disconnect()
    assert not (tmp_path / "nbd.sock").exists()

"""An NBD server in the test's own process, and raw access to it for clients that misbehave."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from blockd.block.node import BlockNode
from blockd.block.root import Root
from blockd.exports.nbd.export import Export
from blockd.exports.nbd.server import CONNECTION_COUNT_MAX, HAGGLING_LIMIT_S, NbdServer
from blockd.protocols.nbd_client import NbdClient
from blockd.wire.nbd import constants as nbd
from blockd.wire.nbd import haggling, transmission
from blockd.wire.nbd.transmission import Request

WAIT_S = 100.0


@dataclass
class Serving:
    """A running server with one export named ``disk``."""

    server: NbdServer
    root: Root
    path: str

    @property
    def uri(self) -> str:
        return f"nbd+unix:///?socket={self.path}"

    async def client(self, name: str = "disk") -> NbdClient:
        return await NbdClient.connect_unix(self.path, name)

    async def raw(self) -> "RawClient":
        """Connect and read the greeting."""
        raw = RawClient(*await asyncio.open_unix_connection(self.path))
        await raw.reader.readexactly(haggling.GREETING_SIZE)
        return raw

    async def until_connections(self, count: int) -> None:
        await until(lambda: self.server.connection_count == count)


@dataclass
class RawClient:
    """A connection on which a test says what it likes."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def option_reply(self) -> tuple[int, bytes]:
        """Read one reply to an option: its type and data."""
        head = haggling.parse_option_reply(await self.receive(haggling.OPTION_REPLY_HEADER_SIZE))
        return head.reply, await self.receive(head.length)

    async def receive(self, length: int) -> bytes:
        async with asyncio.timeout(WAIT_S):
            return await self.reader.readexactly(length)

    async def rest(self) -> bytes:
        """Read until the server closes the connection."""
        async with asyncio.timeout(WAIT_S):
            try:
                return await self.reader.read()
            except ConnectionError:
                return b""

    async def close(self) -> None:
        self.writer.close()
        with suppress(ConnectionError):
            await self.writer.wait_closed()

    async def __aenter__(self) -> "RawClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


CLIENT_FLAGS = haggling.pack_client_flags(nbd.FLAG_FIXED_NEWSTYLE | nbd.FLAG_NO_ZEROES)


def go(name: str = "disk", *, structured: bool = False) -> bytes:
    """All a client has to say to get to the transmission phase."""
    asked = haggling.pack_option(nbd.OPT_STRUCTURED_REPLY) if structured else b""
    return (
        CLIENT_FLAGS + asked + haggling.pack_option(nbd.OPT_GO, haggling.pack_go(haggling.GoOption(name, [])))
    )


def pack(command: int, cookie: int, offset: int, length: int, flags: int = 0) -> bytes:
    return transmission.pack_request(Request(flags, command, cookie, offset, length))


async def transmitting(raw: RawClient, *, structured: bool = False) -> None:
    """Get a client through the haggling."""
    raw.send(go(structured=structured))
    for _ in range(1 + structured):  # options, each with as many replies as it takes
        while (await raw.option_reply())[0] != nbd.REP_ACK:
            pass


@asynccontextmanager
async def serving(
    node: BlockNode,
    folder: Path,
    *,
    writable: bool = True,
    writethrough: bool = False,
    max_connections: int = CONNECTION_COUNT_MAX,
    haggling_limit_s: float = HAGGLING_LIMIT_S,
) -> AsyncIterator[Serving]:
    """Serve `node` on a socket in `folder`; at the end nothing may be left of the server."""
    root = Root(node)
    path = str(folder / "nbd.sock")
    before = socket_count()
    async with asyncio.TaskGroup() as tasks:
        server = NbdServer(tasks, max_connections=max_connections, haggling_limit_s=haggling_limit_s)
        async with server:
            await server.listen_unix(path)
            disk = Export("disk", root, writable, "a test's disk", "disk-id", writethrough=writethrough)
            server.add_export(disk)
            yield Serving(server, root, path)
        assert server.connection_count == 0
        assert server._memory.is_idle
    assert not Path(path).exists()
    await until(lambda: socket_count() <= before)  # transports close their sockets a turn later


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop turn until something that only its own turns can bring about has happened."""
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110  # there is nothing to wait on that would not be the test itself
            await asyncio.sleep(0)


def socket_count() -> int:
    """How many sockets this process has open."""
    count = 0
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the descriptor of the listing itself
            count += str(link.readlink()).startswith("socket:")
    return count

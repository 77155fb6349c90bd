"""The client against servers that are wrong in every way."""

import asyncio
import errno
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from blockd.errors import PeerError, RequestError, StorageError
from blockd.protocols.nbd_client import NbdClient
from blockd.wire.nbd import constants as nbd
from blockd.wire.nbd import haggling, transmission
from blockd.wire.nbd.haggling import ExportInfo
from blockd.wire.nbd.transmission import StatusRun

Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

ACK = nbd.REP_ACK


@asynccontextmanager
async def fake_server(path: Path, script: Script) -> AsyncIterator[str]:
    """A server that does what `script` says with its only client, and then leaves."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await script(reader, writer)
        writer.close()

    async with await asyncio.start_unix_server(serve, path / "fake.sock"):
        yield str(path / "fake.sock")


def saying(data: bytes) -> Script:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await writer.drain()
        await reader.read(65536)

    return script


async def option(reader: asyncio.StreamReader) -> int:
    number, length = haggling.parse_option_header(await reader.readexactly(haggling.OPTION_HEADER_SIZE))
    await reader.readexactly(length)
    return number


def answering(*replies: Callable[[int], bytes]) -> Script:
    """Haggle properly, without structured replies, then answer each request with the next of `replies`."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(haggling.pack_greeting())
        await reader.readexactly(haggling.CLIENT_FLAGS_SIZE)
        assert await option(reader) == nbd.OPT_STRUCTURED_REPLY
        writer.write(haggling.pack_option_reply(nbd.OPT_STRUCTURED_REPLY, nbd.REP_ERR_UNSUP))
        assert await option(reader) == nbd.OPT_GO
        info = haggling.pack_info_export(ExportInfo(1 << 20, nbd.TRANSMISSION_HAS_FLAGS))
        writer.write(haggling.pack_option_reply(nbd.OPT_GO, nbd.REP_INFO, info))
        writer.write(haggling.pack_option_reply(nbd.OPT_GO, ACK))
        for reply in replies:
            request = transmission.parse_request(await reader.readexactly(transmission.REQUEST.size))
            writer.write(reply(request.cookie))
        await reader.read()

    return script


@pytest.mark.parametrize(
    "said",
    [
        b"SSH-2.0-OpenSSH_9.2 and so on",
        haggling.pack_greeting(flags=0),
        haggling.pack_greeting() + b"garbage that is not a reply",
        haggling.pack_greeting() + haggling.pack_option_reply(nbd.OPT_GO, ACK),
        haggling.pack_greeting() + haggling.pack_option_reply(nbd.OPT_STRUCTURED_REPLY, ACK, bytes(100_000)),
        haggling.pack_greeting()
        + haggling.pack_option_reply(nbd.OPT_STRUCTURED_REPLY, nbd.REP_SERVER) * 1025,
    ],
)
async def test_what_is_no_nbd_server_is_refused(tmp_path: Path, said: bytes) -> None:
    async with fake_server(tmp_path, saying(said)) as path:
        with pytest.raises(PeerError):
            await NbdClient.connect_unix(path)


async def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="No such file"):
        await NbdClient.connect_unix(str(tmp_path / "nothing.sock"))
    with pytest.raises(RequestError, match="Could not connect to"):
        await NbdClient.connect_tcp("127.0.0.1", 1)


async def test_a_server_that_leaves_in_the_haggling(tmp_path: Path) -> None:
    async def leave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(haggling.pack_greeting())
        await reader.readexactly(4)

    async with fake_server(tmp_path, leave) as path:
        with pytest.raises(StorageError) as caught:
            await NbdClient.connect_unix(path)
        assert caught.value.errno == errno.ENOTCONN


def chunk(kind: int, payload: bytes, flags: int = nbd.CHUNK_FLAG_DONE) -> Callable[[int], bytes]:
    return lambda cookie: (
        transmission.CHUNK.pack(nbd.CHUNK_MAGIC, flags, kind, cookie, len(payload)) + payload
    )


@pytest.mark.parametrize(
    "reply",
    [
        lambda cookie: b"\0" * 16,
        lambda cookie: transmission.pack_simple_reply(cookie + 1) + bytes(512),
        lambda cookie: transmission.pack_data_header(cookie, 0, 511) + bytes(511),
        lambda cookie: transmission.pack_data_header(cookie, 1, 512) + bytes(512),
        lambda cookie: transmission.pack_data_header(cookie, 0, 40 << 20),
        lambda cookie: transmission.pack_hole(cookie, 0, 500),
        transmission.pack_done,
        chunk(77, b""),
        chunk(nbd.CHUNK_OFFSET_DATA, b"shrt"),
        chunk(nbd.CHUNK_ERROR, b"x"),
    ],
)
async def test_wrong_replies_fail_the_request(tmp_path: Path, reply: Callable[[int], bytes]) -> None:
    async with fake_server(tmp_path, answering(reply)) as path, await NbdClient.connect_unix(path) as client:
        with pytest.raises(PeerError):
            await client.read(0, 512)


async def test_a_read_may_come_in_pieces_of_any_kind(tmp_path: Path) -> None:
    def pieces(cookie: int) -> bytes:
        second = transmission.DATA_CHUNK.pack(nbd.CHUNK_MAGIC, 0, nbd.CHUNK_OFFSET_DATA, cookie, 8 + 4, 12)
        return (
            second
            + b"last"
            + chunk(nbd.CHUNK_OFFSET_HOLE, bytes(7) + b"\4\0\0\0\x08", 0)(cookie)
            + chunk(0, b"")(cookie)
        )

    async with (
        fake_server(tmp_path, answering(pieces)) as path,
        await NbdClient.connect_unix(path) as client,
    ):
        assert await client.read(4, 12) == bytes(8) + b"last"


async def test_errors_carry_what_the_server_says(tmp_path: Path) -> None:
    replies = (
        lambda cookie: transmission.pack_simple_reply(cookie, nbd.ENOSPC),
        lambda cookie: transmission.pack_error(cookie, nbd.EPERM, "not today"),
        lambda cookie: transmission.pack_simple_reply(cookie, 9999),
        lambda cookie: transmission.pack_block_status(cookie, 0, [StatusRun(10, 3), StatusRun(20, 0)]),
    )
    async with (
        fake_server(tmp_path, answering(*replies)) as path,
        await NbdClient.connect_unix(path) as client,
    ):
        for code, text in ((errno.ENOSPC, "ENOSPC"), (errno.EPERM, "not today"), (errno.EIO, "EIO")):
            with pytest.raises(StorageError, match=text) as caught:
                await client.flush()
            assert caught.value.errno == code
        assert [extent.length for extent in await client.block_status(0, 30)] == [10, 20]


async def test_a_cancelled_request_leaves_the_connection_usable(tmp_path: Path) -> None:
    held = asyncio.Event()

    def late(cookie: int) -> bytes:
        held.set()
        return b""

    def both(cookie: int) -> bytes:
        return transmission.pack_simple_reply(cookie - 1) + transmission.pack_simple_reply(cookie)

    async with (
        fake_server(tmp_path, answering(late, both)) as path,
        await NbdClient.connect_unix(path) as client,
        asyncio.TaskGroup() as tasks,
    ):
        first = tasks.create_task(client.flush())
        await held.wait()
        first.cancel()
        await client.flush()

"""The transmission phase, request by request, over a real socket."""

import asyncio
import errno
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from blockd.errors import BlockdError, ErrorKind, ImageError, RequestError, StorageError
from blockd.exports.nbd.error_table import nbd_error
from blockd.extents import Extent, Kind
from blockd.protocols.nbd_client import NbdClient
from blockd.units import KIB, MIB
from blockd.wire.nbd import constants as nbd
from blockd.wire.nbd import transmission
from tests.nbd.memory_node import MemoryNode
from tests.nbd.serving import Serving, pack, serving, transmitting


def pattern(length: int, seed: int = 1) -> bytes:
    return bytes((seed + index * 7) % 251 for index in range(251)) * (length // 251 + 1)


@pytest.fixture(params=["nowait", "waiting"])
def either(request: pytest.FixtureRequest, node: MemoryNode) -> MemoryNode:
    """A node that always answers at once, and one that never does."""
    node.nowait = request.param == "nowait"
    return node


SIZES = [1, 511, 4096, 64 * KIB - 1, 64 * KIB, 300 * KIB, 2 * MIB]


@pytest.mark.parametrize("length", SIZES)
async def test_what_is_written_is_read(either: MemoryNode, tmp_path: Path, length: int) -> None:
    data = pattern(length)[:length]
    async with serving(either, tmp_path) as at, await at.client() as client:
        await client.write(777, data)
        assert either.data[777 : 777 + length] == data
        assert await client.read(777, length) == data
        assert await client.read(777 + length, 16) == bytes(16)


async def test_many_requests_at_once_of_all_sizes(either: MemoryNode, tmp_path: Path) -> None:
    step = either.size // len(SIZES)
    async with serving(either, tmp_path) as at, await at.client() as client:
        for round_ in range(3):
            pieces = [pattern(size, round_)[: min(size, step)] for size in SIZES]
            places = [index * step for index in range(len(SIZES))]
            async with asyncio.TaskGroup() as tasks:
                for offset, piece in zip(places, pieces, strict=True):
                    tasks.create_task(client.write(offset, piece))
            reads = await asyncio.gather(
                *(client.read(o, len(p)) for o, p in zip(places, pieces, strict=True))
            )
            assert reads == pieces


async def test_largest_requests_and_one_byte_more(tmp_path: Path) -> None:
    node = MemoryNode(33 * MIB, cluster_size=MIB)
    data = pattern(32 * MIB)[: 32 * MIB]
    async with serving(node, tmp_path) as at, await at.client() as client:
        await client.write(5, data)
        assert await client.read(5, len(data)) == data
        with pytest.raises(StorageError, match="at most 33554432") as caught:
            await client.write(5, data + b"x")
        assert caught.value.errno == errno.EINVAL
        with pytest.raises(StorageError, match="at most 33554432"):
            await client.read(0, 32 * MIB + 1)
        assert await client.read(5, 100) == data[:100]
    assert node.data[5 : 5 + len(data)] == data


async def test_a_hole_is_not_sent(node: MemoryNode, tmp_path: Path) -> None:
    async with serving(node, tmp_path) as at, await at.raw() as raw:
        await transmitting(raw, structured=True)
        raw.send(pack(nbd.CMD_READ, 1, 0, 128 * KIB))
        reply = await raw.receive(transmission.CHUNK.size + 12)
        assert transmission.parse_chunk(reply).type == nbd.CHUNK_OFFSET_HOLE
        assert transmission.parse_hole(reply[transmission.CHUNK.size :]) == (0, 128 * KIB)


async def test_simple_replies_for_clients_that_want_them(either: MemoryNode, tmp_path: Path) -> None:
    either.data[10:20] = b"0123456789"
    async with serving(either, tmp_path) as at, await at.raw() as raw:
        await transmitting(raw)
        raw.send(pack(nbd.CMD_READ, 7, 10, 10))
        assert await raw.receive(26) == transmission.pack_simple_reply(7) + b"0123456789"
        raw.send(pack(nbd.CMD_READ, 8, either.size, 1))
        assert await raw.receive(16) == transmission.pack_simple_reply(8, nbd.EINVAL)
        raw.send(pack(nbd.CMD_READ, 9, 0, 0))
        assert await raw.receive(16) == transmission.pack_simple_reply(9)
        raw.send(pack(nbd.CMD_READ, 10, 0, 1, nbd.CMD_FLAG_DF))
        assert await raw.receive(17) == transmission.pack_simple_reply(10) + b"\0"
        raw.send(pack(nbd.CMD_BLOCK_STATUS, 11, 0, 1))
        assert await raw.receive(16) == transmission.pack_simple_reply(11, nbd.EINVAL)


async def test_df_and_empty_reads_with_structured_replies(either: MemoryNode, tmp_path: Path) -> None:
    async with serving(either, tmp_path) as at, await at.raw() as raw:
        await transmitting(raw, structured=True)
        raw.send(pack(nbd.CMD_READ, 1, 0, 300 * KIB, nbd.CMD_FLAG_DF))
        chunk = transmission.parse_chunk(await raw.receive(transmission.CHUNK.size))
        assert chunk == (nbd.CHUNK_FLAG_DONE, nbd.CHUNK_OFFSET_DATA, 1, 300 * KIB + 8)
        await raw.receive(chunk.length)
        raw.send(pack(nbd.CMD_READ, 2, 0, 0))
        assert await raw.receive(transmission.CHUNK.size) == transmission.pack_done(2)


async def test_fua_flushes_after_the_write(node: MemoryNode, tmp_path: Path) -> None:
    async with serving(node, tmp_path) as at, await at.client() as client:
        await client.write(0, b"x" * 4096, fua=True)
        await client.write(0, b"x" * MIB, fua=True)
        await client.write_zeroes(0, 4096, fua=True)
        await client.trim(0, 4096, fua=True)
        await client.flush()
    assert node.log == [
        *("write", "flush", "write", "flush", "write_zeroes unmap=True", "flush", "discard", "flush", "flush")
    ]


async def test_writethrough_flushes_after_every_write(either: MemoryNode, tmp_path: Path) -> None:
    async with serving(either, tmp_path, writethrough=True) as at, await at.client() as client:
        await client.write(0, b"x" * 4096)
        await client.write(0, b"x" * MIB)
        await client.write_zeroes(0, 4096)
        await client.trim(0, 4096)
        assert await client.read(4096, 4096) == b"x" * 4096
    assert [entry for entry in either.log if entry != "read"] == [
        *("write", "flush", "write", "flush", "write_zeroes unmap=True", "flush", "discard", "flush")
    ]


async def test_only_a_flush_tells_of_a_loss_once_to_each_connection(node: MemoryNode, tmp_path: Path) -> None:
    """A READ with FUA, in particular, does not count as told."""
    node.nowait = False
    async with serving(node, tmp_path) as at, await at.client() as first, await at.client() as second:
        at.root.lost_writes.add("the disk was full")
        for client in (first, second):
            await client._request(nbd.CMD_FLAG_FUA, nbd.CMD_READ, 0, 512)
            await client.write(0, b"x" * 512, fua=True)
            await client.write_zeroes(0, 4096, fua=True)
            await client._request(nbd.CMD_FLAG_FUA, nbd.CMD_CACHE, 0, 512)
        await _hears_once(first)
        async with await at.client() as late:
            await _hears_once(late)
        await _hears_once(second)


async def test_a_guest_that_is_away_when_its_writes_are_lost_hears_of_it(
    node: MemoryNode, tmp_path: Path
) -> None:
    """Others have been told meanwhile, and nobody knows which of them it is when it comes back."""
    async with serving(node, tmp_path) as at, await at.client() as present:
        async with await at.client() as away:
            await away.write(0, b"x" * 512)
        await at.until_connections(1)
        at.root.lost_writes.add("the disk was full")
        await _hears_once(present)
        for _ in range(2):
            async with await at.client() as client:
                await _hears_once(client)
        at.root.lost_writes.acknowledge()
        async with await at.client() as client:
            await client.flush()


async def test_of_an_acknowledged_loss_nobody_is_told_but_of_the_next_one(
    node: MemoryNode, tmp_path: Path
) -> None:
    async with serving(node, tmp_path) as at, await at.client() as one, await at.client() as other:
        at.root.lost_writes.add("the disk was full")
        await _hears_once(one)
        at.root.lost_writes.acknowledge()
        await other.flush()
        at.root.lost_writes.add("the disk was full again")
        await _hears_once(one)
        await _hears_once(other)


async def test_a_loss_is_not_told_to_clients_that_cannot_write(node: MemoryNode, tmp_path: Path) -> None:
    async with serving(node, tmp_path, writable=False) as at, await at.client() as client:
        at.root.lost_writes.add("the disk was full")
        await client.flush()
        assert at.root.lost_writes.why is not None


async def _hears_once(client: NbdClient) -> None:
    with pytest.raises(StorageError):
        await client.flush()
    await client.flush()


class ZeroedAtOnce(MemoryNode):
    """Answers trims and zeroes without waiting, or says that it would have to."""

    def discard_nowait(self, offset: int, length: int) -> bool:
        if self.nowait:
            self.log.append("discard_nowait")
            self._zero(offset, length, is_hole=True)
        return self.nowait

    def write_zeroes_nowait(self, offset: int, length: int) -> bool:
        if self.error is not None:
            raise self.error
        if self.nowait:
            self.log.append("write_zeroes_nowait")
            self._zero(offset, length, is_hole=True)
        return self.nowait


async def test_trims_and_zeroes_are_answered_at_once_where_that_can_be(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    node = ZeroedAtOnce(MIB)
    node.data[:] = pattern(MIB)[:MIB]
    async with serving(node, tmp_path) as at, await at.client() as client:
        await client.trim(0, 4096)
        await client.write_zeroes(8192, 4096)
        assert node.log == ["discard_nowait", "write_zeroes_nowait"]
        await client.write_zeroes(8192, 4096, no_hole=True)  # says how it is to be done
        await client.trim(0, 4096, fua=True)
        node.nowait = False
        await client.trim(4096, 4096)
        usual = ["write_zeroes unmap=False", "discard", "flush", "discard"]
        assert node.log[2:] == usual
        node.error = StorageError("broken", errno=errno.EIO)
        with pytest.raises(BlockdError):
            await client.write_zeroes(0, 4096)
    assert "': write zeroes of 4096 bytes at 0 failed: broken" in caplog.text
    assert node.data[: 3 * 4096] == bytes(3 * 4096)
    assert node.data[3 * 4096 :] == pattern(MIB)[3 * 4096 : MIB]


async def test_zeroing_trimming_and_caching(node: MemoryNode, tmp_path: Path) -> None:
    async with serving(node, tmp_path) as at, await at.client() as client:
        await client.write(0, b"x" * MIB)
        await client.write_zeroes(4096, 8192, no_hole=True)
        await client.trim(64 * KIB, 64 * KIB)
        await client.cache(0, 3 * MIB)
        assert await client.read(0, 16 * KIB) == b"x" * 4096 + bytes(8192) + b"x" * 4096
    assert node.log == ["write_zeroes unmap=False", "discard", "read", "read", "read"]


async def test_fast_zeroing_is_promised_only_where_it_is_true(tmp_path: Path) -> None:
    clusters, plain = MemoryNode(4 * 4096 + 10), MemoryNode(MIB, cluster_size=1)
    async with serving(clusters, tmp_path) as at, await at.client() as client:
        await client.write_zeroes(4096, 8192, fast=True)
        await client.write_zeroes(4 * 4096, 10, fast=True)  # the disk's last cluster is as long as the disk
        for offset, length, no_hole in ((4096, 100, False), (1, 8191, False), (4096, 4096, True)):
            with pytest.raises(StorageError) as caught:
                await client.write_zeroes(offset, length, fast=True, no_hole=no_hole)
            assert caught.value.errno == errno.ENOTSUP
    async with serving(plain, tmp_path) as at, await at.client() as client:
        with pytest.raises(StorageError) as caught:
            await client.write_zeroes(0, 4096, fast=True)
        assert caught.value.errno == errno.ENOTSUP


async def test_block_status(node: MemoryNode, tmp_path: Path) -> None:
    async with serving(node, tmp_path) as at, await at.client() as client:
        await client.write(8192, b"x" * 8192)
        expected = [
            Extent(100, 8092, Kind.ZERO),
            Extent(8192, 8192, Kind.DATA),
            Extent(16384, node.size - 16384, Kind.ZERO),
        ]
        assert await client.block_status(100, node.size - 100) == expected
        assert await client.block_status(100, node.size - 100, one=True) == expected[:1]
        assert await client.block_status(9000, 10) == [Extent(9000, 10, Kind.DATA)]
        with pytest.raises(StorageError, match="a length"):
            await client.block_status(0, 0)


async def test_block_status_is_bounded(tmp_path: Path) -> None:
    node = MemoryNode(5 * MIB, cluster_size=512)
    node.holes = set(range(0, 10240, 2))
    async with serving(node, tmp_path) as at, await at.client() as client:
        assert len(await client.block_status(0, node.size)) == 4096


Call = Callable[[NbdClient, int, int], Awaitable[object]]
CALLS: dict[str, Call] = {
    "read": lambda client, offset, length: client.read(offset, length),
    "write": lambda client, offset, length: client.write(offset, bytes(length)),
    "write_zeroes": lambda client, offset, length: client.write_zeroes(offset, length),
    "trim": lambda client, offset, length: client.trim(offset, length),
    "cache": lambda client, offset, length: client.cache(offset, length),
    "block_status": lambda client, offset, length: client.block_status(offset, length),
    "flush": lambda client, offset, length: client.flush(),
}
RANGES = [name for name in CALLS if name != "flush"]
MODIFYING = ["write", "write_zeroes", "trim"]


@pytest.mark.parametrize("name", RANGES)
async def test_beyond_the_end(node: MemoryNode, tmp_path: Path, name: str) -> None:
    expected = errno.ENOSPC if name in ("write", "write_zeroes") else errno.EINVAL
    async with serving(node, tmp_path) as at, await at.client() as client:
        for offset, length in (
            (node.size, 1),
            (node.size - 1, 2),
            ((1 << 64) - 1, 200_000),
            (0, node.size + 1),
        ):
            with pytest.raises(StorageError, match="beyond the end") as caught:
                await CALLS[name](client, offset, length)
            assert caught.value.errno == expected
        await CALLS[name](client, node.size - 1, 1)
    assert node.size == len(node.data)


@pytest.mark.parametrize("name", ["read", *MODIFYING, "cache"])
async def test_empty_requests_succeed(either: MemoryNode, tmp_path: Path, name: str) -> None:
    async with serving(either, tmp_path) as at, await at.client() as client:
        await CALLS[name](client, 0, 0)
        await CALLS[name](client, either.size, 0)
    assert either.log == []


@pytest.mark.parametrize("length", [4096, MIB])
@pytest.mark.parametrize("name", MODIFYING)
async def test_a_read_only_export_refuses_changes(tmp_path: Path, name: str, length: int) -> None:
    node = MemoryNode(2 * MIB, read_only=True)
    async with serving(node, tmp_path, writable=False) as at, await at.client() as client:
        assert client.is_read_only
        with pytest.raises(StorageError, match="read-only") as caught:
            await CALLS[name](client, 0, length)
        assert caught.value.errno == errno.EPERM
        await client.flush()
        assert await client.read(0, 512) == bytes(512)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
async def test_a_failing_disk_fails_one_request(
    either: MemoryNode, tmp_path: Path, name: str, code: int
) -> None:
    async with serving(either, tmp_path) as at, await at.client() as client:
        either.error = StorageError("the disk is on fire", errno=code)
        with pytest.raises(StorageError, match="on fire") as caught:
            await CALLS[name](client, 0, MIB if name == "write" else 4096)
        assert caught.value.errno == code
        either.error = None
        await CALLS[name](client, 0, 4096)


async def test_a_bug_inside_fails_one_request(
    node: MemoryNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken() -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(node, "flush", broken)
    async with serving(node, tmp_path) as at, await at.client() as client:
        with pytest.raises(StorageError, match="internal error") as caught:
            await client.flush()
        assert caught.value.errno == errno.EIO
        assert await client.read(0, 16) == bytes(16)
    assert "a bug" in caplog.text


async def test_a_bug_on_the_fast_path_costs_the_connection(
    node: MemoryNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(offset: int, length: int) -> None:
        raise ZeroDivisionError("a bug")

    async with serving(node, tmp_path) as at:
        async with await at.client() as client:
            monkeypatch.setattr(node, "read_nowait", broken)
            with pytest.raises(StorageError) as caught:
                await client.read(0, 16)
            assert caught.value.errno == errno.ENOTCONN
        monkeypatch.undo()
        async with await at.client() as client:
            assert await client.read(0, 16) == bytes(16)
    assert "a bug" in caplog.text


@pytest.mark.parametrize(
    ("command", "flags"),
    [(8, 0), (999, 0), (nbd.CMD_READ, 1 << 7), (nbd.CMD_WRITE_ZEROES, nbd.CMD_FLAG_REQ_ONE)],
)
async def test_unknown_commands_and_flags(node: MemoryNode, tmp_path: Path, command: int, flags: int) -> None:
    async with serving(node, tmp_path) as at, await at.raw() as raw:
        await transmitting(raw)
        raw.send(pack(command, 3, 0, 512, flags))
        assert await raw.receive(16) == transmission.pack_simple_reply(3, nbd.EINVAL)
        raw.send(pack(nbd.CMD_FLUSH, 4, 0, 0))
        assert await raw.receive(16) == transmission.pack_simple_reply(4)


async def test_disc_answers_what_was_asked_before(node: MemoryNode, tmp_path: Path) -> None:
    node.nowait = False
    async with serving(node, tmp_path) as at, await at.raw() as raw:
        await transmitting(raw)
        raw.send(pack(nbd.CMD_WRITE, 1, 0, 4) + b"last" + pack(nbd.CMD_DISC, 2, 0, 0) + b"ignored" * 100)
        assert await raw.rest() == transmission.pack_simple_reply(1)
        assert node.data[:4] == b"last"


async def test_a_grown_disk_is_served_whole(node: MemoryNode, tmp_path: Path) -> None:
    async with serving(node, tmp_path) as at, await at.client() as client:
        await node.resize(node.size + 4096)
        await client.write(node.size - 4096, b"new")
        assert await client.read(node.size - 4096, 3) == b"new"


async def test_a_request_is_checked_again_after_it_was_held(node: MemoryNode, tmp_path: Path) -> None:
    async with serving(node, tmp_path) as at, await at.client() as client, asyncio.TaskGroup() as tasks:
        async with at.root.drained():
            write = tasks.create_task(refused(client, node.size - 512))
            await at_server(at, client)
            await node.resize(4096)
        assert await write == errno.ENOSPC


async def refused(client: NbdClient, offset: int) -> int:
    with pytest.raises(StorageError) as caught:
        await client.write(offset, bytes(512))
    return caught.value.errno


async def at_server(at: Serving, client: NbdClient) -> None:
    """Return when the server has taken everything `client` sent before: it answers a refused request."""
    with pytest.raises(StorageError):
        await client.read(1 << 40, 1)


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (StorageError("", errno=errno.ENOSPC), nbd.ENOSPC),
        (StorageError("", errno=errno.EDQUOT), nbd.ENOSPC),
        (StorageError("", errno=errno.EROFS), nbd.EPERM),
        (StorageError("", errno=errno.EBADF), nbd.EIO),
        (RequestError("", kind=ErrorKind.READ_ONLY), nbd.EPERM),
        (RequestError("", kind=ErrorKind.NOT_SUPPORTED), nbd.ENOTSUP),
        (RequestError(""), nbd.EINVAL),
        (ImageError(""), nbd.EIO),
    ],
)
def test_error_table(error: BlockdError, number: int) -> None:
    assert nbd_error(error) == number

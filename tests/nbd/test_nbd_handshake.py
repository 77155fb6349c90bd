"""Haggling: every option, every way to end it, and every wrong way to go about it."""

from pathlib import Path

import pytest

from blockd.block.root import Root
from blockd.errors import PeerError
from blockd.exports.nbd.export import Export
from blockd.exports.nbd.handshake import Handshake
from blockd.wire.nbd import constants as nbd
from blockd.wire.nbd import haggling
from blockd.wire.nbd.haggling import GoOption, MetaOption
from tests.nbd.memory_node import MemoryNode
from tests.nbd.serving import CLIENT_FLAGS, go, serving

EXPORTS = [("disk", "the disk"), ("other", "")]


@pytest.fixture
async def handshake() -> Handshake:
    """A haggling whose greeting is sent and whose client flags are known, with two exports."""
    root = Root(MemoryNode(1 << 20))
    exports = {name: Export(name, root, True, text, name) for name, text in EXPORTS}
    handshake = Handshake(exports)
    assert haggling.parse_greeting(handshake.replies.pop()) == 3
    say(handshake, CLIENT_FLAGS)
    return handshake


def say(handshake: Handshake, data: bytes) -> list[tuple[int, bytes]]:
    """Hand `data` over, all of which must be used; return the replies: type and data."""
    assert handshake.take(memoryview(data)) == len(data)
    replies = [
        (haggling.parse_option_reply(r).reply, r[haggling.OPTION_REPLY_HEADER_SIZE :])
        for r in handshake.replies
    ]
    handshake.replies.clear()
    return replies


def option(handshake: Handshake, number: int, data: bytes = b"") -> list[tuple[int, bytes]]:
    return say(handshake, haggling.pack_option(number, data))


def types(replies: list[tuple[int, bytes]]) -> list[int]:
    return [reply for reply, _ in replies]


def meta(name: str, *queries: str) -> bytes:
    return haggling.pack_meta(MetaOption(name, list(queries)))


async def test_go_ends_the_haggling_with_what_was_agreed(handshake: Handshake) -> None:
    assert types(option(handshake, nbd.OPT_STRUCTURED_REPLY)) == [nbd.REP_ACK]
    [(reply, context), (end, _)] = option(
        handshake, nbd.OPT_SET_META_CONTEXT, meta("disk", "base:allocation", "x:y")
    )
    assert (reply, end) == (nbd.REP_META_CONTEXT, nbd.REP_ACK)
    assert haggling.parse_meta_context(context) == (0, "base:allocation")
    asked = [nbd.INFO_NAME, nbd.INFO_DESCRIPTION, nbd.INFO_BLOCK_SIZE]
    replies = option(handshake, nbd.OPT_GO, haggling.pack_go(GoOption("disk", asked)))
    assert types(replies) == [nbd.REP_INFO] * 4 + [nbd.REP_ACK]
    info = haggling.parse_info_export(replies[3][1])
    assert info.size == 1 << 20
    assert (
        info.flags == 0b1101_1110_1101
    )  # FAST_ZERO CACHE MULTI_CONN DF WRITE_ZEROES TRIM FUA FLUSH HAS_FLAGS
    assert replies[0][1] == b"\0\1disk"
    assert replies[1][1] == b"\0\2the disk"
    assert replies[2][1] == bytes.fromhex("0003 00000001 00001000 02000000")
    assert handshake.terms is not None
    assert handshake.terms.export.name == "disk"
    assert handshake.terms.structured
    assert handshake.terms.contexts == ("base:allocation",)


@pytest.mark.parametrize(
    ("name", "shown"),
    [("x", "x"), ("a" * 79, "a" * 79), ("a" * 80, "a" * 80 + "..."), ("a" * 81, "a" * 80 + "...")],
)
async def test_what_is_not_there_is_named_as_by_qemu(handshake: Handshake, name: str, shown: str) -> None:
    [(reply, text)] = option(handshake, nbd.OPT_GO, haggling.pack_go(GoOption(name, [])))
    assert (reply, text.decode()) == (nbd.REP_ERR_UNKNOWN, f"export '{shown}' not present")


async def test_info_tells_the_same_and_goes_on(handshake: Handshake) -> None:
    replies = option(handshake, nbd.OPT_INFO, haggling.pack_go(GoOption("disk", [])))
    assert [data[:2] for _, data in replies] == [b"\0\2", b"\0\3", b"\0\0", b""]
    assert haggling.parse_info_export(replies[2][1]).flags & nbd.TRANSMISSION_SEND_DF == 0
    assert handshake.terms is None
    assert option(handshake, nbd.OPT_GO, haggling.pack_go(GoOption("disk", []))) == replies


async def test_contexts_hold_for_their_own_export_only(handshake: Handshake) -> None:
    option(handshake, nbd.OPT_STRUCTURED_REPLY)
    option(handshake, nbd.OPT_SET_META_CONTEXT, meta("other", "base:allocation"))
    option(handshake, nbd.OPT_GO, haggling.pack_go(GoOption("disk", [])))
    assert handshake.terms is not None
    assert not handshake.terms.contexts


async def test_list_names_every_export(handshake: Handshake) -> None:
    replies = option(handshake, nbd.OPT_LIST)
    assert types(replies) == [nbd.REP_SERVER, nbd.REP_SERVER, nbd.REP_ACK]
    assert [haggling.parse_listed(data) for _, data in replies[:2]] == EXPORTS


async def test_list_meta_context(handshake: Handshake) -> None:
    option(handshake, nbd.OPT_STRUCTURED_REPLY)
    for queries in ((), ("base:",), ("base:allocation",)):
        replies = option(handshake, nbd.OPT_LIST_META_CONTEXT, meta("disk", *queries))
        assert types(replies) == [nbd.REP_META_CONTEXT, nbd.REP_ACK]
    assert types(option(handshake, nbd.OPT_LIST_META_CONTEXT, meta("disk", "qemu:"))) == [nbd.REP_ACK]
    assert types(option(handshake, nbd.OPT_SET_META_CONTEXT, meta("disk", "base:"))) == [nbd.REP_ACK]


async def test_abort_is_acknowledged(handshake: Handshake) -> None:
    assert types(option(handshake, nbd.OPT_ABORT)) == [nbd.REP_ACK]
    assert handshake.is_aborted


@pytest.mark.parametrize(
    ("number", "data", "reply"),
    [
        (77, b"anything", nbd.REP_ERR_UNSUP),
        (nbd.OPT_STARTTLS, b"", nbd.REP_ERR_UNSUP),
        (nbd.OPT_GO, haggling.pack_go(GoOption("nothing", [])), nbd.REP_ERR_UNKNOWN),
        (nbd.OPT_GO, haggling.pack_go(GoOption("", [])), nbd.REP_ERR_UNKNOWN),  # two exports: no default
        (nbd.OPT_INFO, b"\0", nbd.REP_ERR_INVALID),
        (nbd.OPT_GO, b"\xff\xff\xff\xff", nbd.REP_ERR_INVALID),
        (nbd.OPT_GO, b"\0\0\0\1\xff\0\0", nbd.REP_ERR_INVALID),  # not UTF-8
        (nbd.OPT_GO, haggling.pack_go(GoOption("n" * 4097, [])), nbd.REP_ERR_INVALID),
        (nbd.OPT_LIST, b"x", nbd.REP_ERR_INVALID),
        (nbd.OPT_STRUCTURED_REPLY, b"x", nbd.REP_ERR_INVALID),
        (nbd.OPT_SET_META_CONTEXT, meta("disk"), nbd.REP_ERR_INVALID),  # before structured replies
        (nbd.OPT_LIST_META_CONTEXT, meta("disk"), nbd.REP_ERR_INVALID),
    ],
)
async def test_a_wrong_option_gets_an_error_and_the_haggling_goes_on(
    handshake: Handshake, number: int, data: bytes, reply: int
) -> None:
    [(got, text)] = option(handshake, number, data)
    assert got == reply
    assert text
    assert types(option(handshake, nbd.OPT_GO, haggling.pack_go(GoOption("disk", []))))[-1] == nbd.REP_ACK


async def test_contexts_of_an_unknown_export(handshake: Handshake) -> None:
    option(handshake, nbd.OPT_STRUCTURED_REPLY)
    for number in (nbd.OPT_SET_META_CONTEXT, nbd.OPT_LIST_META_CONTEXT):
        assert types(option(handshake, number, meta("nothing", "base:allocation"))) == [nbd.REP_ERR_UNKNOWN]


@pytest.mark.parametrize(
    "data",
    [
        b"GARBAGE!" * 3,
        haggling.pack_option(nbd.OPT_EXPORT_NAME, b"nothing"),
        haggling.pack_option(nbd.OPT_EXPORT_NAME, b"n" * 4097),
        haggling.pack_option(nbd.OPT_GO, bytes(nbd.OPTION_LENGTH_MAX + 1)),
    ],
)
async def test_what_breaks_the_framing_ends_the_connection(handshake: Handshake, data: bytes) -> None:
    with pytest.raises(PeerError):
        handshake.take(memoryview(data))


async def test_option_length_and_count_at_their_limits(handshake: Handshake) -> None:
    assert types(option(handshake, 99, bytes(nbd.OPTION_LENGTH_MAX))) == [nbd.REP_ERR_UNSUP]
    for _ in range(nbd.OPTION_COUNT_MAX - 1):
        option(handshake, 99)
    with pytest.raises(PeerError, match="more than 1024 options"):
        handshake.take(memoryview(haggling.pack_option(99)))


async def test_unknown_client_flags_end_the_connection() -> None:
    with pytest.raises(PeerError, match="unknown client flags"):
        Handshake({}).take(memoryview(haggling.pack_client_flags(4)))


@pytest.mark.parametrize("flags", [0, nbd.FLAG_FIXED_NEWSTYLE])
async def test_export_name_pads_its_reply_unless_told_not_to(flags: int) -> None:
    handshake = Handshake({"disk": Export("disk", Root(MemoryNode(4096, read_only=True)), False)})
    handshake.replies.clear()
    data = haggling.pack_client_flags(flags) + haggling.pack_option(nbd.OPT_EXPORT_NAME, b"")
    assert handshake.take(memoryview(data)) == len(data)
    [reply] = handshake.replies
    assert len(reply) == 8 + 2 + 124
    assert int.from_bytes(reply[:8], "big") == 4096
    assert reply[9] & nbd.TRANSMISSION_READ_ONLY
    assert handshake.terms is not None


async def test_other_options_need_a_fixed_newstyle_client() -> None:
    data = haggling.pack_client_flags(0) + haggling.pack_option(nbd.OPT_LIST)
    with pytest.raises(PeerError, match="not fixed newstyle"):
        Handshake({}).take(memoryview(data))


async def test_abort_and_too_long_an_option_close_after_their_reply(node: MemoryNode, tmp_path: Path) -> None:
    async with serving(node, tmp_path) as at:
        for sent, reply in (
            (haggling.pack_option(nbd.OPT_ABORT), nbd.REP_ACK),
            (haggling.pack_option(nbd.OPT_LIST, bytes(40_000)), nbd.REP_ERR_TOO_BIG),
        ):
            async with await at.raw() as raw:
                raw.send(CLIENT_FLAGS + sent)
                assert (await raw.option_reply())[0] == reply
                assert await raw.rest() == b""


async def test_a_client_may_leave_after_any_byte_of_the_handshake(node: MemoryNode, tmp_path: Path) -> None:
    data = go(structured=True)
    async with serving(node, tmp_path) as at:
        for length in range(len(data) + 1):
            async with await at.raw() as raw:
                raw.send(data[:length])
        await at.until_connections(0)
        async with await at.client() as client:
            assert client.size == node.size


async def test_slow_haggling_is_cut_off(node: MemoryNode, tmp_path: Path) -> None:
    async with serving(node, tmp_path, haggling_limit_s=0.05) as at:
        raw = await at.raw()
        raw.send(CLIENT_FLAGS)
        assert await raw.rest() == b""
        await raw.close()


async def test_the_limit_is_for_haggling_only(node: MemoryNode, tmp_path: Path) -> None:
    async with serving(node, tmp_path, haggling_limit_s=0.2) as at, await at.client() as client:
        silent = await at.raw()
        assert await silent.rest() == b""  # the limit has passed for a client that came later
        await silent.close()
        assert await client.read(0, 16) == bytes(16)

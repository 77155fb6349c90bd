"""The codec: what is packed can be parsed, and garbage raises PeerError and nothing else."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockd.errors import PeerError
from blockd.wire.nbd import constants as nbd
from blockd.wire.nbd import haggling, transmission
from blockd.wire.nbd.haggling import ExportInfo, GoOption, MetaOption
from blockd.wire.nbd.transmission import Request, StatusRun

names = st.text(max_size=200).filter(lambda text: len(text.encode()) <= nbd.NAME_LENGTH_MAX)
u16 = st.integers(0, 0xFFFF)
u32 = st.integers(0, 0xFFFFFFFF)
u64 = st.integers(0, (1 << 64) - 1)
infos = st.builds(ExportInfo, u64, u16)


@given(st.builds(GoOption, names, st.lists(u16, max_size=20)))
def test_go_round_trip(go: GoOption) -> None:
    assert haggling.parse_go(haggling.pack_go(go)) == go


@given(st.builds(MetaOption, names, st.lists(names, max_size=10)))
def test_meta_round_trip(meta: MetaOption) -> None:
    assert haggling.parse_meta(haggling.pack_meta(meta)) == meta


@given(u32, st.binary(max_size=100))
def test_option_round_trip(option: int, data: bytes) -> None:
    packed = haggling.pack_option(option, data)
    assert haggling.parse_option_header(packed) == (option, len(data))
    assert packed[haggling.OPTION_HEADER_SIZE :] == data


@given(u32, u32, st.binary(max_size=100))
def test_option_reply_round_trip(option: int, reply: int, data: bytes) -> None:
    packed = haggling.pack_option_reply(option, reply, data)
    assert haggling.parse_option_reply(packed) == (option, reply, len(data))
    assert packed[haggling.OPTION_REPLY_HEADER_SIZE :] == data


@given(infos, names, names, u32)
def test_information_round_trip(info: ExportInfo, name: str, description: str, context_id: int) -> None:
    assert haggling.parse_info_export(haggling.pack_info_export(info)) == info
    assert haggling.parse_info_type(haggling.pack_info_text(nbd.INFO_NAME, name)) == nbd.INFO_NAME
    assert haggling.parse_listed(haggling.pack_listed(name, description)) == (name, description)
    assert haggling.parse_meta_context(haggling.pack_meta_context(context_id, name)) == (context_id, name)


@given(st.builds(Request, u16, u16, u64, u64, u32))
def test_request_round_trip(request: Request) -> None:
    assert transmission.parse_request(transmission.pack_request(request)) == request


@given(u64, u64, st.integers(0, nbd.REQUEST_LENGTH_MAX), u32)
def test_reply_round_trip(cookie: int, offset: int, length: int, error: int) -> None:
    assert transmission.parse_simple_reply(transmission.pack_simple_reply(cookie, error)) == (error, cookie)
    data = transmission.pack_data_header(cookie, offset, length)
    head = transmission.parse_chunk(data)
    assert head == (nbd.CHUNK_FLAG_DONE, nbd.CHUNK_OFFSET_DATA, cookie, length + transmission.OFFSET_SIZE)
    assert transmission.parse_data_offset(data[transmission.CHUNK.size :]) == offset
    hole = transmission.pack_hole(cookie, offset, length)
    assert transmission.parse_hole(hole[transmission.CHUNK.size :]) == (offset, length)


@given(u64, u32, st.text(max_size=100))
def test_error_round_trip(cookie: int, error: int, text: str) -> None:
    packed = transmission.pack_error(cookie, error, text)
    payload = packed[transmission.CHUNK.size :]
    assert transmission.parse_chunk(packed).length == len(payload)
    assert transmission.parse_error(payload) == (error, text)


@given(u64, u32, st.lists(st.builds(StatusRun, u32, u32), min_size=1, max_size=50))
def test_block_status_round_trip(cookie: int, context_id: int, runs: list[StatusRun]) -> None:
    packed = transmission.pack_block_status(cookie, context_id, runs)
    payload = packed[transmission.CHUNK.size :]
    assert transmission.parse_chunk(packed).length == len(payload)
    assert transmission.parse_block_status(payload) == (context_id, runs)


PARSERS: list[Callable[[bytes], object]] = [
    haggling.parse_greeting,
    haggling.parse_client_flags,
    haggling.parse_option_header,
    haggling.parse_go,
    haggling.parse_meta,
    haggling.parse_name,
    haggling.parse_option_reply,
    haggling.parse_listed,
    haggling.parse_info_export,
    haggling.parse_info_type,
    haggling.parse_meta_context,
    transmission.parse_request,
    transmission.parse_reply_magic,
    transmission.parse_simple_reply,
    transmission.parse_chunk,
    transmission.parse_data_offset,
    transmission.parse_hole,
    transmission.parse_error,
    transmission.parse_block_status,
]


@pytest.mark.parametrize("parse", PARSERS, ids=lambda parse: parse.__name__)
@given(st.binary(max_size=80) | st.binary(min_size=4, max_size=4).map(lambda tail: b"\0\0\0\4abcd" + tail))
def test_garbage_raises_peer_error_only(parse: Callable[[bytes], object], data: bytes) -> None:
    try:
        parse(data)
    except PeerError as error:
        assert error.message


def test_text_of_an_error_is_cut_to_its_limit() -> None:
    payload = transmission.pack_error(1, nbd.EIO, "ä" * 5000)[transmission.CHUNK.size :]
    assert len(payload) <= transmission.ERROR_TEXT_MAX + 6


def test_bounds_of_names_and_queries() -> None:
    longest = "n" * nbd.NAME_LENGTH_MAX
    assert haggling.parse_go(haggling.pack_go(GoOption(longest, []))).name == longest
    with pytest.raises(PeerError, match="at most 4096"):
        haggling.parse_go(haggling.pack_go(GoOption(longest + "n", [])))
    queries = ["q"] * nbd.QUERY_COUNT_MAX
    assert haggling.parse_meta(haggling.pack_meta(MetaOption("", queries))).queries == queries
    with pytest.raises(PeerError, match="at most 64"):
        haggling.parse_meta(haggling.pack_meta(MetaOption("", [*queries, "q"])))

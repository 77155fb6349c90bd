"""The JSON reader: what it accepts, what it says about the rest, and that it always goes on."""

import sys
from collections.abc import Iterable
from types import FrameType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockd.wire.qmp import LongText, ParseError, Value, lexer, reader, text
from blockd.wire.qmp.lexer import PART_LENGTH, STRAY_LENGTH_MAX
from blockd.wire.qmp.reader import (
    MESSAGE_LENGTH_MAX,
    NESTING_MAX,
    NUMBER_LENGTH_MAX,
    TOKEN_COUNT_MAX,
    JsonReader,
)
from blockd.wire.qmp.writer import pack_message

CHUNK_LENGTH = 1 << 20


def read_pieces(pieces: Iterable[bytes]) -> list[Any]:
    """Read a stream that arrives in pieces; errors stand as their text."""
    stream = JsonReader()
    messages = [message for piece in pieces for message in stream.feed(piece)]
    return [f"! {message.message}" if isinstance(message, ParseError) else message for message in messages]


def read(data: bytes, chunk_length: int = CHUNK_LENGTH) -> list[Any]:
    return read_pieces(data[start : start + chunk_length] for start in range(0, len(data), chunk_length))


def parse_error(text: str) -> str:
    return f"! JSON parse error, {text}"


def stray(text: str) -> str:
    return parse_error(f"stray '{text}'")


EXPECTING_VALUE = parse_error("expecting value")

# The stream, and what is read from it.
STREAMS: list[tuple[bytes, list[Any]]] = [
    # Values, and where messages end.
    (b'{"a": [1, {"b": null}], "c": true}', [{"a": [1, {"b": None}], "c": True}]),
    (b"{}[]{}", [{}, [], {}]),
    (b'  {"a"\n:\t1}\r\n', [{"a": 1}]),
    (b"true false null ", [True, False, None]),
    (b"\"a\"'b'", ["a", "b"]),
    (b"{'a': 'it\\'s \"x\"'}", [{"a": 'it\'s "x"'}]),
    (b"[1,2", []),
    (b"12", []),  # more digits may follow
    # Numbers.
    (b"0 -0 7 -12 ", [0, 0, 7, -12]),
    (b"9223372036854775807 9223372036854775808 ", [(1 << 63) - 1, 1 << 63]),
    (b"18446744073709551615 18446744073709551616 ", [(1 << 64) - 1, 18446744073709551616.0]),
    (b"-9223372036854775808 -9223372036854775809 ", [-(1 << 63), -9223372036854775809.0]),
    (b"1.5 1e3 1E+2 25e-1 0.25 ", [1.5, 1000.0, 100.0, 2.5, 0.25]),
    (b"01 ", [stray("01")]),
    (b"+1 ", [stray("+")]),
    (b"1. ", [stray("1. ")]),
    (b"1e} ", [stray("1e}")]),
    (b"-x ", [stray("-x")]),
    (b".5 ", [stray(".")]),
    (b"0e1 ", [0, parse_error("invalid keyword 'e'"), 1]),
    (b"NaN ", [stray("N")]),
    # Keywords.
    (b"tru ", [parse_error("invalid keyword 'tru'")]),
    (b"[nil]", [parse_error("invalid keyword 'nil'")]),
    (b"x" * 2000 + b" ", [parse_error(f"invalid keyword '{'x' * 1006}")]),
    # Strings.
    (rb'"\" \\ \/ \b \f \n \r \t \u00e9 \ud83d\ude00"', ['" \\ / \b \f \n \r \t é 😀']),
    (b'"\xc3\xa9 \xf0\x9f\x98\x80 \x7f"', ["é 😀 \x7f"]),
    (b'"a\xc0\x80b" "\\u0000"', ["a\0b", "\0"]),
    (rb'"\q"', [parse_error("invalid escape sequence in string")]),
    (b'"\\\xc3\xa9"', [parse_error("invalid escape sequence in string")]),
    (rb'"\u12"', [parse_error('\\u12" is not a valid Unicode character')]),
    (rb'"\ud800"', [parse_error("\\ud800 is not a valid Unicode character")]),
    (rb'"\ud800\n"', [parse_error("\\ud800 is not a valid Unicode character")]),
    (rb'"\ud800\ud800"', [parse_error("\\ud800 is not a valid Unicode character")]),
    (rb'"\udc00"', [parse_error("\\udc00 is not a valid Unicode character")]),
    (rb'"\uffff"', [parse_error("\\uffff is not a valid Unicode character")]),
    (rb'"\uD83F\uDFFE"', [parse_error("\\uD83F\\uDFFE is not a valid Unicode character")]),
    (b'"\xed\xa0\x80"', [parse_error("invalid UTF-8 sequence in string")]),
    (b'"\xef\xbf\xbf"', [parse_error("invalid UTF-8 sequence in string")]),
    (b'"\xc1\x81"', [parse_error("invalid UTF-8 sequence in string")]),
    (b'"\xf4\x90\x80\x80"', [parse_error("invalid UTF-8 sequence in string")]),
    (b'"\x80\\q"', [parse_error("invalid UTF-8 sequence in string")]),
    (b'"\\q\x80"', [parse_error("invalid escape sequence in string")]),
    # Structure.
    (b"{]", [EXPECTING_VALUE]),
    (b"[}", [EXPECTING_VALUE]),
    (b'{"execute": }', [EXPECTING_VALUE]),
    (b'{"execute"}', [parse_error("missing : in object pair")]),
    (b'{"a" 1}', [parse_error("missing : in object pair")]),
    (b"{1:2}", [parse_error("key is not a string in object")]),
    (b"{[1]:2}", [parse_error("key is not a string in object")]),
    (b"{[1 2]:2}", [parse_error("expected separator in list")]),
    (b'{"a":1 "b":2}', [parse_error("expected separator in dict")]),
    (b'{"a":1]', [parse_error("expected separator in dict")]),
    (b"[1 2]", [parse_error("expected separator in list")]),
    (b"[1}", [parse_error("expected separator in list")]),
    (b"[1,]", [EXPECTING_VALUE]),
    (b'{"a":1,}', [EXPECTING_VALUE]),
    (b'{"a":1,"a":2}', [parse_error("duplicate key")]),
    (b'{"a":1,"a":tru}', [parse_error("invalid keyword 'tru'")]),
    (b"[1 2, 3 4, {]][]", [parse_error("expected separator in list"), []]),
    (b"}]:,", [EXPECTING_VALUE] * 4),
    # Lexical errors end the message; what follows is skipped up to a byte that may start anew.
    (b'{\xff{"a":1}', [stray("\ufffd"), {"a": 1}]),
    (b"{\x01[1]", [stray("\x01"), [1]]),
    (b"\xef\xbb\xbf{}", [stray("\ufffd"), {}]),
    (b'"abc\n1 \n2 ', [stray('"abc\n'), 2]),
    (b'"abc\\\n1 \r2 ', [stray('"abc\\\n'), 2]),
    (b"'\xc3\xff[]", [stray("'\ufffd\ufffd"), []]),
    (b"%d 1 true\t2\n3 ", [stray("%"), 3]),
    (b"% 'x' \x02 1 [2]", [stray("%"), stray("\x02"), [2]]),
    (b"% 1,2 ", [stray("%"), EXPECTING_VALUE, 2]),
    (b"\x00", [stray("")]),
    (b"'" + b"a" * 3000 + b"\n", [stray("'" + "a" * (STRAY_LENGTH_MAX - 1))]),
]


@pytest.mark.parametrize(("data", "expected"), STREAMS, ids=[repr(data)[:50] for data, _ in STREAMS])
def test_streams(data: bytes, expected: list[Any]) -> None:
    assert read(data) == expected
    assert [type(value) for value in read(data)] == [type(value) for value in expected]


@pytest.mark.parametrize(("data", "expected"), STREAMS, ids=[repr(data)[:50] for data, _ in STREAMS])
def test_split_anywhere(data: bytes, expected: list[Any]) -> None:
    assert read(data, chunk_length=1) == expected
    for split in range(len(data)):
        assert read_pieces([data[:split], data[split:]]) == expected


def test_the_command_after_an_error_is_read() -> None:
    for data, _ in STREAMS:
        assert read(data + b'\xff{"execute": "stop"}')[-1] == {"execute": "stop"}


# -- limits -----------------------------------------------------------------------------------


# What follows a message that is too large: it is read as if nothing had been.
NEXT = b'{"execute": "stop"}'
STOP = {"execute": "stop"}


def test_nesting_limit() -> None:
    deepest = b"[" * NESTING_MAX + b"]" * NESTING_MAX
    assert len(read(deepest)) == 1
    for opening, closing in [(b"[", b"]"), (b'{"a":', b"}"), (b'[{"a":', b"}]")]:
        deeper = opening * (NESTING_MAX + 1) + b"{}" + closing * (NESTING_MAX + 1)
        assert read(deeper + NEXT) == ["! JSON nesting depth limit exceeded", STOP]


def test_token_count_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert TOKEN_COUNT_MAX == 2 << 20
    monkeypatch.setattr(reader, "TOKEN_COUNT_MAX", 1001)
    assert read(b"[" + b"1," * 499 + b"1]") == [[1] * 500]
    assert read(b"[" + b"1," * 2000 + b"1]" + NEXT) == ["! JSON token count limit exceeded", STOP]


def test_message_length_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MESSAGE_LENGTH_MAX == 64 << 20
    monkeypatch.setattr(reader, "MESSAGE_LENGTH_MAX", 100_000)
    assert read(b'["' + b"a" * 99_995 + b'"]') == [["a" * 99_995]]
    for length in (99_996, 99_997, 300_000):
        longer = b'["' + b"a" * length + b'"]'
        assert read(longer + NEXT) == ["! JSON token size limit exceeded", STOP]


def test_number_length_limit() -> None:
    assert read(b"1" * NUMBER_LENGTH_MAX + b" ") == [float("inf")]
    assert read(b"[0." + b"1" * (3 * NUMBER_LENGTH_MAX) + b"]" + NEXT) == [
        "! JSON token size limit exceeded",
        STOP,
    ]


def test_client_resynchronises_in_a_message_that_is_too_large() -> None:
    assert read(b"[" * 2000 + b"\xff" + NEXT) == [
        "! JSON nesting depth limit exceeded",
        stray("\ufffd"),
        STOP,
    ]


@pytest.mark.slow
def test_messages_as_large_as_they_may_be() -> None:
    longest = b'"' + b"a" * (MESSAGE_LENGTH_MAX - 3) + b'"'
    (message,) = read(longest)
    assert sum(map(len, message.parts)) == MESSAGE_LENGTH_MAX - 3
    assert read(longest[:-1] + b'aa"' + NEXT) == ["! JSON token size limit exceeded", STOP]
    most_tokens = b"[" + b"1," * (TOKEN_COUNT_MAX // 2 - 1) + b"1]"
    assert read(most_tokens) == ["! JSON token count limit exceeded"]
    assert len(read(most_tokens.replace(b"1,", b"", 1))[0]) == TOKEN_COUNT_MAX // 2 - 1


# -- long strings, which come in parts ----------------------------------------------------------


@pytest.mark.parametrize("part_length", [1, 2, 3, 5, 7, 13])
def test_streams_are_the_same_in_parts(part_length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lexer, "PART_LENGTH", part_length)
    for data, expected in STREAMS:
        assert read(data) == expected


def test_mistakes_beside_long_strings() -> None:
    long = b'"' + b"x" * (2 * PART_LENGTH) + b'"'
    wrong = b'"' + b"x" * (2 * PART_LENGTH) + b'\\q"'
    assert read(b"[1 " + wrong + b"]") == [parse_error("expected separator in list")]
    assert read(b"[" + wrong + b" 1]") == [parse_error("invalid escape sequence in string")]
    assert read(b"[" + long + b" 1]" + long) == [
        parse_error("expected separator in list"),
        "x" * (2 * PART_LENGTH),
    ]
    assert read(long[:-1] + b"\n[]") == [stray('"' + "x" * (STRAY_LENGTH_MAX - 1)), []]
    assert read(b"'" + b"\\u00e9\xe2\x82\xac" * PART_LENGTH + b"'") == ["é€" * PART_LENGTH]


def test_very_long_strings_stay_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "TEXT_LENGTH_MAX", 3 * PART_LENGTH)
    fits = b'"' + b"x" * (3 * PART_LENGTH) + b'"'
    assert read(fits) == ["x" * (3 * PART_LENGTH)]
    longer = b'"\\u00E9\\uD83D\\uDE00' + b"x" * (3 * PART_LENGTH) + b'\\u007F"'
    (message,) = read(longer)
    assert isinstance(message, LongText)
    assert pack_message({"id": message}) == b'{"id": ' + longer + b"}\r\n"
    assert read(b'{"a": 1, ' + longer + b": 2}") == [parse_error("key is too long")]


# -- time -------------------------------------------------------------------------------------

# One unit of each, repeated: all of what could be slow.
REPEATED = [
    *(b"[", b"]", b"1 ", b"a", b'"', b'"a', b"\\", b'"\\n'),
    *(b"\x01", b"{]", b'{"a":1}', b"1.5,", b"\\u00e9", b"'\xc3\n"),
    # Inside of one long string.
    *(b"\x80", b"\xc3", b"\xc3\x80\x80\x80\x80\x80", b"\\u", b"\\ud83d", b"\\\\"),
]


def count_steps(data: bytes, chunk_length: int) -> int:
    """Count the lines of Python run while reading `data`."""
    steps = 0

    def trace(frame: FrameType, event: str, _argument: object) -> Any:
        nonlocal steps
        steps += event == "line"
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        read(data, chunk_length)
    finally:
        sys.settrace(previous)
    return steps


@pytest.mark.parametrize("unit", REPEATED)
@pytest.mark.parametrize("chunk_length", [1, 1 << 20])
def test_steps_grow_with_the_input_and_not_faster(
    unit: bytes, chunk_length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lexer, "PART_LENGTH", 64)
    for start in (b"", b'"'):
        short = count_steps(start + unit * 200, chunk_length)
        long = count_steps(start + unit * 800, chunk_length)
        assert long < 4.4 * short + 400


def test_every_byte_is_matched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The patterns do the work that is not counted as steps: what they match must add up to the input."""
    data = b'{"abc": "' + b"x" * 5000 + b'", "d": 123456, \'e\': "' + rb"\n\u00e9" * 500 + b'"}'
    stream = JsonReader()
    lexer = stream._lexer
    run, passed = type(lexer)._run, []

    def counted(self: Any, piece: bytes, position: int) -> int:
        end = run(self, piece, position)
        passed.append(end - position)
        return end

    monkeypatch.setattr(type(lexer), "_run", counted)
    for start in range(0, len(data), 7):
        stream.feed(data[start : start + 7])
    assert sum(passed) <= len(data)


# -- random input -----------------------------------------------------------------------------

NONCHARACTERS = [
    *range(0xFDD0, 0xFDF0),
    *(plane | low for plane in range(0, 0x110000, 0x10000) for low in (0xFFFE, 0xFFFF)),
]
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="".join(map(chr, NONCHARACTERS))))
values: st.SearchStrategy[Value] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False, allow_infinity=False).filter(lambda value: not value.is_integer())
    | texts,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(texts, inner, max_size=5),
    max_leaves=20,
)


@given(values, st.booleans(), st.integers(1, 50))
def test_what_is_written_is_read_back(value: Value, pretty: bool, chunk_length: int) -> None:
    assert read(pack_message(value, pretty=pretty), chunk_length) == [value]


@given(values, st.data())
def test_mutated_streams_never_raise_and_always_resynchronise(value: Value, data: st.DataObject) -> None:
    stream = bytearray(pack_message({"execute": "x", "id": value}))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(stream)))
        end = start + data.draw(st.integers(0, 3))
        stream[start:end] = data.draw(
            st.binary(max_size=4) | st.sampled_from([b"{", b"]", b'"', b"\\", b"\xff"])
        )
    whole = bytes(stream) + b'\xff{"execute": "stop"}'
    assert read(whole)[-1] == {"execute": "stop"}
    assert read(whole, chunk_length=3) == read(whole)


@given(st.binary(max_size=200))
def test_random_bytes_never_raise(data: bytes) -> None:
    assert read(data + b"\xff[]")[-1] == []
    assert read(data, chunk_length=1) == read(data)

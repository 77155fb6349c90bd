"""Streams for a QMP reader: valid ones with what is in them, broken ones, and noise; each from its seed."""

import json
from random import Random

from blockd.wire.qmp import Value

_CHARACTERS = "aZ09 _/é€\u00a0\u2028😀\0\x1f\x7f\"'\\"
_KEYS = ["execute", "exec-oob", "arguments", "id", "device", "", "é", "a b"]
_COMMANDS = ["qmp_capabilities", "query-jobs", "block-stream", "quit", "no-such"]
_SPACES = ["", "", "", " ", "\n", "\r\n", "\t", "   "]
_INTEGERS = [0, 1, -1, 255, 1 << 31, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, -(1 << 63)]
_SIMPLE_ESCAPES = {'"': '\\"', "\\": "\\\\", "/": "\\/", "\x08": "\\b", "\n": "\\n"}

# What a reader may stumble over, alone and in any order.
_TOKENS = [
    *(b"{", b"}", b"[", b"]", b":", b",", b'"', b"'", b"\\", b"\xff", b"\xfe", b"\x00", b"\n", b"\t", b" "),
    *(b"true", b"false", b"null", b"tru", b"nulll", b"True", b"NaN", b"Infinity"),
    *(b"0", b"-", b"-0", b"01", b"1.", b".5", b"1e", b"1e+", b"1e400", b"-1E-400", b"18446744073709551616"),
    *(b'"a"', b"'b'", b'"\\u00e9"', b'"\\ud83d\\ude00"', b'"\\ud800"', b'"\\udc00"', b'"\\u12"', b'"\\q"'),
    *(
        b'"\xc3\xa9"',
        b'"\xc0\x80"',
        b'"\xc1\x80"',
        b'"\xed\xa0\x80"',
        b'"\xef\xbf\xbf"',
        b'"\xf4\x90\x80\x80"',
    ),
    *(b"\xef\xbb\xbf", b"\xc3", b"\x80", b"\xf0\x9f\x98", b"\x7f", b"%", b"#", b"/*", b"\\u0000", b"\\ud83d"),
    *(b'{"execute": "query-jobs"}', b'"a": 1', b"[1, 2]", b"{}", b"[]"),
]


def valid_stream(random: Random) -> tuple[bytes, list[Value]]:
    """Make a stream of a few values, written in one of the many ways there are."""
    values = [
        _command(random) if random.random() < 0.5 else _value(random, 0)
        for _ in range(random.choice([1, 1, 2, 5]))
    ]
    text = "".join(_written(value, random) + random.choice([" ", "\n", "\r\n"]) for value in values)
    return text.encode(), values


def broken_stream(random: Random) -> bytes:
    """Make a stream that was valid before something happened to it."""
    data = bytearray(valid_stream(random)[0])
    for _ in range(random.choice([1, 1, 2, 4])):
        start = random.randrange(len(data) + 1)
        end = start + random.choice([0, 0, 1, 1, 3, 20])
        match random.randrange(4):
            case 0:
                data[start:end] = random.choice(_TOKENS)
            case 1:
                data[start:end] = b""
            case 2:
                data[start:start] = data[start:end] * random.choice([1, 2, 50])
            case 3 if start < len(data):
                data[start] ^= 1 << random.randrange(8)
    return bytes(data)


def noise(random: Random) -> bytes:
    """Make a stream that never was valid."""
    if random.random() < 0.5:
        return b"".join(random.choice(_TOKENS) for _ in range(random.randrange(1, 25)))
    return random.randbytes(random.randrange(1, 60))


def _command(random: Random) -> Value:
    command: dict[str, Value] = {"execute": random.choice(_COMMANDS)}
    if random.random() < 0.5:
        command["arguments"] = {key: _value(random, 2) for key in random.sample(_KEYS, 2)}
    if random.random() < 0.5:
        command["id"] = _value(random, 1)
    return command


def _value(random: Random, depth: int) -> Value:
    match random.randrange(8 if depth < 4 else 6):
        case 0:
            return random.choice([None, True, False])
        case 1:
            return random.choice(_INTEGERS)
        case 2:
            return random.choice([0.5, -1.25e10, 1e-7, 123456.75])
        case 6:
            return [_value(random, depth + 1) for _ in range(random.randrange(4))]
        case 7:
            return {key: _value(random, depth + 1) for key in random.sample(_KEYS, random.randrange(4))}
    return "".join(random.choice(_CHARACTERS) for _ in range(random.choice([0, 1, 5, 30])))


def _written(value: Value, random: Random) -> str:
    def space() -> str:
        return random.choice(_SPACES)

    match value:
        case dict():
            members = [
                _string(key, random) + space() + ":" + space() + _written(value[key], random) for key in value
            ]
            return "{" + space() + ("," + space()).join(members) + space() + "}"
        case list():
            return (
                "[" + space() + (space() + ",").join(_written(one, random) for one in value) + space() + "]"
            )
        case str():
            return _string(value, random)
    return json.dumps(value)


def _string(text: str, random: Random) -> str:
    quote = random.choice(['"', '"', "'"])
    return quote + "".join(_character(one, quote, random) for one in text) + quote


def _character(one: str, quote: str, random: Random) -> str:
    if one in _SIMPLE_ESCAPES and (one in (quote, "\\", "\n", "\x08") or random.random() < 0.3):
        return _SIMPLE_ESCAPES[one]
    if one == quote == "'":
        return "\\'"
    if one < " " or random.random() < 0.2:
        units = one.encode("utf-16-be")
        codes = [units[start : start + 2].hex() for start in range(0, len(units), 2)]
        return "".join("\\u" + random.choice([code, code.upper()]) for code in codes)
    return one

"""What goes out is QEMU's JSON, byte for byte."""

import pytest

from blockd.wire.qmp import Value
from blockd.wire.qmp.writer import pack_message

LINES: list[tuple[Value, bytes]] = [
    ({}, b"{}"),
    ({"a": [1, {"b": None}], "c": [True, False]}, b'{"a": [1, {"b": null}], "c": [true, false]}'),
    ({"empty": {}, "list": []}, b'{"empty": {}, "list": []}'),
    ([1 << 63, -(1 << 63), 0], b"[9223372036854775808, -9223372036854775808, 0]"),
    ([0.1, -0.0, 3.0], b"[0.10000000000000001, -0, 3]"),
    ([1.5e300, 1e-7], b"[1.5000000000000001e+300, 9.9999999999999995e-08]"),
    ('"\\/\b\f\n\r\t', rb'"\"\\/\b\f\n\r\t"'),
    ("\0\x1f\x7f é€", rb'"\u0000\u001F\u007F \u00E9\u20AC"'),
    ("😀", rb'"\uD83D\uDE00"'),
    ("\ud800\uffff\ufdd0\U0001fffe", rb'"\uFFFD\uFFFD\uFFFD\uFFFD"'),
]


@pytest.mark.parametrize(("value", "line"), LINES, ids=[repr(line)[:40] for _, line in LINES])
def test_lines(value: Value, line: bytes) -> None:
    assert pack_message(value) == line + b"\r\n"


def test_pretty() -> None:
    message: Value = {"return": [{"a": 1, "b": []}, "x"], "none": {}}
    assert pack_message(message, pretty=True).decode().split("\r\n") == [
        "{",
        '    "return": [',
        "        {",
        '            "a": 1,',
        '            "b": [',
        "            ]",
        "        },",
        '        "x"',
        "    ],",
        '    "none": {',
        "    }",
        "}",
        "",
    ]


def test_deep_nesting_is_no_recursion() -> None:
    deep: Value = None
    for _ in range(10_000):
        deep = [deep]
    assert pack_message(deep) == b"[" * 10_000 + b"null" + b"]" * 10_000 + b"\r\n"

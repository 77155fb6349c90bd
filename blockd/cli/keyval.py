"""QEMU's syntax for structured option values: ``key=val,key.sub=val,list.0=val``, or a JSON object.

In the first form every value is a string; a comma inside one is written twice. The first key may be
left out where the option has an implied one: ``--blockdev file,filename=disk.raw``.
"""

import re
from collections.abc import Mapping

from blockd.errors import RequestError
from blockd.wire.qmp import ParseError

# As QEMU: fragments fit a buffer of 128 bytes. The nesting is ours: nothing that exists goes deeper.
FRAGMENT_LENGTH_MAX = 127
NESTING_MAX = 64

_HELP = ("help", "?")
_NAME = re.compile(r"(?:__[A-Za-z0-9.-]+_)?[A-Za-z][A-Za-z0-9_-]*")
_NAME_OR_INDEX = re.compile(rf"[0-9]+|{_NAME.pattern}")
_UP_TO_KEY_END = re.compile(r"[^=,]*")
_VALUE = re.compile(r"(?:[^,]|,,)*")

Members = dict[str, object]


def parse_members(text: str, implied_key: str | None = None) -> tuple[Members, bool]:
    """Parse a value in either form; returns with it whether the values are all strings.

    Raises:   RequestError: not in this syntax; in QEMU's words.
    """
    return (parse_json(text), False) if text.startswith("{") else (parse_keyval(text, implied_key), True)


def parse_json(text: str) -> Members:
    """Parse a JSON object."""
    from blockd.wire.qmp.reader import JsonReader  # noqa: PLC0415  (most command lines have none)

    messages = JsonReader().feed(text.encode("utf-8", "surrogateescape") + b"\n")
    if not messages:
        raise RequestError("JSON parse error, premature EOI")
    if isinstance(messages[0], ParseError):
        raise RequestError(messages[0].message)
    if len(messages) > 1 or not isinstance(messages[0], dict):
        raise RequestError("Expecting at most one JSON value")
    return dict(messages[0])


def parse_keyval(text: str, implied_key: str | None = None) -> Members:
    """Parse the ``key=val`` form into nested objects and lists of strings."""
    members: Members = {}
    position = 0
    wants_help = False
    while position < len(text):
        match = _UP_TO_KEY_END.match(text, position)
        assert match is not None
        key, key_end = match[0], match.end()
        has_value = text.startswith("=", key_end)
        if key in _HELP and not has_value:
            wants_help, position = True, key_end + 1
        elif key and not has_value and implied_key is not None:
            members[implied_key] = key
            position = key_end + 1
        else:
            fragments = _split_key(key)
            if not has_value:
                raise RequestError(f"Expected '=' after parameter '{key}'")
            value, position = _take_value(text, key_end + 1)
            _put(members, fragments, value)
        implied_key = None
    if wants_help:
        raise RequestError("Help is not available for this option")
    return {name: _with_lists(value, name) for name, value in members.items()}


def parse_flat(text: str, implied_key: str) -> Members:
    """Parse the older form of ``--chardev``: no nesting, and ``server`` alone means ``server=on``."""
    members: Members = {}
    position = 0
    while position < len(text):
        match = _UP_TO_KEY_END.match(text, position)
        assert match is not None
        key, key_end = match[0], match.end()
        if text.startswith("=", key_end):
            members[key], position = _take_value(text, key_end + 1)
            continue
        if not position:
            members[implied_key] = key
        elif key.startswith("no"):
            members[key.removeprefix("no")] = "off"
        else:
            members[key] = "on"
        position = key_end + 1
    return members


def _take_value(text: str, start: int) -> tuple[str, int]:
    """Read a value, and return it with the position after its comma."""
    match = _VALUE.match(text, start)
    assert match is not None
    return match[0].replace(",,", ","), match.end() + 1


def _split_key(key: str) -> list[str]:
    fragments: list[str] = []
    start = 0
    while True:
        match = (_NAME_OR_INDEX if fragments else _NAME).match(key, start)
        if match is None or key[match.end() : match.end() + 1] not in ("", "."):
            raise RequestError(f"Invalid parameter '{key}'")
        if len(match[0]) > FRAGMENT_LENGTH_MAX:
            what = "Parameter" if match[0] == key else "Parameter fragment"
            raise RequestError(f"{what} '{match[0]}' is too long")
        fragments.append(match[0])
        if len(fragments) > NESTING_MAX:
            raise RequestError(
                f"Parameter '{key[:FRAGMENT_LENGTH_MAX]}…' nests more than {NESTING_MAX} levels"
            )
        if match.end() == len(key):
            return fragments
        start = match.end() + 1


def _put(members: Members, fragments: list[str], value: str) -> None:
    """Store a value at the end of a path; lists are objects with numbers for names as yet."""
    inner = members
    for count, fragment in enumerate(fragments[:-1], 1):
        below = inner.setdefault(fragment, {})
        if not isinstance(below, dict):
            raise _inconsistent(fragments[:count])
        inner = below
    if isinstance(inner.get(fragments[-1]), dict):
        raise _inconsistent(fragments)
    inner[fragments[-1]] = value


def _inconsistent(fragments: list[str]) -> RequestError:
    return RequestError(f"Parameters '{'.'.join(fragments)}.*' used inconsistently")


def _with_lists(value: object, path: str) -> object:
    """Turn objects whose names are all numbers into lists."""
    if not isinstance(value, dict):
        return value
    inner: Mapping[str, object] = {
        name: _with_lists(member, f"{path}.{name}") for name, member in value.items()
    }
    indexed = {int(name): member for name, member in inner.items() if name.isdigit()}
    if not indexed:
        return inner
    if len(indexed) < len(inner) and any(not name.isdigit() for name in inner):
        raise RequestError(f"Parameters '{path}.*' used inconsistently")
    for index in range(max(indexed) + 1):
        if index not in indexed:
            raise RequestError(f"Parameter '{path}.{index}' missing")
    return [indexed[index] for index in range(len(indexed))]

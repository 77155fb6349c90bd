"""What the structured options of the command line take: a table of checks each, as nodes have them.

Kept apart from QMP's models, which say much the same of their commands: those are slow to load, and a daemon
has read its command line before it needs them.
"""

from collections.abc import Callable, Mapping
from typing import TypeVar

from blockd.block.options import (
    Field,
    Fields,
    Place,
    check_fields,
    choice,
    flag,
    integer,
    record,
    text,
)
from blockd.config import Address, FdAddress, InetAddress, UnixAddress
from blockd.errors import RequestError

PORT_MAX = 65535
_UINT32_END = 1 << 32


def is_decimal(value: str) -> bool:
    """Whether a text is a number without a sign, and no longer than one that can be meant."""
    return value.isascii() and value.isdigit() and len(value) < 20


def port_number(word: str) -> int:
    """A TCP port."""
    if not (is_decimal(word) and int(word) <= PORT_MAX):
        raise RequestError(f"'{word}' is not a port number (0 to {PORT_MAX})")
    return int(word)


def _port(value: object, place: Place) -> int:
    """QEMU writes port numbers as strings."""
    return port_number(value if isinstance(value, str) else str(integer(value, place)))


def _descriptor(value: object, place: Place) -> int:
    if not isinstance(value, str):
        return integer(value, place)
    if not is_decimal(value):
        raise RequestError(f"Unable to parse FD number {value}")
    return int(value)


def _uint32(value: object, place: Place) -> int:
    number = integer(value, place)
    if number < 0:
        raise RequestError(f"Parameter '{place.path}' expects a non-negative value")
    if number >= _UINT32_END:
        raise place.mistyped("integer")
    return number


def _file_name(value: object, place: Place) -> str:
    name = text(value, place)
    require_name(name)
    return name


def require_name(name: str) -> None:
    """Refuse an empty name of a file, which the kernel takes for one that it makes up."""
    if not name:
        raise RequestError("expected the name of a file, and it is empty")


_REQUIRED_TEXT = Field(text, is_required=True)
INET: Fields = {"host": _REQUIRED_TEXT, "port": Field(_port, is_required=True)}
FD: Fields = {"str": Field(_descriptor, is_required=True)}
ADDRESS_TYPES: Mapping[str, tuple[Callable[..., Address], Fields]] = {
    "unix": (UnixAddress, {"path": Field(_file_name, is_required=True)}),
    "inet": (InetAddress, INET),
    "fd": (FdAddress, FD),
}


def address(value: object, place: Place) -> Address:
    """Where to listen or to connect to."""
    if not isinstance(value, dict):
        raise place.mistyped("object")
    at = place.member("type")
    if "type" not in value:
        raise RequestError(f"Parameter '{at.path}' is missing")
    make, fields = ADDRESS_TYPES[str(choice(*ADDRESS_TYPES)(value["type"], at))]
    checked = record({"type": Field(text), **fields})(value, place)
    assert isinstance(checked, dict)
    return make(*(checked[name] for name in fields))


_ADDRESS = Field(address, is_required=True)

SOCKET_CHARDEV: Fields = {"id": _REQUIRED_TEXT, "address": _ADDRESS, "server": Field(flag)}
STDIO_CHARDEV: Fields = {"id": _REQUIRED_TEXT}
MONITOR: Fields = {"chardev": _REQUIRED_TEXT, "mode": Field(choice("control")), "pretty": Field(flag)}
NBD_SERVER: Fields = {"addr": _ADDRESS, "max-connections": Field(_uint32)}
EXPORT: Fields = {
    "type": Field(choice("nbd"), is_required=True),
    "id": _REQUIRED_TEXT,
    "node-name": _REQUIRED_TEXT,
    "name": Field(text),
    "description": Field(text),
    "writable": Field(flag),
    "writethrough": Field(flag),
    "allocation-depth": Field(flag),
    "iothread": Field(text),
    "fixed-iothread": Field(flag),
}
FILE_DEVICE: Fields = {
    "name": _REQUIRED_TEXT,
    "filename": _REQUIRED_TEXT,
    "format": Field(text),
    "backing-format": Field(text),
}
NODE_DEVICE: Fields = {"id": _REQUIRED_TEXT, "node-name": _REQUIRED_TEXT}

# Checked, and then left out: there is one kind of export and monitor, and no threads to choose from.
WITHOUT_EFFECT = ("type", "mode", "iothread", "fixed-iothread")

MadeType = TypeVar("MadeType")


def made(
    make: Callable[..., MadeType], members: Mapping[str, object], fields: Fields, *, is_text: bool = True
) -> MadeType:
    """Make an option of members that are checked by the table `fields`."""
    checked = check_fields(members, fields, is_text=is_text)
    return make(
        **{name.replace("-", "_"): value for name, value in checked.items() if name not in WITHOUT_EFFECT}
    )

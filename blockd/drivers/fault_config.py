"""The file of rules that blkdebug's option `config` names, in the syntax of QEMU's configuration files.

    # a comment
    [inject-error]
    event = "read_aio"
    errno = "5"

    [set-state]
    event = "l2_update"
    new_state = "2"

What is wrong is told in QEMU's words; as there, a value that has no quotes is an empty one.

Source:   QEMU 7.2, docs/devel/blkdebug.txt; what its parser takes was found out by asking it.
"""

import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from blockd.block.file_events import FileEvent
from blockd.block.options import FLAGS, Options
from blockd.errors import RequestError, printable
from blockd.filenames import check_filename
from blockd.filters.fault_rules import IoType
from blockd.units import MIB

LENGTH_MAX = MIB

_LINE = re.compile(r"[^\n]*\n|[^\n]+")
_GROUP = re.compile(r'\[(?:(\S{1,63})\s+"([^"]{1,63})|([^\]]{1,63}))')
_MEMBER = re.compile(r'\s*(\S{1,63})(?:\s*=\s*"([^"]{1,1023}))?')
_IDENTIFIER = re.compile(r"[A-Za-z][A-Za-z0-9._-]*", re.ASCII)
_NUMBER = re.compile(r"\s*([+-]?)(?:0x([0-9a-f]+)|(0[0-7]*)|([1-9][0-9]*))", re.IGNORECASE | re.ASCII)


class ConfiguredRules(NamedTuple):
    """The rules of a file, each as the options of the same names have them."""

    inject_error: list[Options]
    set_state: list[Options]


NO_RULES = ConfiguredRules([], [])


def read_rules_blocking(path: str) -> ConfiguredRules:
    """Read a file of rules.

    Raises:   RequestError: it cannot be read, or what is wrong with it.
    """
    text = _read(check_filename(path) if path else path)
    groups: dict[str, list[Options]] = {name: [] for name in _GROUPS}
    ids = set[tuple[str, str]]()
    for name, members in _groups(text):
        rule = _checked(name, members, ids)
        groups[name].append(rule)
    for rules in groups.values():
        for rule in rules:
            _check_names(rule)
    return ConfiguredRules(groups["inject-error"], groups["set-state"])


def _read(path: str) -> str:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise RequestError("Could not read blkdebug config file: it is no regular file")
            data = os.pread(fd, LENGTH_MAX + 1, 0)
        finally:
            os.close(fd)
    except OSError as error:
        raise RequestError(f"Could not read blkdebug config file: {error.strerror}") from error
    if len(data) > LENGTH_MAX:
        raise RequestError(f"Could not read blkdebug config file: it is longer than {LENGTH_MAX} bytes")
    return data.decode("utf-8", "surrogateescape")


def _groups(text: str) -> Iterator[tuple[str, dict[str, str]]]:
    """The groups of a file, each with its members as they stand there; the last of two values counts."""
    name, members = "", dict[str, str]()
    for line in _LINE.findall(text):
        if line[0] in "\n#":
            continue
        if line[0] == "[" and (found := _GROUP.match(line)):
            if name:
                yield name, members
            name, members = found[1] or found[3], {} if found[2] is None else {"id": found[2]}
        elif not (found := _MEMBER.match(line)):
            raise RequestError("parse error")
        elif not name:
            raise RequestError("no group defined")
        else:
            members[found[1]] = found[2] or ""
    if name:
        yield name, members


def _checked(group: str, members: dict[str, str], ids: set[tuple[str, str]]) -> Options:
    if group not in _GROUPS:
        raise RequestError(f"There is no option group '{printable(group)}'")
    if (identifier := members.pop("id", None)) is not None:
        if not _IDENTIFIER.fullmatch(identifier):
            raise RequestError("Parameter 'id' expects an identifier")
        if (group, identifier) in ids:
            raise RequestError(f"Duplicate ID '{identifier}' for {group}")
        ids.add((group, identifier))
    fields = _GROUPS[group]
    for name in members:
        if name not in fields:
            raise RequestError(f"Invalid parameter '{printable(name)}'")
    return {name: fields[name](name, value) for name, value in members.items()}


def _check_names(rule: Options) -> None:
    if "event" not in rule:
        raise RequestError("Missing event name for rule")
    for name, kind in (("event", FileEvent), ("iotype", IoType)):
        if name in rule and rule[name] not in [*kind]:
            raise RequestError(f"invalid parameter value: {printable(str(rule[name]))}")


# -- values -----------------------------------------------------------------------------------


def _text(_: str, value: str) -> str:
    return value


def _flag(name: str, value: str) -> bool:
    if value not in FLAGS:
        raise RequestError(f"Parameter '{name}' expects 'on' or 'off'")
    return FLAGS[value]


def _number(name: str, value: str) -> int:
    """A number as C writes it; one that is too large for its place loses the bits that do not fit."""
    if not (found := _NUMBER.fullmatch(value)):
        raise RequestError(f"Parameter '{name}' expects a number")
    sign, hexadecimal, octal, decimal = found.groups()
    number = int(hexadecimal or octal or decimal, 16 if hexadecimal else 8 if octal else 10)
    if number >= 1 << 64:
        raise RequestError(f"Value '{value}' is too large for parameter '{name}'")
    half = 1 << (63 if name == "sector" else 31)
    return ((-number if sign == "-" else number) + half) % (2 * half) - half


Field = Callable[[str, str], object]
_GROUPS: Mapping[str, Mapping[str, Field]] = {
    "inject-error": {
        "event": _text,
        "state": _number,
        "iotype": _text,
        "errno": _number,
        "sector": _number,
        "once": _flag,
        "immediately": _flag,
    },
    "set-state": {"event": _text, "state": _number, "new_state": _number},
}

"""The journal as text: the state as a whole, then a line for each time that something has changed.

It begins with an object: `blockd-journal` is the version of the format, `state` what is recorded, and
`sha256` the checksum of `state` as `_encode` writes it down. What has changed since follows, a line for each
time: `changes` (changes.py), their `number` from 1 on, and `sha256`, the checksum of both and of the journal
that they belong to. One line is durable before the next one is written, so only the last can be torn by
a crash; it was not acknowledged then, and is left out.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from blockd.daemon.changes import Changes, Json, RecordedState
from blockd.errors import ImageError
from blockd.units import KIB, MIB

log = logging.getLogger(__name__)

VERSION = 1
# Thousands of disks need less; what is longer was not written by blockd.
LENGTH_MAX = 64 * MIB
# Changes may always be as long as this before the journal is written as a whole again.
CHANGES_LENGTH_MIN = 64 * KIB

START_OVER = "and start with the disks on the command line (find out first which image of each is in use)"
_CURE = f"bring it back from a backup, or move it away {START_OVER}"

_DECODER = json.JSONDecoder()
# Values as they are in checksums.
_encode = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode


@dataclass
class Written:
    """A journal that is in a file: the whole state, and lines that were added to it."""

    checksum: str
    # Of the state as a whole, and of all lines.
    length: int
    changes_length: int = 0
    number: int = 0
    # The file goes on with so many bytes of a line that is not whole.
    torn_length: int = 0

    @property
    def end(self) -> int:
        """Where the next line begins."""
        return self.length + self.changes_length

    def line(self, changes: Changes) -> bytes:
        """Changes as they are added, with a checksum; none need no line.

        They end with their line, so one that is torn from its beginning on does not spoil the one before.
        """
        if not changes:
            return b""
        number, members = self.number + 1, changes.members()
        checksum = checksum_of([self.checksum, number, members])
        return f"\n{_encode({'changes': members, 'number': number, 'sha256': checksum})}\n".encode()

    def add(self, line: bytes) -> None:
        """A line is there now."""
        self.torn_length = 0
        self.changes_length += len(line)
        self.number += bool(line)


def serialized(state: object) -> tuple[Written, bytes]:
    """A state as a journal without lines, made in parts: other threads have their turn in between."""
    parts = [*_parts(state)]
    checksum = hashlib.sha256()
    for part in parts:
        checksum.update(part.encode())
    head = json.dumps({"blockd-journal": VERSION, "sha256": checksum.hexdigest()})[:-1]
    data = f'{head}, "state":\n{"".join(parts)}}}'.encode()
    return Written(checksum.hexdigest(), len(data)), data


def checksum_of(value: object) -> str:
    """The checksum of what can be written as JSON."""
    return hashlib.sha256(_encode(value).encode()).hexdigest()


def _parts(state: object) -> Iterator[str]:
    """What `_encode` makes of a state, record by record."""
    if not isinstance(state, dict):
        yield _encode(state)
        return
    opening = "{"
    for name, value in sorted(state.items()):
        yield f"{opening}{_encode(name)}:"
        opening = ","
        if isinstance(value, list) and value:
            yield f"[{_encode(value[0])}"
            yield from (f",{_encode(record)}" for record in value[1:])
            yield "]"
        else:
            yield _encode(value)
    yield "{}" if opening == "{" else "}"


# -- reading -----------------------------------------------------------------------------------


class Found(NamedTuple):
    """What a journal holds."""

    state: Json
    written: Written


def parse_journal(data: bytes, name: str) -> Found:
    """The state after all changes that are whole; `name` is what errors call the file.

    Raises:   ImageError: the journal is damaged, or was not written by this version of blockd.
    """
    text = data.decode("latin-1")  # it is ASCII, but for what a crash or a fault has made of it
    try:
        journal, end = _DECODER.raw_decode(text)
    except (ValueError, RecursionError) as error:
        raise ImageError(f"'{name}' is damaged: {_CURE}") from error
    if not isinstance(journal, dict) or not isinstance(journal.get("blockd-journal"), int):
        raise not_a_journal(name)
    version = journal["blockd-journal"]
    if version > VERSION:
        raise ImageError(
            f"'{name}' was written by a newer blockd (its version is {version}, this one knows "
            f"{VERSION}): start that one, or move the file away {START_OVER}"
        )
    if version < 1 or journal.get("sha256") != checksum_of(journal.get("state")):
        raise ImageError(f"'{name}' is damaged, its checksum is wrong: {_CURE}")
    return _with_changes(journal, Written(journal["sha256"], end), text[end:], name)


def not_a_journal(name: str) -> ImageError:
    """The error for another kind of file."""
    return ImageError(f"'{name}' is not a journal of blockd: move it away {START_OVER}")


def _with_changes(journal: dict[str, Any], written: Written, text: str, name: str) -> Found:
    """What follows the last change that is whole is torn."""
    lines = [*re.finditer("[^\n]+\n?", text)]
    found = [_parse_line(line[0], written.checksum) for line in lines]
    count = next((number for number, changes in enumerate(found) if changes is None), len(found))
    if any(changes is not None for changes in found[count:]):
        raise ImageError(f"'{name}' is damaged, a change in it has a wrong checksum: {_CURE}")
    if [number for number, _ in filter(None, found)] != [*range(1, count + 1)]:
        raise ImageError(f"'{name}' is damaged, a change is missing in it: {_CURE}")
    if count < len(found):
        log.warning("'%s' ends with a change that was not written to its end: left out", name)
        written.torn_length = len(text) - lines[count].start()
    written.number, written.changes_length = count, len(text) - written.torn_length
    if not count:
        return Found(journal["state"], written)
    state = RecordedState(journal["state"])
    for _, members in filter(None, found):
        state.apply(Changes.parse(members))
    return Found(state.members(), written)


def _parse_line(line: str, journal: str) -> tuple[int, dict[str, Any]] | None:
    """Number and members of changes; None: it is no line of this journal, or not a whole one."""
    try:
        members = json.loads(line)
        number, changes = members["number"], members["changes"]
        is_whole = members["sha256"] == checksum_of([journal, number, changes])
    except (ValueError, RecursionError, TypeError, KeyError):
        return None
    return (number, changes) if is_whole else None

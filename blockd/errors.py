"""What can go wrong, as one small tree.

Whose fault it is decides what happens next, so that is what the classes say:

    BlockdError
     ├─ RequestError   the caller asked wrongly: nothing happened, answer with the message
     ├─ ImageError     the bytes of an image are wrong: refuse it, or stop writing to it
     ├─ StorageError   the world failed (disk, network): a job's on-error policy decides
     └─ PeerError      the other end of a connection broke the protocol: close that one connection

Every border translates ``kind`` with one table (QMP class, NBD errno).
"""

import enum
import errno as errno_codes
import os
from typing import Literal, Self

# What a job was doing when the disk failed.
Operation = Literal["read", "write"]


class ErrorKind(enum.Enum):
    """What a machine may branch on; everything else is for people and stands in the message."""

    GENERIC = "generic"
    COMMAND_NOT_FOUND = "command-not-found"
    DEVICE_NOT_FOUND = "device-not-found"
    DEVICE_IN_USE = "device-in-use"
    DEVICE_NOT_ACTIVE = "device-not-active"
    NOT_SUPPORTED = "not-supported"
    READ_ONLY = "read-only"
    CORRUPT = "corrupt"
    IO = "io"
    NO_SPACE = "no-space"
    PROTOCOL = "protocol"


def printable(text: str) -> str:
    """Escape what would garble a terminal or a log: control characters, bytes that are not UTF-8."""
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text
    )


class BlockdError(Exception):
    """The root: ``kind`` for machines, ``message`` for people, ``context`` for the log."""

    default_kind = ErrorKind.GENERIC

    def __init__(self, message: str, *, kind: ErrorKind | None = None, **context: object) -> None:
        super().__init__(message)
        self.kind = kind or self.default_kind
        self.message = message
        self.context = context

    @property
    def brief(self) -> str:
        """What QEMU says in this place, where its clients compare the text: an error of a job."""
        return self.message


class RequestError(BlockdError):
    """The caller asked for something that cannot be; nothing was changed."""


class ImageError(BlockdError):
    """An image's bytes contradict its format; nothing was written because of them.

    Some of them may stand in the message, so it is escaped.
    """

    default_kind = ErrorKind.CORRUPT

    def __init__(self, message: str, *, kind: ErrorKind | None = None, **context: object) -> None:
        super().__init__(printable(message), kind=kind, **context)

    @property
    def brief(self) -> str:
        return os.strerror(errno_codes.EIO)


class PeerError(BlockdError):
    """A peer broke its protocol; only its own connection is affected."""

    default_kind = ErrorKind.PROTOCOL


class StorageError(BlockdError):
    """A read, write or sync failed; ``errno`` is the system's code.

    ``operation``: what a job's error event reports.
    """

    default_kind = ErrorKind.IO

    def __init__(
        self, message: str, *, errno: int = errno_codes.EIO, operation: Operation = "write", **context: object
    ) -> None:
        full = errno in (errno_codes.ENOSPC, errno_codes.EDQUOT)
        super().__init__(message, kind=ErrorKind.NO_SPACE if full else ErrorKind.IO, **context)
        self.errno = errno
        self.operation = operation

    @property
    def brief(self) -> str:
        return os.strerror(self.errno)

    @classmethod
    def from_os(cls, error: OSError, action: str, name: str) -> Self:
        """Translate an operating system error met while doing `action` to the file `name`."""
        code = error.errno or errno_codes.EIO
        operation: Operation = "read" if action in ("read", "map") else "write"
        return cls(f"Could not {action} '{name}': {os.strerror(code)}", errno=code, operation=operation)

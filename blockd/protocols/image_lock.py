"""Locks on image files, the ones that QEMU takes: its programs and blockd keep out of each other's way.

A lock is on bytes far inside the file, whatever they hold, and it need not be that long:

    byte 100 + n   the holder uses the permission n
    byte 200 + n   the holder does not share the permission n with anyone
    n              0 consistent read, 1 write, 2 write unchanged, 3 resize

All locks are read locks, so taking one never fails because of another. Whether two openers can be together
is found out by asking: who uses n asks whether anybody has byte 200 + n, who does not share it asks for
100 + n. Everybody locks first and asks then, so of two that come at the same moment at most one stays.

They are locks of open file descriptions: they belong to what one `open` made, not to the process, and stay
when another descriptor of the same file is closed.

Source:   QEMU documentation, "Image locking"; fcntl(2), "Open file description locks".
"""

import asyncio
import errno
import fcntl
import logging
import os
import struct
from collections.abc import Awaitable, Callable
from enum import Enum, IntEnum, IntFlag
from typing import NamedTuple

from blockd.errors import RequestError

log = logging.getLogger(__name__)

# What a daemon that was killed had copied by another process (copier.py) is written, and locked, a moment
# longer than it lives; and it is perhaps started again at once.
PATIENCE_S = 0.25
RETRY_INTERVAL_S = 0.01

_USED_BYTE, _UNSHARED_BYTE = 100, 200
# struct flock: type, whence, start, length, pid.
_FLOCK = struct.Struct("@hhqqi4x")


class Permission(IntFlag):
    """What an opener of an image file may do with it; the names are QEMU's."""

    CONSISTENT_READ = 1 << 0
    WRITE = 1 << 1
    WRITE_UNCHANGED = 1 << 2
    RESIZE = 1 << 3

    @property
    def text(self) -> str:
        """As QEMU's errors call it."""
        return str(self.name).lower().replace("_", " ")


class LockMode(Enum):
    """How far an opener keeps others out."""

    USUAL = "usual"  # a writer is alone, readers are among themselves
    FORCE_SHARE = "force-share"  # a reader that takes what it gets, even while others write
    OFF = "off"  # nobody is asked and nobody finds out: for filesystems without such locks


class Claim(NamedTuple):
    """What one opener uses, and what it does not share."""

    used: Permission
    unshared: Permission


NO_CLAIM = Claim(Permission(0), Permission(0))
_CHANGES = Permission.WRITE | Permission.RESIZE


class Use(IntEnum):
    """What an opener does with the file just now."""

    NONE = 0
    READING = 1
    WRITING = 2

    @staticmethod
    def of(*, read_only: bool) -> "Use":
        return Use.READING if read_only else Use.WRITING

    def meets(self, other: "Use") -> bool:
        """Whether two openers are in each other's way: a writer is alone."""
        return Use.WRITING in (self, other) and Use.NONE not in (self, other)


def claim_of(mode: LockMode, use: Use) -> Claim:
    """What an opener claims; also a reader does not want the file to change under it."""
    if mode is LockMode.OFF or use is Use.NONE:
        return NO_CLAIM
    if mode is LockMode.FORCE_SHARE:
        return Claim(Permission.CONSISTENT_READ, Permission(0))
    used = Permission.CONSISTENT_READ if use is Use.READING else Permission.CONSISTENT_READ | _CHANGES
    return Claim(used, _CHANGES)


def claim_for(mode: LockMode, *, read_only: bool) -> Claim:
    """What an opener claims that is there to read, or also to write."""
    return claim_of(mode, Use.of(read_only=read_only))


def change_claim(fd: int, filename: str, before: Claim, wanted: Claim) -> None:
    """Hold `wanted` instead of `before`; in between both are held.

    Raises:   RequestError: another opener is in the way, or the file cannot be locked.
    Fails to: `before` is held.
    """
    try:
        hold(fd, filename, wanted)
        _ask(fd, filename, wanted)
    except RequestError:
        _let_go(fd, wanted, before)
        raise
    _let_go(fd, before, wanted)


async def patiently(change: Callable[[], Awaitable[None]]) -> None:
    """Change a claim, giving whoever is in the way a moment to end."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + PATIENCE_S
    while True:
        try:
            return await change()
        except RequestError:
            if loop.time() > deadline:
                raise
        await asyncio.sleep(RETRY_INTERVAL_S)


def hold(fd: int, filename: str, claim: Claim) -> None:
    """Lock the bytes of a claim, without asking whether anybody else is in the way.

    Raises:   RequestError: the file cannot be locked.
    """
    for byte in _bytes(claim):
        try:
            _fcntl(fd, fcntl.F_OFD_SETLK, fcntl.F_RDLCK, byte)
        except OSError as error:
            raise _not_locked(filename, byte, error) from error


def _not_locked(filename: str, byte: int, error: OSError) -> RequestError:
    """Some filesystems have no locks, or none of this kind, and each says so in its own way."""
    in_use = error.errno == errno.EAGAIN
    why = "" if in_use else f": {os.strerror(error.errno or errno.EIO)} (there is locking=off)"
    return RequestError(f"Could not open '{filename}': Failed to lock byte {byte}{why}")


def _ask(fd: int, filename: str, claim: Claim) -> None:
    # The word that people know first: "write", also where "resize" is in the way too.
    for permission in claim.used | claim.unshared:
        for kind, first_byte, is_asked in (
            ("", _UNSHARED_BYTE, permission in claim.used),
            ("shared ", _USED_BYTE, permission in claim.unshared),
        ):
            if is_asked and _is_locked_by_others(fd, filename, first_byte + permission.bit_length() - 1):
                raise RequestError(
                    f"Could not open '{filename}': Failed to get {kind}\"{permission.text}\" lock. "
                    f"Is another process using the image [{filename}]?"
                )


def _let_go(fd: int, held: Claim, kept: Claim) -> None:
    for byte in sorted({*_bytes(held)} - {*_bytes(kept)}):
        try:
            _fcntl(fd, fcntl.F_OFD_SETLK, fcntl.F_UNLCK, byte)
        except OSError as error:  # closing the file ends it
            log.debug("could not unlock byte %d: %s", byte, error.strerror)


def _bytes(claim: Claim) -> list[int]:
    return [
        first_byte + permission.bit_length() - 1
        for first_byte, permissions in ((_USED_BYTE, claim.used), (_UNSHARED_BYTE, claim.unshared))
        for permission in permissions
    ]


def _is_locked_by_others(fd: int, filename: str, byte: int) -> bool:
    """Whether a write lock, which nobody ever takes, would meet another one's lock."""
    try:
        answer = _fcntl(fd, fcntl.F_OFD_GETLK, fcntl.F_WRLCK, byte)
    except OSError as error:
        raise _not_locked(filename, byte, error) from error
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def _fcntl(fd: int, command: int, kind: int, byte: int) -> bytes:
    return fcntl.fcntl(fd, command, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))

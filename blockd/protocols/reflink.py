"""Cloning (reflink): two files share a range, until either is written there. Costs neither time nor space.

Filesystems that can do it are XFS, btrfs and some others; both files have to be on the same one. What
cannot be cloned, the caller copies.
"""

import contextlib
import errno
import fcntl
import struct

from blockd.protocols.file_status import status_of_open

_FICLONERANGE = 0x4020940D

# What is a multiple of the blocks of nearly every filesystem. Where they are larger, more is copied.
CLONE_ALIGNMENT = 4096
# Behind the end of every file.
_NOWHERE = 1 << 60


class Cloner:
    """Clones into one file; any thread."""

    def __init__(self) -> None:
        # Whether it can be done, by source.
        self._answers: dict[tuple[int, int], bool] = {}

    def can_clone(self, fd: int, source_fd: int, *bounds: int) -> bool:
        """Whether it can be tried: these files can share blocks, and these offsets and lengths are right.

        The kernel is asked once, for a range in which no file has anything. That is invalid where files can
        be cloned; where not, another error comes first.
        """
        if any(bound % CLONE_ALIGNMENT for bound in bounds):
            return False
        try:
            status = status_of_open(source_fd)
        except OSError:
            return False
        source = status.identity
        if source not in self._answers:
            answer = _clone_range(fd, 0, source_fd, _NOWHERE, CLONE_ALIGNMENT)
            self._answers[source] = status.is_regular and answer == errno.EINVAL
        return self._answers[source]

    def is_known_impossible(self, source: tuple[int, int]) -> bool:
        """Whether it was found out before that it cannot be done with a source of this identity."""
        return self._answers.get(source) is False

    def clone(self, fd: int, offset: int, source_fd: int, source_offset: int, length: int) -> bool:
        """Clone a range; False: it may hold anything.

        A failure is the last try with this source, unless the source has an end before that of the range.

        Needs:    `can_clone`; the source's range is in no need of write-back: cloning would see to it, and
                  keep guests from both files meanwhile.
        """
        if not _clone_range(fd, offset, source_fd, source_offset, length):
            return True
        with contextlib.suppress(OSError):
            status = status_of_open(source_fd)
            if source_offset + length <= status.size:
                self._answers[status.identity] = False
        return False


def _clone_range(fd: int, offset: int, source_fd: int, source_offset: int, length: int) -> int:
    """Returns the error, or 0."""
    try:
        fcntl.ioctl(fd, _FICLONERANGE, struct.pack("qQQQ", source_fd, source_offset, length, offset))
    except OSError as error:
        return error.errno or errno.EIO
    return 0

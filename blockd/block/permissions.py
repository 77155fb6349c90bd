"""What those who use a node need of it, and what they let others do to it meanwhile.

Every user of a node, be it an export, a job or the node above, has an `Access` to it. What a node needs of
its children follows from what is wanted of itself: a filter passes that on, a format writes to its file also
when nobody writes to the disk, and nobody may write to what stands below as a backing file.

Source:   QEMU documentation, "Block layer permissions"; the names are those in its error texts.
"""

from collections.abc import Iterable
from enum import Flag, auto
from functools import cache, reduce
from typing import NamedTuple


class Permission(Flag):
    """What can be done to a node; in the order in which error texts name them."""

    NONE = 0
    CONSISTENT_READ = auto()
    WRITE = auto()
    # Write what is read there already, as a copy from the backing file does.
    WRITE_UNCHANGED = auto()
    RESIZE = auto()

    # There is one object for each value: no look at the names.
    __hash__ = object.__hash__

    def __str__(self) -> str:
        names = [one.name for one in Permission if one in self]
        return ", ".join(name.lower().replace("_", " ") for name in names if name)


CONSISTENT_READ, WRITE = Permission.CONSISTENT_READ, Permission.WRITE
WRITE_UNCHANGED, RESIZE = Permission.WRITE_UNCHANGED, Permission.RESIZE
EVERYTHING = CONSISTENT_READ | WRITE | WRITE_UNCHANGED | RESIZE


class Access(NamedTuple):
    """What is needed, and what others may do."""

    need: Permission
    allow: Permission


# What is wanted of a node that nobody uses.
NOTHING = Access(Permission.NONE, EVERYTHING)

# There are few different accesses, and adding a disk combines them dozens of times: what comes of two of them
# is worked out once, as operations on flags are slow.


def wanted_by(users: Iterable[Access]) -> Access:
    """What all users of a node want of it together."""
    return reduce(_both, users, NOTHING)


@cache
def _both(one: Access, other: Access) -> Access:
    return Access(one.need | other.need, one.allow & other.allow)


@cache
def lets(one: Access, other: Access) -> bool:
    """Whether who has one access allows what another one needs."""
    return not other.need & ~one.allow


@cache
def writes(wanted: Access) -> bool:
    """Whether a node with such users has to be writable."""
    return bool(wanted.need & (WRITE | WRITE_UNCHANGED))


@cache
def access_to_file(wanted: Access, *, is_writable: bool) -> Access:
    """What a format needs of a file that holds its tables: nobody else may change it."""
    need = wanted.need | CONSISTENT_READ | (WRITE | RESIZE if is_writable else Permission.NONE)
    return Access(need, wanted.allow & ~(WRITE | RESIZE))


@cache
def access_to_backing(wanted: Access) -> Access:
    """What an overlay needs of its backing: that it stays what it is. (QEMU lets it be written.)"""
    return Access(wanted.need & CONSISTENT_READ, CONSISTENT_READ | WRITE_UNCHANGED)

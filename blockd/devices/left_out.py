"""What a restart could not bring back: it is told to whoever asks, and kept for a start that can.

A thing leaves by being made anew under its name, or because a client removes it. What was only there for the
sake of a node leaves along with it.
"""

from collections.abc import Iterator
from enum import StrEnum
from typing import NamedTuple

from blockd.errors import RequestError


class Kind(StrEnum):
    """What there is to restore."""

    THROTTLE_GROUP = "throttle-group"
    NODE = "node"
    DEVICE = "device"
    EXPORT = "export"
    JOB = "job"


class Thing(NamedTuple):
    """One thing that is left out; `node` is what it needs, if it needs one.

    `cause` is the node whose absence is the whole reason, if that is the reason.
    """

    kind: Kind
    name: str
    reason: str
    node: str | None = None
    cause: str | None = None


class LeftOut:
    """All that is left out."""

    def __init__(self) -> None:
        self._things: dict[tuple[Kind, str], Thing] = {}

    def __iter__(self) -> Iterator[Thing]:
        """The things, in the order in which they would have been restored."""
        return iter(list(self._things.values()))

    def add(self, thing: Thing) -> None:
        self._things[thing.kind, thing.name] = thing

    def get(self, kind: Kind, name: str) -> Thing | None:
        return self._things.get((kind, name))

    def by_root(self) -> list[list[Thing]]:
        """The things grouped by what went wrong: first the one that failed, then those that it took along."""
        groups: dict[Thing, list[Thing]] = {}
        for thing in self:
            root = thing
            while root.cause is not None and (below := self.get(Kind.NODE, root.cause)) is not None:
                root = below
            groups.setdefault(root, []).append(thing)
        return list(groups.values())

    def forget(self, kind: Kind, name: str) -> None:
        """Give a thing up, and what needs it.

        Raises:   RequestError: it is not left out.
        """
        if self._things.pop((kind, name), None) is None:
            raise RequestError(f"The {kind} '{name}' is not left out")
        if kind is Kind.NODE:
            for thing in self:
                if thing.node == name:
                    del self._things[thing.kind, thing.name]

    def replace(self, kind: Kind, name: str) -> None:
        """Give up a thing of which there is another one by now; what needs it can have that one."""
        self._things.pop((kind, name), None)

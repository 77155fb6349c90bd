"""One disk under one name, as clients find it."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Final, NamedTuple

from blockd.block.root import Root
from blockd.few_lines import FewLines
from blockd.wire.nbd import constants as nbd
from blockd.wire.nbd.haggling import ExportInfo

log = logging.getLogger(__name__)

_FLAGS = (
    nbd.TRANSMISSION_HAS_FLAGS
    | nbd.TRANSMISSION_SEND_FLUSH
    | nbd.TRANSMISSION_SEND_FUA
    | nbd.TRANSMISSION_SEND_CACHE
)
_WRITE_FLAGS = (
    nbd.TRANSMISSION_SEND_TRIM | nbd.TRANSMISSION_SEND_WRITE_ZEROES | nbd.TRANSMISSION_SEND_FAST_ZERO
)


@dataclass(eq=False)
class Export:
    """A root as the NBD server offers it; `export_id` is what commands call it, `name` what clients do."""

    name: str
    root: Root
    writable: bool
    description: str = ""
    export_id: str = ""
    # Whether there may be several connections: a client that is told so waits for all that it wants.
    allows_many: bool = True
    # Whether every write is flushed before it is acknowledged.
    writethrough: bool = False
    # Whether clients may ask in which layer of its chain data is.
    allocation_depth: bool = False
    failures: FewLines = field(default_factory=partial(FewLines, log))

    @property
    def contexts(self) -> list[str]:
        """What block status can tell of it."""
        return [name for name in CONTEXTS if name != nbd.ALLOCATION_DEPTH or self.allocation_depth]

    def info(self, *, structured: bool) -> ExportInfo:
        """Size and transmission flags as they are now."""
        flags = _FLAGS | (_WRITE_FLAGS if self.writable else nbd.TRANSMISSION_READ_ONLY)
        if self.allows_many:
            # Every connection runs on the same node, so a flush on one covers what all of them wrote.
            flags |= nbd.TRANSMISSION_CAN_MULTI_CONN
        return ExportInfo(self.root.size, flags | (nbd.TRANSMISSION_SEND_DF if structured else 0))


# What block status can tell of an export, and how clients know it apart: its number in a reply.
CONTEXTS: Final = {nbd.BASE_ALLOCATION: 0, nbd.ALLOCATION_DEPTH: 1}


class Terms(NamedTuple):
    """What client and server agreed on when the haggling ended."""

    export: Export
    structured: bool
    contexts: tuple[str, ...]  # what was negotiated for this export of what block status tells
    client: object  # stands for the connection, for what each of them is told once


# How much of a name an error repeats.
_SHOWN_LENGTH = 80


def not_present(name: str) -> str:
    """Say, as QEMU does, that there is no export of a name."""
    shown = name if len(name) < _SHOWN_LENGTH else f"{name[:_SHOWN_LENGTH]}..."
    return f"export '{shown}' not present"


def find_export(exports: Mapping[str, Export], name: str) -> Export | None:
    """Look an export up; the empty name means the only one there is."""
    if not name and len(exports) == 1:
        return next(iter(exports.values()))
    return exports.get(name)

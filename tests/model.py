"""A disk that is right by being simple: what tests compare the real ones with.

The model holds the content a guest must read, and for every 512-byte sector the values that it may
have after a crash: what was there at the last acknowledged flush, or anything written since. Data is
recognisable: every sector written says which write it comes from and for which offset it was meant.
"""

import struct
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from blockd.units import SECTOR_SIZE

ZERO_SECTOR = bytes(SECTOR_SIZE)
_STAMP = struct.Struct(">QQ")


def stamp(sequence: int, offset: int, length: int) -> bytes:
    """Data for a write: every 16 bytes hold the write's number and the sector's offset."""
    first = offset - offset % SECTOR_SIZE
    data = b"".join(
        _STAMP.pack(sequence, sector) * (SECTOR_SIZE // _STAMP.size)
        for sector in range(first, offset + length, SECTOR_SIZE)
    )
    return data[offset - first : offset - first + length]


def describe(sector: bytes) -> str:
    """Say where the content of a sector comes from."""
    if sector == ZERO_SECTOR:
        return "zeroes"
    sequence, offset = _STAMP.unpack_from(sector)
    if sector == stamp(sequence, offset, SECTOR_SIZE):
        return f"write {sequence} for offset {offset:#x}"
    return f"a mixture that begins with write {sequence} for offset {offset:#x}"


def drawn(layers: Sequence[str], cluster_size: int) -> bytes:
    """The content of a chain drawn with one character a cluster, base first: ``["AB-", "-C0"]``.

    A letter is data of that layer, 0 is zeroes, and - lets the layer below through. A layer that is
    shorter than the one above shows zeroes past its end.
    """
    content = b""
    for layer in layers:
        below = content.ljust(len(layer) * cluster_size, b"\0")
        content = b"".join(
            below[index * cluster_size : (index + 1) * cluster_size]
            if kind == "-"
            else cluster(kind, index, cluster_size)
            for index, kind in enumerate(layer)
        )
    return content


def cluster(kind: str, index: int, cluster_size: int) -> bytes:
    """The content of one drawn cluster."""
    return bytes(cluster_size) if kind == "0" else stamp(ord(kind), index * cluster_size, cluster_size)


class AfterCrash(NamedTuple):
    """What a disk may hold if the power went at one moment."""

    content: bytes
    history: dict[int, tuple[bytes, ...]]
    sizes: tuple[int, ...]

    def allowed(self, sector: int) -> tuple[bytes, ...]:
        start = sector * SECTOR_SIZE
        return self.history.get(sector) or (self.content[start : start + SECTOR_SIZE],)

    def problems(self, found: bytes) -> Iterator[str]:
        """Every sector that holds something it may not hold."""
        if found == self.content:
            return
        if len(found) not in self.sizes:
            yield f"the disk has {len(found)} bytes instead of {self.sizes}"
        for sector in range(min(len(found), len(self.content)) // SECTOR_SIZE):
            value = found[sector * SECTOR_SIZE : (sector + 1) * SECTOR_SIZE]
            if value not in self.allowed(sector):
                may = " or ".join(describe(other) for other in self.allowed(sector))
                kind = "written" if sector in self.history else "untouched"
                yield f"{kind} sector at {sector * SECTOR_SIZE:#x} holds {describe(value)}, not {may}"


class ModelDisk:
    """The oracle. A guest operation is begun before it is sent and finished when it is acknowledged."""

    def __init__(self, content: bytes) -> None:
        self.content = bytearray(content)
        self.sequence = 0
        self._sizes: tuple[int, ...] = (len(content),)
        # By sector: the values possible after a crash, oldest first. Sectors without an entry were
        # never written.
        self._history: dict[int, tuple[bytes, ...]] = {}
        # By sector: how many older values the history has lost to flushes.
        self._outdated: dict[int, int] = {}
        # By sector: what a discard or a failed write may have left besides `content`; settled by reading.
        self._either: dict[int, bytes] = {}
        # Ranges that a guest is using just now; see tests/guest.py.
        self.busy: list[tuple[int, int]] = []
        # Called when what a crash may leave has changed.
        self.on_change: Callable[[], None] = lambda: None
        self._after_crash: AfterCrash | None = None

    @property
    def size(self) -> int:
        return len(self.content)

    # -- guest operations -----------------------------------------------------------------------

    def new_data(self, offset: int, length: int) -> bytes:
        """Data for the next write."""
        self.sequence += 1
        return stamp(self.sequence, offset, length)

    def begin_write(self, offset: int, data: bytes) -> None:
        """The write is on its way: a crash may leave every sector old or new."""
        for sector, value in self._new_sectors(offset, data):
            self._may_become(sector, value)
        self._change()

    def finish_write(self, offset: int, data: bytes) -> None:
        """The write was acknowledged: reads find it."""
        for sector in _sectors(offset, len(data)):
            self._either.pop(sector, None)
        self.content[offset : offset + len(data)] = data
        self._change()

    def fail_write(self, offset: int, data: bytes) -> None:
        """The write failed or was cancelled: every sector holds old or new data."""
        for sector, value in self._new_sectors(offset, data):
            self._either[sector] = value

    def lose_unflushed(self) -> None:
        """What was written since the last acknowledged flush may be lost, and a guest was told so."""
        for sector, history in self._history.items():
            if sector not in self._either and history[0] != self._value(sector):
                self._either[sector] = history[0]

    def finish_durable_write(self, offset: int, data: bytes) -> None:
        """The write was acknowledged as being on the disk: nothing older can come back."""
        self.finish_write(offset, data)
        written = _sectors(offset, len(data))
        self.finish_flush({sector: age for sector, age in self.begin_flush().items() if sector in written})

    def finish_discard(self, offset: int, length: int) -> None:
        """A discarded sector reads as before or as zeroes, but always the same."""
        assert not offset % SECTOR_SIZE and not length % SECTOR_SIZE, "guests discard whole sectors"
        self.fail_write(offset, bytes(length))

    def check_read(self, offset: int, data: bytes) -> None:
        """Compare what a guest read.

        Raises:   AssertionError: it is not what it wrote; says which write came back instead.
        """
        if not self._either and self.content[offset : offset + len(data)] == data:
            return
        for sector in _sectors(offset, len(data)):
            self._check_sector(sector, offset, data)

    def _check_sector(self, sector: int, offset: int, data: bytes) -> None:
        start, end = max(offset, sector * SECTOR_SIZE), min(offset + len(data), (sector + 1) * SECTOR_SIZE)
        found = bytes(data[start - offset : end - offset])
        either = self._either.get(sector)
        if either is not None and found == either[start % SECTOR_SIZE :][: end - start]:
            self.content[sector * SECTOR_SIZE : (sector + 1) * SECTOR_SIZE] = either
            self._change()
        expected = bytes(self.content[start:end])
        assert found == expected, (
            f"sector at {sector * SECTOR_SIZE:#x}: read {_describe_part(found)}, "
            f"expected {_describe_part(expected)}"
        )
        self._either.pop(sector, None)

    def is_unsettled(self, offset: int, length: int) -> bool:
        """Whether the content of any sector will only be known when it is read."""
        return any(sector in self._either for sector in _sectors(offset, length))

    # -- flush and crash ------------------------------------------------------------------------

    def begin_flush(self) -> dict[int, int]:
        """What will be durable when the flush is acknowledged: all that is acknowledged by now."""
        durable = {}
        for sector, history in self._history.items():
            if sector not in self._either:
                newest = len(history) - 1 - history[::-1].index(self._value(sector))
                durable[sector] = self._outdated.get(sector, 0) + newest
        return durable

    def finish_flush(self, durable: dict[int, int]) -> None:
        """The flush was acknowledged: older values cannot come back."""
        for sector, version in durable.items():
            outdated = version - self._outdated.get(sector, 0)
            if outdated > 0:  # else a flush that began later was acknowledged before
                self._history[sector] = self._history[sector][outdated:]
                self._outdated[sector] = version
        self._change()

    def after_crash(self) -> AfterCrash:
        """What may be found if the power went now."""
        if self._after_crash is None:
            self._after_crash = AfterCrash(bytes(self.content), dict(self._history), self._sizes)
        return self._after_crash

    def allowed_after_crash(self, sector: int) -> tuple[bytes, ...]:
        """The values one sector may have if the power went now."""
        return self._history.get(sector) or (self._value(sector),)

    def begin_resize(self, size: int) -> None:
        """The disk is being made larger, and what is new reads as zeroes; or smaller."""
        self._sizes = (self.size, size)
        self.content.extend(bytes(max(0, size - self.size)))
        self._change()

    def cut(self, size: int) -> None:
        """Be smaller from the beginning."""
        del self.content[size:]
        self._sizes = (size,)

    def finish_resize(self) -> None:
        size = self._sizes[-1]
        del self.content[size:]
        for found in (self._history, self._outdated, self._either):
            for sector in [sector for sector in found if sector * SECTOR_SIZE >= size]:
                del found[sector]
        self._sizes = (size,)
        self._change()

    # -- details ----------------------------------------------------------------------------------

    def _change(self) -> None:
        self._after_crash = None
        self.on_change()

    def _value(self, sector: int) -> bytes:
        return bytes(self.content[sector * SECTOR_SIZE : (sector + 1) * SECTOR_SIZE])

    def _may_become(self, sector: int, value: bytes) -> None:
        self._history[sector] = (*self._history.get(sector, (self._value(sector),)), value)

    def _new_sectors(self, offset: int, data: bytes) -> Iterator[tuple[int, bytes]]:
        """Every sector a write touches, with its whole content after the write."""
        for sector in _sectors(offset, len(data)):
            start = sector * SECTOR_SIZE
            value = bytearray(self._value(sector))
            low, high = max(offset, start), min(offset + len(data), start + SECTOR_SIZE)
            assert high - low == len(value) or sector not in self._either, (
                "part of an unsettled sector written"
            )
            value[low - start : high - start] = data[low - offset : high - offset]
            yield sector, bytes(value)


def _sectors(offset: int, length: int) -> range:
    return range(offset // SECTOR_SIZE, (offset + length - 1) // SECTOR_SIZE + 1)


def _describe_part(part: bytes) -> str:
    return describe(part) if len(part) == SECTOR_SIZE else part[:32].hex()

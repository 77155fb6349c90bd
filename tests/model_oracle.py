"""What guests read of a few windows of a disk, sector by sector, whatever else is done to it meanwhile."""

import random

from blockd.units import SECTOR_SIZE


class Oracle:
    """What a guest reads, sector by sector, of the windows it uses."""

    def __init__(self, windows: list[range]) -> None:
        self.windows = windows
        self.content = {window.start: bytearray(len(window)) for window in windows}
        # By sector: what it may hold besides, after a discard or a cancelled request.
        self.either: dict[int, list[bytes]] = {}
        self.busy: list[tuple[int, int]] = []
        # While the backing is away: what was there before, and which sectors are guests' own since.
        self.hidden: dict[int, bytes] | None = None
        self.hidden_either: dict[int, list[bytes]] = {}
        self.own: set[int] = set()

    def pick(self, rng: random.Random, unit: int) -> tuple[int, int, int]:
        """Window, offset, length of a range that nobody else uses; length 0: there is none."""
        window = self.windows[int(rng.random() * len(self.windows))]
        step = unit if rng.random() < 0.4 else SECTOR_SIZE
        offset = window.start + int(rng.random() * (len(window) // step)) * step
        length = (1 + int(rng.random() * rng.choice((1, 2, 8)))) * step
        length = min(length, window.stop - offset)
        if any(start < offset + length and offset < end for start, end in self.busy):
            return window.start, offset, 0
        return window.start, offset, length

    def settle(self, window: int, offset: int, data: bytes) -> None:
        """A request was acknowledged: these bytes are there, and nothing else may be."""
        sectors = range(offset // SECTOR_SIZE, (offset + len(data)) // SECTOR_SIZE)
        if self.either:
            for sector in sectors:
                self.either.pop(sector, None)
        if self.hidden is not None:
            self.own.update(sectors)
        self.content[window][offset - window : offset - window + len(data)] = data

    def unsettle(self, offset: int, data: bytes) -> None:
        """It was cancelled, or a discard: each sector is as it was, or as it was to be."""
        for position in range(0, len(data), SECTOR_SIZE):
            value = data[position : position + SECTOR_SIZE]
            self.either.setdefault((offset + position) // SECTOR_SIZE, []).append(value)

    def compare(self, window: int, offset: int, found: bytes) -> None:
        """Compare what a guest read; what could be either is known then.

        Raises:   AssertionError: it is neither what is expected nor what it may be besides.
        """
        content, start = self.content[window], offset - window
        if not self.either and content[start : start + len(found)] == found:
            return
        for position in range(0, len(found), SECTOR_SIZE):
            sector = (offset + position) // SECTOR_SIZE
            value = found[position : position + SECTOR_SIZE]
            expected = bytes(content[start + position : start + position + SECTOR_SIZE])
            allowed = [expected, *self.either.pop(sector, ())]
            if value not in allowed:
                may = " or ".join(f"{other[:8].hex()}..." for other in allowed)
                raise AssertionError(
                    f"the sector at {offset + position:#x} holds {value[:8].hex()}..., not {may}"
                )
            content[start + position : start + position + SECTOR_SIZE] = value

    def grow(self, windows: list[range]) -> None:
        """The disk has become larger: there are zeroes."""
        self.windows = [*self.windows, *windows]
        self.content.update((window.start, bytearray(len(window))) for window in windows)

    def find_out(self, window: range, found: bytes) -> None:
        """What of a window could be either is known then, but where somebody is busy."""
        for sector in list(self.either):
            offset = sector * SECTOR_SIZE
            if offset in window and not any(start <= offset < end for start, end in self.busy):
                start = offset - window.start
                self.compare(window.start, offset, found[start : start + SECTOR_SIZE])

    def detach(self) -> None:
        """The backing is going, and what is below shows as zeroes."""
        self.hidden = {start: bytes(content) for start, content in self.content.items()}
        self.hidden_either = {sector: values[:] for sector, values in self.either.items()}
        self.own.clear()

    def hide(self, window: int, offset: int, length: int) -> None:
        """Nothing of a range is in the image itself."""
        self.content[window][offset - window : offset - window + length] = bytes(length)

    def attach(self) -> None:
        """The backing is there again: where guests have written nothing, it may show."""
        assert self.hidden is not None, "it was away"
        for start, content in self.hidden.items():
            for position in range(0, len(content), SECTOR_SIZE):
                if (start + position) // SECTOR_SIZE not in self.own:
                    self.unsettle(start + position, content[position : position + SECTOR_SIZE])
        for sector, values in self.hidden_either.items():
            for value in values if sector not in self.own else ():
                self.unsettle(sector * SECTOR_SIZE, value)
        self.hidden = None

    def copy(self) -> "Oracle":
        """What is so now, whatever guests do from now on; anything may be where one is busy."""
        copied = Oracle(self.windows)
        copied.content = {start: content[:] for start, content in self.content.items()}
        copied.either = {sector: values[:] for sector, values in self.either.items()}
        copied.busy = self.busy[:]
        return copied

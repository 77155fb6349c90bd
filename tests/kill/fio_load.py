"""fio as a guest that verifies what it writes: every block holds its own offset, each write is flushed."""

import asyncio
import struct
from pathlib import Path
from typing import Self

from blockd.units import KIB

BLOCK = 4 * KIB
STOP_TIMEOUT_S = 100.0


def pattern(offset: int) -> bytes:
    """What fio writes to the block at an offset."""
    return struct.pack("<Q", offset) * (BLOCK // 8)


class FioLoad:
    """One fio on the part of a disk that begins at `offset`, until its connection is lost."""

    def __init__(self, folder: Path, offset: int, size: int, process: asyncio.subprocess.Process) -> None:
        self._folder = folder
        self._offset = offset
        self._size = size
        self._process = process

    @classmethod
    async def start(cls, folder: Path, uri: str, offset: int, size: int, seed: int) -> Self:
        """Start to write all blocks in random order, again and again; each is read back soon after."""
        process = await asyncio.create_subprocess_exec(
            *("fio", "--name=load", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite", f"--bs={BLOCK}"),
            *(f"--offset={offset}", f"--size={size}", "--loops=1000", f"--randseed={seed}", "--fsync=1"),
            *("--verify=pattern", "--verify_pattern=%o", "--verify_backlog=8", "--verify_state_save=0"),
            *("--write_lat_log=load", "--log_offset=1"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            cwd=folder,
        )
        return cls(folder, offset, size, process)

    async def wait(self) -> str:
        """Wait until it has ended, which the loss of its connection makes it do; returns what it printed."""
        async with asyncio.timeout(STOP_TIMEOUT_S):
            printed, _ = await self._process.communicate()
        return printed.decode()

    def flushed(self) -> set[int]:
        """The offsets of the blocks whose write and flush were acknowledged: all but the last one written."""
        log = self._folder / "load_clat.1.log"
        rows = [line.split(",") for line in log.read_text().splitlines()] if log.exists() else []
        return {int(row[4]) for row in [row for row in rows if int(row[2]) == 1][:-1]}

    def problems(self, before: bytes, after: bytes) -> list[str]:
        """What is wrong with the part after a kill, given what the whole disk held before."""
        found = []
        flushed = self.flushed()
        for offset in range(self._offset, self._offset + self._size, BLOCK):
            block, old = after[offset : offset + BLOCK], before[offset : offset + BLOCK]
            new = pattern(offset)
            if block != new and (offset in flushed or not _is_mixture(block, old, new)):
                found.append(f"block {offset:#x} is wrong, flushed: {offset in flushed}")
        return found


def _is_mixture(block: bytes, old: bytes, new: bytes) -> bool:
    """Whether each sector is from before or from the write."""
    return all(
        block[start : start + 512] in (old[start : start + 512], new[start : start + 512])
        for start in range(0, BLOCK, 512)
    )

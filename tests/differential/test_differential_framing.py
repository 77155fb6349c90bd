"""The same bytes to qemu-storage-daemon and to blockd: the same answers, byte for byte.

Masked are the version and the time.
"""

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.differential.framing import DIFFERENT, EXCHANGES
from tests.differential.pair import blockd
from tests.qsd import qsd

END = b'\xff{"execute": "no-such", "id": "the end"}'
EXCHANGE_COUNT_MIN = 110

Pair = tuple[Path, Path]


async def answers(path: Path, exchange: bytes) -> list[bytes]:
    """Send one exchange to a new session and return the lines that answer it, masked."""
    reader, writer = await asyncio.open_unix_connection(path, limit=4 << 20)
    writer.write(exchange + END)
    lines: list[bytes] = []
    async with asyncio.timeout(100):
        while b'"the end"' not in (line := await reader.readline()):
            assert line, lines
            lines.append(re.sub(rb'"micro": \d+|"package": "[^"]*"', b"", line))
    writer.close()
    await writer.wait_closed()
    return [*lines, line]


@pytest.fixture
async def both(tmp_path: Path) -> AsyncIterator[Pair]:
    for name in ("theirs", "ours"):
        (tmp_path / name).mkdir()
    async with qsd(tmp_path / "theirs") as theirs, blockd(tmp_path / "ours") as ours:
        yield theirs, ours


async def test_every_exchange_is_answered_alike(both: Pair) -> None:
    different = []
    for exchange in EXCHANGES:
        theirs, ours = [await answers(path, exchange) for path in both]
        if theirs != ours:
            different.append((exchange, theirs, ours))
    assert len(EXCHANGES) >= EXCHANGE_COUNT_MIN
    assert different == []


async def test_deliberate_differences_are_there(both: Pair) -> None:
    for exchange, entry in DIFFERENT:
        theirs, ours = [await answers(path, exchange) for path in both]
        assert theirs != ours, f"take it out of the table, and {entry} out of the document"

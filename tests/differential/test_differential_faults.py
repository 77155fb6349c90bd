"""The same requests fail on a disk with limits of its own, with qemu-storage-daemon and with blockd."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from blockd.errors import StorageError
from blockd.protocols.nbd_client import NbdClient
from blockd.units import KIB
from tests.differential.pair import blockd
from tests.qmp_client import QmpClient
from tests.qsd import qsd

SIZE = 256 * KIB
BAD_SECTOR = 40  # in the middle of a block of 8 KiB, which begins at 16 KiB
BAD = BAD_SECTOR * 512
DAEMONS = {"theirs": qsd, "blockd": blockd}
LIMITS: dict[str, dict[str, int]] = {
    "none": {},
    "blocks": {"align": 8 * KIB},
    "transfers": {"align": 4 * KIB, "max-transfer": 8 * KIB},
    "zeroes": {"opt-write-zero": 16 * KIB, "max-write-zero": 16 * KIB},
    "discards": {"opt-discard": 8 * KIB, "max-discard": 16 * KIB},
}
FAULTS: dict[str, dict[str, object]] = {
    io_type: {"event": "none", "iotype": io_type, "sector": BAD_SECTOR}
    for io_type in ("read", "write", "write-zeroes", "discard")
}
RANGES = [
    (0, 16 * KIB),
    (0, 24 * KIB),
    (16 * KIB, 512),
    (BAD + 1 * KIB, 1 * KIB),
    (BAD, 512),
    (BAD - 512, 4 * KIB),
    (8 * KIB, 64 * KIB),
    (24 * KIB, 512),
]


async def end_of(socket: Path, io_type: str, offset: int, length: int) -> str:
    """How a request ends; QSD leaves guests whose reads fail, so each comes anew."""
    async with asyncio.timeout(100), await NbdClient.connect_unix(str(socket), "top") as guest:
        try:
            match io_type:
                case "read":
                    await guest.read(offset, length)
                case "write":
                    await guest.write(offset, b"w" * length)
                case "write-zeroes":
                    await guest.write_zeroes(offset, length)
                case "discard":
                    await guest.trim(offset, length)
        except StorageError:
            return f"{io_type} {offset}+{length} failed"
    return f"{io_type} {offset}+{length} done"


def is_whole(place: tuple[int, int], align: int) -> bool:
    """Whether a range consists of whole blocks."""
    return not any(number % align for number in place)


def is_mistaken(io_type: str, options: dict[str, Any]) -> bool:
    """Whether QSD makes a mistake with parts of blocks.

    It crashes when it is to discard one, and writes to one of which it could not read the rest.
    """
    return io_type == "discard" or (io_type != "read" and options["inject-error"][0]["iotype"] == "read")


async def results(owner: str, folder: Path, options: dict[str, Any]) -> tuple[list[str], bytes]:
    """How requests ended, and what the file holds in the end."""
    folder.mkdir()
    path = folder / "disk"
    path.write_bytes(b"o" * SIZE)
    async with DAEMONS[owner](folder) as socket, await QmpClient.connect(socket) as client:
        image = {"driver": "file", "filename": str(path), "discard": "unmap"}
        node = {"driver": "blkdebug", "node-name": "top", "image": image, "discard": "unmap", **options}
        await client.command("blockdev-add", node)
        address = {"type": "unix", "data": {"path": str(folder / "nbd")}}
        await client.command("nbd-server-start", {"addr": address})
        export = {"type": "nbd", "id": "e", "node-name": "top", "writable": True}
        await client.command("block-export-add", export)
        ends = [
            await end_of(folder / "nbd", io_type, *place)
            for io_type in FAULTS
            for place in RANGES
            if is_whole(place, options.get("align", 1)) or not is_mistaken(io_type, options)
        ]
        await client.command("quit")
    return ends, path.read_bytes()


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("fault", FAULTS)
async def test_the_same_requests_fail(limits: str, fault: str, tmp_path: Path) -> None:
    options = {**LIMITS[limits], "inject-error": [FAULTS[fault]]}
    theirs, ours = [await results(owner, tmp_path / owner, options) for owner in DAEMONS]
    assert ours[0] == theirs[0]
    assert any(end.endswith("failed") for end in ours[0])
    assert ours[1] == theirs[1]

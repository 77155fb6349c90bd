"""What a stop costs: disks that have nothing for their files cost no sync, all others do."""

import os
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from blockd.protocols.nbd_client import NbdClient
from blockd.units import KIB, MIB
from tests import qemu_img
from tests.control.running import running
from tests.qmp_client import QmpClient

COUNT = 6
Change = Callable[[NbdClient, QmpClient], Awaitable[object]]


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file is synced."""
    counts: Counter[str] = Counter()
    real = os.fdatasync

    def sync(fd: int) -> None:
        counts[Path(f"/proc/self/fd/{fd}").readlink().name] += 1
        real(fd)

    monkeypatch.setattr(os, "fdatasync", sync)
    return counts


async def flush(guest: NbdClient, _: QmpClient) -> None:
    await guest.flush()


async def write_in_place(guest: NbdClient, _: QmpClient) -> None:
    await guest.write(0, b"2" * 4 * KIB)


async def write_much(guest: NbdClient, _: QmpClient) -> None:
    await guest.write(0, b"2" * 2 * MIB)


async def write_elsewhere(guest: NbdClient, _: QmpClient) -> None:
    await guest.write(3 * MIB, b"2" * 4 * KIB)


async def trim(guest: NbdClient, _: QmpClient) -> None:
    await guest.trim(0, 64 * KIB)


async def write_zeroes(guest: NbdClient, _: QmpClient) -> None:
    await guest.write_zeroes(0, 64 * KIB)


async def stream(_: NbdClient, client: QmpClient) -> None:
    await client.command("block-stream", {"device": "used", "job-id": "job"})
    await client.event("BLOCK_JOB_COMPLETED")


CHANGES: list[Change] = [write_in_place, write_much, write_elsewhere, trim, write_zeroes]


@pytest.mark.parametrize("image_format", ["qcow2", "qed", "raw"])
@pytest.mark.parametrize("change", [flush, *CHANGES, stream], ids=lambda change: str(change.__name__))
async def test_a_stop_syncs_what_has_changed_only(
    tmp_path: Path, synced: Counter[str], change: Change, image_format: str
) -> None:
    if change is stream and image_format == "raw":
        return  # it has no backing
    has_journal = image_format == "qed"
    words: list[str | Path] = ["--state-dir", tmp_path / "state"] if has_journal else []
    base = tmp_path / "base.raw"
    base.write_bytes(b"0" * 4 * MIB)
    link = [] if image_format == "raw" else ["-b", str(base), "-F", "raw"]
    names = [f"disk{number}" for number in range(COUNT)]
    for name in (*names, "used"):
        path = tmp_path / f"{name}.img"
        qemu_img.qemu("qemu-img", "create", "-q", "-f", image_format, *link, path, *([] if link else ["4M"]))
        words += ["--device", f"{name}={path},format={image_format}"]
    async with running(tmp_path, *words) as daemon:
        client, guest = await daemon.qmp(), await daemon.guest("used")
        await guest.write(0, b"1" * 64 * KIB)
        await guest.flush()
        await change(guest, client)
        synced.clear()
        await guest.disconnect()
    others = {name: count for name, count in synced.items() if name in [f"{each}.img" for each in names]}
    assert not others
    if change in CHANGES:
        assert synced["used.img"]

"""Streams on filesystems where files can share blocks: nothing is copied that can be shared."""

import random
from pathlib import Path

import pytest

from blockd.cli.blockctl import main
from blockd.cli.image.create import NewImage, create_image
from blockd.protocols.nbd_client import NbdClient
from blockd.units import KIB, MIB
from tests import chains, layers, qemu_img
from tests.conftest import StartDaemon
from tests.filesystems import Place, mounted, mounted_again, shared_bytes
from tests.guest import Guest
from tests.layers import Layer
from tests.model import ModelDisk
from tests.nbd_disk import NbdDisk

CLUSTER = 64 * KIB
# The last cluster is not whole, and is copied.
SIZE = 8 * MIB - 512
# 16 MiB of data in the base, some of it covered or zeroed by the middle.
BASE = "ABCDEFGH" * 32
MIDDLE = ("-" * 12 + "M0--") * 16
# What guests write has blocks of its own, and what they read is copied.
GUEST_STEP_COUNT = 60


@pytest.mark.slow
@pytest.mark.parametrize("base_format", ["raw", "qcow2"])
async def test_stream_under_a_guest_shares_blocks(
    reflink_place: Place, start_daemon: StartDaemon, base_format: str
) -> None:
    drawings = [BASE, MIDDLE, "-" * len(BASE)]
    chain = await chains.make(reflink_place.path, drawings, CLUSTER, base_format)
    model = ModelDisk(chain.content)
    daemon = await start_daemon("--device", f"vda={chain.active}")
    async with (
        await daemon.qmp() as qmp,
        await NbdClient.connect_unix(str(daemon.nbd_path), "vda") as client,
    ):
        guest = Guest(NbdDisk(client), model, random.Random(1), cluster_size=CLUSTER)
        await qmp.command("block_stream", device="vda", speed=4 * MIB)
        for _ in range(GUEST_STEP_COUNT):
            await guest.step()
        await qmp.command("block-job-set-speed", device="vda", speed=0)
        completed = await qmp.event("BLOCK_JOB_COMPLETED")
        assert "error" not in completed
        if reflink_place.is_mounted:
            assert shared_bytes(chain.active) > len(chain.content) // 4
        await guest.read_all()
    assert await daemon.stop() == 0
    for path in chain.paths[:-1]:
        path.unlink()
    verdict = qemu_img.check(chain.active)
    assert verdict is not None
    assert (verdict.corruptions, verdict.leaks) == (0, 0)
    assert qemu_img.content(chain.active) == model.content


@pytest.mark.parametrize("image_format", layers.OVERLAY_FORMATS)
async def test_every_format_shares_blocks(reflink_place: Place, image_format: str) -> None:
    content = bytearray(random.Random(2).randbytes(SIZE))
    base = reflink_place.path / "base.raw"
    base.write_bytes(content)
    active = base.with_name(f"active.{image_format}")
    options = layers.creation_options(active, Layer(image_format, SIZE, CLUSTER))
    await create_image(str(active), NewImage(image_format, SIZE, base.name, "raw", options))
    content[3 * CLUSTER + 1 : 5 * CLUSTER] = bytes(2 * CLUSTER - 1)
    async with layers.opened(active, image_format) as disk:
        await disk.node.write(3 * CLUSTER + 1, bytes(2 * CLUSTER - 1))
        await disk.stream(None)
        assert await chains.read_all(disk.node) == content
    if reflink_place.is_mounted:
        data = active.with_suffix(".data") if image_format == "add-cow" else active
        assert shared_bytes(data) == SIZE // CLUSTER * CLUSTER - 2 * CLUSTER
    base.unlink()
    if image_format != "add-cow":  # whose guest has the raw image by now
        async with layers.opened(active, image_format, read_only=True) as disk:
            assert await chains.read_all(disk.node) == content


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
async def test_what_is_shared_outlives_a_power_cut(tmp_path: Path, kind: str) -> None:
    """It is on the disk when the stream has completed, though the base has never been synced."""
    after = tmp_path / "after.filesystem"
    with mounted(kind, tmp_path) as place:
        chain = await chains.make(place.path, [BASE, "-" * len(BASE)], CLUSTER, "raw")
        async with layers.opened(chain.active, "qcow2") as disk:
            await disk.stream(None)
            place.after_power_cut(after)
    with mounted_again(after) as path:
        active = path / chain.active.name
        qemu_img.assert_sound(active)
        assert qemu_img.content(active) == chain.content


@pytest.mark.parametrize("image_format", ["raw", "qcow2", "qed"])
def test_convert_looks_for_zeroes(reflink_place: Place, image_format: str) -> None:
    """Whoever converts an image wants its zeroes to take no space, also when the source is gone."""
    source, target = reflink_place.path / "source.raw", reflink_place.path / "target"
    content = random.Random(3).randbytes(MIB) + bytes(SIZE - MIB)
    source.write_bytes(content)
    assert main(["image", "convert", "-O", image_format, str(source), str(target)]) == 0
    assert qemu_img.content(target, image_format) == content
    assert target.stat().st_blocks * 512 < 2 * MIB

"""What an export is advertised as is the same with qemu-storage-daemon and with blockd, byte for byte."""

import asyncio
from collections.abc import Mapping
from pathlib import Path

import pytest

from blockd.units import KIB, MIB
from blockd.wire.nbd import constants as nbd
from blockd.wire.nbd import haggling
from blockd.wire.nbd.haggling import GoOption
from tests import qemu_img
from tests.differential.nodes import in_folder
from tests.differential.pair import blockd
from tests.nbd.serving import RawClient
from tests.qmp_client import QmpClient
from tests.qsd import qsd

DAEMONS = {"theirs": qsd, "blockd": blockd}
Options = Mapping[str, object]
Replies = list[tuple[int, bytes]]
NAME, SIZES = nbd.INFO_NAME, nbd.INFO_BLOCK_SIZE
ASKED: tuple[list[int], ...] = ([], [NAME], [SIZES], [SIZES, NAME])


def file(name: str) -> Options:
    return {"driver": "file", "filename": name}


def limited(image: Options, **limits: int) -> Options:
    return {"driver": "blkdebug", "image": image} | {
        name.replace("_", "-"): limit for name, limit in limits.items()
    }


def image(image_format: str, below: Options, **more: object) -> Options:
    return {"driver": image_format, "file": below, **more}


def throttled(below: Options) -> Options:
    return {"driver": "throttle", "throttle-group": "group", "file": below}


LIMITS = {"align": 4 * KIB, "max_transfer": 768 * KIB}
NODES: Mapping[str, Options] = {
    "file": file("disk.raw"),
    "raw": image("raw", file("disk.raw")),
    "part": image("raw", file("disk.raw"), offset=512, size=4096),
    "qcow2": image("qcow2", file("disk.qcow2")),
    "qed": image("qed", file("disk.qed")),
    "null": {"driver": "null-co", "size": MIB},
    "throttle": throttled(image("qed", file("disk.qed"))),
    "copy-on-read": image("copy-on-read", image("qcow2", file("disk.qcow2"))),
    "align": limited(file("disk.raw"), align=4 * KIB),
    "large align": limited(file("disk.raw"), align=64 * KIB, max_transfer=3 * MIB),
    "max-transfer": limited(file("disk.raw"), max_transfer=3_000_000),
    "max-transfer larger than a request": limited(file("disk.raw"), max_transfer=64 * MIB),
    "zeroes and discards": limited(
        file("disk.raw"), align=512, opt_write_zero=64 * KIB, max_write_zero=MIB, opt_discard=MIB
    ),
    "both": limited(file("disk.raw"), **LIMITS),
    "twice": limited(limited(file("disk.raw"), **LIMITS), align=512, max_transfer=MIB),
    "twice, once without": limited(limited(file("disk.raw"), **LIMITS), align=512),
    "raw on limits": image("raw", limited(file("disk.raw"), **LIMITS)),
    "qcow2 on limits": image("qcow2", limited(file("disk.qcow2"), **LIMITS)),
    "qed on limits": image("qed", limited(file("disk.qed"), **LIMITS)),
    "throttle on limits": throttled(limited(file("disk.raw"), **LIMITS)),
    "raw on a throttle on limits": image("raw", throttled(limited(file("disk.raw"), **LIMITS))),
    "copy-on-read on limits": image("copy-on-read", image("qcow2", limited(file("disk.qcow2"), **LIMITS))),
    "a backing with limits": image("qcow2", file("disk.qcow2"), backing="base"),
}


async def replies_to(path: Path, option: int, asked: list[int]) -> Replies:
    """All replies to INFO or GO, in their order."""
    client = RawClient(*await asyncio.open_unix_connection(path))
    await client.reader.readexactly(haggling.GREETING_SIZE)
    client.send(haggling.pack_client_flags(nbd.FLAG_FIXED_NEWSTYLE | nbd.FLAG_NO_ZEROES))
    client.send(haggling.pack_option(option, haggling.pack_go(GoOption("disk", asked))))
    found = [await client.option_reply()]
    while found[-1][0] == nbd.REP_INFO:
        found.append(await client.option_reply())
    client.writer.close()
    return found


async def advertised(owner: str, folder: Path, node: Options, description: str | None) -> list[Replies]:
    """What a daemon tells of an export of a node."""
    folder.mkdir()
    for image_format in ("raw", "qcow2", "qed"):
        qemu_img.qemu("qemu-img", "create", "-q", "-f", image_format, folder / f"disk.{image_format}", "1M")
    async with DAEMONS[owner](folder) as socket, await QmpClient.connect(socket) as client:
        await client.command("object-add", {"qom-type": "throttle-group", "id": "group"})
        base = limited(file("disk.raw"), **LIMITS)
        for name, options in (("base", {**base, "read-only": True}), ("disk", node)):
            if name == "disk" or "base" in node.values():
                await client.command("blockdev-add", {**in_folder(folder, options), "node-name": name})
        address = {"type": "unix", "data": {"path": str(folder / "nbd")}}
        await client.command("nbd-server-start", {"addr": address})
        export = {"type": "nbd", "id": "e", "node-name": "disk", "writable": True}
        more = {} if description is None else {"description": description}
        await client.command("block-export-add", {**export, **more})
        return [
            await replies_to(folder / "nbd", option, asked)
            for option in (nbd.OPT_INFO, nbd.OPT_GO)
            for asked in ASKED
        ]


@pytest.mark.parametrize("name", NODES)
async def test_exports_are_advertised_as_by_qemu(name: str, tmp_path: Path) -> None:
    description = "a disk" if name == "both" else None
    theirs, ours = [await advertised(owner, tmp_path / owner, NODES[name], description) for owner in DAEMONS]
    assert ours == theirs
    assert all(len(replies) > 2 for replies in theirs)


async def test_the_minimum_is_one_that_clients_take(tmp_path: Path) -> None:
    """NBD allows 64 KiB at most; QEMU tells more, and clients refuse that."""
    node = limited(file("disk.raw"), align=MIB)
    for owner, minimum in (("theirs", MIB), ("blockd", 64 * KIB)):
        *_, replies = await advertised(owner, tmp_path / owner, node, None)
        sizes = haggling.pack_info_block_size(minimum, minimum, 32 * MIB)
        assert (nbd.REP_INFO, sizes) in replies


@pytest.mark.parametrize("driver", ["null-co", "raw"])
async def test_sizes_that_are_no_multiple_of_512(driver: str, tmp_path: Path) -> None:
    null = {"driver": "null-co", "size": 1000}
    node = null if driver == "null-co" else image("raw", null)
    sizes = {}
    for owner in DAEMONS:
        [(*_, (_, info), (_, _)), *_] = await advertised(owner, tmp_path / owner, node, None)
        sizes[owner] = haggling.parse_info_export(info).size
    assert sizes == {"theirs": 1024, "blockd": 1000 if driver == "null-co" else 1024}

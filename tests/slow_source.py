"""A disk whose base is too slow for what guests write to be merged: parts of clusters stay staged."""

import json

from blockd.protocols.nbd_client import NbdClient
from blockd.units import KIB
from tests.chains import Chain
from tests.qmp_client import QmpClient

CLUSTER = 64 * KIB
LAYERS = ["ABCDEFGH" * 4, "-" * 32]
# Bytes per second: a cluster takes minutes, once what the limit allows at once has been read.
LIMITS = {"bps-read": 512}
# What is written to a part of some clusters that the image lacks: of several, for each run of a daemon gets
# one from the source at once.
PART = b"staged" * 100
OFFSETS = [cluster * CLUSTER + 512 for cluster in (5, 9, 13, 17)]
STAGED_LENGTH = len(OFFSETS) * len(PART)


def options(chain: Chain) -> list[str]:
    """For the daemon's command line: the chain as the device `vda`, with a limit (`slow`) on its raw base."""
    group = {"qom-type": "throttle-group", "id": "slow", "limits": LIMITS}
    base = {"driver": "raw", "file": {"driver": "file", "filename": str(chain.paths[0])}}
    slow = {"driver": "throttle", "node-name": "base", "throttle-group": "slow", "file": base}
    file = {"driver": "file", "filename": str(chain.active)}
    disk = {"driver": "qcow2", "node-name": "disk", "file": file, "backing": "base"}
    export = {"type": "nbd", "id": "e", "node-name": "disk", "name": "vda", "writable": True}
    return [
        *("--object", json.dumps(group), "--blockdev", json.dumps(slow), "--blockdev", json.dumps(disk)),
        *("--device", "id=vda,node-name=disk", "--export", json.dumps(export)),
    ]


async def speed_up(client: QmpClient) -> None:
    """Lift the limit."""
    await client.command("qom-set", path="slow", property="limits", value={"bps-read": 0})


async def write_parts(guest: NbdClient) -> None:
    """Write parts of clusters that the image lacks: acknowledged, and read again."""
    for offset in OFFSETS:
        await guest.write(offset, PART)
    await read_parts(guest)


async def read_parts(guest: NbdClient) -> None:
    for offset in OFFSETS:
        assert bytes(await guest.read(offset, len(PART))) == PART


def with_parts(chain: Chain) -> bytes:
    """What the disk holds then."""
    content = bytearray(chain.content)
    for offset in OFFSETS:
        content[offset : offset + len(PART)] = PART
    return bytes(content)

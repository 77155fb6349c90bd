"""A name for which a header has no room is refused when it is given, before any work is done."""

import json
from pathlib import Path

import pytest

from blockd.units import MIB
from tests import qemu_img
from tests.conftest import StartDaemon
from tests.qmp_client import QmpClient, QmpError

# The header of an image with such clusters has less room than the longest name that may be recorded.
CLUSTER = 512
LONG_NAME = "a" * 1023
REFUSED = f"backing file name is too long for clusters of {CLUSTER} bytes"


def make_chain(folder: Path, active: Path) -> None:
    """base.raw <- middle.qcow2 <- active, by a link beside that."""
    (active.parent / "link").symlink_to(folder)
    with (folder / "base.raw").open("wb") as base:
        base.truncate(MIB)
        base.write(b"base" * 128)
    middle = qemu_img.create(folder / "middle.qcow2", MIB, backing=folder / "base.raw", backing_format="raw")
    qemu_img.write(middle, "write -P 1 64k 64k")
    options = f"cluster_size={CLUSTER}"
    qemu_img.create(active, MIB, options, backing=active.parent / "link" / "middle.qcow2")


COMMANDS = {
    "block-stream": {"job-id": "j", "device": "vda", "base": "base.raw", "backing-file": LONG_NAME},
    "change-backing-file": {"device": "vda", "image-node-name": "ACTIVE", "backing-file": LONG_NAME},
    "block-stream without work": {"device": "vda", "base": "middle.qcow2", "backing-file": LONG_NAME},
}


@pytest.fixture
async def client(start_daemon: StartDaemon, tmp_path: Path) -> QmpClient:
    make_chain(tmp_path, tmp_path / "active.qcow2")
    daemon = await start_daemon("--device", f"vda={tmp_path / 'active.qcow2'}")
    return await daemon.qmp()


@pytest.mark.parametrize("name", COMMANDS)
async def test_nothing_is_begun(client: QmpClient, tmp_path: Path, name: str) -> None:
    arguments = {
        key: str(tmp_path / value) if key == "base" else value for key, value in COMMANDS[name].items()
    }
    if "image-node-name" in arguments:
        [device] = await client.command("query-block")
        arguments["image-node-name"] = device["inserted"]["node-name"]
    before = (tmp_path / "active.qcow2").read_bytes()
    with pytest.raises(QmpError, match=REFUSED):
        await client.command(name.partition(" ")[0], arguments)
    assert await client.command("query-jobs") == []
    assert client.events == []
    assert (tmp_path / "active.qcow2").read_bytes() == before


async def test_the_name_of_the_base_itself(start_daemon: StartDaemon, tmp_path: Path) -> None:
    """No name is given: what is to be recorded leads to the base, whose path is this long."""
    folder = tmp_path.joinpath(*["b" * 200] * 3)
    folder.mkdir(parents=True)
    make_chain(folder, tmp_path / "active.qcow2")
    daemon = await start_daemon("--device", f"vda={tmp_path / 'active.qcow2'}", "--image-paths", folder)
    client = await daemon.qmp()
    with pytest.raises(QmpError, match=REFUSED):
        await client.command("block_stream", {"device": "vda", "base": str(folder / "base.raw")})
    assert await client.command("query-jobs") == []


async def test_a_new_image(client: QmpClient, tmp_path: Path) -> None:
    made = tmp_path / "new.qcow2"
    made.write_bytes(b"precious")
    await client.command("blockdev-add", {"driver": "file", "node-name": "new", "filename": str(made)})
    options = {"driver": "qcow2", "file": "new", "size": MIB, "cluster-size": CLUSTER}
    await client.command(
        "blockdev-create",
        {"job-id": "c", "options": {**options, "backing-file": LONG_NAME, "backing-fmt": "raw"}},
    )
    await client.event("JOB_STATUS_CHANGE", id="c", status="concluded")
    [job] = await client.command("query-jobs")
    assert REFUSED in job["error"], json.dumps(job)
    assert made.read_bytes() == b"precious"


async def test_an_add_cow_file_and_a_qed_image_have_room(client: QmpClient, tmp_path: Path) -> None:
    """Their headers take any name that may be recorded at all."""
    image = tmp_path / "active.qed"
    link = ("-b", tmp_path / "base.raw", "-F", "raw")
    qemu_img.qemu("qemu-img", "create", "-q", "-f", "qed", "-o", "cluster_size=4096", *link, image)
    file = {"driver": "file", "filename": str(image)}
    await client.command("blockdev-add", {"driver": "qed", "node-name": "e", "file": file})
    await client.command(
        "change-backing-file", {"device": "e", "image-node-name": "e", "backing-file": LONG_NAME}
    )
    await client.command(
        "change-backing-file", {"device": "e", "image-node-name": "e", "backing-file": "base.raw"}
    )

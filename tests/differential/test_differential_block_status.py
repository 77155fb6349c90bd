"""What nbdinfo finds of an export, and in which layers of its chain, is the same with both daemons."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests import qemu_img
from tests.differential.nodes import in_folder
from tests.differential.pair import blockd
from tests.programs import run
from tests.qmp_client import QmpClient
from tests.qsd import qsd

DAEMONS = {"theirs": qsd, "blockd": blockd}
CONTEXTS = ("qemu:allocation-depth", "base:allocation")
Node = Mapping[str, object]


def image(name: str) -> Node:
    return {"driver": name.rpartition(".")[2], "file": {"driver": "file", "filename": name}}


TOP = image("top.qcow2")
NODES: Mapping[str, Node] = {
    "file": {"driver": "file", "filename": "base.raw"},
    "raw": image("base.raw"),
    "a longer overlay": image("mid.qcow2"),
    "three layers": TOP,
    "the top alone": {**TOP, "backing": None},
    "qed": image("top.qed"),
    "throttle": {"driver": "throttle", "throttle-group": "group", "file": TOP},
    "copy-on-read": {"driver": "copy-on-read", "file": TOP},
    "two filters": {
        "driver": "throttle",
        "throttle-group": "group",
        "file": {"driver": "copy-on-read", "file": TOP},
    },
    "null": {"driver": "null-co", "read-zeroes": True},
}


def make_images(folder: Path) -> None:
    """Layers of 3, 5 and 7 MiB."""
    folder.mkdir()
    made: list[tuple[str, str, str | None, list[str]]] = [
        ("base.raw", "3M", None, ["write -P 1 0 1M"]),
        ("mid.qcow2", "5M", "base.raw", ["write -P 2 512k 256k", "write -z 4M 128k", "write -z 1M 64k"]),
        ("top.qcow2", "7M", "mid.qcow2", ["write -P 3 256k 64k", "write -z 2M 64k", "write -P 3 6M 64k"]),
        ("top.qed", "7M", "mid.qcow2", ["write -P 3 256k 64k", "write -z 2M 64k", "write -P 3 6M 64k"]),
    ]
    for name, size, backing, writes in made:
        path, image_format = folder / name, name.rpartition(".")[2]
        below = ("-b", backing, "-F", backing.rpartition(".")[2]) if backing else ()
        qemu_img.qemu("qemu-img", "create", "-q", "-f", image_format, *below, path, size)
        qemu_img.write(path, *writes, image_format=image_format)


async def found(owner: str, folder: Path, node: Node, *, depth: bool) -> list[str]:
    """What nbdinfo says of an export of a node."""
    make_images(folder)
    uri = f"nbd+unix:///disk?socket={folder / 'nbd'}"
    async with DAEMONS[owner](folder) as socket, await QmpClient.connect(socket) as client:
        await client.command("object-add", {"qom-type": "throttle-group", "id": "group"})
        await client.command("blockdev-add", {**in_folder(folder, node), "node-name": "disk"})
        address = {"type": "unix", "data": {"path": str(folder / "nbd")}}
        await client.command("nbd-server-start", {"addr": address})
        export = {"type": "nbd", "id": "e", "node-name": "disk", "allocation-depth": depth}
        await client.command("block-export-add", export)
        told = json.loads(await run("nbdinfo", "--json", uri))["exports"][0]
        maps = [await run("nbdinfo", f"--map={context}", uri) for context in told["contexts"]]
        return [json.dumps({**told, "uri": ""}), *maps]


@pytest.mark.parametrize("name", NODES)
async def test_layers_are_told_as_by_qemu(name: str, tmp_path: Path) -> None:
    theirs, ours = [await found(owner, tmp_path / owner, NODES[name], depth=True) for owner in DAEMONS]
    assert json.loads(theirs[0])["contexts"] == ["base:allocation", "qemu:allocation-depth"]
    assert ours == theirs


async def test_layers_are_told_to_those_who_may_know(tmp_path: Path) -> None:
    theirs, ours = [await found(owner, tmp_path / owner, TOP, depth=False) for owner in DAEMONS]
    assert json.loads(theirs[0])["contexts"] == ["base:allocation"]
    assert ours == theirs


async def test_what_qemu_calls_unknown(tmp_path: Path) -> None:
    """QSD says of disks of nothing, and of raw images on overlays, that it does not know what is there."""
    node = {"driver": "raw", "file": TOP}
    theirs, ours = [await found(owner, tmp_path / owner, node, depth=True) for owner in DAEMONS]
    kinds = [{line.split(maxsplit=3)[3] for line in told[1].splitlines()} for told in (theirs, ours)]
    assert kinds == [{"data", "hole", "hole,zero"}, {"data", "hole,zero"}]
    assert {line.split()[2] for line in theirs[2].splitlines()} == {"0", "1"}
    assert {line.split()[2] for line in ours[2].splitlines()} == {"1"}

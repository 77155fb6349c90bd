"""Names in images that begin with `json:`: a format and a file are understood, everything else is refused."""

import json
from pathlib import Path

import pytest

from blockd.errors import RequestError
from blockd.filenames import RECORDED_LENGTH_MAX, recorded_image
from blockd.units import KIB
from tests import qemu_img
from tests.control.running import refusal, running
from tests.iotests_ideas.nodes import add, qcow2

SIZE = 64 * KIB
BAD_FILES: list[object] = [1, None, "", {}, ["base.img"], "a\0b", "a\nb", "\ud800"]


def nested(filename: object, driver: str = "qcow2") -> str:
    return "json:" + json.dumps({"driver": driver, "file": {"driver": "file", "filename": filename}})


@pytest.mark.parametrize(
    "name",
    [
        nested("base.img"),
        'json:{"driver": "qcow2", "file.driver": "file", "file.filename": "base.img"}',
        'json:{"file": {"filename": "base.img"}, "driver": "qcow2"}',
    ],
)
def test_a_format_and_a_file_are_understood(name: str) -> None:
    assert recorded_image(name) == ("base.img", "qcow2")
    assert recorded_image(name.replace("base.img", "a:b")).filename == "./a:b"


@pytest.mark.parametrize("name", ["base.img", "file:base.img", "./json:{}", "/json:{}", "nbd:x"])
def test_other_names_say_no_format(name: str) -> None:
    assert recorded_image(name) == (name, None)


@pytest.mark.parametrize(
    "name",
    [
        *("json:", "json:{", "json:{}", "json:[]", "json:1", 'json:"base.img"', "json:" + "[" * 1000),
        *(nested(filename) for filename in BAD_FILES),
        *(nested("base.img", driver) for driver in ("file", "nbd", "blkdebug", "", "vmdk")),
        'json:{"driver": "qcow2", "file": "node"}',
        'json:{"driver": ["qcow2"], "file": {"filename": "base.img"}}',
        'json:{"driver": "qcow2", "file": {"driver": "nbd", "filename": "base.img"}}',
        'json:{"driver": "qcow2", "file": {"driver": {}, "filename": "base.img"}}',
        'json:{"driver": "qcow2", "file": {"filename": "base.img", "locking": "off"}}',
        'json:{"driver": "qcow2", "file": {"filename": "base.img"}, "read-only": false}',
        'json:{"driver": "qcow2", "file": {"filename": "base.img"}, "file.filename": "other"}',
        'json:{"driver": "qcow2", "driver": "raw", "file": {"filename": "base.img"}}',
        'json:{"driver": "qcow2", "file": {"filename": "base.img"}, "backing": null}',
        'json:{"driver": "raw", "offset": 512, "file": {"filename": "base.img"}}',
    ],
)
def test_anything_else_is_refused(name: str) -> None:
    with pytest.raises(RequestError):
        recorded_image(name)


def overlay(folder: Path, name: str, backing_format: str | None = None) -> Path:
    """An image with a name that nobody has checked."""
    recorded = ["-F", backing_format] if backing_format is not None else []
    path = folder / "top.qcow2"
    qemu_img.qemu("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "base.img", path, str(SIZE))
    qemu_img.qemu("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", name, *recorded, path)
    return path


async def test_the_file_counts_from_the_folder_of_the_image(tmp_path: Path) -> None:
    qemu_img.create(tmp_path / "base.img", SIZE)
    qemu_img.qemu("qemu-io", "-f", "qcow2", "-c", "write -P 7 0 64k", tmp_path / "base.img")
    path = overlay(tmp_path, nested("base.img"), "qcow2")
    async with running(tmp_path) as daemon:
        await add(await daemon.qmp(), qcow2("top", path))
        node = daemon.services.graph["top"]
        assert await node.read(0, SIZE) == bytes([7]) * SIZE


async def test_it_leads_out_of_the_folder_as_little_as_another_name(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    qemu_img.create(tmp_path / "inner" / "base.img", SIZE)
    qemu_img.create(tmp_path / "outside.img", SIZE)
    for name in (nested(str(tmp_path / "outside.img")), nested("/proc/self/fd/0", "raw")):
        path = overlay(tmp_path / "inner", name, "qcow2")
        async with running(tmp_path / "inner") as daemon:
            options = {"driver": "qcow2", "node_name": "n", "file": {"driver": "file", "filename": str(path)}}
            found = await refusal(await daemon.qmp(), "blockdev-add", **options)
            assert "outside the folder" in found[1] or "is no image file" in found[1]


def test_the_longest_name_is_no_matter() -> None:
    name = nested("x" * (RECORDED_LENGTH_MAX - len(nested(""))))
    assert len(name) == RECORDED_LENGTH_MAX
    assert len(recorded_image(name).filename) > 900

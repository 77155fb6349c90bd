"""Whatever name, placed wherever: read back, by blockd and by QEMU from another folder, it is the same file.

Decoys with other bytes stand wherever a name that is taken for something else would lead: what follows a
colon, the name without `./`, and in other folders.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from blockd.block.chain import chain
from blockd.block.image_paths import ImagePaths
from blockd.block.node import OverlayNode
from blockd.cli.image.convert import Source, convert_image
from blockd.cli.image.create import NewImage, create_image
from blockd.devices.backing_names import name_for
from blockd.drivers import NodeGraph
from blockd.drivers.sharing import file_of
from blockd.errors import RequestError
from blockd.filenames import has_control_characters, plain, recordable, without_protocol
from blockd.protocols.file_status import status_of_name
from tests import qemu_img
from tests.chains import read_all

SIZE = 64 * 1024
OURS, DECOY = b"\x55" * SIZE, b"\xaa" * SIZE

PIECES = [
    *("a", "é", "x.raw", ".", "..", "-", " ", "%s", "%", ",", "=", '"', "'", "\\", "?", "#", "*", "~", "$x"),
    *(":", "json:", "file:", "file:x.raw", "nbd:x", "a:b", "http:", "blkstream:", "fat:", "{}"),
    *("\u202e", "\udcff", "\n", "\t", "\x1b[31m", "\x7f", "\x85"),
]
NAMES = (
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=5)
    .map("".join)
    .filter(lambda name: name not in (".", ".."))
)
PRINTABLE = NAMES.filter(lambda name: not has_control_characters(name))


class Scene(NamedTuple):
    """Where an image is to be made, and how it may call the base that is there."""

    image: str
    base: str
    # Relative to the folder of the image.
    name: str


# How the base is reached from the folder of the image: `pool/vms/vm`, or `link` in the working folder.
PLACES = {
    "beside": "{}",
    "dotted": "./{}",
    "below": "sub/{}",
    "parent": "../{}",
    "behind a link": "out/{}",
    "across a link": "out/../{}",
    "round about": "sub/..//./{}",
}


@contextlib.contextmanager
def scene(base: str, place: str) -> Iterator[Scene]:
    """Make the folders, the base and the decoys, and go to the folder that all is in."""
    with tempfile.TemporaryDirectory() as root, contextlib.chdir(root):
        for folder in ("pool/vms/vm/sub", "pool/far/away", "elsewhere"):
            Path(folder).mkdir(parents=True)
        Path("pool/vms/vm/out").symlink_to("../../far/away")
        Path("link").symlink_to("pool/vms/vm")
        name = PLACES[place].format(base)
        for folder in (".", "elsewhere", "pool/vms", "pool/vms/vm", "pool/far", "pool/far/away"):
            for decoy in {base, base.rpartition(":")[2], base.removeprefix("file:")} - {"", ".", ".."}:
                Path(folder, decoy).write_bytes(DECOY)
        path = "link/" + name
        Path(path).unlink(missing_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.write(fd, OURS)
        os.close(fd)
        yield Scene("link/top", path, name)


def assert_leads_there(image: str, image_format: str, base: str) -> None:
    """QEMU, from somewhere else, reads the base through the image."""
    path = Path(image).absolute()
    with contextlib.chdir("elsewhere"):
        qemu_img.qemu("qemu-io", "-r", "-f", image_format, "-c", f"read -P 0x55 0 {SIZE}", path)
    assert qemu_img.info(path)["backing-filename"]
    assert status_of_name(base).size == SIZE


@settings(max_examples=20, deadline=None)
@given(base=NAMES, place=st.sampled_from(sorted(PLACES)), image_format=st.sampled_from(["qcow2", "qed"]))
@example(base="a:b.raw", place="beside", image_format="qcow2")
@example(base="file:x.raw", place="beside", image_format="qcow2")
@example(base="file:x.raw", place="dotted", image_format="qed")
@example(base="json:{}", place="beside", image_format="qcow2")
@example(base="x.raw", place="across a link", image_format="qed")
async def test_a_name_that_is_given_leads_there(base: str, place: str, image_format: str) -> None:
    with scene(base, place) as found:
        new = NewImage(image_format, SIZE, plain(found.name), "raw")
        if has_control_characters(base):
            with pytest.raises(RequestError, match="control characters"):
                await create_image(found.image, new)
            assert not Path(found.image).exists()
            return
        await create_image(found.image, new)
        await assert_read_back(found, image_format)
        assert_leads_there(found.image, image_format, found.base)


async def assert_read_back(found: Scene, image_format: str) -> None:
    graph = NodeGraph(ImagePaths(["pool"]))
    top = await graph.open_image(found.image, image_format, read_only=True)
    file = file_of(list(chain(top))[1])
    assert file is not None
    assert file.identity() == status_of_name(found.base).identity
    assert await read_all(top) == OURS
    await graph.close()


@settings(max_examples=20, deadline=None)
@given(
    base=PRINTABLE,
    mid=PRINTABLE,
    place=st.sampled_from(sorted(PLACES)),
    mid_place=st.sampled_from(["beside", "below", "across a link"]),
    is_absolute=st.booleans(),
)
@example(base="a:b", mid="x", place="beside", mid_place="beside", is_absolute=False)
@example(base="x.raw", mid="a:b", place="across a link", mid_place="across a link", is_absolute=False)
async def test_a_name_that_is_found_leads_there(
    base: str, mid: str, place: str, mid_place: str, is_absolute: bool
) -> None:
    """What a stream to the base is going to record."""
    with scene(base, place) as found:
        mid = PLACES[mid_place].format(f"mid-{mid}")
        prefix = f"{Path.cwd()}/link/" if is_absolute else ""
        back = {"beside": "", "below": "../", "across a link": "../vms/vm/"}[mid_place]
        await create_image(f"link/{mid}", NewImage("qcow2", SIZE, plain(back + found.name), "raw"))
        await create_image(found.image, NewImage("qcow2", SIZE, plain(prefix + mid), "qcow2"))
        graph = NodeGraph(ImagePaths(["pool"]))
        top = await graph.open_image(found.image, "qcow2", read_only=False)
        nodes = list(chain(top))
        assert isinstance(top, OverlayNode)
        name = name_for(nodes[2], top)
        assert name == recordable(name)
        assert name.startswith("/") == is_absolute
        top.backing = nodes[2]
        await top.change_backing(name, "raw")
        await graph.close()
        assert_leads_there(found.image, "qcow2", found.base)


@settings(max_examples=20, deadline=None)
@given(base=PRINTABLE, place=st.sampled_from(sorted(PLACES)))
@example(base="a:b.raw", place="beside")
@example(base="file:x.raw", place="below")
async def test_convert_reads_what_it_was_given(base: str, place: str) -> None:
    with scene(base, place) as found:
        for image_format in ("qcow2", "add-cow"):
            source = Source(found.base, "raw", ["pool"])
            target = f"link/copy:of.{image_format}"
            await convert_image(source, target, NewImage(image_format), lambda _status: None)
            graph = NodeGraph()
            assert await read_all(await graph.open_image(target, image_format, read_only=True)) == OURS
            await graph.close()


@settings(max_examples=15, deadline=None)
@given(image=NAMES, place=st.sampled_from(["beside", "dotted", "below"]))
@example(image="a:b.raw", place="beside")
@example(image="file:x.raw", place="dotted")
async def test_image_file_of_an_add_cow_file(image: str, place: str) -> None:
    with scene("base.raw", "parent") as found:
        name = PLACES[place].format(f"{image}-image")
        told = {"image_file": plain(name)}
        new = NewImage("add-cow", SIZE, found.name, "raw", told)
        if has_control_characters(image):
            with pytest.raises(RequestError, match="control characters"):
                await create_image(found.image, new)
            assert not Path(found.image).exists()
            return
        await create_image(found.image, new)
        assert status_of_name(f"link/{name}").size == SIZE
        graph = NodeGraph(ImagePaths(["pool"]))
        top = await graph.open_image(found.image, "add-cow", read_only=True)
        file = file_of(top.children()["image"])
        assert file is not None
        assert file.identity() == status_of_name(f"link/{name}").identity
        assert await read_all(top) == OURS
        await graph.close()


@given(st.text(max_size=30))
def test_a_path_stays_the_same_path(name: str) -> None:
    """What is written is taken for what it was, however often it is taken."""
    path = plain(name)
    assert without_protocol(path) == path
    assert without_protocol(without_protocol(f"file:{name}")) == path
    with contextlib.suppress(RequestError):
        assert recordable(recordable(path)) == recordable(path) == path

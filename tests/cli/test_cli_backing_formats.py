"""Backing files whose format their image does not record: name and content agree, or the user tells."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from blockd.drivers import NodeGraph
from blockd.errors import BlockdError
from blockd.formats.qcow2.image import Qcow2Image
from blockd.protocols.file import FileNode
from tests.qemu_img import qemu


@pytest.fixture
async def graph() -> AsyncIterator[NodeGraph]:
    """A graph that is closed at the end."""
    graph = NodeGraph()
    yield graph
    await graph.close()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A qcow2 image whose name does not say so; `base.qcow2` is the same."""
    path = tmp_path / "base.img"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
    (tmp_path / "base.qcow2").write_bytes(path.read_bytes())
    return path


async def overlay(path: Path, backing: str, backing_format: str = "qcow2") -> Path:
    """An image that does not record this format, unless it is raw."""
    image_format = path.suffix.removeprefix(".").replace("img", "qed")
    link = ("-u", "-b", backing, "-F", backing_format)
    qemu("qemu-img", "create", "-q", "-f", image_format, *link, path, "1M")
    if image_format == "qcow2":
        await forget_backing_format(path)
    return path


async def forget_backing_format(path: Path) -> None:
    """Make an image as older versions of QEMU did, without the format of its backing file."""
    file = await FileNode.open(str(path), node_name="f", read_only=False)
    image = await Qcow2Image.open(file, node_name="i", read_only=False)
    await image.change_backing(image.backing_filename, None)
    await image.close()
    await file.close()


async def refusal(opening: object) -> str:
    """What an opening says when it fails."""
    with pytest.raises(BlockdError) as refused:
        await opening  # type: ignore[misc]
    return refused.value.message


IMAGES = pytest.mark.parametrize("name", ["top.qed", "top.qcow2"])


@IMAGES
async def test_name_and_content_agree(graph: NodeGraph, tmp_path: Path, base: Path, name: str) -> None:
    top = await overlay(tmp_path / name, "base.qcow2")
    node = await graph.open_image(str(top), None, read_only=True)
    assert node.backing is not None
    assert node.backing.driver == "qcow2"


@IMAGES
async def test_a_raw_image_whose_guest_wrote_a_header_is_never_taken_for_that(
    graph: NodeGraph, tmp_path: Path, base: Path, name: str
) -> None:
    """QEMU opens it, and whatever file that header names."""
    top = await overlay(tmp_path / name, base.name)
    assert "Could not tell the format" in await refusal(graph.open_image(str(top), None, read_only=True))
    raw = await overlay(tmp_path / "raw.qed", base.name, "raw")
    node = await graph.open_image(str(raw), None, read_only=True)
    assert node.backing is not None
    assert bytes(await node.read(0, 4)) == b"QFI\xfb"


@IMAGES
async def test_options_of_a_node_tell(graph: NodeGraph, tmp_path: Path, base: Path, name: str) -> None:
    path = str(await overlay(tmp_path / name, base.name))
    top = {"driver": name[4:], "node-name": "top", "file": {"driver": "file", "filename": path}}
    text = await refusal(graph.open(top))
    assert "its content looks like qcow2" in text
    assert text.endswith(" in the node's option 'backing' (backing.driver=FORMAT,…)")
    below = {"driver": "qcow2", "file": {"driver": "file", "filename": str(base)}}
    assert (await graph.open({**top, "backing": below})).backing is not None


@IMAGES
async def test_the_user_tells_with_the_name(graph: NodeGraph, tmp_path: Path, base: Path, name: str) -> None:
    top = str(await overlay(tmp_path / name, base.name))
    text = await refusal(graph.open_image(top, None, read_only=False))
    assert "its content looks like qcow2" in text
    assert text.endswith(" with the option backing-format")
    text = await refusal(graph.open_image(top, None, read_only=False, backing_format="zap"))
    assert text.endswith(f"Could not open '{base}': Unknown driver 'zap'")
    for told in ("qcow2", "raw"):
        node = await graph.open_image(top, None, read_only=True, backing_format=told)
        assert node.backing is not None
        assert node.backing.driver == told


async def test_what_is_recorded_comes_first(graph: NodeGraph, tmp_path: Path, base: Path) -> None:
    """The guest of a raw image may have made its start that of any image."""
    top = await overlay(tmp_path / "top.qed", base.name, "raw")
    node = await graph.open_image(str(top), None, read_only=True, backing_format="qcow2")
    assert node.backing is not None
    assert node.backing.driver == "raw"


async def test_what_is_told_is_told_of_one_link(graph: NodeGraph, tmp_path: Path, base: Path) -> None:
    await overlay(tmp_path / "middle.img", base.name)
    top = await overlay(tmp_path / "top.qed", "middle.img", "qed")
    text = await refusal(graph.open_image(str(top), None, read_only=True, backing_format="qed"))
    assert text.startswith(
        f"Could not open backing file of '{tmp_path}/middle.img': Could not tell the format"
    )
    assert text.endswith(" in the node's option 'backing' (backing.driver=FORMAT,…)")


async def test_nothing_is_told_of_images_without_a_backing_file(graph: NodeGraph, base: Path) -> None:
    """Options stay when a stream has made an image independent."""
    path = str(base.with_suffix(".qcow2"))
    node = await graph.open_image(path, None, read_only=True, backing_format="raw")
    assert node.backing is None

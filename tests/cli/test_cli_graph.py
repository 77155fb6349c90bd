"""Opening nodes: what options and file names lead to, and what every kind of bad input gets."""

import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from blockd.block.chain import chain
from blockd.block.image_paths import ImagePaths
from blockd.block.node import BlockNode
from blockd.drivers import FORMATS, NodeGraph
from blockd.errors import BlockdError
from blockd.filters.blkstream import BlkStream
from blockd.formats.qcow2.create import create
from blockd.protocols.new_file import new_file
from tests import qemu_img
from tests.hostile_names import put_name, stand_in

SIZE = 1 << 20


@pytest.fixture
async def graph() -> AsyncIterator[NodeGraph]:
    """A graph that is closed at the end."""
    graph = NodeGraph()
    yield graph
    await graph.close()
    assert not graph.nodes


def open_files() -> list[str]:
    """The regular files this process has open."""
    links = [Path(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]  # noqa: PTH208
    return sorted(str(link.readlink()) for link in links if link.exists() and link.is_file())


async def overlay(path: Path, backing: str | None, backing_format: str | None = "qcow2") -> Path:
    """Make an image that records any backing file, which need not be there."""
    async with new_file(str(path)) as file:
        recorded = backing_format if backing else None
        innocent = stand_in(backing) if backing else None
        await create(file, SIZE, backing_filename=innocent, backing_format=recorded)
    if backing:
        put_name(path, backing)
    return path


async def refusal(opening: object) -> str:
    """What an opening says when it fails, after which nothing more is open than before."""
    before = open_files()
    with pytest.raises(BlockdError) as refused:
        await opening  # type: ignore[misc]
    assert open_files() == before
    return refused.value.message


def filenames(top: BlockNode) -> list[str]:
    return [node.filename for node in chain(top)]


# -- by options ------------------------------------------------------------------------------


async def test_nested_and_named_nodes(graph: NodeGraph, tmp_path: Path) -> None:
    base = await overlay(tmp_path / "base.qcow2", None)
    top = await overlay(tmp_path / "top.qcow2", "base.qcow2")
    await graph.open(
        {
            "driver": "qcow2",
            "node-name": "base",
            "read-only": True,
            "file": {"driver": "file", "filename": str(base)},
        }
    )
    node = await graph.open(
        {
            "driver": "qcow2",
            "node-name": "top",
            "backing": "base",
            "file": {"driver": "file", "node-name": "top-file", "filename": str(top)},
        }
    )
    assert node.backing is graph["base"]
    assert not node.read_only
    assert graph["base"].read_only and graph["base"].children()["file"].read_only
    assert set(graph.nodes) == {"base", "#block001", "top", "top-file"}


async def test_recorded_backing_is_opened_unless_told_otherwise(graph: NodeGraph, tmp_path: Path) -> None:
    await overlay(tmp_path / "base.qcow2", None)
    top = await overlay(tmp_path / "top.qcow2", "base.qcow2")
    options = {"driver": "qcow2", "node-name": "top", "file": {"driver": "file", "filename": str(top)}}
    node = await graph.open(options)
    assert filenames(node) == [str(top), str(tmp_path / "base.qcow2")]
    assert node.backing is not None and node.backing.read_only
    await graph.remove("top")
    alone = await graph.open({**options, "backing": None})
    assert alone.backing is None


async def test_copy_on_read_in_front_of_a_node(graph: NodeGraph, tmp_path: Path) -> None:
    await overlay(tmp_path / "base.qcow2", None)
    await graph.open(
        {
            "driver": "qcow2",
            "node-name": "top",
            "file": {
                "driver": "file",
                "filename": str(await overlay(tmp_path / "top.qcow2", "base.qcow2")),
            },
            "backing": {
                "driver": "qcow2",
                "node-name": "base",
                "file": {"driver": "file", "filename": str(tmp_path / "base.qcow2")},
            },
        }
    )
    for driver in ("copy-on-read", "blkstream"):
        node = await graph.open({"driver": driver, "node-name": "front", "file": "top"})
        assert isinstance(node, BlkStream)
        assert node.active is graph["top"]
        assert await refusal(graph.remove("top")) == "Block device top is in use"
        await graph.remove("front")
    with_bottom = await graph.open(
        {"driver": "copy-on-read", "node-name": "front", "file": "top", "bottom": "top"}
    )
    assert isinstance(with_bottom, BlkStream)
    assert with_bottom.base is graph["base"]
    text = await refusal(
        graph.open({"driver": "copy-on-read", "node-name": "x", "file": "top", "bottom": "no"})
    )
    assert text == "Node 'no' is not in a chain starting from 'top'"


async def test_auto_read_only_falls_back(
    graph: NodeGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = await overlay(tmp_path / "a.qcow2", None)
    monkeypatch.setattr(os, "access", lambda _path, mode: mode != os.W_OK)  # root may write everything
    options = {"driver": "qcow2", "node-name": "a", "file": {"driver": "file", "filename": str(path)}}
    assert (await graph.open({**options, "auto-read-only": True})).read_only


async def test_wrong_options(graph: NodeGraph, tmp_path: Path) -> None:
    path = str(await overlay(tmp_path / "a.qcow2", None))
    file: dict[str, object] = {"driver": "file", "filename": path}
    other = {"driver": "file", "filename": str(await overlay(tmp_path / "b.qcow2", None))}
    await graph.open({**file, "node-name": "taken"})
    cases: list[tuple[dict[str, object], str]] = [
        (file, "'node-name' must be specified for the root node"),
        ({**file, "node-name": "taken"}, "Duplicate nodes with node-name='taken'"),
        ({**file, "node-name": "9bad"}, "Invalid node-name: '9bad'"),
        ({**file, "node-name": "a\n"}, "Invalid node-name: 'a\\n'"),
        ({**file, "node-name": "x" * 32}, "Node name too long"),
        ({**file, "node-name": "x", "zap": 1}, "Parameter 'zap' is unexpected"),
        ({"driver": "zap", "node-name": "x"}, "Parameter 'driver' does not accept value 'zap'"),
        ({"driver": "file", "node-name": "x"}, "Parameter 'filename' is missing"),
        (
            {"driver": "file", "node-name": "x", "filename": str(tmp_path / "none")},
            f"Could not open '{tmp_path}/none': No such file or directory",
        ),
        (
            {"driver": "raw", "node-name": "x", "file": "none"},
            "Cannot find device='none' nor node-name='none'",
        ),
        (
            {"driver": "qcow2", "node-name": "x", "file": {**file, "node-name": "x"}},
            "Duplicate nodes with node-name='x'",
        ),
        (
            {"driver": "qcow2", "node-name": "x", "file": {**other, "read-only": True}},
            "Block node is read-only",
        ),
        (
            {"driver": "copy-on-read", "node-name": "x", "file": "taken"},
            "Cannot copy on read into 'taken': it is no image that can have a backing file",
        ),
    ]
    for options, message in cases:
        assert await refusal(graph.open(options)) == message
        assert set(graph.nodes) == {"taken"}


async def test_two_formats_on_one_file(graph: NodeGraph, tmp_path: Path) -> None:
    path = str(await overlay(tmp_path / "a.qcow2", None))
    await graph.open({"driver": "file", "node-name": "f", "filename": path})
    await graph.open({"driver": "qcow2", "node-name": "q", "file": "f"})
    for read_only in (True, False):
        options = {"driver": "qcow2", "node-name": "x", "file": "f", "read-only": read_only}
        text = await refusal(graph.open(options))
        assert text.startswith("Permission conflict on node 'f': permissions 'write, resize' are both")
    # Of itself it needs nothing of the file.
    await graph.open({"driver": "raw", "node-name": "r", "file": "f"})


async def test_nodes_nest_to_a_bound(graph: NodeGraph) -> None:
    options: dict[str, object] = {"driver": "file", "filename": "x"}
    for _ in range(70):
        options = {"driver": "raw", "file": options}
    assert await refusal(graph.open({**options, "node-name": "x"})) == "More than 64 nodes inside each other"


async def test_a_file_given_twice_in_one_chain(graph: NodeGraph, tmp_path: Path) -> None:
    path = str(await overlay(tmp_path / "a.qcow2", None))
    file = {"driver": "file", "filename": path, "read-only": True}
    options = {
        "driver": "qcow2",
        "node-name": "top",
        "read-only": True,
        "file": file,
        "backing": {"driver": "raw", "node-name": "below", "file": file},
    }
    assert await refusal(graph.open(options)) == f"'{path}' is in the backing chain twice: 'top', 'below'"


# -- life ------------------------------------------------------------------------------------


async def test_remove(graph: NodeGraph, tmp_path: Path) -> None:
    base = await overlay(tmp_path / "base.qcow2", None)
    top = await overlay(tmp_path / "top.qcow2", "base.qcow2")
    await graph.open({"driver": "qcow2", "node-name": "b", "file": {"driver": "file", "filename": str(base)}})
    file = {"driver": "file", "node-name": "f", "filename": str(top)}
    await graph.open({"driver": "qcow2", "node-name": "x", "file": file, "backing": "b"})
    assert await refusal(graph.remove("none")) == "Failed to find node with node-name='none'"
    assert await refusal(graph.remove("b")) == "Node 'b' is busy: node is used as backing hd of 'x'"
    assert await refusal(graph.remove("f")) == "Node f is not owned by the monitor"
    graph.add_user(graph["x"], "export 'e'")
    assert await refusal(graph.remove("x")) == "Node x is in use"
    graph.remove_user(graph["x"], "export 'e'")
    await graph.remove("x")
    assert set(graph.nodes) == {"b", "#block001"}
    await graph.remove("b")
    assert open_files() == [name for name in open_files() if str(tmp_path) not in name]


async def test_an_image_stays_until_its_last_user_leaves(graph: NodeGraph, tmp_path: Path) -> None:
    await overlay(tmp_path / "base.qcow2", None)
    path = await overlay(tmp_path / "top.qcow2", "base.qcow2")
    node = await graph.open_image(str(path), None, read_only=False)
    await graph.close_unused()
    assert len(graph.nodes) == 4
    graph.add_user(node, "device 'vda'")
    graph.add_user(node, "job 'j'")
    graph.remove_user(node, "device 'vda'")
    await graph.close_unused()
    assert len(graph.nodes) == 4
    graph.remove_user(node, "job 'j'")
    await graph.close_unused()
    assert not graph.nodes


async def test_what_a_stream_has_cut_off_is_closed(graph: NodeGraph, tmp_path: Path) -> None:
    await overlay(tmp_path / "base.qcow2", None)
    await overlay(tmp_path / "mid.qcow2", "base.qcow2")
    path = await overlay(tmp_path / "top.qcow2", "mid.qcow2")
    node = await graph.open_image(str(path), "qcow2", read_only=False)
    graph.add_user(node, "device 'vda'")
    assert node.backing is not None
    graph.connect(node, "backing", node.backing.backing)
    await graph.close_unused()
    assert filenames(node) == [str(path), str(tmp_path / "base.qcow2")]
    assert len(graph.nodes) == 4


# -- by file name ----------------------------------------------------------------------------


async def test_whole_chain_made_by_qemu(graph: NodeGraph, tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(bytes(SIZE))
    mid = qemu_img.create(tmp_path / "mid.qcow2", SIZE, backing=base, backing_format="raw")
    top = qemu_img.create(tmp_path / "top.qcow2", SIZE, backing=mid)
    node = await graph.open_image(str(top), None, read_only=False, node_name="vda")
    assert filenames(node) == [str(top), str(mid), str(base)]
    assert [layer.driver for layer in chain(node)] == ["qcow2", "qcow2", "raw"]
    assert [layer.read_only for layer in chain(node)] == [False, True, True]
    assert graph["vda"] is node


async def test_relative_names_start_at_the_image_that_has_them(
    graph: NodeGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "images" / "old").mkdir(parents=True)
    await overlay(tmp_path / "images" / "old" / "base.qcow2", None)
    await overlay(tmp_path / "images" / "old" / "mid.qcow2", "file:base.qcow2")
    await overlay(tmp_path / "images" / "top.qcow2", "old/mid.qcow2")
    monkeypatch.chdir(tmp_path)
    node = await graph.open_image("images/top.qcow2", None, read_only=True)
    assert filenames(node) == ["images/top.qcow2", "images/old/mid.qcow2", "images/old/base.qcow2"]


async def test_copy_on_read_by_file_name(graph: NodeGraph, tmp_path: Path) -> None:
    await overlay(tmp_path / "base.qcow2", None)
    path = await overlay(tmp_path / "top.qcow2", "base.qcow2")
    node = await graph.open_image(f"blkstream:{path}", None, read_only=False, node_name="vda")
    assert isinstance(node, BlkStream)
    assert node.node_name == "vda"
    assert node.active.backing is not None
    text = await refusal(graph.open_image(f"blkstream:{path}", None, read_only=True))
    assert 'Failed to get "write" lock' in text


async def test_format_needs_name_and_content_to_agree(graph: NodeGraph, tmp_path: Path) -> None:
    qcow2 = (await overlay(tmp_path / "a.qcow2", None)).read_bytes()
    for name, content, what in [
        ("a.img", qcow2, "its content looks like qcow2, but its name does not end in .qcow2"),
        ("a.raw", qcow2, "its content looks like qcow2, but its name does not end in .qcow2"),
        ("b.qcow2", bytes(512), "its name ends in .qcow2, but its content is no qcow2 image"),
        ("plain", bytes(512), "neither its name nor its content tells it"),
        ("empty.qcow2", b"", "its name ends in .qcow2, but its content is no qcow2 image"),
    ]:
        path = tmp_path / name
        path.write_bytes(content)
        text = await refusal(graph.open_image(str(path), None, read_only=True))
        assert text.startswith(f"Could not tell the format of '{path}': {what}")
        assert f"specify the format ({', '.join(FORMATS)})" in text
    (tmp_path / "b.raw").write_bytes(bytes(512))
    assert (await graph.open_image(str(tmp_path / "b.raw"), None, read_only=True)).driver == "raw"
    assert (await graph.open_image(str(tmp_path / "a.raw"), "raw", read_only=True)).driver == "raw"
    text = await refusal(graph.open_image(str(tmp_path / "a.img"), "vmdk", read_only=True))
    assert text == f"Could not open '{tmp_path}/a.img': Unknown driver 'vmdk'"


async def test_missing_backing_names_both_files(graph: NodeGraph, tmp_path: Path) -> None:
    await overlay(tmp_path / "mid.qcow2", "none.qcow2")
    top = await overlay(tmp_path / "top.qcow2", "mid.qcow2")
    text = await refusal(graph.open_image(str(top), None, read_only=False))
    assert text == (
        f"Could not open backing file of '{tmp_path}/mid.qcow2': "
        f"Could not open '{tmp_path}/none.qcow2': No such file or directory"
    )
    assert not graph.nodes


@pytest.mark.parametrize(
    ("backing", "reason"),
    [
        ('json:{"driver":"file","filename":"/etc/passwd"}', "Its 'json:' name is not understood"),
        ("nbd:localhost:10809", "Unknown protocol 'nbd'"),
        ("/proc/self/mem", "which is no image file"),
        ("/dev/fd/0", "which is no image file"),
        ("../" * 20 + "proc/self/environ", "which is no image file"),
        ("/etc/passwd", "which is outside the folder of the image; allow it with --image-paths /etc"),
        ("../outside.qcow2", "which is outside the folder of the image"),
        ("escape/passwd", "which is outside the folder of the image"),
        ("loop", "Too many levels of symbolic links"),
        ("a\x1b[31mred\n", "control characters in its backing file name 'a\\x1b[31mred\\n'"),
        ("\u202ewar.tupni", "\\u202ewar.tupni': No such file"),
        ("\udcff\udcfe.raw", "\\udcff\\udcfe.raw': No such file"),
        ("fifo", "not a regular file or block device"),
        ("socket", "not a regular file or block device"),
        ("folder", "not a regular file or block device"),
        (".", "not a regular file or block device"),
    ],
)
async def test_names_that_images_may_not_have(
    graph: NodeGraph, tmp_path: Path, backing: str, reason: str
) -> None:
    folder = tmp_path / "images"
    (folder / "folder").mkdir(parents=True)
    await overlay(tmp_path / "outside.qcow2", None)
    (folder / "escape").symlink_to("/etc")
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "fifo")
    path = await overlay(folder / "top.qcow2", backing)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket"))
        text = await refusal(graph.open_image(str(path), None, read_only=False))
    assert reason in text
    assert str(path) in text
    assert text.isprintable()


async def test_folders_and_files_that_the_user_named_are_allowed(tmp_path: Path) -> None:
    for name in ("shared", "vm"):
        (tmp_path / name).mkdir()
    base = await overlay(tmp_path / "shared" / "base.qcow2", None)
    top = await overlay(tmp_path / "vm" / "top.qcow2", str(base))
    by_folder = NodeGraph(ImagePaths([str(tmp_path / "shared")]))
    assert (await by_folder.open_image(str(top), None, read_only=False)).backing is not None
    await by_folder.close()
    by_file = NodeGraph()
    await by_file.open_image(str(base), None, read_only=True)
    assert (await by_file.open_image(str(top), None, read_only=False)).backing is not None
    await by_file.close()


async def test_loops(graph: NodeGraph, tmp_path: Path) -> None:
    for name, backing in [("a", "b"), ("b", "c"), ("c", "a")]:
        await overlay(tmp_path / f"{name}.qcow2", f"{backing}.qcow2")
    text = await refusal(graph.open_image(str(tmp_path / "a.qcow2"), None, read_only=False))
    assert text == (
        f"Could not open backing file of '{tmp_path}/c.qcow2': The backing chain is a loop: "
        f"'{tmp_path}/a.qcow2' is the same file as '{tmp_path}/a.qcow2' above it"
    )
    await overlay(tmp_path / "self.qcow2", "link.qcow2")
    (tmp_path / "link.qcow2").hardlink_to(tmp_path / "self.qcow2")
    assert "is the same file as" in await refusal(
        graph.open_image(str(tmp_path / "self.qcow2"), None, read_only=True)
    )


async def test_depth_has_a_bound(graph: NodeGraph, tmp_path: Path) -> None:
    await overlay(tmp_path / "0.qcow2", None)
    for number in range(1, 65):
        await overlay(tmp_path / f"{number}.qcow2", f"{number - 1}.qcow2")
    top = await graph.open_image(str(tmp_path / "63.qcow2"), None, read_only=True)
    assert len(filenames(top)) == 64
    text = await refusal(graph.open_image(str(tmp_path / "64.qcow2"), None, read_only=True))
    assert text.endswith("The backing chain has more than 64 images")
    text = await refusal(graph.open_overlay(str(tmp_path / "64.qcow2"), "qcow2", top))
    assert text == "The backing chain has more than 64 images"


# -- the overlay of a switch ------------------------------------------------------------------


async def test_overlay_of_the_active_image(graph: NodeGraph, tmp_path: Path) -> None:
    path = await overlay(tmp_path / "disk.qcow2", None)
    active = await graph.open_image(str(path), None, read_only=False)
    graph.add_user(active, "device 'vda'")
    copy = await overlay(tmp_path / "copy.qcow2", "disk.qcow2")
    (tmp_path / "alias.qcow2").symlink_to(path)
    node = await graph.open_overlay(str(copy), "qcow2", active)
    assert node.backing is None
    graph.connect(node, "backing", active)
    graph.add_user(node, "device 'vda'")
    graph.remove_user(active, "device 'vda'")
    await graph.close_unused()
    assert filenames(node) == [str(copy), str(path)]


async def test_overlays_that_are_none(graph: NodeGraph, tmp_path: Path) -> None:
    path = await overlay(tmp_path / "disk.qcow2", None)
    active = await graph.open_image(str(path), None, read_only=False)
    other = await overlay(tmp_path / "other.qcow2", None)
    of_other = await overlay(tmp_path / "of-other.qcow2", "other.qcow2")
    as_raw = await overlay(tmp_path / "as-raw.qcow2", "disk.qcow2", "raw")
    small = qemu_img.create(tmp_path / "small.qcow2", SIZE // 2, backing=path)
    cases = [
        (other, f"'{other}' has no backing file; it must be an overlay of '{path}'"),
        (of_other, f"The backing file of '{of_other}' is '{other}', not the active image '{path}'"),
        (as_raw, f"'{as_raw}' records the format 'raw' for its backing file '{path}', which is 'qcow2'"),
        (small, f"'{small}' has {SIZE // 2} bytes, fewer than the {SIZE} of '{path}'"),
        (tmp_path / "none", f"Could not open '{tmp_path}/none': No such file or directory"),
        (
            path,
            f"Could not open '{path}': Failed to get \"write\" lock: the file is in use by node '#block002'",
        ),
    ]
    count = len(graph.nodes)
    for image, message in cases:
        assert await refusal(graph.open_overlay(str(image), "qcow2", active)) == message
        assert len(graph.nodes) == count

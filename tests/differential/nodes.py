"""Scenarios of nodes: adding, removing, listing, resizing, and all that can be wrong with it."""

from collections.abc import Mapping
from pathlib import Path

from tests.differential.pair import FOLDER, Scenario, Send, Step, call


def in_folder(folder: Path, node: Mapping[str, object]) -> dict[str, object]:
    """The options of the same node, of files in a folder."""
    told = dict(node)
    for name, value in node.items():
        if name == "filename":
            told[name] = str(folder / str(value))
        elif isinstance(value, Mapping):
            told[name] = in_folder(folder, value)
    return told


def file_node(name: str, filename: str, **more: object) -> Send:
    return call("blockdev-add", driver="file", node_name=name, filename=f"{FOLDER}/{filename}", **more)


def image_node(name: str, filename: str, **more: object) -> Send:
    """An image with its file and, unless told otherwise, the backing chain recorded in it."""
    file = {"driver": "file", "filename": f"{FOLDER}/{filename}"}
    return call("blockdev-add", driver="qcow2", node_name=name, file=file, **more)


def raw_node(name: str, filename: str, **more: object) -> Send:
    file = {"driver": "file", "filename": f"{FOLDER}/{filename}"}
    return call("blockdev-add", driver="raw", node_name=name, file=file, **more)


def chain_nodes() -> list[Step]:
    """The chain top → mid → base, each node named like its file."""
    return [
        image_node("base", "base.qcow2", read_only=True),
        image_node("mid", "mid.qcow2", backing="base"),
        image_node("top", "top.qcow2", backing="mid"),
    ]


def reopened(name: str, filename: str, **more: object) -> Send:
    """The same node with other options."""
    file = {"driver": "file", "filename": f"{FOLDER}/{filename}"}
    options = {"driver": "qcow2", "node-name": name, "file": file} | {
        member.replace("_", "-"): value for member, value in more.items()
    }
    return call("blockdev-reopen", options=[options])


LIST = call("query-named-block-nodes")
FLAT = call("query-named-block-nodes", flat=True)

ARGUMENTS = Scenario(
    "arguments of blockdev-add",
    [
        call("blockdev-add"),
        call("blockdev-add", driver="none", node_name="x"),
        call("blockdev-add", driver=1, node_name="x"),
        call("blockdev-add", driver="file"),
        call("blockdev-add", driver="file", node_name="x"),
        call("blockdev-add", driver="file", node_name="x", filename=1),
        call("blockdev-add", driver="file", node_name="x", filename=None),
        call("blockdev-add", driver="file", node_name=7, filename="x"),
        call("blockdev-add", driver="file", node_name="x", filename="x", bogus=1),
        call("blockdev-add", driver="file", node_name="x", filename="x", read_only="on"),
        call("blockdev-add", driver="file", node_name="x", filename="x", discard="zap"),
        call("blockdev-add", driver="file", node_name="x", filename="x", cache={"direct": 1}),
        call("blockdev-add", driver="file", node_name="x", filename="x", cache={"bogus": True}),
        call("blockdev-add", driver="file", node_name="x", filename="x", cache=True),
        call("blockdev-add", driver="qcow2", node_name="x"),
        call("blockdev-add", driver="qcow2", node_name="x", file=1),
        call("blockdev-add", driver="qcow2", node_name="x", file="none"),
        call("blockdev-add", driver="qcow2", node_name="x", file={}),
        call("blockdev-add", driver="qcow2", node_name="x", file={"driver": "none"}),
        call("blockdev-add", driver="qcow2", node_name="x", file={"driver": "file"}),
        call("blockdev-add", driver="qcow2", node_name="x", file={"driver": "file", "filename": "x", "a": 1}),
        call("blockdev-add", driver="qcow2", node_name="x", file="y", backing=1),
        call("blockdev-add", driver="qcow2", node_name="x", file="y", lazy_refcounts="on"),
        call("blockdev-add", driver="qcow2", node_name="x", file="y", l2_cache_size="1M"),
        call("blockdev-add", driver="qcow2", node_name="x", file="y", overlap_check="some"),
        call("blockdev-add", driver="qcow2", node_name="x", file="y", overlap_check={"main-header": 1}),
        call("blockdev-add", driver="qcow2", node_name="x", file="y", overlap_check={"bogus": True}),
        call("blockdev-del"),
        call("blockdev-del", node_name=1),
        call("query-named-block-nodes", flat=1),
        call("query-named-block-nodes", bogus=True),
        LIST,
    ],
)

NAMES = Scenario(
    "names of nodes",
    [
        file_node("f", "disk.raw"),
        file_node("f", "text.txt"),
        file_node("9bad", "disk.raw"),
        file_node("", "disk.raw"),
        file_node("a b", "disk.raw"),
        file_node("x" * 31, "text.txt"),
        file_node("x" * 32, "text.txt"),
        file_node("x" * 33, "text.txt"),
        file_node("a.b-c_d", "base.qcow2"),
        file_node("#block1", "mid.qcow2"),
        call("blockdev-del", node_name="x"),
        call("blockdev-del", node_name=""),
        call("blockdev-del", node_name="f"),
        call("blockdev-del", node_name="f"),
        FLAT,
    ],
)

OPENING = Scenario(
    "what can be opened",
    [
        file_node("x", "none"),
        file_node("x", "folder"),
        file_node("x", "text.txt/y"),
        call("blockdev-add", driver="file", node_name="x", filename=""),
        image_node("x", "none"),
        image_node("x", "text.txt"),
        image_node("x", "disk.raw"),
        image_node("x", "folder"),
        image_node("x", "alone.qcow2", backing="none"),
        call("blockdev-add", driver="raw", node_name="x", file="none"),
        FLAT,
    ],
)

LIFE = Scenario(
    "nodes come and go",
    [
        LIST,
        file_node("f", "alone.qcow2"),
        call("blockdev-add", driver="qcow2", node_name="q", file="f"),
        LIST,
        FLAT,
        call("blockdev-del", node_name="f"),
        call("blockdev-del", node_name="q"),
        call("blockdev-add", driver="raw", node_name="r", file="f"),
        FLAT,
        call("blockdev-del", node_name="r"),
        call("blockdev-del", node_name="f"),
        LIST,
    ],
)

CHAINS = Scenario(
    "chains of nodes",
    [
        *chain_nodes(),
        LIST,
        FLAT,
        call("blockdev-del", node_name="base"),
        call("blockdev-del", node_name="mid"),
        call("blockdev-del", node_name="top"),
        call("blockdev-del", node_name="base"),
        call("blockdev-del", node_name="mid"),
        call("blockdev-del", node_name="base"),
        image_node("whole", "top.qcow2"),
        LIST,
        FLAT,
        call("blockdev-del", node_name="whole"),
        image_node("without", "top.qcow2", backing=None),
        FLAT,
        call("blockdev-del", node_name="without"),
        image_node("lost", "lost.qcow2"),
        image_node("wrong", "wrong.qcow2"),
        image_node("missing", "alone.qcow2", backing={"driver": "qcow2", "file": "none"}),
        FLAT,
    ],
)

JSON_NAMES = Scenario(
    "backing files with names that tell more",
    [
        *(image_node("n", "nested.qcow2"), LIST, FLAT, call("blockdev-del", node_name="n")),
        *(image_node("n", "dotted.qcow2"), LIST, FLAT, call("blockdev-del", node_name="n")),
        image_node("m", "elsewhere.qcow2"),
    ],
)

RAW = Scenario(
    "raw images",
    [
        raw_node("r", "disk.raw"),
        raw_node("o", "odd.raw"),
        LIST,
        call("blockdev-del", node_name="r"),
        file_node("ro", "disk.raw", read_only=True),
        call("blockdev-add", driver="raw", node_name="w", file="ro", read_only=True),
        FLAT,
    ],
)

NOT_WRITABLE = Scenario(
    "a writable image on a file that is not",
    [
        file_node("ro", "disk.raw", read_only=True),
        call("blockdev-add", driver="raw", node_name="w", file="ro"),
    ],
)

SETTINGS = Scenario(
    "what every node can be told of its requests",
    [
        image_node("a", "alone.qcow2", detect_zeroes="unmap"),
        image_node("a", "alone.qcow2", detect_zeroes="unmap", discard="ignore"),
        image_node("a", "alone.qcow2", detect_zeroes="unmap", discard="unmap"),
        LIST,
        call("blockdev-del", node_name="a"),
        image_node("a", "top.qcow2", cache={"direct": True}, detect_zeroes="on"),
        LIST,
        call("blockdev-del", node_name="a"),
        image_node("a", "alone.qcow2", detect_zeroes="on"),
        reopened("a", "alone.qcow2", detect_zeroes="unmap"),
        reopened("a", "alone.qcow2", detect_zeroes="unmap", discard="unmap", cache={"no-flush": True}),
        FLAT,
        reopened("a", "alone.qcow2"),
        FLAT,
        call("blockdev-del", node_name="a"),
        image_node("a", "alone.qcow2", cache={"no-flush": True}),
        LIST,
        file_node("f", "disk.raw", aio="native"),
        file_node("f", "disk.raw", aio="native", cache={"direct": True, "no-flush": True}),
        raw_node("r", "odd.raw", detect_zeroes="unmap"),
        call("blockdev-add", driver="raw", node_name="r", file="f", cache={"direct": False}),
        FLAT,
    ],
)

SHARED = Scenario(
    "a file under two images",
    [
        file_node("f", "alone.qcow2"),
        call("blockdev-add", driver="qcow2", node_name="q", file="f"),
        call("blockdev-add", driver="raw", node_name="second", file="f"),
    ],
)

RESIZING = Scenario(
    "block_resize",
    [
        image_node("q", "alone.qcow2"),
        image_node("ro", "base.qcow2", read_only=True),
        call("block_resize"),
        call("block_resize", size=1),
        call("block_resize", node_name="none", size=512),
        call("block_resize", device="none", size=512),
        call("block_resize", device="q", node_name="q", size=512),
        call("block_resize", node_name="q", size="1M"),
        call("block_resize", node_name="q", size=-512),
        call("block_resize", node_name="q", size=5 << 20),
        call("block_resize", node_name="q", size=(5 << 20) + 1),
        call("block_resize", node_name="q", size=1 << 62),
        call("block_resize", node_name="ro", size=5 << 20),
        raw_node("r", "disk.raw"),
        call("block_resize", node_name="r", size=6 << 20),
        call("block_resize", node_name="r", size=1 << 20),
        call("block_resize", node_name="r", size=0),
        call("blockdev-del", node_name="q"),
        FLAT,
    ],
)

LISTS = Scenario(
    "lists of nothing",
    [
        call("query-block"),
        call("query-block-jobs"),
        call("query-jobs"),
        call("query-block-exports"),
        call("query-named-block-nodes"),
        call("query-version"),
        call("query-block", bogus=1),
        call("query-jobs", bogus=1),
        call("quit", bogus=1),
        call("quit"),
        call("query-version"),
    ],
)

SCENARIOS = [
    ARGUMENTS,
    NAMES,
    OPENING,
    LIFE,
    CHAINS,
    JSON_NAMES,
    RAW,
    NOT_WRITABLE,
    SETTINGS,
    SHARED,
    RESIZING,
    LISTS,
]

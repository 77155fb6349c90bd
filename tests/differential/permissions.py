"""Scenarios of permissions: what the users of a node let others do to it."""

from tests.differential.exports import EXPORTS, START, export
from tests.differential.nodes import FLAT, chain_nodes, file_node, image_node, raw_node
from tests.differential.pair import FOLDER, Scenario, call

FILE_OF_AN_IMAGE = Scenario(
    "the file under an image",
    [
        START,
        file_node("f", "alone.qcow2"),
        call("blockdev-add", driver="qcow2", node_name="q", file="f"),
        export("e", "f"),
        export("e", "f", writable=True),
        call("block_resize", node_name="f", size=1 << 20),
        call("blockdev-add", driver="qcow2", node_name="q2", file="f"),
        call("blockdev-add", driver="qcow2", node_name="q2", file="f", read_only=True),
        call("blockdev-add", driver="raw", node_name="r", file="f"),
        export("e", "r"),
        export("e", "r", writable=True),
        call("block_resize", node_name="r", size=1 << 20),
        call("blockdev-del", node_name="r"),
        export("e", "q", writable=True),
        call("block_resize", node_name="q", size=8 << 20),
        call("block-export-del", id="e"),
        call("block_resize", node_name="q", size=8 << 20),
        FLAT,
    ],
)

TWO_RAW = Scenario(
    "two raw images in one file",
    [
        START,
        file_node("f", "disk.raw"),
        call("blockdev-add", driver="raw", node_name="r1", file="f"),
        call("blockdev-add", driver="raw", node_name="r2", file="f"),
        export("e1", "r1", writable=True),
        export("e2", "r2", writable=True),
        call("block_resize", node_name="f", size=8 << 20),
        call("block_resize", node_name="r1", size=8 << 20),
        EXPORTS,
    ],
)

TWO_NODES = Scenario(
    "two nodes of one file",
    [
        START,
        *(raw_node("r", "data.raw"), image_node("u", "upper.qcow2"), file_node("f", "data.raw")),
        *(export("e", "u", writable=True), export("x", "r"), call("block-export-del", id="x")),
        *(call("block-export-del", id="e"), call("blockdev-del", node_name="u")),
        *(raw_node("ro", "data.raw", read_only=True), export("e", "ro"), call("block-export-del", id="e")),
        *(export("e", "r", writable=True), call("block-export-del", id="e")),
        *(call("block_resize", node_name="f", size=4 << 20), export("e", "f", writable=True)),
        call("block-export-del", id="e"),
        *(file_node("fq", "alone.qcow2"), image_node("q", "alone.qcow2")),
        *(image_node("q2", "alone.qcow2"), image_node("q3", "alone.qcow2", read_only=True)),
        *(export("e", "fq"), export("e", "fq", writable=True)),
        *(call("blockdev-del", node_name="q"), image_node("q2", "alone.qcow2"), FLAT),
    ],
)

WRITTEN_BESIDE = Scenario(
    "a raw file that somebody else writes",
    [
        START,
        *(raw_node("r", "data.raw"), image_node("u", "upper.qcow2"), file_node("f", "data.raw")),
        *(export("e", "r", writable=True), call("blockdev-del", node_name="u")),
        *(export("e", "r", writable=True), export("x", "f", writable=True), image_node("u", "upper.qcow2")),
    ],
)

DISK_AS_BACKING = Scenario(
    "a disk of guests as a backing",
    [
        START,
        image_node("q", "alone.qcow2"),
        export("e", "q", writable=True),
        image_node("o", "over.qcow2", backing="q"),
    ],
)

NOTHING_BELOW_ITSELF = Scenario(
    "nothing stands below itself",
    [
        image_node("a", "alone.qcow2"),
        *chain_nodes(),
        call("blockdev-snapshot", node="a", overlay="a"),
        call("blockdev-snapshot", node="top", overlay="top"),
        image_node("x", "over.qcow2", backing="x"),
        call("blockdev-add", driver="qcow2", node_name="x", file="x"),
        call("blockdev-add", driver="qcow2", node_name="x", file=""),
        *(
            call(
                "blockdev-reopen",
                options=[
                    {
                        "driver": "qcow2",
                        "node-name": name,
                        "file": {"driver": "file", "filename": f"{FOLDER}/{name}.qcow2"},
                        "backing": backing,
                    }
                ],
            )
            for name, backing in [("mid", "top"), ("mid", "mid"), ("top", ""), ("top", "none")]
        ),
        FLAT,
    ],
)

SCENARIOS = [FILE_OF_AN_IMAGE, TWO_RAW, TWO_NODES, WRITTEN_BESIDE, DISK_AS_BACKING, NOTHING_BELOW_ITSELF]

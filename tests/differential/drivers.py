"""Scenarios of drivers that few disks need: parts of files, and disks of nothing."""

from tests.differential.exports import START, export
from tests.differential.jobs import status, stream
from tests.differential.nodes import FLAT, LIST, file_node, raw_node
from tests.differential.pair import FOLDER, Scenario, Send, call

MIB = 1 << 20
GONE = call("blockdev-del", node_name="n")


def null(name: str, driver: str = "null-co", **more: object) -> Send:
    return call("blockdev-add", driver=driver, node_name=name, **more)


PARTS = Scenario(
    "parts of raw files",
    [
        raw_node("n", "data.raw", offset="1"),
        raw_node("n", "data.raw", offset=-512),
        raw_node("n", "data.raw", size=-512),
        raw_node("n", "data.raw", offset=4 * MIB + 1),
        raw_node("n", "data.raw", size=5 * MIB),
        raw_node("n", "data.raw", offset=4 * MIB - 512, size=1024),
        raw_node("n", "data.raw", size=1000),
        *(raw_node("n", "data.raw", offset=4 * MIB), FLAT, GONE),
        *(raw_node("n", "data.raw", offset=512, size=0), FLAT, GONE),
        raw_node("n", "data.raw", offset=512, size=1024),
        *(FLAT, call("block_resize", node_name="n", size=2048), GONE),
        raw_node("n", "data.raw", offset=1000, read_only=True),
        *(FLAT, call("block_resize", node_name="n", size=2048), GONE),
        raw_node("n", "data.raw", offset=1000),
        *(FLAT, call("block_resize", node_name="n", size=MIB), FLAT, GONE),
        *(raw_node("n", "odd.raw", offset=100), FLAT),
    ],
)

NOTHING = Scenario(
    "disks of nothing",
    [
        null("a", size="x"),
        null("a", latency_ns=-1),
        null("a", read_zeroes=1),
        null("a", bogus=1),
        null("a", filename="x"),
        null("a"),
        call("block_resize", node_name="a", size=MIB),
        call("query-blockstats", query_nodes=True),
        null("b", "null-aio", size=1000, read_zeroes=True, latency_ns=1000, read_only=True),
        call("blockdev-add", driver="raw", node_name="r", file="a"),
        call("blockdev-del", node_name="a"),
        LIST,
    ],
)


def raw_on(file: object, **more: object) -> Send:
    options = {"driver": "raw", "node-name": "n", "file": file}
    return call("blockdev-reopen", options=[{**options, **more}])


OTHER_FILES = Scenario(
    "raw images that get another file",
    [
        file_node("f", "data.raw"),
        file_node("g", "odd.raw"),
        file_node("ro", "disk.raw", read_only=True),
        call("blockdev-add", driver="raw", node_name="n", file="f"),
        raw_on("none"),
        raw_on("n"),
        raw_on("ro"),
        *(raw_on("g"), LIST, raw_on("f"), LIST, GONE),
        call("blockdev-add", driver="raw", node_name="n", file="f", offset=512, size=1024),
        *(raw_on("g", offset=512, size=1024), LIST),
    ],
)


def qcow2_on(*places: tuple[str, str], **more: object) -> Send:
    """Reopen images, each in a file."""
    options = [{"driver": "qcow2", "node-name": name, "file": file, **more} for name, file in places]
    return call("blockdev-reopen", options=options)


OTHER_FILES_OF_IMAGES = Scenario(
    "images that get another file",
    [
        START,
        *(file_node(name, f"{name}.qcow2") for name in ("alone", "base", "free", "over", "larger")),
        file_node("raw", "disk.raw"),
        file_node("ro", "text.txt", read_only=True),
        call("blockdev-add", driver="qcow2", node_name="q", file="alone"),
        call("blockdev-add", driver="qcow2", node_name="o", file="base"),
        *(export("q", "q", writable=True), export("o", "o")),
        *(qcow2_on(("q", "none")), qcow2_on(("q", "q")), qcow2_on(("q", "o"))),
        *(qcow2_on(("q", "ro")), qcow2_on(("q", "base")), qcow2_on(("o", "alone"))),
        *(qcow2_on(("q", "free")), LIST, call("blockdev-del", node_name="free"), qcow2_on(("q", "alone"))),
        *(qcow2_on(("q", "base"), ("o", "alone")), LIST),
        *(qcow2_on(("q", "alone"), ("o", "none")), qcow2_on(("q", "alone"), ("o", "free")), LIST),
        *(qcow2_on(("q", "raw")), qcow2_on(("q", "over")), qcow2_on(("q", "larger"), backing=None)),
    ],
)

BETWEEN = Scenario(
    "a throttle between an image and its file",
    [
        START,
        *(file_node(name, f"{name}.qcow2") for name in ("alone", "base")),
        call("object-add", qom_type="throttle-group", id="g"),
        call("blockdev-add", driver="throttle", node_name="t", throttle_group="g", file="alone"),
        call("blockdev-add", driver="qcow2", node_name="q", file="alone"),
        call("blockdev-add", driver="qcow2", node_name="o", file="base"),
        *(export("q", "q", writable=True), export("o", "o")),
        *(qcow2_on(("q", "t")), call("blockdev-del", node_name="t"), qcow2_on(("q", "alone"))),
        *(qcow2_on(("o", "t")), qcow2_on(("q", "base"), ("o", "t")), qcow2_on(("q", "t"))),
        *(qcow2_on(("q", "t"), ("o", "base")), call("object-del", id="g"), qcow2_on(("q", "alone"))),
        *(call("blockdev-del", node_name="t"), call("object-del", id="g"), LIST),
    ],
)


def failing(**limits: object) -> Send:
    image = {"driver": "file", "filename": f"{FOLDER}/disk.raw"}
    return call("blockdev-add", driver="blkdebug", node_name="n", image=image, **limits)


LIMITS = Scenario(
    "limits of requests",
    [
        *(failing(align=align) for align in (511, 513, 1 << 31, 1 << 32, -1)),
        *(failing(max_transfer=limit) for limit in ((1 << 31) - 1, 1 << 31, -1)),
        *(
            failing(align=4096, **{limit: 512})
            for limit in ("max_transfer", "opt_write_zero", "max_write_zero")
        ),
        *(failing(align=4096, **{limit: 512}) for limit in ("opt_discard", "max_discard")),
        failing(opt_write_zero=4096, max_write_zero=6144),
        failing(opt_discard=4096, max_discard=6144),
        *(failing(align=align) for align in (0, 1, 4096) for _ in (1, 2)),
        *(GONE, failing(opt_write_zero=1000, max_write_zero=3000, opt_discard=7, max_discard=21)),
    ],
)
TAKEN = Scenario(
    "permissions that are taken for a test",
    [
        file_node("f", "disk.raw"),
        call("blockdev-add", driver="blkdebug", node_name="n", image="f", take_child_perms=["write"]),
        call("blockdev-add", driver="raw", node_name="r", file="f"),
        call("blockdev-add", driver="blkdebug", node_name="m", image="f", unshare_child_perms=["write"]),
        *(
            GONE,
            call("blockdev-add", driver="blkdebug", node_name="m", image="f", unshare_child_perms=["write"]),
        ),
        call(
            "blockdev-add", driver="blkdebug", node_name="n", image="f", take_child_perms=["resize", "write"]
        ),
        call(
            "blockdev-add", driver="blkdebug", node_name="n", image="f", take_child_perms=["write-unchanged"]
        ),
    ],
)


def told_again(**options: object) -> Send:
    return call(
        "blockdev-reopen", options=[{name.replace("_", "-"): value for name, value in options.items()}]
    )


N: dict[str, object] = {"driver": "null-co", "node_name": "n"}
B: dict[str, object] = {"driver": "blkdebug", "node_name": "n", "image": "f"}
F: dict[str, object] = {"driver": "file", "node_name": "f", "filename": f"{FOLDER}/data.raw"}
R: dict[str, object] = {"driver": "raw", "node_name": "n", "file": "f"}
FAULT: dict[str, object] = {"event": "none"}
FIXED = Scenario(
    "options that are told again",
    [
        call("blockdev-add", **N, size=1024, latency_ns=5),
        told_again(**N, size=1024, latency_ns=5),
        *(told_again(**N, size=2048, latency_ns=5), told_again(**N, size=1024, latency_ns=6)),
        *(told_again(**N, size=1024), told_again(**N, size=1024, latency_ns=5, read_zeroes=True)),
        *(GONE, call("blockdev-add", **F), call("blockdev-add", **B, align=4096, inject_error=[FAULT])),
        told_again(**B, align=4096, inject_error=[FAULT]),
        told_again(**B, align=512, inject_error=[FAULT]),
        told_again(**B, inject_error=[FAULT]),
        told_again(**B, align=4096),
        told_again(**B, align=4096, inject_error=[{**FAULT, "errno": 3}]),
        told_again(**B, align=4096, inject_error=[FAULT, FAULT]),
        *(GONE, told_again(**F), told_again(**F, locking="off"), told_again(**F, aio="native")),
    ],
)
MOVED = Scenario(
    "parts of files that are told again",
    [
        call("blockdev-add", **F),
        call("blockdev-add", **R, offset=1024, size=1024),
        *(told_again(**R, size=512), told_again(**R), told_again(**R, offset=1000), LIST),
        *(told_again(**R, size=5 * MIB), told_again(**R, offset=5 * MIB), told_again(**R, size=1000)),
        *(told_again(**R, offset=512, size=1024), LIST, GONE),
        *(call("blockdev-add", **R), told_again(**R), told_again(**R, offset=512)),
    ],
)

THROTTLED = {
    "driver": "throttle",
    "throttle-group": "g",
    "file": {"driver": "file", "filename": f"{FOLDER}/top.qcow2"},
}
STANDING = Scenario(
    "images on throttled files",
    [
        call("object-add", qom_type="throttle-group", id="g"),
        call("blockdev-add", driver="qcow2", node_name="n", file=THROTTLED),
        *(call("block_resize", node_name="n", size=5 * MIB), stream("j", "n"), status("null"), GONE),
        call("blockdev-add", node_name="t", **THROTTLED),
        call("blockdev-add", driver="qcow2", node_name="n", file="t"),
        call("blockdev-add", driver="qcow2", node_name="m", file="t"),
        *(
            call("blockdev-del", node_name="t"),
            GONE,
            call("blockdev-add", driver="raw", node_name="n", file="t"),
        ),
        *(GONE, call("blockdev-add", driver="blkdebug", node_name="d", image="t")),
        call("blockdev-add", driver="qcow2", node_name="n", file="d", read_only=True),
        *(GONE, call("blockdev-del", node_name="d"), call("blockdev-del", node_name="t")),
        call("object-del", id="g"),
    ],
)

SCENARIOS = [
    PARTS,
    NOTHING,
    OTHER_FILES,
    OTHER_FILES_OF_IMAGES,
    BETWEEN,
    LIMITS,
    TAKEN,
    FIXED,
    MOVED,
    STANDING,
]

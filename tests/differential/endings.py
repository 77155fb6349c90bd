"""Scenarios of what jobs have for themselves, and of what is told at the end of a daemon."""

from tests.differential.exports import START, export
from tests.differential.jobs import job, slow_stream, status, stream
from tests.differential.nodes import FLAT, LIST, chain_nodes, image_node
from tests.differential.pair import FOLDER, Scenario, Send, call, wait

BACKING_FILES = Scenario(
    "another backing file to record",
    [
        *chain_nodes(),
        stream("j", "top", backing_file="x"),
        stream("j", "top", bottom="base", backing_file="x"),
        stream("j", "top", bottom="base", backing_file=f"{FOLDER}/base.qcow2"),
        stream("j", "top", base_node="base", backing_file=f"{FOLDER}/base.qcow2"),
        status("null"),
        FLAT,
    ],
)

NO_BACKING_FILE = Scenario(
    "no backing file to record",
    [
        *chain_nodes(),
        *(stream("j", "top", base_node="base", backing_file=""), status("null")),
        call("change-backing-file", device="top", image_node_name="top", backing_file="base.qcow2"),
        *(stream("j", "top", base_node="base", backing_file=""), status("null"), LIST),
        *(call("blockdev-del", node_name=name) for name in ("top", "mid")),
        *(image_node("top", "top.qcow2"), FLAT),
    ],
)

FILTER_NAMES = Scenario(
    "names of filters",
    [
        *chain_nodes(),
        *(
            stream("j", "top", filter_node_name=name)
            for name in ("top", "mid", "base", "9x", "", "a b", "x" * 32, "x" * 100)
        ),
        FLAT,
        stream("j", "top", filter_node_name="x" * 31),
        status("null"),
        FLAT,
    ],
)

FILTER = Scenario(
    "the filter of a job",
    [
        *chain_nodes(),
        *slow_stream("j", "top", filter_node_name="flt"),
        *(stream("k", name) for name in ("flt", "top", "mid")),
        stream("k", "top", filter_node_name="flt"),
        image_node("flt", "alone.qcow2"),
        *(call("blockdev-del", node_name=name) for name in ("flt", "top", "mid")),
        call("change-backing-file", device="top", image_node_name="top", backing_file="x"),
        image_node("over", "alone.qcow2"),
        call("blockdev-snapshot", node="flt", overlay="over"),
    ],
)


def on_backing(name: str, filename: str, backing: str | None) -> Send:
    file = {"driver": "file", "filename": f"{FOLDER}/{filename}"}
    options = {"driver": "qcow2", "node-name": name, "file": file, "backing": backing}
    return call("blockdev-reopen", options=[options])


LINKS = Scenario(
    "the links that a job relies on",
    [
        *chain_nodes(),
        *slow_stream("j", "top", base_node="base"),
        on_backing("top", "top.qcow2", None),
        on_backing("mid", "mid.qcow2", None),
    ],
)

_BASES: dict[str, list[str | None]] = {
    "another base": ["alone"],
    "no base": [None],
    "its first base again": [None, "alone", "base"],
}
OTHER_BASES = [
    Scenario(
        f"a stream that ends at {name}",
        [
            *chain_nodes(),
            image_node("alone", "alone.qcow2", read_only=True),
            stream("j", "top", base_node="base", auto_finalize=False),
            wait("BLOCK_JOB_PENDING", id="j"),
            *(on_backing("mid", "mid.qcow2", base) for base in bases),
            *(on_backing("top", "top.qcow2", "alone"), job("finalize"), status("null"), LIST),
            *(call("blockdev-del", node_name=name) for name in ("top", "mid")),
            *(image_node("top", "top.qcow2"), LIST),
        ],
    )
    for name, bases in _BASES.items()
]

BELOW_A_WHOLE_STREAM = Scenario(
    "an image below a stream of the whole chain",
    [
        *(image_node("mid", "mid.qcow2", backing=None), image_node("top", "top.qcow2", backing="mid")),
        image_node("alone", "alone.qcow2", read_only=True),
        stream("j", "top", auto_finalize=False),
        wait("BLOCK_JOB_PENDING", id="j"),
        on_backing("mid", "mid.qcow2", "alone"),
    ],
)

QUITS = [
    Scenario(
        "quit with exports",
        [
            image_node("n", "alone.qcow2"),
            START,
            *(export(name, "n", name=name) for name in ("e", "f", "g")),
            call("quit"),
        ],
    ),
    Scenario(
        "the end of the server with exports",
        [
            image_node("n", "alone.qcow2"),
            START,
            *(export(name, "n", name=name) for name in ("e", "f", "g")),
            call("nbd-server-stop"),
            call("query-block-exports"),
        ],
    ),
    Scenario(
        "quit with jobs that were not dismissed",
        [
            *chain_nodes(),
            stream("j", "top", auto_dismiss=False),
            status("concluded"),
            image_node("n", "upper.qcow2"),
            stream("k", "n", auto_finalize=False, auto_dismiss=False),
            status("pending", "k"),
            START,
            export("e", "n"),
            call("quit"),
        ],
    ),
]

SCENARIOS = [
    BACKING_FILES,
    NO_BACKING_FILE,
    FILTER_NAMES,
    FILTER,
    LINKS,
    *OTHER_BASES,
    BELOW_A_WHOLE_STREAM,
    *QUITS,
]

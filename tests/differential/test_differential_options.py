"""Every option of every driver: what is said of it, and what nodes are reported as that were given it.

Names of files are left out ("File names are file names"), and the order of nodes, which differs where a
blkdebug node has opened its image itself.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from blockd.drivers import DRIVERS
from tests.differential.images import make_images
from tests.differential.pair import FOLDER, IMAGES, Scenario, Send, call, transcripts
from tests.differential.test_differential_document import option_names

Options = dict[str, Any]


def file(name: str, **more: object) -> Options:
    return {"driver": "file", "filename": f"{FOLDER}/{name}", **more}


RAW, QCOW2 = file("data.raw"), file("alone.qcow2")
TOP = {"driver": "qcow2", "file": file("top.qcow2")}
EVERY: list[Options] = [
    {},
    *({"discard": value} for value in ("ignore", "unmap", "zap")),
    *({"cache": {"direct": value}} for value in (True, False, "on")),
    {"cache": {"no-flush": True}},
    {"cache": {"direct": True, "no-flush": True}},
    {"cache": {"zap": True}},
    {"cache": True},
    *({"read-only": value} for value in (True, False)),
    {"auto-read-only": True},
    {"auto-read-only": True, "read-only": True},
    {"force-share": True},
    {"force-share": True, "read-only": True},
    {"detect-zeroes": "on"},
    *({"detect-zeroes": "unmap"} | discard for discard in ({}, {"discard": "unmap"}, {"discard": "ignore"})),
]
OF_FILES: list[Options] = [
    *({"locking": value} for value in ("on", "off", "auto", "zap")),
    *({"aio": value} for value in ("threads", "native", "io_uring", "zap")),
    {"aio": "native", "cache": {"direct": True}},
    *({"aio-max-batch": value} for value in (0, 10)),
    *({"drop-cache": value} for value in (True, False)),
]
SIZES = ("cache-size", "l2-cache-size", "refcount-cache-size")
OF_QCOW2: list[Options] = [
    *({"lazy-refcounts": value} for value in (True, False)),
    *(
        {f"pass-discard-{what}": value}
        for what in ("request", "snapshot", "other")
        for value in (True, False)
    ),
    *({"overlap-check": value} for value in ("none", "constant", "cached", "all", "zap")),
    {"overlap-check": {"template": "none", "bitmap-directory": True}},
    {"overlap-check": {"template": "zap"}},
    *({name: value} for name in SIZES for value in (1 << 20, 1, 0, -1)),
    *({SIZES[0]: 1 << 20, name: value} for name in SIZES[1:] for value in (1 << 20, 2 << 20)),
    dict.fromkeys(SIZES, 1 << 20),
    dict.fromkeys(SIZES[1:], 1 << 20),
    *({"l2-cache-entry-size": value} for value in (-1, 0, 256, 511, 512, 5000, 4096, 65536, 1 << 17)),
    *({"cache-clean-interval": value} for value in (-1, 0, 600, (1 << 32) - 1, 1 << 32)),
]
RULES: list[Options] = [
    {"inject-error": [{"event": "none", "immediately": True}]},
    {"set-state": [{"event": "none", "new_state": 5}]},
    *({name: 4096} for name in ("align", "max-transfer", "opt-write-zero", "opt-discard")),
    *({name: 8192} for name in ("max-write-zero", "max-discard")),
]


def variations() -> Iterator[Options]:
    """One node each."""
    throttle = {"driver": "throttle", "throttle-group": "g"}
    raw = {"driver": "raw", "file": RAW}
    nodes: list[tuple[Options, list[Options]]] = [
        (RAW, OF_FILES),
        (raw, [{"offset": 512}, {"size": 1024}, {"offset": 512, "size": 1024}]),
        ({"driver": "qcow2", "file": QCOW2}, OF_QCOW2),
        ({"driver": "qed", "file": file("disk.qed")}, []),
        (TOP, []),
        ({"driver": "null-co"}, [{"size": 1000}, {"latency-ns": 5}, {"read-zeroes": True}]),
        ({"driver": "null-aio"}, []),
        ({"driver": "blkdebug", "image": RAW}, RULES),
        ({**throttle, "file": RAW}, []),
        ({**throttle, "file": raw}, []),
        ({"driver": "copy-on-read", "file": TOP}, []),
    ]
    for node, more in nodes:
        yield from ({**node, **options} for options in [*EVERY, *more])
    faults = {"driver": "blkdebug", "image": QCOW2}
    yield {"driver": "qcow2", "file": faults}
    yield {"driver": "raw", "file": {"driver": "blkdebug", "image": RAW}}
    yield {"driver": "blkdebug", "image": {"driver": "null-co"}}
    for options in EVERY:
        yield {"driver": "qcow2", "file": {**QCOW2, **options}}
        yield {"driver": "qcow2", "cache": {"direct": True}, "file": {**QCOW2, **options}}
        yield {"driver": "raw", "read-only": True, "file": {**RAW, **options}}
        yield {"driver": "copy-on-read", "file": {**TOP, **options}}
        yield {**throttle, "file": {**raw, **options}}
        yield {"driver": "blkdebug", "image": {**RAW, **options}}


def is_below_read_only(options: Options) -> bool:
    """Whether what a node stands on is read-only, and itself it is not ("What cannot work is refused")."""
    below = options.get("file") or options.get("image") or {}
    return bool(below.get("read-only")) and not options.get("read-only")


NAMES = {"filename", "file", "backing_file", "full-backing-filename"}


def without_names(value: Any) -> Any:
    match value:
        case dict():
            return {name: without_names(inner) for name, inner in value.items() if name not in NAMES}
        case list():
            return [without_names(inner) for inner in value]
    return value


def compared(lines: Sequence[str]) -> list[str]:
    """The answers to the options, and to the question for nodes; those in an order of their own."""
    added, listed, _ = (json.loads(line) for line in lines)
    return [json.dumps(added), *sorted(json.dumps(node) for node in without_names(listed["return"]))]


async def test_options_are_taken_and_reported_as_by_qemu(tmp_path: Path) -> None:
    make_images(tmp_path / IMAGES)
    told = [options for options in variations() if not is_below_read_only(options)]
    steps = [call("object-add", qom_type="throttle-group", id="g")]
    for options in told:
        add = {"execute": "blockdev-add", "arguments": {"node-name": "n", **options}}
        steps += [Send(json.dumps(add)), call("query-named-block-nodes"), call("blockdev-del", node_name="n")]
    theirs, ours = await transcripts(Scenario("options", steps), tmp_path)
    different = [
        (options, [*map(compared, (theirs[start : start + 3], ours[start : start + 3]))])
        for options, start in zip(told, range(2, len(theirs), 3), strict=True)
        if compared(theirs[start : start + 3]) != compared(ours[start : start + 3])
    ]
    assert different == []


def test_no_option_is_left_out() -> None:
    given = {name for options in variations() for name in _names(options)}
    found = {name for driver in DRIVERS.values() for name in option_names(driver.fields)}
    assert {name for name in found - given if not name.startswith(ELSEWHERE)} == set()


# What cannot be compared, or is by other tests here.
ELSEWHERE = (
    *("delay.", "inject-error.", "set-state.", "config", "overlap-check.", "take-child-", "unshare-child-"),
    *("bottom", "node-name"),
)


def _names(options: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _names(value, "" if name in ("file", "image") else f"{prefix}{name}.")
        yield f"{prefix}{name}"


async def test_nodes_that_blockd_takes_or_lists_otherwise(tmp_path: Path) -> None:
    make_images(tmp_path / IMAGES)
    add = {"execute": "blockdev-add"}
    empty = {**RAW, "node-name": "n", "cache": {}}
    faults = {"driver": "blkdebug", "node-name": "n", "image": {**RAW, "node-name": "f"}}
    steps: list[Send] = []
    for options in (empty, faults):
        steps += [Send(json.dumps({**add, "arguments": options})), call("query-named-block-nodes")]
        steps.append(call("blockdev-del", node_name="n"))
    lines = await transcripts(Scenario("others", steps), tmp_path)
    theirs, ours = ([json.loads(line) for line in of_one] for of_one in lines)
    assert "error" in theirs[1]
    assert ours[1] == {"return": {}}
    assert [node["node-name"] for node in theirs[5]["return"]] == ["f", "n"]
    assert [node["node-name"] for node in ours[5]["return"]] == ["n", "f"]

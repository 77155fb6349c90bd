"""Every command that takes a node, for nodes in every role: what is tried on both, and what differs."""

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from tests.differential.differences import (
    BACKINGS,
    IMAGES,
    NODES_ON_FILES,
    NULL_NAME,
    PROMISE,
    REASONS,
    THROTTLED,
    UNUSED_OVERLAYS,
    WRITABLE,
)
from tests.differential.exports import START, export
from tests.differential.nodes import file_node, image_node
from tests.differential.pair import FOLDER, Send, call

SIZE = 8 << 20


def _image(name: str, file: str, filename: str, **more: object) -> list[Send]:
    return [
        file_node(file, filename),
        call("blockdev-add", driver="qcow2", node_name=name, file=file, **more),
    ]


NODES = [
    START,
    call("object-add", qom_type="throttle-group", id="g", limits={}),
    *_image("base", "fb", "base.qcow2", read_only=True),
    *_image("mid", "fm", "mid.qcow2", backing="base"),
    *_image("top", "ft", "top.qcow2", backing="mid"),
    *_image("q", "fq", "alone.qcow2"),
    file_node("ff", "text.txt"),
    file_node("fr", "disk.raw"),
    call("blockdev-add", driver="raw", node_name="r", file="fr"),
    image_node("u", "upper.qcow2", backing=None),
    call("blockdev-add", driver="throttle", node_name="t", file="u", throttle_group="g"),
]
ROLES = {
    "fb": "file of a read-only image",
    "base": "backing of a backing, added read-only",
    "fm": "file of a backing",
    "mid": "backing",
    "ft": "file of an active image",
    "top": "active image",
    "fq": "file of an image that stands alone",
    "q": "image that stands alone",
    "ff": "file that stands alone",
    "fr": "file of a raw image",
    "r": "raw image",
    "u": "image behind a throttle",
    "t": "throttle",
}
# What else uses the nodes meanwhile.
USES: Mapping[str, list[Send]] = {
    "nobody": [],
    "guests that read": [export(f"in-{name}", name) for name in ("mid", "top", "q", "r", "t")],
    "guests that write": [export(f"in-{name}", name, writable=True) for name in ("top", "q", "r", "t")],
    "a stream": [call("block-stream", job_id="s", device="top", auto_finalize=False)],
}


class Case(NamedTuple):
    """One command for one node."""

    name: str
    node: str
    request: Send

    @property
    def changes_nodes(self) -> bool:
        """Whether it leaves, when it is accepted, other nodes than before."""
        return self.name in ("remove", "itself as its overlay", "an overlay of it", "stream")


def cases() -> Iterator[Case]:
    for node in ROLES:
        for name, request in _requests(node):
            yield Case(name, node, request)


def _requests(node: str) -> Iterator[tuple[str, Send]]:
    yield "export", export("new", node, name="new")
    yield "export writable", export("new", node, name="new", writable=True)
    yield "resize", call("block_resize", node_name=node, size=SIZE)
    yield "stream", call("block-stream", job_id="new", device=node)
    new = {"node_name": "new", "file": node}
    for driver in ("qcow2", "raw"):
        yield f"{driver} on it", call("blockdev-add", driver=driver, **new)
        yield f"read-only {driver} on it", call("blockdev-add", driver=driver, read_only=True, **new)
    yield "throttle on it", call("blockdev-add", driver="throttle", throttle_group="g", **new)
    yield "copy-on-read on it", call("blockdev-add", driver="copy-on-read", **new)
    yield "overlay on it", image_node("new", "over.qcow2", backing=node)
    names = {"image_node_name": node, "backing_file": f"{FOLDER}/base.qcow2"}
    yield "change its backing file", call("change-backing-file", device="top", **names)
    yield "remove", call("blockdev-del", node_name=node)
    yield "itself as its overlay", call("blockdev-snapshot", node=node, overlay=node)
    yield "an overlay of it", call("blockdev-snapshot", node="q", overlay=node)


class Rule(NamedTuple):
    """A difference: of which commands, what each of the two says (all patterns), and the entry for it."""

    entry: str
    command: str
    theirs: str
    ours: str

    def explains(self, case: Case, theirs: str, ours: str) -> bool:
        texts = ((self.command, case.name), (self.theirs, theirs), (self.ours, ours))
        return all(re.search(pattern, text) for pattern, text in texts)


_ACCEPTED = "^accepted$"
RULES = [
    Rule(
        BACKINGS, "^overlay on it$", _ACCEPTED, "Permission conflict .* unshared by node 'new' .* 'backing'"
    ),
    Rule(BACKINGS, "^export writable$", _ACCEPTED, "Permission conflict .* 'write' .* as 'backing' child"),
    Rule(PROMISE, "^stream$", _ACCEPTED, "Block node is read-only"),
    Rule(NULL_NAME, "^resize$", r"Device '\(null\)' is in use", "Node '.*' is busy"),
    Rule(IMAGES, "qcow2 on it$", "Image is not in qcow2 format", "is not a qcow2 image"),
    Rule(WRITABLE, "^raw on it$", _ACCEPTED, "Block node is read-only"),
    Rule(NODES_ON_FILES, "qcow2 on it$", "", "driver needs a protocol node as its file"),
    Rule(NODES_ON_FILES, "^copy-on-read on it$", "", "Cannot copy on read into"),
    Rule(THROTTLED, "^stream$", "Permission conflict on node 'u': permissions 'write' are", _ACCEPTED),
    Rule(UNUSED_OVERLAYS, "overlay$|an overlay of it$", "", "The overlay is already in use"),
    Rule(REASONS, "^itself as its overlay$", "The overlay", "is busy: it is the file of"),
    Rule(
        REASONS, "^change its backing file$", "not in the same chain|same chain", "not allowing backing file"
    ),
    Rule(REASONS, "^remove$", "Node mid is in use", "Node 'mid' is busy: node is used as backing hd of"),
]

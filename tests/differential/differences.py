"""Where blockd answers otherwise on purpose: which lines, and the entry of the document that says why."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path

DOCUMENT = Path(__file__).parents[2] / "docs" / "qmp-differences.md"


@dataclass(frozen=True)
class Difference:
    """Lines that stand in one place of two transcripts; of each, a part that tells it is meant."""

    entry: str
    theirs: Sequence[str] = ()
    ours: Sequence[str] = ()

    def explains(self, theirs: Sequence[str], ours: Sequence[str]) -> bool:
        return _match(self.theirs, theirs) and _match(self.ours, ours)


def _match(parts: Sequence[str], lines: Sequence[str]) -> bool:
    return len(parts) == len(lines) and all(part in line for part, line in zip(parts, lines, strict=True))


IMAGES = "Errors about images name the image"
FILENAMES = "File names are file names"
WRITABLE = "What cannot work is refused at once"
PROMISE = "Read-only is a promise"
BACKINGS = "A backing file is not written"
NODES_ON_FILES = "What a node can stand on"
UNUSED_OVERLAYS = "An overlay is nobody's yet"
THROTTLED = "Streams begin below throttles"
REASONS = "Which of several reasons is told"
WHOLE_RAW = "Raw images that are whole stay so"
SIZES = "Sizes of images"
LONG_TEXTS = "Long texts are not sent back in errors"
REFUSED = "A refused stream was never a job"
WHOLE = "A stream of the whole chain leaves no backing"
CONCLUDED = "A concluded job blocks nothing"
DRAIN = "Draining is no pause"
NULL_NAME = "A busy node is called by its name"
ENVELOPES = "The first of several mistakes"
ELEMENTS = "Elements of lists have names"
LONG_VALUES = "What is very long is not taken"
OTHER_FILES = "An image in another file is what that holds"
LIMITS = "One message beyond a limit is one error"

RESUMED = "Replies do not wait for what follows"

_NOT_QCOW2 = "Image is not in qcow2 format"
_LOCK = 'Failed to get \\"write\\" lock'
_PAUSED, _RUNNING = '"status": "paused"', '"status": "running"'

_COMPOSED = Difference(FILENAMES, ['"file": "json:{'], ['"file": "FOLDER/top.qcow2"'])

# By scenario, in the order in which they come.
DIFFERENCES: Mapping[str, Sequence[Difference]] = {
    "what can be opened": [
        Difference(
            IMAGES,
            [_NOT_QCOW2, _NOT_QCOW2],
            ["'FOLDER/text.txt' is not a qcow2 image", "'FOLDER/disk.raw' is not a qcow2 image"],
        )
    ],
    "chains of nodes": [
        _COMPOSED,
        Difference(
            IMAGES,
            [
                "Could not open backing file: Could not open 'FOLDER/none.qcow2': No such",
                f"Could not open backing file: {_NOT_QCOW2}",
            ],
            [
                "Could not open backing file of 'FOLDER/lost.qcow2': Could not open 'FOLDER/none.qcow2': No",
                "Could not open backing file of 'FOLDER/wrong.qcow2': 'FOLDER/text.txt' is not a qcow2 image",
            ],
        ),
    ],
    "backing files with names that tell more": [
        Difference(
            FILENAMES,
            ["Could not open backing file: Failed to connect"],
            ["Its 'json:' name is not understood"],
        )
    ],
    "a writable image on a file that is not": [
        Difference(WRITABLE, ['"return": {}'], ["Block node is read-only"])
    ],
    "two nodes of one file": [
        Difference(
            IMAGES,
            [_LOCK, 'Failed to get shared \\"write\\" lock', 'Failed to get shared \\"resize\\" lock', _LOCK],
            [f"Could not open 'FOLDER/alone.qcow2': {_LOCK}: the file is in use by node '#block…'"] * 4,
        )
    ],
    "a raw file that somebody else writes": [
        Difference(BACKINGS, ours=[f"Could not open 'FOLDER/data.raw': {_LOCK}: the file is in use by node"]),
        Difference(
            BACKINGS,
            ["Block export id 'e' is already in use", '"return": {}', '"return": {}'],
            [
                f"Could not open 'FOLDER/data.raw': {_LOCK}: the file is in use by node",
                "Could not open backing file of 'FOLDER/upper.qcow2': Could not open 'FOLDER/data.raw': Fail",
            ],
        ),
    ],
    "a disk of guests as a backing": [
        Difference(BACKINGS, ['"return": {}'], ["Permission conflict on node 'q': permissions 'write' are"])
    ],
    "block_resize": [
        Difference(
            SIZES,
            ["Failed to grow the L1 table: File too large"],
            ["A qcow2 image with 65536 byte clusters cannot be so large"],
        ),
    ],
    "exports come and go": [
        Difference(LONG_TEXTS, ["zzzz' too long"], ["zzzz…' too long: at most 4096 bytes"])
    ],
    "streams that are refused": [
        Difference(REFUSED, ['"status": "created"', '"status": "null"']),
        Difference(
            PROMISE,
            [
                *(f'"status": "{status}"' for status in ("created", "running", "waiting", "pending")),
                "BLOCK_JOB_COMPLETED",
                *(f'"status": "{status}"' for status in ("concluded", "null")),
                '"return": {}',
            ],
            ["Block node is read-only"],
        ),
    ],
    "a stream down to a base under another name": [_COMPOSED],
    "verbs while it runs": [
        Difference(
            NULL_NAME, ["Device '(null)' is in use"], ["Node 'top' is busy: block device is in use by"]
        )
    ],
    "finalizing and dismissing by hand": [
        Difference(CONCLUDED, ["Node 'top' is busy"], ["Job ID 'j' already in use"])
    ],
    "an error that stays, then cancelling": [
        Difference(RESUMED, ours=['"return": {}']),
        Difference(RESUMED, theirs=['"return": {}']),
    ],
    "the links that a job relies on": [
        Difference(DRAIN, [_PAUSED, _RUNNING]),
        Difference(DRAIN, [_PAUSED, _RUNNING]),
    ],
    "no backing file to record": [_COMPOSED],
    "a stream that ends at another base": [_COMPOSED],
    "a stream that ends at no base": [_COMPOSED],
    "an image below a stream of the whole chain": [
        Difference(WHOLE, ['"return": {}'], ["Node 'mid' is busy: block device is in use by block job"])
    ],
    "the filter of a job": [Difference(DRAIN, [_PAUSED, _RUNNING, _PAUSED, _RUNNING])],
    "raw images that get another file": [Difference(WRITABLE, ['"return": {}'], ["Block node is read-only"])],
    "images that get another file": [
        Difference(
            OTHER_FILES,
            ['"return": {}', '"return": {}', '"return": {}'],
            [
                "'FOLDER/disk.raw' is not a qcow2 image",
                "backing is missing for 'q'",
                "Permission conflict on node 'q': permissions 'resize' are both required",
            ],
        )
    ],
    "parts of files that are told again": [
        Difference(WHOLE_RAW, ['"return": {}'], ["Cannot change the option 'offset'"])
    ],
    "disks of nothing": [Difference(FILENAMES, ["json:{"], ['"filename": "null-aio://"'])],
    "quit with a running job": [Difference(DRAIN, [_PAUSED, _RUNNING])],
}


def unexplained(scenario: str, theirs: Sequence[str], ours: Sequence[str]) -> list[str]:
    """Say where two transcripts differ and should not, and where they should and do not."""
    expected = list(DIFFERENCES.get(scenario, []))
    faults = []
    for theirs_here, ours_here in _hunks(theirs, ours):
        if expected and expected[0].explains(theirs_here, ours_here):
            del expected[0]
        else:
            faults.append(
                "\n".join(
                    [*(f"QSD:    {line}" for line in theirs_here), *(f"blockd: {line}" for line in ours_here)]
                )
            )
    return faults + [f"not seen: {difference}" for difference in expected]


def _hunks(theirs: Sequence[str], ours: Sequence[str]) -> Iterator[tuple[Sequence[str], Sequence[str]]]:
    matcher = SequenceMatcher(None, theirs, ours, autojunk=False)
    for tag, start, end, our_start, our_end in matcher.get_opcodes():
        if tag != "equal":
            yield theirs[start:end], ours[our_start:our_end]

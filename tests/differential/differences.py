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
SIZES = "Sizes of images"
LONG_TEXTS = "Long texts are not sent back in errors"
QUIT = "Exports are not deleted by quit"
REFUSED = "A refused stream was never a job"
CONCLUDED = "A concluded job blocks nothing"
DRAIN = "Draining is no pause"
NULL_NAME = "A busy node is called by its name"
ENVELOPES = "The first of several mistakes"
ELEMENTS = "Elements of lists have names"
LONG_VALUES = "What is very long is not taken"
LIMITS = "One message beyond a limit is one error"

RESUMED = "Replies do not wait for what follows"

_NOT_QCOW2 = "Image is not in qcow2 format"
_PAUSED, _RUNNING = '"status": "paused"', '"status": "running"'

# What is told of an error that ended a job.
_READ = "Could not read 'FOLDER/data.raw': "
_EIO, _ENOSPC = "Input/output error", "No space left on device"

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
        Difference(FILENAMES, ['"file": "json:{'], ['"file": "FOLDER/top.qcow2"']),
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
    "a writable image on a file that is not": [
        Difference(WRITABLE, ['"return": {}'], ["Block node is read-only"])
    ],
    "a file under two images": [Difference(WRITABLE, ['"return": {}'], ["Permission conflict on node 'f'"])],
    "block_resize": [
        Difference(SIZES, ['"return": {}'], ["Shrinking a qcow2 image is not supported"]),
        Difference(
            SIZES,
            ["Failed to grow the L1 table: File too large"],
            ["A qcow2 image with 65536 byte clusters cannot be so large"],
        ),
    ],
    "quit with an export": [Difference(QUIT, ["BLOCK_EXPORT_DELETED"])],
    "exports come and go": [
        Difference(LONG_TEXTS, ["zzzz' too long"], ["zzzz…' too long: at most 4096 bytes"])
    ],
    "streams that are refused": [Difference(REFUSED, ['"status": "created"', '"status": "null"'])],
    "a stream down to a base under another name": [
        Difference(FILENAMES, ['"file": "json:{'], ['"file": "FOLDER/top.qcow2"'])
    ],
    "verbs while it runs": [
        Difference(
            NULL_NAME, ["Device '(null)' is in use"], ["Node 'top' is busy: block device is in use by"]
        )
    ],
    "finalizing and dismissing by hand": [
        Difference(CONCLUDED, ["Node 'top' is busy"], ["Job ID 'j' already in use"])
    ],
    **{
        f"error {errno} with {policy}": [Difference(IMAGES, [f'"error": "{text}"'], [_READ + text])]
        for errno, text, policies in [
            (5, _EIO, ["report", "ignore", "enospc", "auto"]),
            (28, _ENOSPC, ["report", "ignore"]),
        ]
        for policy in policies
    },
    "an error that stays, then cancelling": [
        Difference(RESUMED, ours=['"return": {}']),
        Difference(RESUMED, theirs=['"return": {}']),
    ],
    "a failed job that is kept": [
        Difference(IMAGES, [f'"error": "{_EIO}"'], [_READ + _EIO]),
        Difference(IMAGES, [f'"error": "{_EIO}"'] * 2, [_READ + _EIO] * 2),
    ],
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

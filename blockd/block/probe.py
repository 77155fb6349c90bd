"""Which format an image has when nobody said so: only if its name and its first bytes agree.

A guest writes the first bytes of a raw image; would they alone decide, it could turn its disk into
an image that names any file of the host as backing.
"""

from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import NamedTuple

from blockd.errors import RequestError

# As much of the start of a file as any probe looks at.
PROBE_LENGTH = 512


class Signature(NamedTuple):
    """How a format is recognised; one without `probe` is whatever no other format claims."""

    extension: str
    probe: Callable[[bytes], bool] | None


class UnknownFormat(RequestError):
    """The format of a file is not known for sure."""


def probe_format(filename: str, first_bytes: bytes, signatures: Mapping[str, Signature]) -> str:
    """Name the format that both the file's extension and its first bytes say.

    Raises:   UnknownFormat: they do not agree; the caller's user has to specify the format.
    """
    claimed = [
        name for name, entry in signatures.items() if entry.probe is not None and entry.probe(first_bytes)
    ]
    extension = PurePath(filename).suffix.lower()
    for name, entry in signatures.items():
        if entry.extension == extension and claimed == ([name] if entry.probe is not None else []):
            return name
    named = next((name for name, entry in signatures.items() if entry.extension == extension), None)
    if claimed:
        why = f"its content looks like {claimed[0]}, but its name does not end in .{claimed[0]}"
    elif named is not None:
        why = f"its name ends in {extension}, but its content is no {named} image"
    else:
        why = "neither its name nor its content tells it"
    raise UnknownFormat(
        f"Could not tell the format of '{filename}': {why}; specify the format ({', '.join(signatures)})"
    )

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


def probe_format(filename: str, first_bytes: bytes, signatures: Mapping[str, Signature]) -> str:
    """Name the format that both the file's extension and its first bytes say.

    Raises:   RequestError: they do not agree; the caller's user has to specify the format.
    """
    claimed = [
        name for name, entry in signatures.items() if entry.probe is not None and entry.probe(first_bytes)
    ]
    extension = PurePath(filename).suffix.lower()
    for name, entry in signatures.items():
        if entry.extension == extension and claimed == ([name] if entry.probe is not None else []):
            return name
    content = f"looks like {claimed[0]}" if claimed else "is of no format with a signature"
    raise RequestError(
        f"Could not tell the format of '{filename}': its content {content}, and its name does not confirm "
        f"that; specify the format ({', '.join(signatures)})"
    )

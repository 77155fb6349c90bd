"""Backing files by name: finding the one a client means, and naming one so that it is found again."""

from collections.abc import Iterator
from itertools import pairwise

from blockd.block.chain import chain
from blockd.block.node import BlockNode, OverlayNode
from blockd.drivers.sharing import file_of
from blockd.errors import RequestError, printable
from blockd.filenames import absolute, basename, beside, plain, recordable, without_protocol
from blockd.formats.raw.part import RawPart
from blockd.protocols.file_status import status_of_name


def name_for(base: BlockNode, active: OverlayNode) -> str:
    """A name that leads to `base` from the folder of `active`: relative if the names in between are.

    Needs:    a thread, for it looks files up.
    Raises:   RequestError: no name leads there, or none that an image may record.
    """
    file = file_of(base)
    if isinstance(base, RawPart):
        raise RequestError(f"No image can record '{base.node_name}', a part of a file, as its backing file")
    for name in _names(base, active):
        if file is None or _leads_to(beside(active.filename, name), file.identity()):
            return recordable(name)
    raise RequestError(
        f"'{printable(base.filename)}' was moved: tell by which name '{printable(active.filename)}' is to "
        "record it (backing-file)"
    )


def _names(base: BlockNode, active: OverlayNode) -> Iterator[str]:
    """Names that may lead to `base`, the best first."""
    composed = _composed(base, active)
    if composed is not None and not composed.startswith("/"):
        yield plain(basename(base.filename))
        yield composed
    yield absolute(base.filename)


def _composed(base: BlockNode, active: OverlayNode) -> str | None:
    """What the images from `active` down to `base` record, put together; None: not all are paths."""
    name = ""
    for above, node in pairwise(chain(active)):
        if not isinstance(above, OverlayNode) or above.backing_filename is None:
            return None
        try:
            name = beside(name, without_protocol(above.backing_filename))
        except RequestError:
            return None
        if node is base:
            return name
    return None


def find_base(top: BlockNode, wanted: str) -> BlockNode:
    """Find a backing image of `top` by its file name, as recorded or leading to the same file, or node name.

    A relative name counts from the folder of the image that records it, or else from our own.

    Needs:    a thread, for it looks files up.
    Raises:   RequestError: there is none.
    """
    links = list(pairwise(chain(top)))
    for above, node in links:
        recorded = above.backing_filename if isinstance(above, OverlayNode) else None
        if wanted in (recorded, node.filename, node.node_name):
            return node
    for is_ours in (False, True):
        for above, node in links:
            path = wanted if is_ours else beside(above.filename, wanted)
            file = file_of(node)
            if file is not None and _leads_to(path, file.identity()):
                return node
    raise RequestError(f"Can't find '{printable(wanted)}' in the backing chain")


def _leads_to(path: str, identity: tuple[int, int]) -> bool:
    try:
        return status_of_name(path).identity == identity
    except (OSError, ValueError):
        return False

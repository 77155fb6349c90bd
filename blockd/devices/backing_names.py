"""Backing files by name: finding the one a client means, and naming one so that it is found again."""

import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from blockd.block.chain import chain
from blockd.block.node import BlockNode, OverlayNode
from blockd.errors import RequestError


def name_for(base: BlockNode, active: OverlayNode) -> str:
    """A name for `base` that leads there from the folder of `active`: relative if it was so and can be."""
    path = _absolute(base.filename)
    is_beside = path.parent == _absolute(active.filename).parent
    was_relative = active.backing_filename is not None and not Path(active.backing_filename).is_absolute()
    return path.name if is_beside and was_relative else str(path)


def _absolute(filename: str) -> Path:
    """The same path from the root on; symbolic links stay, as they do when a backing file is looked for."""
    return Path(os.path.normpath(Path(filename).absolute()))


def find_base(top: BlockNode, wanted: str) -> BlockNode:
    """Find a backing image of `top` by its file name, as recorded or leading to the same file, or node name.

    Needs:    a thread, for it looks files up.
    Raises:   RequestError: there is none.
    """
    names = _recorded_names(top)
    for node, recorded in names:
        if wanted in (recorded, node.filename, node.node_name):
            return node
    for node, _ in names:
        if any(_is_same_file(path, node.filename) for path in _paths(wanted, top)):
            return node
    raise RequestError(f"Can't find '{wanted}' in the backing chain")


def _recorded_names(top: BlockNode) -> list[tuple[BlockNode, str | None]]:
    """Every image below `top`, with its file name as recorded in the image above it."""
    return [
        (node, above.backing_filename if isinstance(above, OverlayNode) else None)
        for above, node in pairwise(chain(top))
    ]


def _paths(wanted: str, top: BlockNode) -> Iterator[Path]:
    """A relative name may count from our folder or from the image's."""
    yield Path(wanted)
    yield Path(top.filename).parent / wanted


def _is_same_file(path: Path, other: str) -> bool:
    try:
        return path.samefile(other)
    except (OSError, ValueError):
        return False

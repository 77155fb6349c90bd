"""Opening image files as the daemon does, for as long as a command works on them."""

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from blockd.block.image_paths import ImagePaths
from blockd.block.node import BlockNode, FilterNode
from blockd.block.probe import PROBE_LENGTH, probe_format
from blockd.drivers import FORMATS, NodeGraph
from blockd.drivers.opening import Format
from blockd.errors import RequestError, printable
from blockd.filenames import given_path
from blockd.protocols.file import FileNode


def format_entry(name: str) -> Format:
    """The row of a format.

    Raises:   RequestError: there is none of this name.
    """
    if name not in FORMATS:
        raise RequestError(f"Unknown file format '{printable(name)}'; there are {', '.join(FORMATS)}")
    return FORMATS[name]


@asynccontextmanager
async def opened_image(
    filename: str,
    image_format: str | None,
    image_paths: Iterable[str],
    *,
    has_backing: bool = True,
    backing_format: str | None = None,
) -> AsyncIterator[tuple[BlockNode, NodeGraph]]:
    """Open an image read-only, and unless told otherwise its backing chain; with it the graph it is in.

    Raises:   RequestError, ImageError, StorageError: an image cannot be opened.
    """
    if backing_format is not None:
        format_entry(backing_format)
    graph = NodeGraph(ImagePaths(image_paths))
    try:
        image = await graph.open_image(
            filename, image_format, read_only=True, has_backing=has_backing, backing_format=backing_format
        )
        if isinstance(image, FilterNode):
            raise RequestError(f"'{filename}' names a filter; give the image file itself")
        yield image, graph
    finally:
        await graph.close()


@asynccontextmanager
async def opened_file(
    filename: str, image_format: str | None, *, read_only: bool
) -> AsyncIterator[tuple[FileNode, str]]:
    """Open the file of an image, as it is; with it the format it has.

    Raises:   RequestError: it cannot be opened, or its format cannot be told.
    """
    filename = given_path(filename)
    file = await FileNode.open(filename, node_name="file", read_only=read_only)
    try:
        if image_format is None:
            first_bytes = bytes(await file.read(0, PROBE_LENGTH))
            signatures = {name: entry.signature for name, entry in FORMATS.items()}
            image_format = probe_format(filename, first_bytes, signatures)
        format_entry(image_format)
        yield file, image_format
    finally:
        await file.close()

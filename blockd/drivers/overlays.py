"""Which image may be put on top of another: one that records it as its backing file."""

import errno
import os

from blockd.aio import in_thread
from blockd.block.chain import format_of
from blockd.block.image_paths import ImagePaths
from blockd.block.node import BlockNode, OverlayNode
from blockd.drivers.sharing import file_of, folder_of
from blockd.errors import RequestError
from blockd.filenames import recorded_image
from blockd.formats.raw.part import RawPart
from blockd.protocols.file_status import status_of_open


async def checked_overlay(paths: ImagePaths, image: BlockNode, active: BlockNode) -> OverlayNode:
    """The same image, if it records `active` as its backing file.

    Raises:   RequestError: it does not, or is smaller.
    """
    if not isinstance(image, OverlayNode) or not image.backing_filename:
        raise RequestError(
            f"'{image.filename}' has no backing file; it must be an overlay of '{active.filename}'"
        )
    backing, identity = await in_thread(_find_recorded, paths, image, image.backing_filename)
    file = file_of(active)
    if file is None or identity != file.identity():
        raise RequestError(
            f"The backing file of '{image.filename}' is '{backing}', not the active image '{active.filename}'"
        )
    if isinstance(active, RawPart):
        raise RequestError(f"No image can record '{active.node_name}', a part of a file, as its backing file")
    recorded_format = image.backing_format or recorded_image(image.backing_filename).format_name
    if recorded_format not in (None, format_of(active)):
        raise RequestError(
            f"'{image.filename}' records the format '{recorded_format}' for its backing file "
            f"'{active.filename}', which is '{format_of(active)}'"
        )
    if image.size < active.size:
        raise RequestError(
            f"'{image.filename}' has {image.size} bytes, fewer than the {active.size} of '{active.filename}'"
        )
    return image


def _find_recorded(paths: ImagePaths, image: BlockNode, name: str) -> tuple[str, tuple[int, int]]:
    """Name and identity of the backing file of `image`, which need not be one that may be opened."""
    try:
        with paths.find(recorded_image(name).filename, folder_of(image)) as found:
            return found.filename, status_of_open(found.fd).identity
    except OSError as error:
        where = f"Could not open backing file of '{image.filename}'"
        raise RequestError(f"{where}: {os.strerror(error.errno or errno.EIO)}") from error
    except RequestError as error:
        raise RequestError(f"Could not open backing file of '{image.filename}': {error.message}") from error

"""add-cow images as nodes: the add-cow file, and the image that it names beside itself.

The image is a node of its own, of the driver `raw`: when everything is in it, the disk goes on there.
"""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import PurePath

from blockd.aio import in_thread
from blockd.block.image_paths import ImagePaths
from blockd.block.node import BlockNode, ProtocolNode
from blockd.drivers.opening import Opening, Wanted
from blockd.drivers.sharing import files_of, folder_of
from blockd.errors import BlockdError, RequestError, printable
from blockd.filenames import basename, beside, plain, recordable
from blockd.formats.add_cow import check as checking
from blockd.formats.add_cow.create import CLUSTER_SIZE_DEFAULT, create
from blockd.formats.add_cow.image import AddCowImage, read_header
from blockd.formats.check_report import CheckReport
from blockd.formats.raw.create import create as create_raw
from blockd.formats.raw.image import RawImage
from blockd.protocols.file import FileNode
from blockd.protocols.image_lock import LockMode
from blockd.protocols.new_file import NewFile, new_file
from blockd.protocols.opening import Find


async def open_add_cow(opening: Opening, wanted: Wanted) -> AddCowImage:
    """Open an add-cow file and its image, not the backing."""
    file = await opening.file(wanted)
    read_only = wanted.read_only or file.read_only
    overlay = await AddCowImage.open(file, node_name=wanted.node_name, read_only=read_only)
    if "image" in wanted.options:
        await _attach_given(opening, wanted, overlay)
    else:
        await opening.attach_recorded_image(overlay, wanted.lock_mode)
    return opening.add(overlay)


async def _attach_given(opening: Opening, wanted: Wanted, overlay: AddCowImage) -> None:
    image = await opening.child(wanted, "image", read_only=overlay.read_only)
    if not isinstance(image, RawImage):
        raise RequestError(
            f"The 'add-cow' driver needs a raw node as its image, and '{image.node_name}' is of driver "
            f"'{image.driver}'"
        )
    await opening.check_file(image, wanted.node_name, "image", is_writable=not overlay.read_only)
    if image.read_only and not overlay.read_only:
        raise RequestError(f"The image '{image.node_name}' of '{wanted.node_name}' is read-only")
    identities = [file.identity() for node in (overlay, image) for file in files_of(node)]
    if len(identities) > len(set(identities)):
        raise RequestError(f"'{overlay.filename}' cannot be the add-cow file of itself")
    overlay.attach(image)


# -- images by file name ------------------------------------------------------------------------


async def attach_recorded(
    opening: Opening, overlay: BlockNode, lock_mode: LockMode, above: Sequence[BlockNode]
) -> None:
    """Open the image that an add-cow file records, and attach it."""
    assert isinstance(overlay, AddCowImage), "of this format"
    await opening.attach_recorded_image(overlay, lock_mode, above)


async def open_alone(file: ProtocolNode, node_name: str, read_only: bool) -> BlockNode:
    """Open the add-cow file; its image is attached by `attach_recorded`."""
    return await AddCowImage.open(file, node_name=node_name, read_only=read_only)


async def create_add_cow(
    file: ProtocolNode,
    size: int,
    *,
    image_file: str | None = None,
    backing_filename: str | None = None,
    backing_format: str | None = None,
    cluster_size: int = CLUSTER_SIZE_DEFAULT,
) -> None:
    """Make an add-cow file, and its image unless there is one; a name counts from the folder of the file.

    Without a name the image is made beside the file, with the extension ``.raw``.

    Raises:   RequestError: the image is of another size, or something else cannot be.
    Fails to: no image was made, and the file is no add-cow file.
    """
    name = _image_name(file.filename, image_file)
    path = beside(file.filename, name)

    async def make() -> None:
        await create(
            file,
            size,
            image_filename=name,
            backing_filename=backing_filename,
            backing_format=backing_format,
            cluster_size=cluster_size,
        )

    if image_file is not None and await in_thread(os.path.exists, path):
        await _check_size(path, size)
        await make()
        return
    async with new_file(path) as image:
        await create_raw(image, size)
        await make()
        if isinstance(file, NewFile):
            file.beside += await in_thread(image.made_blocking)


def _image_name(filename: str, told: object) -> str:
    """As it is recorded: a name that is not told is that of the add-cow file, ending in ``.raw``."""
    name = plain(PurePath(basename(filename)).with_suffix(".raw").name) if told is None else str(told)
    return recordable(name, "image file")


async def _check_size(path: str, wanted: int) -> None:
    found = await _size_of(path)
    if found != wanted:
        raise RequestError(f"The image '{path}' has {found} bytes, and the disk is to have {wanted}")


async def _size_of(found: str | Find) -> int:
    file = await FileNode.open(found, node_name="#image", read_only=True)
    try:
        return (await RawImage.open(file, node_name="#raw", read_only=True)).size
    finally:
        await file.close()


async def check_add_cow(file: ProtocolNode) -> CheckReport:
    """Check an add-cow file against the image that it names."""
    header = await read_header(file)
    try:
        size = await _size_of(partial(ImagePaths().find, header.image.text, folder_of(file), "image file"))
    except BlockdError as error:
        message = f"Could not open the image file of '{file.filename}': {error.message}"
        raise RequestError(printable(message), kind=error.kind) from error
    return await checking.check(file, size)


def info(node: BlockNode) -> Mapping[str, object]:
    """What only add-cow images have, as a member of QEMU's ImageInfo."""
    assert isinstance(node, AddCowImage), "of this format"
    data = {"image-file": node.image.filename, "all-allocated": node.is_complete}
    return {"format-specific": {"type": node.driver, "data": data}}

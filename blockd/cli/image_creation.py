"""Making an image from the shell, for those who have no qemu-img."""

from pathlib import Path

from blockd.drivers import FORMATS
from blockd.errors import RequestError
from blockd.formats.qcow2.create import create as create_qcow2
from blockd.formats.raw.create import create as create_raw
from blockd.protocols.file import FileNode
from blockd.protocols.new_file import new_file


async def create_image(
    filename: str, size: int | None, image_format: str, backing: str | None, backing_format: str | None
) -> int:
    """Make an image, as large as its backing file if no size is given; returns its size.

    Raises:   RequestError: it cannot be made so, or the file exists. StorageError: the disk failed.
    Fails to: there is no such file.
    """
    if (backing is None) != (backing_format is None):
        raise RequestError("A backing file and its format are given together: -b FILE -F FORMAT")
    if size is None:
        if backing is None or backing_format is None:
            raise RequestError("Give the size, such as 10G, or a backing file to take it from")
        size = await _size_of(str(Path(filename).parent / backing), backing_format)
    create = create_qcow2 if image_format == "qcow2" else create_raw
    async with new_file(filename) as file:
        await create(file, size, backing_filename=backing, backing_format=backing_format)
    return size


async def _size_of(path: str, image_format: str) -> int:
    file = await FileNode.open(path, node_name="file", read_only=True)
    try:
        image = await FORMATS[image_format].open(file, "image", True)
        await image.close()
        return image.size
    finally:
        await file.close()

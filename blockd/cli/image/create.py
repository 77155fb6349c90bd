"""`blockctl image create`: an empty image, or an overlay of another one, with qemu-img's options."""

from collections.abc import Sequence
from pathlib import Path

from blockd.block.image_paths import printable
from blockd.block.options import Field, Fields, Options, check_fields, size, text
from blockd.cli.keyval import parse_keyval
from blockd.drivers import FORMATS
from blockd.drivers.opening import Format
from blockd.errors import RequestError
from blockd.protocols.file import FileNode
from blockd.protocols.new_file import new_file

# What may be given after -o as well as by options and arguments of its own, for every format.
_EVERY_FORMAT: Fields = {"size": Field(size), "backing_file": Field(text), "backing_fmt": Field(text)}


def parse_create_options(image_format: str, texts: Sequence[str]) -> Options:
    """Read ``-o key=value,…``, given any number of times, by what the format can be told.

    Raises:   RequestError: no such format, no such option, or a value that cannot be.
    """
    fields = {**_EVERY_FORMAT, **format_entry(image_format).create_options}
    told: Options = {}
    for words in texts:
        told.update(parse_keyval(words))
    for name in told:
        if name not in fields:
            raise RequestError(
                f"Invalid option '{printable(name)}' for the format '{image_format}', which can be told: "
                f"{', '.join(sorted(fields))}"
            )
    return check_fields(told, fields, is_text=True)


def format_entry(name: str) -> Format:
    """The row of a format.

    Raises:   RequestError: there is none of this name.
    """
    if name not in FORMATS:
        raise RequestError(f"Unknown file format '{printable(name)}'; there are {', '.join(FORMATS)}")
    return FORMATS[name]


async def create_image(
    filename: str,
    size: int | None,
    image_format: str,
    *,
    backing: str | None,
    backing_format: str | None,
    options: Options | None = None,
) -> int:
    """Make an image, as large as its backing file if no size is given; returns its size.

    Raises:   RequestError: it cannot be made so, or the file exists. StorageError: the disk failed.
    Fails to: there is no such file.
    """
    entry = format_entry(image_format)
    if (backing is None) != (backing_format is None):
        raise RequestError("A backing file and its format are given together: -b FILE -F FORMAT")
    if size is None:
        if backing is None or backing_format is None:
            raise RequestError("Give the size, such as 10G, or a backing file to take it from")
        size = await _size_of(str(Path(filename).parent / backing), backing_format)
    async with new_file(filename) as file:
        await entry.create(
            file, size, backing_filename=backing, backing_format=backing_format, **(options or {})
        )
    return size


async def _size_of(path: str, image_format: str) -> int:
    entry = format_entry(image_format)
    file = await FileNode.open(path, node_name="file", read_only=True)
    try:
        image = await entry.open(file, "image", True)
        await image.close()
        return image.size
    finally:
        await file.close()

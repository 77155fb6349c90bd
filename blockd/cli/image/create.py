"""`blockctl image create`: an empty image, or an overlay of another one, with qemu-img's options."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from blockd.block.options import Field, Fields, check_fields, text
from blockd.block.options import size as check_size
from blockd.cli.keyval import parse_keyval
from blockd.drivers import FORMATS, NodeGraph
from blockd.drivers.opening import Format
from blockd.errors import RequestError, printable
from blockd.protocols.image_lock import LockMode
from blockd.protocols.new_file import new_file

# What may be given after -o as well as by options and arguments of its own, for every format.
_EVERY_FORMAT: Fields = {
    "size": Field(check_size),
    "backing_file": Field(text),
    "backing_fmt": Field(text),
}


class NewImage(NamedTuple):
    """What an image is to be like; without a size it is as large as its backing file."""

    image_format: str
    size: int | None = None
    backing: str | None = None
    backing_format: str | None = None
    # What only its format can be told, as arguments of `Format.create`.
    options: Mapping[str, object] = {}

    def told(self, texts: Sequence[str]) -> "NewImage":
        """What `texts` (``key=value,…``) say is added; what was said before stays.

        Raises:   RequestError: no such format, no such option, or a value that cannot be.
        """
        fields = {**_EVERY_FORMAT, **format_entry(self.image_format).create_options}
        words = {name: value for part in texts for name, value in parse_keyval(part).items()}
        for name in words:
            if name not in fields:
                raise RequestError(
                    f"Invalid option '{printable(name)}' for the format '{self.image_format}', which can be "
                    f"told: {', '.join(sorted(fields))}"
                )
        told = check_fields(words, fields, is_text=True)
        size, backing, backing_format = (told.pop(name, None) for name in _EVERY_FORMAT)
        assert isinstance(size, int | None)
        assert isinstance(backing, str | None)
        assert isinstance(backing_format, str | None)
        return self._replace(
            size=size if self.size is None else self.size,
            backing=backing if self.backing is None else self.backing,
            backing_format=backing_format if self.backing_format is None else self.backing_format,
            options={**told, **self.options},
        )


def format_entry(name: str) -> Format:
    """The row of a format.

    Raises:   RequestError: there is none of this name.
    """
    if name not in FORMATS:
        raise RequestError(f"Unknown file format '{printable(name)}'; there are {', '.join(FORMATS)}")
    return FORMATS[name]


async def create_image(filename: str, image: NewImage) -> int:
    """Make an image; returns its size.

    Raises:   RequestError: it cannot be made so, or the file exists. StorageError: the disk failed.
    Fails to: there is no such file.
    """
    entry = format_entry(image.image_format)
    size, backing, backing_format = image.size, image.backing, image.backing_format
    if (backing is None) != (backing_format is None):
        raise RequestError("A backing file and its format are given together: -b FILE -F FORMAT")
    if size is None:
        if backing is None or backing_format is None:
            raise RequestError("Give the size, such as 10G, or a backing file to take it from")
        size = await _size_of(str(Path(filename).parent / backing), backing_format)
    async with new_file(filename) as file:
        await entry.create(
            file, size, backing_filename=backing, backing_format=backing_format, **image.options
        )
    return size


async def _size_of(path: str, image_format: str) -> int:
    graph = NodeGraph()
    try:
        # It may well be in use: that is when overlays are made. Its size stays.
        image = await graph.open_image(
            path, image_format, read_only=True, has_backing=False, lock_mode=LockMode.FORCE_SHARE
        )
        return image.size
    finally:
        await graph.close()

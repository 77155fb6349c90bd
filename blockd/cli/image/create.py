"""`blockctl image create`: an empty image, or an overlay of another one, with qemu-img's options."""

import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import PurePath
from typing import NamedTuple

from blockd.aio import in_thread
from blockd.block.node import BlockNode
from blockd.block.options import Field, Fields, check_fields, text
from blockd.block.options import size as check_size
from blockd.block.probe import PROBE_LENGTH
from blockd.cli.image.opening import format_entry
from blockd.cli.keyval import parse_keyval
from blockd.drivers import FORMATS, NodeGraph
from blockd.errors import RequestError, printable
from blockd.filenames import absolute, beside, given_path, recordable
from blockd.protocols.image_lock import LockMode
from blockd.protocols.new_file import MadeFile, new_file

# What may be given after -o as well as by options and arguments of its own, for every format.
_EVERY_FORMAT: Fields = {
    "size": Field(check_size),
    "backing_file": Field(text),
    "backing_fmt": Field(text),
}


DEFAULT_FORMAT = "qcow2"
# Extensions of formats that only other programs make.
_OTHERS = (".vmdk", ".vdi", ".vhdx", ".vhd", ".vpc")


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


def chosen_format(filename: str, given: str | None, option: str) -> str:
    """The format of a new image: what `option` has given, or qcow2 unless its name says another one.

    Whoever leaves the option out and names a file `x.raw` would get a file that is not what its name says.

    Raises:   RequestError: the name says another one.
    """
    suffix = PurePath(filename).suffix.lower()
    named = [name for name, entry in FORMATS.items() if entry.signature.extension == suffix]
    if given is not None:
        return given
    if named == [DEFAULT_FORMAT] or (not named and suffix not in _OTHERS):
        return DEFAULT_FORMAT
    choice = "".join(f"{option} {name}, or " for name in named) + f"{option} {DEFAULT_FORMAT}"
    unknown = "" if named else f"; blockd makes no {suffix[1:]} images"
    raise RequestError(
        f"'{filename}' is not named like a {DEFAULT_FORMAT} image, which it would be: say {choice}{unknown}"
    )


async def create_image(filename: str, image: NewImage) -> int:
    """Make an image; returns its size.

    Raises, Fails to: as `make_image`.
    """
    size, made = await make_image(filename, image)
    for file in made:
        await in_thread(file.close)
    return size


async def make_image(filename: str, image: NewImage) -> tuple[int, list[MadeFile]]:
    """Make an image; returns its size and the files, that of its name first. The caller closes them.

    Raises:   RequestError: it cannot be made so, or the file exists. StorageError: the disk failed.
    Fails to: there is no such file.
    """
    entry = format_entry(image.image_format)
    filename = given_path(filename)
    if image.backing is not None:
        image = image._replace(backing=recordable(image.backing))
    size, backing, backing_format = image.size, image.backing, image.backing_format
    if (backing is None) != (backing_format is None):
        raise RequestError("A backing file and its format are given together: -b FILE -F FORMAT")
    if backing is not None and backing_format is not None and (size is None or entry.has_backing):
        backing_size = await _size_of_backing(filename, backing, backing_format)
        size = backing_size if size is None else size
    if size is None:
        raise RequestError("Give the size, such as 10G, or a backing file to take it from")
    made: list[MadeFile] = []
    try:
        async with new_file(filename) as file:
            await entry.create(
                file, size, backing_filename=backing, backing_format=backing_format, **image.options
            )
            made = await in_thread(file.made_blocking)
    except BaseException:
        for each in made:
            each.remove()
            each.close()
        raise
    return size, made


async def _size_of_backing(filename: str, backing: str, backing_format: str) -> int:
    """The size of the backing file of a new image.

    Raises:   RequestError, StorageError: it is not there, or cannot be opened.
    """
    path = beside(filename, backing)
    try:
        return await _size_of(path, backing_format)
    except RequestError as error:
        if not await in_thread(os.path.exists, path) and await in_thread(os.path.exists, backing):
            raise RequestError(
                f"{error.message}; the name of a backing file counts from the folder of the new image: "
                f"-b {await in_thread(absolute, backing)}"
            ) from error
        raise


async def format_taken_for_raw(filename: str, image: NewImage) -> str | None:
    """The format that name and content of the backing file of a new image say, if it is used as raw."""
    if image.backing is None or image.backing_format != "raw":
        return None
    path = beside(given_path(filename), recordable(image.backing))
    async with _opened(path, "raw") as backing:
        first_bytes = bytes(await backing.read(0, min(PROBE_LENGTH, backing.size)))
    for name, entry in FORMATS.items():
        extension, probe = entry.signature
        if probe is not None and PurePath(path).suffix.lower() == extension and probe(first_bytes):
            return name
    return None


async def _size_of(path: str, image_format: str) -> int:
    async with _opened(path, image_format) as image:
        return image.size


@asynccontextmanager
async def _opened(path: str, image_format: str) -> AsyncIterator[BlockNode]:
    """A backing file. It may well be in use: that is when overlays are made."""
    graph = NodeGraph()
    try:
        yield await graph.open_image(
            path, image_format, read_only=True, has_backing=False, lock_mode=LockMode.FORCE_SHARE
        )
    finally:
        await graph.close()

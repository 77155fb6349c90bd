"""Where names inside images may point to.

A backing file's name comes from the image, and so perhaps from a stranger: it is taken as a plain path,
and only when that leads into the image's own folder or to what the daemon's user has named.
"""

import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from blockd.errors import RequestError, printable

# Doors to whatever this process has open, or to the kernel itself.
_FORBIDDEN = ("/proc", "/sys", "/dev/fd", "/dev/stdin", "/dev/stdout", "/dev/stderr")
_PLAIN_PROTOCOL = "file"


def protocol_of(filename: str) -> str | None:
    """The protocol before the first colon, unless that colon is part of a path."""
    start, colon, _ = filename.partition(":")
    return start if colon and "/" not in start else None


def without_protocol(filename: str) -> str:
    """Take a file name of QEMU's kind as a path.

    Raises:   RequestError: it names another protocol than ``file:``.
    """
    protocol = protocol_of(filename)
    if protocol is None:
        return filename
    if protocol != _PLAIN_PROTOCOL:
        raise RequestError(f"Unknown protocol '{printable(protocol)}' (a file of that name is './NAME')")
    return filename.removeprefix(f"{_PLAIN_PROTOCOL}:")


def beside(filename: str, recorded: str) -> str:
    """Where a name that is recorded in an image leads; written as it is recorded."""
    folder, slash, _ = filename.rpartition("/")
    return recorded if recorded.startswith("/") else folder + slash + recorded


class ImagePaths:
    """The folders and files that names inside images may lead to, besides the image's own folder.

    Its methods follow symbolic links, so they block on the file system.
    """

    def __init__(self, folders: Iterable[str] = ()) -> None:
        self._folders = [_target(Path(folder)) for folder in folders]
        self._files: set[Path] = set()

    def allow_file(self, filename: str) -> None:
        """Let images name this file: the daemon's user did."""
        self._files.add(_target(Path(filename)))

    @property
    def allowed_files(self) -> list[str]:
        """The files that were allowed so far."""
        return sorted(map(str, self._files))

    def copy(self) -> "ImagePaths":
        """One that allows the same, until it is told more."""
        copied = ImagePaths()
        copied._folders, copied._files = list(self._folders), set(self._files)
        return copied

    def resolve(self, name: str, image: str, role: str = "backing file") -> str:
        """Find the path that `name`, recorded in the image file `image` as its `role`, stands for.

        Raises:   RequestError: the name is none that an image may have.
        """
        if any(unicodedata.category(letter) == "Cc" for letter in name):
            raise RequestError(f"'{image}' has control characters in its {role} name '{printable(name)}'")
        path = Path(image).parent / without_protocol(name)
        plain, target = Path(os.path.normpath(path.absolute())), _target(path)
        if any(found.is_relative_to(door) for found in (plain, target) for door in _FORBIDDEN):
            raise RequestError(f"'{image}' names '{name}' as its {role}, which is no image file")
        folders = (_target(Path(image).parent), *self._folders)
        if target not in self._files and not any(target.is_relative_to(folder) for folder in folders):
            raise RequestError(
                f"'{image}' names '{name}' as its {role}, which is outside the folder of the image; "
                f"allow it with --image-paths {target.parent}"
            )
        return str(path)


def _target(path: Path) -> Path:
    """Follow all symbolic links."""
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:
        raise RequestError(f"Could not open '{path}': Too many levels of symbolic links") from error

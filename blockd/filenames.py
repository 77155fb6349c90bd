"""File names as text: what they mean, how two are joined, and what an image may record.

A name that an image records counts from the folder of that image, as the image was named. The two are joined
as text and the kernel resolves the result. So `..` is never taken away here: behind a symbolic link it leads
to the parent of the link's target.

A name with a colon before its first slash names a protocol. A plain file of such a name is written `./NAME`.

Source:   QEMU 7.2's rules: the protocol prefix, `file:`, and how backing file names are made absolute.
"""

import errno
import json
import os
import unicodedata
from collections.abc import Iterator
from typing import NamedTuple

from blockd.errors import RequestError, printable

# What the formats allow: qcow2 and QED readers, QEMU's too, refuse longer names.
RECORDED_LENGTH_MAX = 1023

_PLAIN_PROTOCOL = "file"
_JSON_FORMATS = ("raw", "qcow2", "qed")

_WORKING_FOLDER_GONE = "the working folder was removed (absolute names work)"


# -- meaning ----------------------------------------------------------------------------------


def protocol_of(filename: str) -> str | None:
    """The protocol before the first colon, unless that colon is part of a path."""
    start, colon, _ = filename.partition(":")
    return start if colon and "/" not in start else None


def plain(path: str) -> str:
    """The name by which a path is given: with a `./` in front if a part of it looked like a protocol."""
    return path if protocol_of(path) is None else f"./{path}"


def without_protocol(filename: str) -> str:
    """Take a file name of QEMU's kind as a path, which stays the same if it is taken so again.

    Raises:   RequestError: it names another protocol than ``file:``.
    """
    protocol = protocol_of(filename)
    if protocol is None:
        return filename
    if protocol != _PLAIN_PROTOCOL:
        raise RequestError(f"Unknown protocol '{printable(protocol)}' (a file of that name is './NAME')")
    return plain(filename.removeprefix(f"{_PLAIN_PROTOCOL}:"))


def has_control_characters(name: str) -> bool:
    """Whether a name has characters that would garble a terminal or a log; NUL is one of them."""
    return any(unicodedata.category(letter) == "Cc" for letter in name)


def check_path(path: str) -> str:
    """Refuse what can be no file name at all.

    Raises:   RequestError: it is empty or has a NUL character.
    """
    if not path:
        raise RequestError("A file name is empty")
    if "\0" in path:
        raise RequestError(f"The file name '{printable(path)}' has a NUL character in it")
    return path


def check_filename(path: str) -> str:
    """Refuse a name of an image file that could not be kept everywhere: in another image, in a log.

    Raises:   RequestError: it is empty or has control characters.
    """
    check_path(path)
    if has_control_characters(path):
        raise RequestError(f"The file name '{printable(path)}' has control characters in it")
    return path


def given_path(filename: str) -> str:
    """The path that a client's file name stands for.

    Raises:   RequestError: it names a protocol, or is refused by `check_filename`.
    """
    return check_filename(without_protocol(filename))


# -- joining ----------------------------------------------------------------------------------


def folder_of(filename: str) -> str:
    """What stands before the last component, its slash included; nothing if there is no folder."""
    folder, slash, _ = filename.rpartition("/")
    return folder + slash


def basename(filename: str) -> str:
    """The last component."""
    return filename.rpartition("/")[2]


def beside(image: str, path: str) -> str:
    """Where a path leads that counts from the folder of `image`; written as it is."""
    return path if path.startswith("/") else folder_of(image) + path


def full_name(image: str, recorded: str) -> str:
    """A recorded name from where we are; one with another protocol stays as it is."""
    if protocol_of(recorded) not in (None, _PLAIN_PROTOCOL):
        return recorded
    return beside(image, without_protocol(recorded))


def absolute(path: str) -> str:
    """The same path from the root on, to be used from another working folder.

    Raises:   RequestError: it is relative, and the working folder does not exist any more.
    """
    if path.startswith("/"):
        return path
    try:
        return os.path.join(os.getcwd(), path)  # noqa: PTH109, PTH118  (pathlib drops './')
    except OSError as error:
        raise RequestError(f"Could not find '{printable(path)}': {_WORKING_FOLDER_GONE}") from error


def why_not(path: str, error: OSError) -> str:
    """What the system's error means for a name that counts from the working folder, as others may not."""
    if error.errno == errno.ENOENT and not path.startswith("/"):
        try:
            os.getcwd()  # noqa: PTH109
        except OSError:
            return _WORKING_FOLDER_GONE
    return os.strerror(error.errno or errno.EIO)


def real_path(path: str) -> str:
    """The path without symbolic links and `..`, as the file system resolves them at the moment.

    Raises:   RequestError: it cannot be resolved.
    """
    try:
        return os.path.realpath(absolute(check_path(path)))  # links first, `..` after them
    except OSError as error:
        raise RequestError(f"Could not open '{printable(path)}': {error.strerror}") from error


# -- in images --------------------------------------------------------------------------------


def recordable(filename: str, role: str = "backing file") -> str:
    """The name that an image records for what a client calls `filename`: this image's `role`.

    Every reader takes it for the same path, here and in QEMU, wherever that runs.

    Raises:   RequestError: readers would refuse it, or take it for something else than a file.
    """
    path = without_protocol(filename)
    if not path or basename(path) in ("", ".", ".."):
        raise RequestError(f"The {role} name '{printable(path)}' names no file")
    if has_control_characters(path):
        raise RequestError(f"The {role} name '{printable(path)}' has control characters in it")
    if (length := len(os.fsencode(path))) > RECORDED_LENGTH_MAX:
        raise RequestError(f"The {role} name is {length} bytes long, more than {RECORDED_LENGTH_MAX}")
    return path


class RecordedImage(NamedTuple):
    """What the name of a backing file stands for."""

    filename: str
    # None: the name does not tell.
    format_name: str | None


def recorded_image(name: str) -> RecordedImage:
    """Take a recorded name apart, which may be ``json:`` with a format and a file and nothing else.

    Raises:   RequestError: it is ``json:`` and says anything else; or a file name that there cannot be.
    """
    if protocol_of(name) != "json":
        return RecordedImage(name, None)
    try:
        told = json.loads(name.removeprefix("json:"), object_pairs_hook=_members)
        options = _members([*_flat(told)])
        format_name, path = options.pop("driver"), options.pop("file.filename")
        is_file = options.pop("file.driver", _PLAIN_PROTOCOL) == _PLAIN_PROTOCOL
        os.fsencode(str(path))
    except (ValueError, KeyError, RecursionError):
        is_file = False
    if not is_file or options or format_name not in _JSON_FORMATS or not isinstance(path, str):
        raise RequestError(
            "Its 'json:' name is not understood: such a name may say "
            f"driver ({', '.join(_JSON_FORMATS)}), file.driver ({_PLAIN_PROTOCOL}) and file.filename only"
        )
    return RecordedImage(plain(check_filename(path)), str(format_name))


def _members(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise ValueError("a member stands there twice")
    return members


def _flat(told: object) -> Iterator[tuple[str, object]]:
    """The members of an object, and those of the objects in it by dotted names."""
    if not isinstance(told, dict):
        raise ValueError("no object")
    for name, value in told.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{inner}", member) for inner, member in value.items())
        else:
            yield name, value


def pack_recorded(name: str, role: str = "backing file") -> bytes:
    """The bytes of a name in an image.

    Raises:   RequestError: it is not as `recordable` makes names.
    """
    if recordable(name, role) != name:
        raise RequestError(f"The {role} name '{printable(name)}' names a protocol")
    return name.encode("utf-8", "surrogateescape")


def parse_recorded(data: bytes) -> str:
    """The name that stands in an image, whatever it is."""
    return data.decode("utf-8", "surrogateescape")

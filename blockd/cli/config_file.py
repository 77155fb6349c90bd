"""A TOML file as a part of the command line: ``--config disks.toml``.

Its keys are the names of the options, a table is what an option takes as JSON, and an array of tables is an
option given several times:

    state-dir = "/var/lib/blockd"           --state-dir /var/lib/blockd
    [[device]]                              --device '{"name": "vda", "filename": "disk.qcow2"}'
    name = "vda"
    filename = "disk.qcow2"

TOML puts tables together by name, so their order is not that of the file but one in which what is named
stands before what names it (`_ORDER`). What is wrong is told with the file and the line.

Raises:   RequestError, from everything in here: "FILE:LINE: what is wrong"; nothing happened.
"""

import json
import pathlib
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from blockd.cli.config_lines import ConfigLines, Path
from blockd.cli.suggestions import did_you_mean, instead, members_of, not_yet
from blockd.config import Given, Option
from blockd.errors import RequestError
from blockd.units import MIB

# Thousands of disks need less.
CONFIG_LENGTH_MAX = 4 * MIB

# Options that are tables, in the order in which they are done; those with a plain value are among them.
_ORDER = ("object", "blockdev", "nbd-server", "nbd", "device", "export", "chardev", "monitor", "qmp", "http")
_TABLES = ("object", "blockdev", "nbd-server", "device", "export", "chardev", "monitor")
_ONCE = ("pidfile", "state-dir", "state-restore")
_NUMBERS = ("guest-latency", "nbd-poll")
_KNOWN = (*_ORDER, *_ONCE, *_NUMBERS, "image-paths", "daemonize")

# What errors call the member they are about, in QEMU's words.
_ABOUT = re.compile(r"(?:Parameter|parameter type for) '([^']+)'")
_STEP = re.compile(r"[^.\[\]]+")

Handle = Callable[[str, str], Option]


class ConfigFile(NamedTuple):
    """What a file says; `places` tells where it says the things that can be said only once."""

    options: tuple[Given, ...]
    once: Mapping[str, str]
    places: Mapping[str, str]
    image_paths: tuple[str, ...]


def read_config(filename: str, handle: Handle) -> ConfigFile:
    """Read a file; `handle` makes an option of its name on the command line and its value."""
    return _Reader(filename, _load(filename), handle).read()


def _load(filename: str) -> str:
    try:
        with pathlib.Path(filename).open("rb") as file:
            data = file.read(CONFIG_LENGTH_MAX + 1)
    except OSError as error:
        raise RequestError(f"{filename}: Could not open: {error.strerror}") from error
    if len(data) > CONFIG_LENGTH_MAX:
        raise RequestError(f"{filename}: longer than {CONFIG_LENGTH_MAX // MIB} MiB: this is no config file")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RequestError(f"{filename}:{line}: not valid UTF-8") from error


class _Reader:
    """One file that is being read."""

    def __init__(self, filename: str, text: str, handle: Handle) -> None:
        self._filename = filename
        self._handle = handle
        try:
            self._document = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise _syntax_error(filename, text, str(error)) from error
        self._lines = ConfigLines(text)

    def read(self) -> ConfigFile:
        for name in self._document:
            if name not in _KNOWN:
                raise self._wrong((name,), f"unknown key '{name}'{did_you_mean(name, _KNOWN)}")
        options = [given for name in _ORDER if name in self._document for given in self._options(name)]
        once = {name: self._text((name,), self._document[name]) for name in _ONCE if name in self._document}
        once |= {name: self._number((name,)) for name in _NUMBERS if name in self._document}
        if self._flag("daemonize"):
            once["daemonize"] = ""
        places = {f"--{name}": self._place((name,)) for name in once}
        image_paths = tuple(self._texts("image-paths"))
        return ConfigFile(
            tuple(options), {f"--{name}": value for name, value in once.items()}, places, image_paths
        )

    def _options(self, name: str) -> Iterator[Given]:
        if name not in _TABLES:
            for value, path in self._values(name):
                yield self._given(name, self._text(path, value), path)
            return
        for table, path in self._values(name):
            if not isinstance(table, dict):
                raise self._wrong(path, f"'{name}' is a table: write [[{name}]]")
            yield self._given(name, self._json(table, path), path)

    def _values(self, name: str) -> Iterator[tuple[object, Path]]:
        """The value of a key, or each of them if it is a list."""
        value = self._document[name]
        if not isinstance(value, list):
            yield value, (name,)
            return
        for index, element in enumerate(value):
            yield element, (name, index)

    def _given(self, name: str, value: str, path: Path) -> Given:
        try:
            option = self._handle(f"--{name}", value)
            return Given(f"--{name} {value}", option, f"{self._place(path)}: {name}")
        except RequestError as error:
            raise self._about(error.message, name, path) from error

    def _about(self, message: str, name: str, path: Path) -> RequestError:
        """An error in a table, at the line of the member that it is about."""
        found = _ABOUT.search(message)
        if found is None:
            return self._wrong(path, message)
        steps = [int(step) if step.isdigit() else step for step in _STEP.findall(found[1])]
        if message.endswith("is missing") and (unknown := self._unknown(name, (*path, *steps[:-1]))):
            # Most likely that is what is missing, with a slip in it.
            steps = [*steps[:-1], unknown]
            message = f"unknown key '{unknown}' in {name}{instead(unknown, members_of(name))}"
        elif message.endswith("is unexpected"):
            meant = not_yet(found[1]) or instead(str(steps[-1]), members_of(name))
            message = f"unknown key '{found[1]}' in {name}{meant}"
        return self._wrong((*path, *steps), message)

    def _unknown(self, name: str, path: Path) -> str | None:
        """A key of a table, or of one in it, that none may have."""
        table: object = self._document
        for step in path:
            if isinstance(table, dict | list):
                table = table[step]  # type: ignore[index]
        known = {member.partition(".")[0] for member in members_of(name)}
        keys = table if isinstance(table, dict) else ()
        return next((key for key in keys if key not in known), None)

    # -- values -------------------------------------------------------------------------------

    def _text(self, path: Path, value: object) -> str:
        if not isinstance(value, str):
            raise self._wrong(path, f"'{path[0]}' has to be a string")
        return value

    def _texts(self, name: str) -> Iterator[str]:
        if name in self._document:
            for value, path in self._values(name):
                yield self._text(path, value)

    def _number(self, path: tuple[str]) -> str:
        value = self._document[path[0]]
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._wrong(path, f"'{path[0]}' has to be a whole number")
        return str(value)

    def _flag(self, name: str) -> bool:
        value = self._document.get(name, False)
        if not isinstance(value, bool):
            raise self._wrong((name,), f"'{name}' has to be true or false")
        return value

    def _json(self, table: dict[str, object], path: Path) -> str:
        try:
            return json.dumps(table, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise self._wrong(path, "dates and times, inf and nan mean nothing here") from error

    def _place(self, path: Path) -> str:
        return f"{self._filename}:{self._lines.find(path)}"

    def _wrong(self, path: Path, message: str) -> RequestError:
        return RequestError(f"{self._place(path)}: {message}")


def _syntax_error(filename: str, text: str, message: str) -> RequestError:
    """tomllib puts the place last, and calls the end of the file just that."""
    found = re.search(r" \(at (?:line (\d+), column \d+|end of document)\)$", message)
    line = found[1] if found and found[1] else str(len(text.splitlines()) or 1)
    return RequestError(f"{filename}:{line}: {message[: found.start()] if found else message}")

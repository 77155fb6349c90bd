"""Objects: what clients define beside nodes, by id; most of them for nodes and servers to use.

    throttle-group    limits that disks share; they can be changed at any time
    secret            bytes that are told to nobody
    tls-creds-x509    a folder with certificates
    iothread          accepted, so that QEMU's command lines work; there are no threads to choose from

Raises:   RequestError, from everything in here: what is wrong, in QEMU's words; nothing happened.
"""

import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from blockd.aio import in_thread
from blockd.block.options import Check, Field, Fields, Options, Place, choice, flag, integer, record, text
from blockd.errors import RequestError, printable
from blockd.filters.throttle_group import NO_LIMITS, ThrottleGroup

# The limits under names of their own, as the command line gives them.
LIMIT_PREFIX = "x-"

_IDENTIFIER = re.compile(r"[A-Za-z][A-Za-z0-9._-]*", re.ASCII)


def _optional(**checks: Check) -> dict[str, Field]:
    return {name.replace("_", "-"): Field(check) for name, check in checks.items()}


_LOADED: Fields = {"loaded": Field(flag, features=("deprecated",))}
LIMITS: Fields = {name: Field(integer) for name in NO_LIMITS}

# What each type may be told, besides qom-type and id.
OBJECT_TYPES: Mapping[str, Fields] = {
    "throttle-group": {
        "limits": Field(record(LIMITS)),
        **{LIMIT_PREFIX + name: Field(integer, features=("unstable",)) for name in NO_LIMITS},
    },
    "secret": {
        **_LOADED,
        **_optional(format=choice("raw", "base64"), data=text, file=text, keyid=text, iv=text),
    },
    "tls-creds-x509": {
        **_LOADED,
        **_optional(
            verify_peer=flag,
            dir=text,
            endpoint=choice("client", "server"),
            priority=text,
            sanity_check=flag,
            passwordid=text,
        ),
    },
    "iothread": _optional(
        poll_max_ns=integer,
        poll_grow=integer,
        poll_shrink=integer,
        aio_max_batch=integer,
        thread_pool_min=integer,
        thread_pool_max=integer,
    ),
}


def check_object(options: Mapping[str, object], *, is_text: bool) -> Options:
    """Check the options of an object; `is_text`: all values are strings still."""
    for name in ("qom-type", "id"):
        if name not in options:
            raise RequestError(f"Parameter '{name}' is missing")
    place = Place({}, is_text)
    object_type = text(options["qom-type"], place.member("qom-type"))
    if object_type not in OBJECT_TYPES:
        raise RequestError(f"Parameter 'qom-type' does not accept value '{object_type}'")
    if not _IDENTIFIER.fullmatch(text(options["id"], place.member("id"))):
        raise RequestError("Parameter 'id' expects an identifier")
    known: Fields = {"qom-type": Field(text), "id": Field(text), **OBJECT_TYPES[object_type]}
    checked = record(known)(dict(options), place)
    assert isinstance(checked, dict)
    return checked


class Object(NamedTuple):
    """One object; what it is made of is not kept, but for what others need."""

    type: str
    throttle_group: ThrottleGroup | None = None


class Objects:
    """All objects, by id."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._objects: dict[str, Object] = {}

    def __iter__(self) -> Iterator[tuple[str, Object]]:
        return iter(self._objects.items())

    def get(self, object_id: str) -> Object | None:
        return self._objects.get(object_id)

    def throttle_group(self, object_id: str) -> ThrottleGroup:
        """Find a throttle group."""
        found = self._objects.get(object_id)
        if found is None or found.throttle_group is None:
            raise RequestError(f"Throttle group '{object_id}' does not exist")
        return found.throttle_group

    async def add(self, options: Mapping[str, object]) -> None:
        """Add an object by its options, which are checked."""
        object_id, object_type = str(options["id"]), str(options["qom-type"])
        group = None
        if object_type == "throttle-group":
            group = ThrottleGroup(object_id, _limits(options), self._clock)
        elif object_type == "secret":
            await in_thread(_check_secret, options)
        elif object_type == "tls-creds-x509":
            await in_thread(_check_credentials, options)
        if object_id in self._objects:
            raise RequestError(
                f"attempt to add duplicate property '{object_id}' to object (type 'container')"
            )
        self._objects[object_id] = Object(object_type, group)

    def remove(self, object_id: str) -> None:
        """Remove an object that nobody uses."""
        found = self._objects.get(object_id)
        if found is None:
            raise RequestError(f"object '{object_id}' not found")
        if found.throttle_group is not None and found.throttle_group.members:
            raise RequestError(f"object '{object_id}' is in use, can not be deleted")
        del self._objects[object_id]


def _limits(options: Mapping[str, object]) -> dict[str, int]:
    """The limits of a throttle group; what `limits` says goes before a name of its own."""
    given = options.get("limits", {})
    assert isinstance(given, dict)
    own = {name: options[LIMIT_PREFIX + name] for name in NO_LIMITS if LIMIT_PREFIX + name in options}
    return {**own, **given}


def _check_secret(options: Mapping[str, object]) -> None:
    if "keyid" in options:
        raise RequestError(f"No secret with id '{options['keyid']}': encrypted secrets are not supported")
    if "data" in options and "file" in options:
        raise RequestError("'file' and 'data' are mutually exclusive")
    if "file" in options:
        _check_readable(str(options["file"]), "Unable to read {0}: Failed to open file “{1}”: {2}")
    elif "data" not in options:
        raise RequestError("Either 'file' or 'data' must be provided")


def _check_credentials(options: Mapping[str, object]) -> None:
    if "dir" not in options:
        raise RequestError("Missing 'dir' property value")
    needed = ["ca-cert.pem"]
    if options.get("endpoint", "client") == "server":
        needed += ["server-cert.pem", "server-key.pem"]
    for name in needed:
        _check_readable(f"{options['dir']}/{name}", "Unable to access credentials {0}: {2}")


def _check_readable(path: str, complaint: str) -> None:
    """Raise RequestError if `path` is not a file that can be read; `complaint` takes it twice, and why."""
    try:
        if stat.S_ISREG(Path(path).stat().st_mode):
            with Path(path).open("rb"):
                return
        reason = "not a regular file"
    except (OSError, ValueError) as error:
        reason = os.strerror(error.errno or 0) if isinstance(error, OSError) else "the name has a NUL"
    raise RequestError(complaint.format(printable(path), printable(path), reason))

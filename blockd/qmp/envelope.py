"""What goes around commands: the shape of requests, replies and the greeting, with QEMU's error texts."""

from typing import NamedTuple

from blockd import __version__
from blockd.errors import BlockdError, RequestError
from blockd.qmp.errors import error_object
from blockd.wire.qmp import Message, Value

# The version of qemu-storage-daemon whose answers ours are: clients branch on it.
QEMU_VERSION = (7, 2, 0)
PACKAGE = f"blockd {__version__}"
# In one request's arguments, containers included: checking them is work for one moment.
ARGUMENT_VALUES_MAX = 10_000


class Request(NamedTuple):
    """A well-formed request."""

    command: str
    arguments: dict[str, Value]
    out_of_band: bool


def version() -> dict[str, Value]:
    """Return what `query-version` and the greeting say, in the member order of QEMU."""
    major, minor, micro = QEMU_VERSION
    return {"qemu": {"micro": micro, "minor": minor, "major": major}, "package": PACKAGE}


def greeting() -> dict[str, Value]:
    """Return the first message of every session."""
    return {"QMP": {"version": version(), "capabilities": ["oob"]}}


def is_out_of_band(message: Message) -> bool:
    """Tell whether a message asks to overtake the queue, well-formed or not."""
    return isinstance(message, dict) and "exec-oob" in message and "execute" not in message


def parse_request(message: Message, *, oob_enabled: bool) -> Request:
    """Check the envelope of a message.

    Raises:   RequestError: it is no object, or a member is missing, unknown or of the wrong type.
    """
    if not isinstance(message, dict):
        raise RequestError("QMP input must be a JSON object")
    verb = _verb(message, oob_enabled)
    for name in message:
        if name not in (verb, "arguments", "id"):
            raise RequestError(f"QMP input member '{name}' is unexpected")
    arguments = message.get("arguments", {})
    if not isinstance(arguments, dict):
        raise RequestError("QMP input member 'arguments' must be an object")
    if _has_too_many_values(arguments):
        raise RequestError(f"QMP input member 'arguments' has more than {ARGUMENT_VALUES_MAX} values")
    if verb is None:
        raise RequestError("QMP input lacks member 'execute'")
    return Request(str(message[verb]), arguments, verb == "exec-oob")


def _has_too_many_values(arguments: dict[str, Value]) -> bool:
    count, containers = 0, [iter(arguments.values())]
    while containers:
        for value in containers.pop():
            count += 1
            if count > ARGUMENT_VALUES_MAX:
                return True
            if isinstance(value, dict | list):
                containers.append(iter(value.values() if isinstance(value, dict) else value))
    return False


def _verb(message: dict[str, Value], oob_enabled: bool) -> str | None:
    """Return the name of the one member that names the command."""
    possible = ("exec-oob", "execute") if oob_enabled else ("execute",)
    verbs = [name for name in possible if name in message]
    for name in verbs:
        if not isinstance(message[name], str):
            raise RequestError(f"QMP input member '{name}' must be a string")
    if len(verbs) == 2:
        raise RequestError("QMP input member 'execute' clashes with 'exec-oob'")
    return verbs[0] if verbs else None


def success_reply(message: Message, result: Value) -> dict[str, Value]:
    """Answer `message`, giving its id back."""
    return {"return": result, **_id_of(message)}


def error_reply(message: Message, error: BlockdError) -> dict[str, Value]:
    """Answer `message` with an error, giving its id back when it got far enough to have one."""
    return {**_id_of(message), "error": error_object(error)}


def _id_of(message: Message) -> dict[str, Value]:
    return {"id": message["id"]} if isinstance(message, dict) and "id" in message else {}

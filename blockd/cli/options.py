"""The command line as `Config`: one small handler an option, in the order given.

Names and syntax are qemu-storage-daemon's, so that the program's name is all that changes, plus a few
options of blockd's own for people.

Raises:   RequestError, from everything in here: "OPTION VALUE: what is wrong"; nothing happened.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import NamedTuple

from blockd.cli.keyval import Members, parse_flat, parse_json, parse_members
from blockd.cli.option_fields import (
    EXPORT,
    FILE_DEVICE,
    MONITOR,
    NBD_SERVER,
    NODE_DEVICE,
    SOCKET_CHARDEV,
    STDIO_CHARDEV,
    is_decimal,
    made,
    port_number,
    require_name,
)
from blockd.config import (
    Blockdev,
    Config,
    Export,
    FileDevice,
    Given,
    HttpServer,
    InetAddress,
    Monitor,
    NbdServer,
    NodeDevice,
    Object,
    Option,
    QmpSocket,
    SocketChardev,
    StdioChardev,
    UnixAddress,
)
from blockd.drivers import check_blockdev
from blockd.errors import RequestError
from blockd.objects import check_object

DEFAULT_QMP_PATH = "blockd.qmp"
DEFAULT_NBD_PATH = "blockd.nbd"
# Options whose value is a number of microseconds, and the most that each may be: a guest that waits for
# longer has given up, and who stays awake for longer never sleeps.
_MICROSECONDS = {"--guest-latency": 60_000_000, "--nbd-poll": 1_000}

# What --state-restore can be, and whether it is strict.
_STATE_RESTORE = {"partial": False, "strict": True}

_IDENTIFIER = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")
# Options of a socket chardev that only say how QEMU goes about it.
_WITHOUT_EFFECT = ("wait", "delay", "nodelay", "mux")


# How an empty value is shown.
EMPTY = "''"


class Action(Enum):
    """What the program is started for."""

    SERVE = "serve"
    CHECK = "check"
    HELP = "help"
    VERSION = "version"


class CommandLine(NamedTuple):
    """What the arguments say."""

    action: Action
    config: Config = Config(())
    is_background: bool = False


def parse_command_line(arguments: Sequence[str], inherited: Sequence[Given] = ()) -> CommandLine:
    """Read the arguments that follow the program's name.

    `inherited` are options for sockets that are open already; with any, no others are added.
    """
    for argument in arguments:
        if not _is_utf8(argument):
            raise RequestError(f"{argument}: not valid UTF-8")
    gathered = _Gathered([*inherited], {}, [])
    remaining = list(arguments)
    while remaining:
        name, value = _next_option(remaining)
        if name in _ACTIONS:
            return CommandLine(_ACTIONS[name])
        gathered.take(name, value)
    options, once, image_paths = gathered
    if "--state-restore" in once and "--state-dir" not in once:
        raise RequestError("--state-restore: nothing to restore without --state-dir DIR")
    all_options = tuple(options) if inherited else _with_defaults(options)
    config = Config(
        all_options,
        once.get("--pidfile"),
        tuple(image_paths),
        once.get("--state-dir"),
        is_restore_strict=_STATE_RESTORE[once.get("--state-restore", "partial")],
        guest_latency_us=_microseconds(once, "--guest-latency"),
        nbd_poll_us=_microseconds(once, "--nbd-poll"),
    )
    action = Action.CHECK if "--check-config" in once else Action.SERVE
    return CommandLine(action, config, is_background="--daemonize" in once)


def _microseconds(once: Mapping[str, str], name: str) -> int | None:
    return int(once[name]) if name in once else None


class _Gathered(NamedTuple):
    """What was read so far."""

    options: list[Given]
    once: dict[str, str]
    image_paths: list[str]

    def take(self, name: str, value: str) -> None:
        """Add one option."""
        if name in _ONCE:
            self._take_once(name, value)
        elif name == "--image-paths":
            self.image_paths.append(_named(name, value))
        elif name == "--config":
            self._take_file(_named(name, value))
        else:
            text = f"{name} {value or EMPTY}"
            self.options.append(Given(text, _handle(name, value, text)))

    def _take_once(self, name: str, value: str, place: str = "") -> None:
        if name in self.once:
            raise RequestError(f"{place and place + ': '}{name} option can only be given once")
        if name in _OF_FILES:
            _named(f"{place and place + ': '}{name}", value)
        limit_us = _MICROSECONDS.get(name)
        if limit_us is not None and not (is_decimal(value) and int(value) <= limit_us):
            raise RequestError(
                f"{place and place + ': '}{name} {value}: expected microseconds, 0 to {limit_us}"
            )
        if name == "--state-restore" and value not in _STATE_RESTORE:
            raise RequestError(f"{place and place + ': '}{name} {value}: expected partial or strict")
        self.once[name] = value

    def _take_file(self, filename: str) -> None:
        """Add what a config file says, as if it stood here."""
        from blockd.cli.config_file import read_config  # noqa: PLC0415  (most have none)

        said = read_config(filename, lambda name, value: _HANDLERS[name](value))
        for name, value in said.once.items():
            self._take_once(name, value, said.places[name])
        self.image_paths.extend(_named(f"{filename}: image-paths", path) for path in said.image_paths)
        self.options.extend(said.options)


def _named(option: str, value: str) -> str:
    """The name of a file, as an option's value."""
    try:
        require_name(value)
    except RequestError as error:
        raise RequestError(f"{option} {EMPTY}: {error.message}") from error
    return value


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _next_option(remaining: list[str]) -> tuple[str, str]:
    """Take an option and its value off the front."""
    name, equals, value = remaining.pop(0).partition("=")
    if not name.startswith("-"):
        raise RequestError(
            f"{name}{equals}{value}: Unexpected argument; a disk is given as --device NAME=FILE"
        )
    if name in _WITHOUT_VALUE:
        return name, ""
    if name not in _HANDLERS and name not in _WITH_VALUE:
        from blockd.cli.suggestions import did_you_mean  # noqa: PLC0415

        known = [known[2:] for known in (*_HANDLERS, *_WITH_VALUE, *_WITHOUT_VALUE)]
        meant = did_you_mean(name.lstrip("-"), known, "--")
        raise RequestError(f"unrecognized option '{name}'{meant or '; see --help'}")
    if equals:
        return name, value
    if not remaining:
        raise RequestError(f"option '{name}' requires an argument")
    return name, remaining.pop(0)


def _handle(name: str, value: str, argument: str) -> Option:
    try:
        return _HANDLERS[name](value)
    except RequestError as error:
        from blockd.cli.suggestions import explained  # noqa: PLC0415  (only where something is wrong)

        raise RequestError(f"{argument}: {explained(name, value, error.message)}") from error


def _with_defaults(options: list[Given]) -> tuple[Given, ...]:
    """Add the sockets that a device needs to be of use, where none are given."""
    given = [type(entry.option) for entry in options]
    first: list[Given] = []
    last: list[Given] = []
    if FileDevice in given and NbdServer not in given:
        server = NbdServer(addr=UnixAddress(path=DEFAULT_NBD_PATH))
        first.append(Given(f"--nbd {DEFAULT_NBD_PATH}", server))
    if (FileDevice in given or NodeDevice in given) and QmpSocket not in given and Monitor not in given:
        last.append(Given(f"--qmp {DEFAULT_QMP_PATH}", QmpSocket(path=DEFAULT_QMP_PATH)))
    return (*first, *options, *last)


# -- one handler an option --------------------------------------------------------------------


def _blockdev(value: str) -> Blockdev:
    members, is_text = parse_members(value, "driver")
    return Blockdev(options=check_blockdev(members, is_text=is_text))


def _chardev(value: str) -> SocketChardev | StdioChardev:
    members = parse_json(value) if value.startswith("{") else parse_flat(value, "backend")
    if "id" not in members:
        raise RequestError("chardev: no id specified")
    backend = members.pop("backend", None)
    if backend == "stdio":
        members = {name: member for name, member in members.items() if name not in ("mux", "signal")}
        option: SocketChardev | StdioChardev = made(StdioChardev, members, STDIO_CHARDEV)
    elif backend == "socket":
        option = _socket_chardev(members)
    else:
        raise RequestError(f"'{backend}' is not a valid char driver name (socket and stdio are)")
    _check_identifier(option.id)
    return option


def _socket_chardev(members: Members) -> SocketChardev:
    address: Members = {}
    for key, member in {"path": "path", "fd": "str", "host": "host", "port": "port"}.items():
        if key in members:
            address[member] = members.pop(key)
    kinds = {"path": "unix", "str": "fd", "host": "inet"}
    found = [kind for member, kind in kinds.items() if member in address]
    if len(found) != 1:
        raise RequestError("chardev: socket: one of 'path', 'fd', or 'host' and 'port' is required")
    if found == ["inet"] and "port" not in address:
        raise RequestError("chardev: socket: no port given")
    plain = {name: member for name, member in members.items() if name not in _WITHOUT_EFFECT}
    return made(SocketChardev, {**plain, "address": {"type": found[0], **address}}, SOCKET_CHARDEV)


def _monitor(value: str) -> Monitor:
    members, is_text = parse_members(value, "chardev")
    return made(Monitor, members, MONITOR, is_text=is_text)


def _nbd_server(value: str) -> NbdServer:
    members, is_text = parse_members(value)
    return made(NbdServer, members, NBD_SERVER, is_text=is_text)


def _export(value: str) -> Export:
    members, is_text = parse_members(value, "type")
    return made(Export, members, EXPORT, is_text=is_text)


def _object(value: str) -> Object:
    members, is_text = parse_members(value, "qom-type")
    return Object(options=check_object(members, is_text=is_text))


def _device(value: str) -> FileDevice | NodeDevice:
    if value.startswith("{"):
        return _device_of(parse_json(value))
    name, equals, _ = value.partition("=")
    if not equals:
        raise RequestError("expected NAME=FILE, such as vda=disk.qcow2, or id=NAME,node-name=NODE")
    members = parse_flat(value, "name")
    if "node-name" not in members:
        _check_identifier(name)
        filename = members.pop(name)
        members = {**members, "name": name, "filename": filename}
    return _device_of(members)


def _device_of(members: Members) -> FileDevice | NodeDevice:
    if "node-name" in members:
        on_node = made(NodeDevice, members, NODE_DEVICE)
        _check_identifier(on_node.id)
        return on_node
    on_file = made(FileDevice, members, FILE_DEVICE)
    _check_identifier(on_file.name)
    return on_file


def _qmp(value: str) -> QmpSocket:
    require_name(value)
    host, colon, port = value.rpartition(":")
    if colon and "/" not in host and port.isdecimal():
        raise RequestError(
            f"expected the path of a unix socket; for TCP, --chardev socket,id=I,host={host},port={port},"
            f"server=on --monitor I (a socket file of that name is ./{value})"
        )
    return QmpSocket(path=value)


def _nbd(value: str) -> NbdServer:
    return NbdServer(addr=_address(value))


def _http(value: str) -> HttpServer:
    return HttpServer(addr=_address(value))


def _address(value: str) -> UnixAddress | InetAddress:
    host, colon, port = value.rpartition(":")
    if "://" in value:
        raise RequestError("expected PATH or HOST:PORT, and this is a URL")
    if not host and (port if colon else value).isdecimal():
        raise RequestError(
            f"expected PATH or HOST:PORT, such as 127.0.0.1:{port} (a socket file of that name is ./{value})"
        )
    if not colon or "/" in value:
        require_name(value)
        return UnixAddress(path=value)
    return InetAddress(host.strip("[]"), port_number(port))


def _check_identifier(name: str) -> None:
    if not _IDENTIFIER.fullmatch(name):
        raise RequestError(
            "Parameter 'id' expects an identifier: letters, digits, '-', '.' and '_', starting with a letter"
        )


_ACTIONS = {"--help": Action.HELP, "-h": Action.HELP, "--version": Action.VERSION, "-V": Action.VERSION}
_ONCE = ("--pidfile", "--daemonize", "--state-dir", "--state-restore", *_MICROSECONDS, "--check-config")
_OF_FILES = ("--pidfile", "--state-dir")
_WITHOUT_VALUE = (*_ACTIONS, "--daemonize", "--check-config")
_WITH_VALUE = ("--pidfile", "--image-paths", "--state-dir", "--state-restore", *_MICROSECONDS, "--config")

_HANDLERS: dict[str, Callable[[str], Option]] = {
    "--blockdev": _blockdev,
    "--chardev": _chardev,
    "--monitor": _monitor,
    "--nbd-server": _nbd_server,
    "--export": _export,
    "--object": _object,
    "--device": _device,
    "--qmp": _qmp,
    "--nbd": _nbd,
    "--http": _http,
}

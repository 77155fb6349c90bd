"""Being a service of systemd: sockets that are open already, and saying when we are ready.

`LISTEN_FDS` sockets from file descriptor 3 on are ours if `LISTEN_PID` is our process. Their names
(`FileDescriptorName=` in the .socket unit) say what they are for: ``qmp`` or ``nbd``. A single socket without
such a name is for NBD; that is how libnbd starts servers.

Source:   the manual pages sd_listen_fds(3) and sd_notify(3).
"""

import logging
import os
import socket
from collections.abc import Callable, MutableMapping

from blockd.config import FdAddress, Given, Monitor, NbdServer, Option, SocketChardev
from blockd.errors import RequestError

logger = logging.getLogger(__name__)

_FIRST_FD = 3
# More than any unit file has; who passes more has made a mistake.
LISTEN_FDS_MAX = 64

Environment = MutableMapping[str, str]


def inherited_sockets(environment: Environment) -> list[Given]:
    """Return the options that serve the inherited sockets, and hide these from processes of ours.

    Raises:   RequestError: the variables make no sense.
    """
    pid, count, names = (environment.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"))
    if pid != str(os.getpid()):
        return []
    if not (count.isascii() and count.isdigit() and int(count) <= LISTEN_FDS_MAX):
        raise RequestError(f"LISTEN_FDS={count}: not a number from 0 to {LISTEN_FDS_MAX}")
    fds = range(_FIRST_FD, _FIRST_FD + int(count))
    roles = _roles(names.split(":") if names else [], len(fds))
    options: list[Given] = []
    for fd, role in zip(fds, roles, strict=True):
        _keep_to_ourselves(fd)
        options += [Given(f"socket {fd} of LISTEN_FDS", option) for option in _serving(role, fd)]
    return options


def _roles(names: list[str], count: int) -> list[str]:
    if count == 1 and names != ["qmp"]:
        return ["nbd"]
    if len(names) != count or not {"qmp", "nbd"}.issuperset(names):
        raise RequestError(
            f"LISTEN_FDNAMES={':'.join(names)}: each of several sockets needs the name qmp or nbd; "
            "in a .socket unit, set FileDescriptorName="
        )
    return names


def _keep_to_ourselves(fd: int) -> None:
    try:
        os.set_inheritable(fd, False)
    except OSError as error:
        raise RequestError(f"socket {fd} of LISTEN_FDS: {os.strerror(error.errno or 0)}") from error


def _serving(role: str, fd: int) -> list[Option]:
    address = FdAddress(fd=fd)
    if role == "nbd":
        return [NbdServer(addr=address)]
    name = f"LISTEN_FD_{fd}"
    return [SocketChardev(id=name, address=address, server=True), Monitor(chardev=name)]


def notifier(environment: Environment) -> Callable[[str], None]:
    """Return what tells the service manager a state such as ``READY=1``; without one it does nothing."""
    path = environment.pop("NOTIFY_SOCKET", "")
    address = "\0" + path[1:] if path.startswith("@") else path

    def notify(state: str) -> None:
        if not address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as service_manager:
            try:
                service_manager.sendto(state.encode(), address)
            except OSError as error:
                reason = os.strerror(error.errno or 0)
                logger.warning(
                    "cannot tell the service manager %s: NOTIFY_SOCKET=%s: %s", state, path, reason
                )

    return notify

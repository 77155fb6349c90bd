"""What was probably meant: errors about options of the command line or a file name what there is instead."""

import difflib
import re
from collections.abc import Iterable, Sequence

from blockd.cli.option_fields import (
    ADDRESS_TYPES,
    EXPORT,
    FD,
    FILE_DEVICE,
    INET,
    MONITOR,
    NBD_SERVER,
    NODE_DEVICE,
)
from blockd.drivers.table import DRIVERS
from blockd.objects import LIMITS, OBJECT_TYPES

# More names than this are not listed.
_LISTED_MAX = 10
_UNEXPECTED = re.compile(r"Parameter '([^']+)' is unexpected")
_MISSING = re.compile(r"Parameter '([^']+)' is missing")
_WRONG_VALUE = re.compile(r"Parameter '(driver|qom-type|type)' does not accept value '([^']*)'")
_LAST_STEP = re.compile(r"(?:^|,)[\w.-]*?([A-Za-z][\w-]*)=")
# What QMP says, too.
NO_TLS = "the NBD server cannot do TLS yet; start it without 'tls-creds' on a unix socket"


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """The nearest of the known names, as the end of an error; nothing if none is near.

    A name that is known stands in the wrong place: a limit belongs to `limits`, others to another driver.
    """
    names = list(known)
    if name in names:
        return f"; did you mean 'limits.{name}'?" if name in LIMITS else ""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean '{prefix}{close[0]}'?" if close else ""


def not_yet(name: str) -> str:
    """What a member asks for that blockd cannot do, as the end of an error; nothing if it can."""
    return f"; {NO_TLS}" if name.startswith("tls-") else ""


def explained(option: str, value: str, message: str) -> str:
    """An error about an option, such as `--export`, with what was probably meant where that can be told.

    QEMU's words stay in front.
    """
    members = members_of(option.removeprefix("--"))
    if found := _UNEXPECTED.fullmatch(message):
        name = found[1].rpartition(".")[2]
        # What is in no way like anything else is told in QEMU's words alone, where QEMU has the option.
        meant = instead(name, members) if option == "--device" else did_you_mean(name, members)
        return message + (not_yet(found[1]) or meant)
    if found := _WRONG_VALUE.fullmatch(message):
        types = ("nbd",) if option == "--export" else ADDRESS_TYPES
        values = {"driver": DRIVERS, "qom-type": OBJECT_TYPES, "type": types}[found[1]]
        return message + did_you_mean(found[2], values)
    if _MISSING.fullmatch(message):
        # Most likely that is what is missing, with a slip in it.
        unknown = next((key for key in _LAST_STEP.findall(value) if key not in members), None)
        if unknown is not None and (meant := did_you_mean(unknown, members)):
            return f"{message}, and '{unknown}' is unexpected{meant}"
    return message


def instead(name: str, known: Sequence[str]) -> str:
    """The nearest of the known names, or all if they are few, as the end of an error."""
    names = list(dict.fromkeys(known))
    listed = f"; expected one of {', '.join(names)}" if len(names) <= _LISTED_MAX else ""
    return did_you_mean(name, names) or listed


def members_of(table: str) -> list[str]:
    """The keys that an option or a table may have, whatever else it says; none for plain values."""
    match table:
        case "blockdev":
            return ["driver", *(name for driver in DRIVERS.values() for name in driver.fields)]
        case "object":
            return ["qom-type", "id", *LIMITS, *(name for fields in OBJECT_TYPES.values() for name in fields)]
        case "chardev":
            return ["backend", "id", "path", "host", "port", "fd", "server", "wait"]
        case "nbd-server":
            return [*NBD_SERVER, "type", "path", *INET, *FD]
        case "device":
            return [*FILE_DEVICE, *NODE_DEVICE]
        case "export":
            return [*EXPORT]
        case "monitor":
            return [*MONITOR]
    return []

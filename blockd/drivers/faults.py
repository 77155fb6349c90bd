"""The options of the `faults` driver: those of QEMU's blkdebug, and delays of our own."""

import errno
from collections.abc import Iterator
from functools import reduce
from operator import or_

from blockd.aio import in_thread
from blockd.block.file_events import FileEvent
from blockd.block.node import BlockNode
from blockd.block.options import (
    INT32_MAX,
    Check,
    Field,
    Fields,
    Options,
    array,
    choice,
    flag,
    integer,
    node,
    record,
    size,
    small_size,
    text,
)
from blockd.block.permissions import Access, Permission
from blockd.drivers.fault_config import NO_RULES, read_rules_blocking
from blockd.drivers.opening import Opening, Wanted
from blockd.errors import RequestError
from blockd.filters.fault_rules import DEFAULT_IO_TYPES, Fault, FaultRules, IoType, Rule, StateRule
from blockd.filters.faults import BlkdebugNode, FaultsNode
from blockd.filters.request_limits import RequestLimits

DELAY_MS_MAX = 3_600_000

_RULE: Fields = {
    "event": Field(choice(*FileEvent), is_required=True),
    "state": Field(integer),
    "iotype": Field(choice(*IoType)),
    "sector": Field(integer),
    "once": Field(flag),
}
_STATE: Fields = {
    "event": Field(choice(*FileEvent), is_required=True),
    "state": Field(integer),
    "new_state": Field(integer, is_required=True),
}
_LIMITS = [name.replace("_", "-") for name in RequestLimits._fields]
_PERMISSION_NAMES = {str(one).replace(" ", "-"): one for one in Permission if one}
_PERMISSIONS = array(choice(*_PERMISSION_NAMES))


def _rules(fields: Fields) -> Check:
    return array(record(fields))


FAULTS: Fields = {
    "image": Field(node, is_required=True),
    # A file with rules of the two kinds below, which come before those that are given here.
    "config": Field(text),
    # Nothing is answered without waiting here, so `immediately` changes nothing.
    "inject-error": Field(_rules({**_RULE, "errno": Field(integer), "immediately": Field(flag)})),
    "delay": Field(_rules({**_RULE, "milliseconds": Field(integer, is_required=True)})),
    "set-state": Field(_rules(_STATE)),
    "align": Field(size),
    **{name: Field(small_size) for name in _LIMITS[1:]},
    "take-child-perms": Field(_PERMISSIONS),
    "unshare-child-perms": Field(_PERMISSIONS),
}


async def open_faults(opening: Opening, wanted: Wanted) -> BlockNode:
    """Open a file and what makes it fail."""
    config = wanted.options.get("config")
    configured = NO_RULES if config is None else await in_thread(read_rules_blocking, str(config))
    rules = FaultRules(
        [
            _rule(given, Fault(errno=_number(given, "errno", errno.EIO)))
            for given in [*configured.inject_error, *_each(wanted, "inject-error")]
        ],
        [_rule(given, Fault(delay_s=_delay_ms(given) / 1000)) for given in _each(wanted, "delay")],
        [
            StateRule(_event(given), _number(given, "new_state"), _number(given, "state"))
            for given in [*configured.set_state, *_each(wanted, "set-state")]
        ],
    )
    limits = _limits(wanted)
    access = Access(_permissions(wanted, "take-child-perms"), ~_permissions(wanted, "unshare-child-perms"))
    image = await opening.file(wanted, "image", is_shared=True)
    node_class = BlkdebugNode if wanted.options["driver"] == BlkdebugNode.driver else FaultsNode
    return opening.add(
        node_class(image, rules, node_name=wanted.node_name, limits=limits, more_access=access)
    )


def _limits(wanted: Wanted) -> RequestLimits:
    """The limits of requests, each in whole units of another one.

    Raises:   RequestError: they do not fit each other.
    """
    given = RequestLimits(*(_number(wanted.options, name) for name in _LIMITS))
    limits = given._replace(align=max(given.align, 1))
    units = RequestLimits(
        limits.align,
        max_transfer=limits.align,
        opt_write_zero=limits.align,
        max_write_zero=max(limits.opt_write_zero, limits.align),
        opt_discard=limits.align,
        max_discard=max(limits.opt_discard, limits.align),
    )
    for name, limit, unit in zip(_LIMITS, limits, units, strict=True):
        is_power = name != "align" or not limit & (limit - 1)
        if limit >= INT32_MAX or limit % unit or not is_power:
            raise RequestError(f"Cannot meet constraints with {name} {limit}")
    return limits


def _permissions(wanted: Wanted, option: str) -> Permission:
    names = wanted.options.get(option, [])
    assert isinstance(names, list)
    return reduce(or_, (_PERMISSION_NAMES[name] for name in names), Permission.NONE)


def _each(wanted: Wanted, name: str) -> Iterator[Options]:
    given = wanted.options.get(name, [])
    assert isinstance(given, list)
    for options in given:
        assert isinstance(options, dict)
        yield options


def _rule(given: Options, fault: Fault) -> Rule:
    io_types = frozenset({IoType(str(given["iotype"]))}) if "iotype" in given else DEFAULT_IO_TYPES
    sector = _number(given, "sector", -1)
    return Rule(
        _event(given),
        fault,
        state=_number(given, "state"),
        io_types=io_types,
        sector=None if sector == -1 else sector,
        once=bool(given.get("once")),
    )


def _event(given: Options) -> FileEvent:
    return FileEvent(str(given["event"]))


def _number(given: Options, name: str, default: int = 0) -> int:
    value = given.get(name, default)
    assert isinstance(value, int)
    return value


def _delay_ms(given: Options) -> int:
    delay_ms = _number(given, "milliseconds")
    if not 0 <= delay_ms <= DELAY_MS_MAX:
        raise RequestError(f"Parameter 'milliseconds' must be between 0 and {DELAY_MS_MAX}")
    return delay_ms

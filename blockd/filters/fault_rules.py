"""The rules by which faults are injected; they mean what they mean to QEMU's blkdebug driver.

An event makes the rules for it active, if the state is theirs, in place of those that were active. From
then on they apply to every request of their kind. The state is a number that starts as 1 and that
events change, so that rules can count: the third L2 update fails when the first two have led to state 3.
"""

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from blockd.block.file_events import FileEvent
from blockd.units import SECTOR_SIZE


class IoType(StrEnum):
    """The kinds of requests to a file."""

    READ = "read"
    WRITE = "write"
    WRITE_ZEROES = "write-zeroes"
    DISCARD = "discard"
    FLUSH = "flush"
    BLOCK_STATUS = "block-status"


DEFAULT_IO_TYPES = frozenset(IoType) - {IoType.BLOCK_STATUS}


class Fault(NamedTuple):
    """What happens to a request: it is late, and fails unless `errno` is 0."""

    errno: int = 0
    delay_s: float = 0.0


@dataclass(frozen=True, eq=False)
class Rule:
    """The fault of requests of some types, over `sector` if one is given, once `event` was announced."""

    event: FileEvent
    fault: Fault
    state: int = 0  # 0: any
    io_types: frozenset[IoType] = DEFAULT_IO_TYPES
    sector: int | None = None
    once: bool = False

    def covers(self, io_type: IoType, offset: int, length: int) -> bool:
        """Whether the rule is about a request."""
        is_here = self.sector is None or offset <= self.sector * SECTOR_SIZE < offset + length
        return is_here and io_type in self.io_types


class StateRule(NamedTuple):
    """Another state, from `event` on."""

    event: FileEvent
    new_state: int
    state: int = 0  # 0: any


class _Rules:
    """Rules in the order they were given, and which of them are active; the first one that applies counts."""

    def __init__(self, rules: Iterable[Rule]) -> None:
        self._all = list(rules)
        self._active: list[Rule] = []

    def announce(self, event: FileEvent, state: int) -> None:
        self._active = [
            rule for rule in self._all if rule.event is event and rule.state in (0, state)
        ] or self._active

    def take(self, io_type: IoType, offset: int, length: int) -> Fault:
        for rule in self._active:
            if rule.covers(io_type, offset, length):
                if rule.once and any(rule.fault):  # one that lets requests pass is not used up
                    self._active.remove(rule)
                    self._all.remove(rule)
                return rule.fault
        return Fault()


class FaultRules:
    """The rules of one file at work; for any thread."""

    def __init__(
        self, errors: Iterable[Rule] = (), delays: Iterable[Rule] = (), states: Iterable[StateRule] = ()
    ) -> None:
        self._errors = _Rules(errors)
        self._delays = _Rules(delays)
        self._states = list(states)
        self._state = 1
        self._lock = threading.Lock()
        self.announce(FileEvent.NONE)

    def announce(self, event: FileEvent) -> None:
        """Say what happens next."""
        with self._lock:
            self._errors.announce(event, self._state)
            self._delays.announce(event, self._state)
            for rule in self._states:
                if rule.event is event and rule.state in (0, self._state):
                    self._state = rule.new_state
                    break

    def take(self, io_type: IoType, offset: int = 0, length: int = 0) -> Fault:
        """Tell what happens to a request; rules that apply only once are used up by that."""
        with self._lock:
            error = self._errors.take(io_type, offset, length)
            delay = self._delays.take(io_type, offset, length)
        return Fault(error.errno, delay.delay_s)

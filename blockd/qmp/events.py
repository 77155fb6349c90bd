"""The one bus that events travel on.

An event is a pydantic model, see `models.Event`; the bus is there before those are loaded. `EventBus.emit`
stamps it and hands it to every listener at once, so events keep the order they were emitted in and stand
before the reply of the command that caused them.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from blockd.wire.qmp import Value

if TYPE_CHECKING:
    from blockd.qmp.models import Event

Listener = Callable[[dict[str, Value]], None]


class EventBus:
    """Deliver events to whoever listens: QMP sessions, a web page's event stream."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._listeners: dict[int, Listener] = {}
        self._next_key = 0

    @property
    def has_listeners(self) -> bool:
        """Whether anybody would be given an event; who asks before making one spares itself the work."""
        return bool(self._listeners)

    def emit(self, event: "Event") -> None:
        """Give every listener the event in its QMP form, `{"timestamp", "event", "data"}`.

        Needs:    listeners neither raise nor wait.
        """
        seconds, fraction = divmod(self._clock(), 1)
        message: dict[str, Value] = {
            "timestamp": {"seconds": int(seconds), "microseconds": int(fraction * 1_000_000)},
            "event": event.name,
        }
        data = event.model_dump(mode="json", exclude_none=True)
        if data:
            message["data"] = data
        for listener in list(self._listeners.values()):
            listener(message)

    @contextmanager
    def listening(self, listener: Listener) -> Iterator[None]:
        """Have `listener` called with each event while the context is open."""
        key = self._next_key
        self._next_key += 1
        self._listeners[key] = listener
        try:
            yield
        finally:
            del self._listeners[key]

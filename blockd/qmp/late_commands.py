"""The commands of a server, which come after its greeting.

What commands take and return is slow to load: it is a hundred models and the library that makes them. A
daemon that has to be up quickly listens and greets without them, and loads them in a thread then, so that
guests wait for turns of that thread only, which are milliseconds. A request that comes before the commands
are there waits for all of it.
"""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from blockd.aio import in_thread

if TYPE_CHECKING:
    from blockd.qmp.session import Session
    from blockd.qmp.table import CommandTable

Context = TypeVar("Context")


class Tables(NamedTuple, Generic[Context]):
    """All commands there are."""

    of_server: "CommandTable[Context]"
    of_sessions: "CommandTable[Session[Any]]"


class LateCommands(Generic[Context]):
    """Commands that are loaded once, when somebody first asks for them."""

    def __init__(self, load: "Callable[[], CommandTable[Context]]") -> None:
        self._load = load
        self._loading = asyncio.Lock()
        self._tables: Tables[Context] | None = None

    async def tables(self) -> Tables[Context]:
        """Return the commands, loaded by then.

        Cancel:   takes effect when they are loaded.
        """
        async with self._loading:
            if self._tables is None:
                self._tables = await in_thread(self._load_all)
            return self._tables

    def _load_all(self) -> Tables[Context]:
        from blockd.qmp.session_commands import SESSION_COMMANDS  # noqa: PLC0415

        return Tables(self._load(), SESSION_COMMANDS)

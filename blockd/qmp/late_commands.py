"""What a server needs after its greeting: the reader of requests, and the commands.

What commands take and return is slow to load: it is a hundred models and the library that makes them; the
reader's grammar is compiled. A daemon that has to be up quickly listens and greets without them, and loads
them in a thread then, so that guests wait for turns of that thread only, which are milliseconds. A request
that comes before the commands are there waits for all of it.
"""

import asyncio
import errno
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from blockd.aio import in_thread
from blockd.errors import BlockdError

if TYPE_CHECKING:
    from blockd.qmp.session import Session
    from blockd.qmp.table import CommandTable
    from blockd.wire.qmp.reader import JsonReader

logger = logging.getLogger(__name__)

# What the import of a sound module may raise, and of one that is missing or cut off.
_EXPECTED = (OSError, ImportError, SyntaxError, MemoryError, EOFError)

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
        self._loading_reader = asyncio.Lock()
        self._tables: Tables[Context] | None = None
        self._reader: type[JsonReader] | None = None

    async def tables(self) -> Tables[Context]:
        """Return the commands, loaded by then.

        Cancel:   takes effect when they are loaded.

        Raises:   BlockdError: they could not be loaded; the next call tries again.
        """
        async with self._loading:
            if self._tables is None:
                self._tables = await in_thread(self._load_all)
            return self._tables

    async def reader(self) -> "JsonReader":
        """Return a new reader of requests, whose module is loaded once, when somebody first listens.

        Raises:   BlockdError: it could not be loaded; the next call tries again.
        """
        async with self._loading_reader:
            if self._reader is None:
                self._reader = await in_thread(_load_reader)
            return self._reader()

    def _load_all(self) -> Tables[Context]:
        with _loading("the commands"):
            from blockd.qmp.session_commands import SESSION_COMMANDS  # noqa: PLC0415

            return Tables(self._load(), SESSION_COMMANDS)


def _load_reader() -> "type[JsonReader]":
    with _loading("the JSON reader"):
        from blockd.wire.qmp.reader import JsonReader  # noqa: PLC0415

        return JsonReader


@contextmanager
def _loading(what: str) -> Iterator[None]:
    """Imports that come late.

    Raises:   BlockdError: no descriptor or memory was left for them, or an upgrade of blockd is half done:
              that may fail in any way, as a module of one edition meets those of the other.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, _EXPECTED):
            logger.exception("could not load %s", what)
        raise BlockdError(f"Could not load {what}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.filename or 'a module'}: {os.strerror(error.errno or errno.EIO)}"
    if isinstance(error, MemoryError):
        return "out of memory"
    return str(error) if isinstance(error, _EXPECTED) else f"{type(error).__name__}: {error}"

"""The commands a server knows: what each takes and returns is read from its handler's annotations.

    table: CommandTable[Daemon] = CommandTable()

    @table.command("block_stream")
    async def block_stream(daemon: Daemon, arguments: BlockStreamArguments) -> None: ...

A handler takes the context and, if the command has arguments, a subclass of `Arguments`. It returns a
`Result`, a list, or None for the empty object. Arguments are checked as a whole before the handler runs.
"""

import inspect
import typing
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter, ValidationError

from blockd.aio import in_turns
from blockd.qmp.errors import argument_error
from blockd.qmp.models import Arguments, Event
from blockd.wire.qmp import Value

Context = TypeVar("Context")
Handler = TypeVar("Handler", bound=Callable[..., Awaitable[object]])


@dataclass(frozen=True, slots=True)
class Command(Generic[Context]):
    """One command; `returns` is the type of None when it returns the empty object."""

    name: str
    allow_oob: bool
    arguments: type[Arguments] | None
    returns: object
    handler: Callable[..., Awaitable[object]]
    features: tuple[str, ...] = ()
    """What `query-qmp-schema` says of it beside its type, such as ``deprecated``."""

    @property
    def result(self) -> TypeAdapter[object] | None:
        """What turns a result into JSON, made when it is first needed: a daemon must start quickly."""
        return None if self.returns is type(None) else _adapter(self.returns)

    async def run(self, context: Context, arguments: dict[str, Value]) -> Value:
        """Check the arguments, run the handler and return its result as JSON.

        Raises:   RequestError: an argument is missing, unknown or of the wrong type; nothing happened.
        """
        try:
            checked = (self.arguments or Arguments).from_wire(arguments)
        except ValidationError as error:
            raise argument_error(error, arguments) from error
        result = await (self.handler(context, checked) if self.arguments else self.handler(context))
        if (adapter := self.result) is None:
            return {}
        if isinstance(result, list):
            (returns,) = typing.get_args(self.returns)
            left, result = result[::-1], None  # what nobody keeps is freed in turns, too
            return await in_turns(partial(_dumped, _adapter(returns)), _taken(left))
        return _dumped(adapter, result)


def _taken(left: list[object]) -> Iterator[object]:
    while left:
        yield left.pop()


def _dumped(adapter: TypeAdapter[object], result: object) -> Value:
    dumped: Value = adapter.dump_python(result, mode="json", exclude_none=True)
    return dumped


@cache
def _adapter(returns: Any) -> TypeAdapter[object]:
    return TypeAdapter(returns)


class CommandTable(Generic[Context]):
    """Commands by name, in the order they were defined; and the events that may come."""

    def __init__(self, events: Sequence[type[Event]] = ()) -> None:
        self.events = events
        self._commands: dict[str, Command[Context]] = {}

    def command(
        self, name: str, *, oob: bool = False, features: tuple[str, ...] = ()
    ) -> Callable[[Handler], Handler]:
        """Register the decorated handler under `name`; stack decorators for an alias.

        `oob` lets clients run it with exec-oob, overtaking queued commands: it must not wait for I/O.
        """

        def register(handler: Handler) -> Handler:
            assert name not in self._commands, f"command {name} is defined twice"
            parameters = list(inspect.signature(handler).parameters)
            hints = typing.get_type_hints(handler, include_extras=True)
            self._commands[name] = Command(
                name,
                oob,
                hints[parameters[1]] if len(parameters) > 1 else None,
                hints["return"],
                handler,
                features,
            )
            return handler

        return register

    def merge(self, other: "CommandTable[Context]") -> None:
        """Take over the commands of `other`, so that each topic can have a module and table of its own."""
        assert not self._commands.keys() & other._commands.keys(), "a command is defined twice"
        self._commands |= other._commands

    def wrapped(self, wrap: Callable[[Command[Context]], Command[Context]]) -> "CommandTable[Context]":
        """The same commands, each as `wrap` makes it of the one here."""
        table: CommandTable[Context] = CommandTable(self.events)
        table._commands = {name: wrap(command) for name, command in self._commands.items()}
        return table

    def get(self, name: str) -> Command[Context] | None:
        return self._commands.get(name)

    def __iter__(self) -> Iterator[Command[Context]]:
        return iter(self._commands.values())

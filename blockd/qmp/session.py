"""The rules of one client's session: negotiation first, then commands; knows nothing of sockets.

States: negotiating → commands (once `qmp_capabilities` succeeded). Commands of the server wait until it is
ready, those of the session do not. A message goes in, a reply comes out;
what is run when is the connection's business.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, TypeVar

from blockd.errors import BlockdError, ErrorKind, RequestError
from blockd.qmp.envelope import Request, error_reply, parse_request, success_reply
from blockd.qmp.late_commands import LateCommands
from blockd.wire.qmp import Message, ParseError, Value

if TYPE_CHECKING:
    from blockd.qmp.table import Command

logger = logging.getLogger(__name__)

Context = TypeVar("Context")


class Session(Generic[Context]):
    """One client: what it negotiated, and how its messages are answered."""

    def __init__(
        self,
        commands: LateCommands[Context],
        context: Context,
        on_negotiated: Callable[[], None] = lambda: None,
        is_ready: asyncio.Event | None = None,
    ) -> None:
        self.commands = commands
        self.is_negotiated = False
        self.oob_enabled = False
        self._context = context
        self._when_negotiated = [on_negotiated]
        self._is_ready = is_ready

    def negotiate(self, *, oob: bool) -> None:
        """End the negotiation; from here on the client gets events."""
        self.oob_enabled = oob
        self.is_negotiated = True
        for action in self._when_negotiated:
            action()

    def when_negotiated(self, action: Callable[[], None]) -> None:
        """Have `action` done, which neither raises nor waits, when the negotiation ends."""
        self._when_negotiated.append(action)

    async def answer(self, message: Message) -> dict[str, Value]:
        """Run one message and return the reply to it; never raises on behalf of a command.

        Cancel:   cancels the command.
        """
        if isinstance(message, ParseError):
            return error_reply(None, message)
        try:
            request = parse_request(message, oob_enabled=self.oob_enabled)
            return success_reply(message, await self._run(request))
        except BlockdError as error:
            return error_reply(message, error)
        except Exception:
            logger.exception("internal error in a QMP command: %s", _name_of(message))
            sentence = f"Internal error in {_name_of(message)}: see the log of blockd, which goes on"
            return error_reply(message, BlockdError(sentence))

    async def _run(self, request: Request) -> Value:
        if request.command == "qmp_capabilities" or not self.is_negotiated:
            self._check_negotiation(request.command)
        commands, of_sessions = await self.commands.tables()
        if own := of_sessions.get(request.command):
            _check_oob(request, own)
            return await own.run(self, request.arguments)
        command = commands.get(request.command)
        if command is None:
            raise _not_found(f"The command {request.command} has not been found")
        _check_oob(request, command)
        if self._is_ready is not None:
            await self._is_ready.wait()
        return await command.run(self._context, request.arguments)

    def _check_negotiation(self, command: str) -> None:
        if self.is_negotiated:
            raise _not_found("Capabilities negotiation is already complete, command ignored")
        if command != "qmp_capabilities":
            raise _not_found("Expecting capabilities negotiation with 'qmp_capabilities'")


def _check_oob(request: Request, command: "Command[Context]") -> None:
    if request.out_of_band and not command.allow_oob:
        raise RequestError(f"The command {request.command} does not support OOB")


def _not_found(message: str) -> RequestError:
    return RequestError(message, kind=ErrorKind.COMMAND_NOT_FOUND)


def _name_of(message: Value) -> Value:
    return (message.get("execute") or message.get("exec-oob")) if isinstance(message, dict) else None

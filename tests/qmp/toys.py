"""A server's worth of commands for tests, with a gate that holds one of them."""

import asyncio
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from blockd.errors import ErrorKind, RequestError
from blockd.qmp.events import EventBus
from blockd.qmp.models import Arguments, Event, Int64, Members, NonNegative, Result
from blockd.qmp.table import CommandTable


class ToyContext:
    """What the commands work on."""

    def __init__(self) -> None:
        self.bus = EventBus(clock=lambda: 1_300_000_000.25)
        # What ran, in order.
        self.journal: list[str] = []
        self.waiting = asyncio.Event()
        self.gate = asyncio.Event()


class Rang(Event):
    """A bell rang."""

    name: ClassVar[str] = "RANG"

    note: str
    louder_than: int | None = None


class Quiet(Event):
    """An event without data."""

    name: ClassVar[str] = "QUIET"


class UnixAddress(Members):
    type: Literal["unix"]
    path: str


class InetAddress(Members):
    type: Literal["inet"]
    host: str
    port: Int64 = 0


class StreamArguments(Arguments):
    device: str
    base: str | None = None
    all: bool = True
    speed: NonNegative = 0
    on_error: Literal["report", "ignore", "stop"] = "report"
    nice: float = 0.0
    flags: list[Literal["a", "b"]] = Field(default_factory=list)
    addr: Annotated[UnixAddress | InetAddress, Field(discriminator="type")] | None = None


class StreamState(Result):
    device: str
    on_error: str
    base: str | None = None


class RingArguments(Arguments):
    note: str = "a"
    times: Int64 = 1


class JournalArguments(Arguments):
    entry: str = ""


class OpenArguments(Arguments, extra="allow"):
    driver: str


class Opened(Result):
    names: list[str]


TOYS: CommandTable[ToyContext] = CommandTable()


@TOYS.command("stream")
@TOYS.command("query-stream", oob=True)
async def stream(context: ToyContext, arguments: StreamArguments) -> StreamState:
    context.journal.append(f"stream {arguments.device}")
    if arguments.device == "none":
        raise RequestError("Device 'none' not found", kind=ErrorKind.DEVICE_NOT_FOUND)
    return StreamState(device=arguments.device, on_error=arguments.on_error, base=arguments.base)


@TOYS.command("open")
async def open_(context: ToyContext, arguments: OpenArguments) -> Opened:
    return Opened(names=sorted(arguments.model_extra or {}))


@TOYS.command("ring")
async def ring(context: ToyContext, arguments: RingArguments) -> None:
    for _ in range(arguments.times):
        context.bus.emit(Rang(note=arguments.note))


@TOYS.command("note")
async def note(context: ToyContext, arguments: JournalArguments) -> None:
    context.journal.append(arguments.entry)


@TOYS.command("wait")
async def wait(context: ToyContext) -> None:
    context.waiting.set()
    await context.gate.wait()
    context.journal.append("waited")


@TOYS.command("look", oob=True)
async def look(context: ToyContext) -> list[StreamState]:
    return [StreamState(device="d", on_error="report")]


@TOYS.command("break")
async def break_(context: ToyContext) -> None:
    raise ZeroDivisionError("a mistake of ours")

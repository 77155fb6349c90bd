"""The commands that every session has, whatever it is a session with; they run on the session itself."""

from typing import Any, Literal

from pydantic import Field

from blockd.aio import in_thread
from blockd.qmp.envelope import version
from blockd.qmp.introspection import SchemaInfo, introspect
from blockd.qmp.models import Arguments, Result
from blockd.qmp.session import Session
from blockd.qmp.table import CommandTable

SESSION_COMMANDS: CommandTable[Session[Any]] = CommandTable()


class QmpCapabilitiesArguments(Arguments):
    """Which of the offered capabilities to enable."""

    enable: list[Literal["oob"]] = Field(default_factory=list)


class QemuVersion(Result):
    """A version in three parts."""

    micro: int
    minor: int
    major: int


class VersionInfo(Result):
    """The version of qemu-storage-daemon that is spoken, and ours."""

    qemu: QemuVersion
    package: str


class CommandInfo(Result):
    """The name of a command."""

    name: str


@SESSION_COMMANDS.command("qmp_capabilities")
async def qmp_capabilities(session: Session[Any], arguments: QmpCapabilitiesArguments) -> None:
    """End the negotiation; from here on the session runs commands and gets events."""
    session.negotiate(oob="oob" in arguments.enable)


@SESSION_COMMANDS.command("query-version")
async def query_version(session: Session[Any]) -> VersionInfo:
    """Report whose answers these are."""
    return VersionInfo.model_validate(version())


@SESSION_COMMANDS.command("query-commands")
async def query_commands(session: Session[Any]) -> list[CommandInfo]:
    """List every command."""
    tables = await session.commands.tables()
    return [CommandInfo(name=command.name) for table in tables for command in table]


@SESSION_COMMANDS.command("query-qmp-schema")
async def query_qmp_schema(session: Session[Any]) -> list[SchemaInfo]:
    """Describe every command and event, and the types of what they take and return."""
    return await in_thread(introspect, *await session.commands.tables())

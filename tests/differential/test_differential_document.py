"""docs/qmp-differences.md says what the tables and the daemon say."""

import re
from pathlib import Path

from blockd.commands.table import COMMANDS
from blockd.qmp.session_commands import SESSION_COMMANDS
from tests.differential.differences import DIFFERENCES, DOCUMENT
from tests.differential.framing import DIFFERENT
from tests.qmp_client import QmpClient
from tests.qsd import qsd

# Entries that no exchange with one client can show, and the tests that show them.
SHOWN_ELSEWHERE = {
    "What blockd has more": "below",
    "What blockd does not have": "below",
    "With --state-dir, the end of the daemon keeps jobs": "tests/state/test_state_restart.py",
    "Slow and silent clients": "tests/qmp/test_qmp_server.py, tests/qmp/test_qmp_transports.py",
    "Internal snapshots keep their backing": "tests/control/test_control_block_stream.py",
    "Socket files belong to one daemon": "tests/qmp/test_qmp_transports.py",
}


def entries() -> dict[str, str]:
    """The text of each entry by its heading."""
    parts = re.split(r"^## (.*)$", DOCUMENT.read_text(), flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_every_difference_has_an_entry_and_every_entry_a_difference() -> None:
    shown = {difference.entry for found in DIFFERENCES.values() for difference in found}
    shown |= {entry for _, entry in DIFFERENT}
    assert shown | SHOWN_ELSEWHERE.keys() == entries().keys()
    assert not shown & SHOWN_ELSEWHERE.keys()


def test_every_entry_says_why() -> None:
    assert [entry for entry, text in entries().items() if "\n\nWhy: " not in text] == []


async def test_commands_and_events_are_told(tmp_path: Path) -> None:
    async with qsd(tmp_path) as path, await QmpClient.connect(path) as client:
        schema = await client.command("query-qmp-schema")
    theirs = {entity["name"] for entity in schema if entity["meta-type"] == "command"}
    ours = {command.name for table in (COMMANDS, SESSION_COMMANDS) for command in table}
    assert told("What blockd does not have") == theirs - ours, f"{DOCUMENT.name} is out of date"
    their_events = {entity["name"] for entity in schema if entity["meta-type"] == "event"}
    our_events = {event.name for event in COMMANDS.events}
    assert told("What blockd has more") == (ours - theirs) | (our_events - their_events), (
        f"{DOCUMENT.name} is out of date"
    )


def told(entry: str) -> set[str]:
    """The names of commands and events that an entry lists."""
    listed = re.findall(r"^(?:- |  |and events: )`.*?(?=\n\S|\n\n)", entries()[entry] + "\n\n", re.M | re.S)
    return {name for text in listed for name in re.findall(r"`([^`]+)`", text)}

"""docs/qmp-differences.md says what the tables and the daemon say."""

import re
from collections.abc import Iterator
from pathlib import Path

from blockd.block.options import Array, Fields, Record, node, node_or_none
from blockd.commands.table import COMMANDS
from blockd.drivers import DRIVERS
from blockd.qmp.introspection import introspect
from blockd.qmp.session_commands import SESSION_COMMANDS
from tests.differential.differences import DIFFERENCES, DOCUMENT
from tests.differential.framing import DIFFERENT
from tests.differential.permission_cases import RULES
from tests.differential.schema import Comparison, Finding, Schema
from tests.qmp_client import QmpClient
from tests.qsd import qsd

# Entries that no exchange with one client can show, and the tests that show them.
SHOWN_ELSEWHERE = {
    "What blockd has more": "below",
    "What blockd does not have": "below",
    "What the schema lists otherwise": "below",
    "Options without effect": "below",
    "With --state-dir, the end of the daemon keeps jobs and exports": "tests/state/test_state_restart.py",
    "TCP clients send JSON from the first byte": "tests/qmp/test_qmp_transports.py",
    "A chain has at most 64 images": "tests/cli/test_cli_graph.py",
    "Slow and silent clients": "tests/qmp/test_qmp_server.py, tests/qmp/test_qmp_transports.py",
    "Internal snapshots keep their backing": "tests/control/test_control_block_stream.py",
    "A job that is being finalized cannot be cancelled": "tests/control/test_control_verbs.py",
    "Clients may connect before the daemon is ready": "tests/control/test_control_ready.py",
    "Socket files belong to one daemon": "tests/qmp/test_qmp_transports.py",
    "Formats are not guessed": "tests/cli/test_cli_backing_formats.py",
    "Nothing told is nothing asked for": "tests/differential/test_differential_options.py",
    "The order of nodes": "tests/differential/test_differential_options.py",
    "Block status where QSD knows nothing": "tests/differential/test_differential_block_status.py",
    "A minimum block size that NBD allows": "tests/differential/test_differential_block_sizes.py",
    "Disks whose size is no multiple of 512": "tests/differential/test_differential_block_sizes.py",
    "`blockctl image map` does not look for holes in a file": "tests/interop/test_population.py",
}


def entries() -> dict[str, str]:
    """The text of each entry by its heading."""
    parts = re.split(r"^## (.*)$", DOCUMENT.read_text(), flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_every_difference_has_an_entry_and_every_entry_a_difference() -> None:
    shown = {difference.entry for found in DIFFERENCES.values() for difference in found}
    shown |= {entry for _, entry in DIFFERENT} | {rule.entry for rule in RULES}
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


async def test_everything_else_in_the_schema_is_told_with_its_reason(tmp_path: Path) -> None:
    async with qsd(tmp_path) as path, await QmpClient.connect(path) as client:
        theirs = Schema(await client.command("query-qmp-schema"))
    ours = Schema(
        entity.model_dump(mode="json", exclude_none=True) for entity in introspect(COMMANDS, SESSION_COMMANDS)
    )
    assert len(theirs.entities) > 100
    found = set(Comparison(theirs, ours).findings())
    listed = findings_told("What the schema lists otherwise")
    assert {finding for finding in found if finding.verb == "differs"} == set()
    assert found - listed == set(), f"{DOCUMENT.name} does not tell"
    assert listed - found == set(), f"{DOCUMENT.name} is out of date"


def test_options_without_effect_are_listed() -> None:
    """Whoever adds an option says here that it has an effect, or there why it has none."""
    text = entries()["Options without effect"].partition("- `detect-zeroes`")[0]
    listed = set(re.findall(r"`([^`]+)`", " ".join(re.findall(r"^- ([^:]*):", text, re.MULTILINE))))
    found = {name for driver in DRIVERS.values() for name in option_names(driver.fields)}
    assert listed | EFFECTIVE == found
    assert not listed & EFFECTIVE


# Options of nodes, other than the nodes below, that change what a node does, and the tests that show it.
EFFECTIVE = {
    *("node-name", "read-only", "auto-read-only", "force-share"),  # tests/locks, tests/differential/nodes.py
    *("discard", "detect-zeroes"),  # test_differential_requests.py
    "cache.no-flush",  # tests/formats/test_unsafe_file.py
    *("filename", "locking"),  # tests/locks
    "throttle-group",  # tests/throttle
    *("offset", "size"),  # tests/formats/test_raw_part.py
    *("latency-ns", "read-zeroes"),  # tests/formats/test_null.py
    "bottom",  # tests/stream
    "config",  # test_differential_fault_config.py
    *(f"inject-error.{name}" for name in ("event", "state", "iotype", "sector", "once", "errno")),
    *(f"delay.{name}" for name in ("event", "state", "iotype", "sector", "once", "milliseconds")),
    *("align", "max-transfer", "opt-write-zero", "max-write-zero", "opt-discard", "max-discard"),
    *("take-child-perms", "unshare-child-perms"),  # both lines: test_differential_faults.py
    *(f"set-state.{name}" for name in ("event", "state", "new_state")),  # tests/faults
}


def option_names(fields: Fields, prefix: str = "") -> Iterator[str]:
    """The options of a table and of the objects in it; not those that name nodes."""
    for name, field in fields.items():
        check = field.check.check_element if isinstance(field.check, Array) else field.check
        if isinstance(check, Record):
            yield from option_names(check.fields, f"{prefix}{name}.")
        elif check not in (node, node_or_none):
            yield prefix + name


def findings_told(entry: str) -> set[Finding]:
    """What an entry lists: the place, a verb, names, and the reason, which must not be missing."""
    items = re.findall(r"^- (.*?)(?=^- |^\n)", entries()[entry], re.MULTILINE | re.DOTALL)
    found: set[Finding] = set()
    for item in items:
        parts = re.match(r"`([^`]+)`\s(lacks|adds)\s((?:`[^`]+`,?\s*)+):\s+\S", item)
        assert parts is not None, item
        found |= {Finding(parts[1], parts[2], name) for name in re.findall(r"`([^`]+)`", parts[3])}
    return found


def told(entry: str) -> set[str]:
    """The names of commands and events that an entry lists."""
    listed = re.findall(r"^(?:- |  |and events: )`.*?(?=\n\S|\n\n)", entries()[entry] + "\n\n", re.M | re.S)
    return {name for text in listed for name in re.findall(r"`([^`]+)`", text)}

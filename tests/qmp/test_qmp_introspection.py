"""query-qmp-schema: whole, masked, and what clients written for QEMU look for is there."""

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import QMPClient

from blockd.commands.table import COMMANDS
from blockd.qmp.introspection import introspect
from blockd.qmp.late_commands import LateCommands
from blockd.qmp.server import QmpServer
from blockd.qmp.session import Session
from blockd.qmp.session_commands import SESSION_COMMANDS
from blockd.qmp.table import CommandTable
from blockd.units import KIB
from blockd.wire.qmp.writer import pack_message
from tests.qmp.toys import TOYS, Quiet, Rang, ToyContext
from tests.qmp_client import QmpClient
from tests.qsd import qsd

Entity = dict[str, Any]
Schema = dict[str, Entity]
BUILTINS = {"str", "int", "number", "bool", "null", "any"}
SHAPES: dict[str, set[str]] = {
    "builtin": {"json-type"},
    "enum": {"members", "values"},
    "array": {"element-type"},
    "object": {"members", "tag", "variants"},
    "alternate": {"members"},
    "command": {"arg-type", "ret-type", "allow-oob"},
    "event": {"arg-type"},
}


async def answer(table: CommandTable[Any]) -> Schema:
    """What a session with these commands answers."""
    command = SESSION_COMMANDS.get("query-qmp-schema")
    assert command is not None
    entities: Any = await command.run(Session(LateCommands(lambda: table), None), {})
    names = [entity["name"] for entity in entities]
    assert len(names) == len(set(names))
    return {entity["name"]: entity for entity in entities}


@pytest.fixture(scope="module")
def ours() -> Schema:
    return asyncio.run(answer(COMMANDS))


def types_named(entity: Entity) -> Iterator[str]:
    """All types that an entity refers to."""
    yield from (entity[key] for key in ("arg-type", "ret-type", "element-type") if key in entity)
    if entity["meta-type"] in ("object", "alternate"):
        yield from (member["type"] for member in entity["members"] + entity.get("variants", []))


def find(schema: Schema, path: str) -> Entity | None:
    """Look something up as QEMU documents it: `command/arg-type/member/+case/member`."""
    name, *steps = path.split("/")
    entity: Entity | None = schema.get(name)
    for step in steps:
        if entity is None:
            return None
        if entity["meta-type"] == "array":
            entity = schema[entity["element-type"]]
        if step in ("arg-type", "ret-type"):
            entity = schema[entity[step]]
            continue
        key, options = ("case", entity.get("variants", [])) if step[0] == "+" else ("name", entity["members"])
        found = [option for option in options if option[key] == step.lstrip("+")]
        entity = schema[found[0]["type"]] if found else None
    return entity


def members(schema: Schema, name: str) -> Schema:
    """The members of an object, those of its variants too."""
    entity = schema[name]
    found = {member["name"]: member for member in entity.get("members", [])}
    for variant in entity.get("variants", []):
        found |= {
            f"+{variant['case']}/{name}": member for name, member in members(schema, variant["type"]).items()
        }
    return found


# -- shape ------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", [COMMANDS, TOYS], ids=["blockd", "toys"])
async def test_every_type_is_there_masked_and_used(table: CommandTable[Any]) -> None:
    schema = await answer(table)
    used = {name for entity in schema.values() for name in types_named(entity)}
    faces = {name for name, entity in schema.items() if entity["meta-type"] in ("command", "event")}
    assert used | faces == schema.keys()
    for name in used:
        inner = name[1:-1] if schema[name]["meta-type"] == "array" else name
        assert inner in BUILTINS or re.fullmatch(r"[0-9]+", inner), name


async def test_every_entity_has_the_members_of_its_kind(ours: Schema) -> None:
    for entity in ours.values():
        allowed = SHAPES[entity["meta-type"]] | {"name", "meta-type", "features"}
        assert entity.keys() <= allowed, entity
        if entity["meta-type"] == "object":
            assert all(
                member.keys() <= {"name", "type", "default", "features"} for member in entity["members"]
            )
            assert ("tag" in entity) == ("variants" in entity)
        if entity["meta-type"] == "enum":
            assert entity["values"] == [member["name"] for member in entity["members"]]


async def test_equal_types_are_there_once(ours: Schema) -> None:
    contents = [{key: value for key, value in entity.items() if key != "name"} for entity in ours.values()]
    types = [content for content in contents if content["meta-type"] not in ("command", "event")]
    assert not [content for content in types if types.count(content) > 1]


async def test_commands_and_events_are_those_there_are(ours: Schema) -> None:
    commands = {name for name, entity in ours.items() if entity["meta-type"] == "command"}
    assert commands == {command.name for table in (COMMANDS, SESSION_COMMANDS) for command in table}
    out_of_band = {name for name in commands if ours[name].get("allow-oob")}
    assert out_of_band >= {
        *("job-pause", "job-cancel", "block-job-set-speed", "query-jobs"),
        *("block_stream_status", "block_stream_cancel"),
    }
    assert all(ours[name].get("allow-oob", True) is True for name in commands)
    events = {name for name, entity in ours.items() if entity["meta-type"] == "event"}
    assert events == {event.name for event in COMMANDS.events}
    assert ours["nbd-server-add"]["features"] == ["deprecated"]


def test_kinds_of_types() -> None:
    """One of each, made of the toys."""
    table: CommandTable[ToyContext] = CommandTable([Rang, Quiet])
    table.merge(TOYS)
    schema: Schema = {
        entity.name: entity.model_dump(by_alias=True, exclude_none=True) for entity in introspect(table)
    }
    arguments = find(schema, "stream/arg-type")
    assert arguments is not None
    assert {name: ("default" in member) for name, member in members(schema, arguments["name"]).items()} == {
        "device": False,
        **dict.fromkeys(["base", "all", "speed", "on-error", "nice", "flags", "addr"], True),
    }
    expected: list[tuple[str, str, Any]] = [
        ("stream/arg-type/speed", "json-type", "int"),
        ("stream/arg-type/nice", "json-type", "number"),
        ("stream/arg-type/all", "json-type", "boolean"),
        ("stream/arg-type/on-error", "values", ["report", "ignore", "stop"]),
        ("stream/arg-type/flags", "meta-type", "array"),
        ("stream/arg-type/addr", "tag", "type"),
        ("stream/arg-type/addr/type", "values", ["inet", "unix"]),
        ("stream/arg-type/addr/+inet/port", "json-type", "int"),
        ("stream/arg-type/addr/+unix/path", "json-type", "string"),
        ("look/ret-type/base", "json-type", "string"),
        ("look/arg-type", "members", []),
        ("note/ret-type", "members", []),
        ("RANG/arg-type/louder-than", "json-type", "int"),
        ("QUIET/arg-type", "members", []),
    ]
    for path, key, value in expected:
        entity = find(schema, path)
        assert entity is not None, path
        assert entity[key] == value, path
    assert find(schema, "stream/arg-type/addr/+inet/path") is None
    assert find(schema, "stream/arg-type/bogus") is None


# -- beside the reference -----------------------------------------------------------------------


def kind(schema: Schema, name: str) -> str:
    entity = schema[name]
    return str(entity.get("json-type", entity["meta-type"]))


async def reference_answer(folder: Path) -> Schema:
    async with qsd(folder) as path, await QmpClient.connect(path) as client:
        return {entity["name"]: entity for entity in await client.command("query-qmp-schema")}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Schema:
    return asyncio.run(reference_answer(tmp_path_factory.mktemp("qsd")))


async def test_block_stream_takes_all_that_it_takes_there(ours: Schema, theirs: Schema) -> None:
    assert find(ours, "block-stream/arg-type/base-node") == find(theirs, "block-stream/arg-type/base-node")
    own, reference = (members(schema, schema["block-stream"]["arg-type"]) for schema in (ours, theirs))
    assert own.keys() >= reference.keys()
    for name, member in reference.items():
        assert ("default" in member) == ("default" in own[name]), name
        assert kind(theirs, member["type"]) == kind(ours, own[name]["type"]), name
    policies = [find(schema, "block-stream/arg-type/on-error") for schema in (ours, theirs)]
    assert all(policy is not None and "enospc" in policy["values"] for policy in policies)


async def test_members_of_the_same_name_are_the_same(ours: Schema, theirs: Schema) -> None:
    """For every command and event that both have: what both take or tell has the same type there."""
    shared = [name for name in ours if theirs.get(name, {}).get("meta-type") in ("command", "event")]
    assert len(shared) > 30
    different = []
    for name in shared:
        for side in ("arg-type", "ret-type"):
            if side not in ours[name]:
                continue
            own, reference = find(ours, f"{name}/{side}"), find(theirs, f"{name}/{side}")
            assert own is not None
            assert reference is not None
            assert own["meta-type"] == reference["meta-type"], name
            pairs = _shared_members(ours, own, theirs, reference)
            different += [f"{name}/{side}/{path}: {what}" for path, what in pairs]
    assert different == []


def _shared_members(
    ours: Schema, own: Entity, theirs: Schema, reference: Entity
) -> Iterator[tuple[str, str]]:
    own_members, reference_members = members(ours, own["name"]), members(theirs, reference["name"])
    for path in own_members.keys() & reference_members.keys():
        own_kind = kind(ours, own_members[path]["type"])
        reference_kind = kind(theirs, reference_members[path]["type"])
        if own_kind != reference_kind:
            yield path, f"{own_kind}, there {reference_kind}"


# -- its consumers ------------------------------------------------------------------------------


async def test_qemu_qmp_reads_it(qmp_path: str, server: QmpServer[ToyContext]) -> None:
    client = QMPClient("test")
    await client.connect(qmp_path)
    reply: Any = await client.execute("query-qmp-schema")
    schema = {entity["name"]: entity for entity in reply}
    assert find(schema, "stream/arg-type/addr/+unix/path") == {
        "name": "str",
        "meta-type": "builtin",
        "json-type": "string",
    }
    await client.disconnect()


def test_it_fits_the_line_of_any_client(ours: Schema) -> None:
    """Some versions of qemu.qmp read 256 KiB a line at most."""
    assert len(pack_message(list(ours.values()))) < 256 * KIB


def test_what_may_be_left_out_is_marked_so(ours: Schema) -> None:
    """Of every command: two objects that differ in nothing else are two types."""
    for command in COMMANDS:
        if command.arguments is None:
            continue
        arguments = ours[ours[command.name]["arg-type"]]
        told = {member["name"]: "default" in member for member in arguments["members"]}
        for name, field in command.arguments.model_fields.items():
            assert told[name.replace("_", "-")] == (not field.is_required()), f"{command.name}: {name}"
    assert ours["block_stream_status"]["arg-type"] != ours["block_stream_cancel"]["arg-type"]

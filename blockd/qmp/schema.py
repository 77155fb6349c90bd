"""JSON Schema of every command and event, one document each, made from the models they are checked with.

Shape:    `commands/NAME.json` describes an object of `arguments` and `return`, `events/NAME.json` one of
          `data`; the types of objects inside stand in `$defs`.
"""

import inspect
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from pydantic import TypeAdapter
from pydantic.json_schema import JsonSchemaMode

from blockd.qmp.field_docs import describe_fields
from blockd.qmp.models import Event, Members
from blockd.qmp.table import Command, CommandTable

# JSON Schema is what pydantic says it is.
Schema: TypeAlias = dict[str, Any]

_DIALECT = "https://json-schema.org/draft/2020-12/schema"

# What `json_schema_extra` of a model may say, as pydantic knows only definitions of its own: definitions by
# name, and a reference to one of them.
DEFINITIONS = "x-definitions"
REFERENCE = "x-ref"
# Of a member: what else query-qmp-schema says of it.
FEATURES = "x-features"

_NULL: Schema = {"type": "null"}
_EMPTY_OBJECT: Schema = {"type": "object", "properties": {}, "additionalProperties": False}


def schema_documents(tables: Iterable[CommandTable[Any]], events: Iterable[type[Event]]) -> dict[Path, str]:
    """Return the text of every document by its path in the folder of schemas."""
    describe_fields(Members)
    documents = {
        Path("commands", f"{command.name}.json"): _command_schema(command)
        for table in tables
        for command in table
    }
    documents |= {Path("events", f"{event.name}.json"): _event_schema(event) for event in events}
    return {path: json.dumps(schema, indent=2) + "\n" for path, schema in documents.items()}


def differing_documents(folder: Path, documents: Mapping[Path, str]) -> list[Path]:
    """Return the documents that are missing in `folder`, are not like this in it, or should not be there."""
    found = {path.relative_to(folder): path.read_text() for path in folder.glob("*/*.json")}
    return sorted(path for path in found.keys() | documents.keys() if found.get(path) != documents.get(path))


def write_documents(folder: Path, documents: Mapping[Path, str]) -> None:
    """Make `folder` hold these documents and no others."""
    for path in differing_documents(folder, documents):
        if path not in documents:
            (folder / path).unlink()
            continue
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(documents[path])


def arguments_schema(command: Command[Any]) -> Schema:
    """Return the JSON Schema of what a command takes, with the definitions it needs."""
    return _schema(TypeAdapter(command.arguments), "validation") if command.arguments else _EMPTY_OBJECT


def result_schema(command: Command[Any]) -> Schema:
    """Return the JSON Schema of what a command returns, with the definitions it needs."""
    return _schema(command.result, "serialization") if command.result else _EMPTY_OBJECT


def data_schema(event: type[Event]) -> Schema:
    """Return the JSON Schema of an event's data, with the definitions it needs."""
    return _schema(TypeAdapter(event), "serialization")


def _command_schema(command: Command[Any]) -> Schema:
    members = {"arguments": arguments_schema(command), "return": result_schema(command)}
    return _document(command.name, inspect.getdoc(command.handler), members) | {
        "x-allow-oob": command.allow_oob
    }


def _event_schema(event: type[Event]) -> Schema:
    return _document(event.name, inspect.getdoc(event), {"data": data_schema(event)})


def _schema(adapter: TypeAdapter[Any], mode: JsonSchemaMode) -> Schema:
    schema: Schema = _without_null(adapter.json_schema(mode=mode))
    return _with_definitions(schema)


def _document(title: str, description: str | None, members: Mapping[str, Schema]) -> Schema:
    """Put the schemas of members together, with their definitions at the top, where references look."""
    definitions: Schema = {}
    for member in members.values():
        definitions |= member.get("$defs", {})
    return {
        "$schema": _DIALECT,
        "title": title,
        "description": description,
        "type": "object",
        "properties": {name: _without_definitions(member) for name, member in members.items()},
        **({"$defs": definitions} if definitions else {}),
    }


def _without_definitions(schema: Schema) -> Schema:
    return {name: value for name, value in schema.items() if name != "$defs"}


def _with_definitions(schema: Schema) -> Schema:
    """Put definitions from inside of a schema to its other ones."""
    found: Schema = {}
    resolved: Schema = _resolve(schema, found)
    return resolved | ({"$defs": resolved.get("$defs", {}) | found} if found else {})


def _resolve(schema: Any, found: Schema) -> Any:
    """Make references proper ones, and move definitions into `found`."""
    if isinstance(schema, list):
        return [_resolve(element, found) for element in schema]
    if not isinstance(schema, dict):
        return schema
    for name, definition in schema.get(DEFINITIONS, {}).items():
        found[name] = _resolve(definition, found)
    kept = {name: _resolve(value, found) for name, value in schema.items() if name != DEFINITIONS}
    return {"$ref": f"#/$defs/{kept.pop(REFERENCE)}"} | kept if REFERENCE in kept else kept


def _without_null(schema: Any) -> Any:
    """Take out null: a member that is None in code is left out on the wire, and null is refused there."""
    if isinstance(schema, list):
        return [_without_null(element) for element in schema]
    if not isinstance(schema, dict):
        return schema
    if DEFINITIONS in schema:
        return schema
    kept = {name: _without_null(value) for name, value in schema.items()}
    if "required" in kept:
        members = schema["properties"]
        kept["required"] = [name for name in kept["required"] if _NULL not in members[name].get("anyOf", [])]
    choices = [choice for choice in kept.get("anyOf", []) if choice != _NULL]
    if len(choices) == len(kept.get("anyOf", [])):
        return kept
    del kept["anyOf"]
    if kept.get("default", 0) is None:
        del kept["default"]
    return (choices[0] if len(choices) == 1 else {"anyOf": choices}) | kept

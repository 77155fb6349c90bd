"""Tables of fields as JSON Schema, so that `query-qmp-schema` tells drivers, objects and their options.

Nodes refer to nodes: the definitions below refer to each other, and `schema.py` puts them beside those of
the models.
"""

from collections.abc import Mapping

from blockd.block.options import (
    INT32_MAX,
    Array,
    Check,
    Choice,
    Field,
    Fields,
    NameOrRecord,
    Record,
    flag,
    integer,
    node,
    node_or_none,
    size,
    small_size,
    text,
)
from blockd.drivers import DRIVERS
from blockd.objects import OBJECT_TYPES
from blockd.qmp.schema import DEFINITIONS, FEATURES, REFERENCE, Schema

NODE = "BlockdevOptions"
OBJECT = "ObjectOptions"

_STRING: Schema = {"type": "string"}
_REFERENCE_TO_NODE: Schema = {"anyOf": [_STRING, {REFERENCE: NODE}]}


def node_schema(schema: Schema) -> None:
    """Make `schema` say what a node may be told: for `json_schema_extra` of a model."""
    tables = {name: driver.fields for name, driver in DRIVERS.items()}
    schema.clear()
    schema |= {REFERENCE: NODE, DEFINITIONS: _union(NODE, "driver", tables)}


def object_schema(schema: Schema) -> None:
    """Make `schema` say what an object may be told."""
    schema.clear()
    schema |= {REFERENCE: OBJECT, DEFINITIONS: _union(OBJECT, "qom-type", OBJECT_TYPES, {"id": _STRING})}


def _union(name: str, tag: str, tables: Mapping[str, Fields], shared: Schema | None = None) -> Schema:
    """The definitions of an object whose `tag` says which other members it has, besides `shared` ones."""
    variants = {
        f"{name}-{case}": _variant(tag, case, fields, shared or {}) for case, fields in tables.items()
    }
    mapping = {case: f"#/$defs/{name}-{case}" for case in tables}
    union = {
        "oneOf": [{REFERENCE: variant} for variant in variants],
        "discriminator": {"propertyName": tag, "mapping": mapping},
    }
    return {name: union, **variants}


def _variant(tag: str, case: str, fields: Fields, shared: Schema) -> Schema:
    variant = _object(fields)
    variant["properties"] = {tag: {"const": case, "type": "string"}, **shared, **variant["properties"]}
    variant["required"] = [tag, *shared, *variant["required"]]
    return variant


def _object(fields: Fields) -> Schema:
    return {
        "type": "object",
        "properties": {name: _property(field) for name, field in fields.items()},
        "required": [name for name, field in fields.items() if field.is_required],
        "additionalProperties": False,
    }


def _property(field: Field) -> Schema:
    schema = _schema_of(field.check)
    return {**schema, FEATURES: list(field.features)} if field.features else schema


def _schema_of(check: Check) -> Schema:
    match check:
        case Choice(names):
            return {"enum": list(names), "type": "string"}
        case Record(fields):
            return _object(fields)
        case NameOrRecord(name, record):
            return {"anyOf": [_schema_of(name), _schema_of(record)]}
        case Array(check_element):
            return {"type": "array", "items": _schema_of(check_element)}
    return _SIMPLE[check]


_SIMPLE: Mapping[Check, Schema] = {
    text: _STRING,
    flag: {"type": "boolean"},
    integer: {"type": "integer"},
    size: {"type": "integer", "minimum": 0},
    small_size: {"type": "integer", "minimum": 0, "maximum": INT32_MAX},
    node: _REFERENCE_TO_NODE,
    node_or_none: {"anyOf": [*_REFERENCE_TO_NODE["anyOf"], {"type": "null"}]},
}

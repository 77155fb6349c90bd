"""query-qmp-schema: what commands and events there are and what they are made of, in QEMU's terms.

It is made from the JSON Schema of the models, so what a client finds is what is checked. A client follows
names from a command through `arg-type` and members to the one it looks for; the names of types mean
nothing and differ between versions. An array's name is that of its elements in brackets.

Source:   QEMU documentation, "QAPI", "Client JSON Protocol introspection".
"""

import json
import typing
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, GetJsonSchemaHandler, JsonValue, SerializerFunctionWrapHandler, model_serializer
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from blockd.qmp.models import Members, Result
from blockd.qmp.schema import FEATURES, Schema, arguments_schema, data_schema, result_schema
from blockd.qmp.table import Command, CommandTable

_BUILTINS = {
    "string": ("str", "string"),
    "integer": ("int", "int"),
    "number": ("number", "number"),
    "boolean": ("bool", "boolean"),
    "null": ("null", "null"),
}
_ANY = ("any", "value")


class Entity(Result):
    """What every kind of entity has."""

    name: str
    """Of a command or event, its own; of a type, one without meaning."""
    features: list[str] | None = None


class BuiltinInfo(Entity):
    """A type that is not made of others."""

    meta_type: Literal["builtin"] = "builtin"
    json_type: Literal["string", "number", "int", "boolean", "null", "object", "array", "value"]


class EnumMember(Members):
    """One value of an enumeration."""

    name: str
    features: list[str] | None = None


class EnumInfo(Entity):
    """A set of strings."""

    meta_type: Literal["enum"] = "enum"
    members: list[EnumMember]
    values: list[str] = Field(json_schema_extra={FEATURES: ["deprecated"]})
    """The names of the members."""


class ArrayInfo(Entity):
    """A list."""

    meta_type: Literal["array"] = "array"
    element_type: str


class ObjectMember(Members):
    """A member of an object."""

    name: str
    type: str
    default: JsonValue = None
    """There, and null, if the member may be left out."""
    features: list[str] | None = None
    is_optional: bool = Field(False, exclude=True)

    @model_serializer(mode="wrap")
    def _with_default(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        members: dict[str, Any] = serialize(self)
        return members | {"default": None} if self.is_optional else members

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Describe the members, not the mapping that they are made into."""
        return handler(typing.cast(CoreSchema, {**core_schema, "serialization": None}))


class ObjectVariant(Members):
    """The further members of an object whose tag has a certain value."""

    case: str
    type: str


class ObjectInfo(Entity):
    """An object."""

    meta_type: Literal["object"] = "object"
    members: list[ObjectMember]
    tag: str | None = None
    """The member that says which variant it is."""
    variants: list[ObjectVariant] | None = None


class AlternateMember(Members):
    """One of the types that a value may have."""

    type: str


class AlternateInfo(Entity):
    """A value of one of several types."""

    meta_type: Literal["alternate"] = "alternate"
    members: list[AlternateMember]


class CommandEntity(Entity):
    """A command."""

    meta_type: Literal["command"] = "command"
    arg_type: str
    ret_type: str
    allow_oob: bool | None = None
    """There, and true, if the command may be run with exec-oob."""


class EventEntity(Entity):
    """An event."""

    meta_type: Literal["event"] = "event"
    arg_type: str


TypeInfo: TypeAlias = BuiltinInfo | EnumInfo | ArrayInfo | ObjectInfo | AlternateInfo
SchemaInfo: TypeAlias = Annotated[
    BuiltinInfo | EnumInfo | ArrayInfo | ObjectInfo | AlternateInfo | CommandEntity | EventEntity,
    Field(discriminator="meta_type"),
]


@lru_cache(maxsize=8)
def introspect(*tables: CommandTable[Any]) -> list[SchemaInfo]:
    """Describe the commands and events of `tables` and all types they need; takes a moment the first time."""
    types = _Types()
    entities: list[SchemaInfo] = []
    for table in tables:
        entities += [_command(command, types) for command in table]
        entities += [
            EventEntity(name=event.name, arg_type=types.name_of(data_schema(event))) for event in table.events
        ]
    return [*entities, *types]


def _command(command: Command[Any], types: "_Types") -> CommandEntity:
    return CommandEntity(
        name=command.name,
        arg_type=types.name_of(arguments_schema(command)),
        ret_type=types.name_of(result_schema(command)),
        allow_oob=command.allow_oob or None,
        features=list(command.features) or None,
    )


class _Types:
    """Turns JSON Schemas into types, each of which is there once."""

    def __init__(self) -> None:
        self._types: dict[str, TypeInfo] = {}
        # By all that makes up the type but its name.
        self._names: dict[str, str] = {}
        self._definitions: dict[str, Schema] = {}
        # Definitions that are being turned into types, and the name of each that refers to itself.
        self._unfinished: dict[str, str | None] = {}
        # The names of those that do, by their text.
        self._recursive: dict[str, str] = {}
        self._name_count = 0

    def __iter__(self) -> Iterator[TypeInfo]:
        return iter(self._types.values())

    def name_of(self, document: Schema) -> str:
        """Return the name of the type that `document` describes."""
        self._definitions = document.get("$defs", {})
        return self._name(document)

    def _name(self, schema: Schema) -> str:
        if "$ref" in schema:
            return self._referred(schema["$ref"].rpartition("/")[2])
        if "enum" in schema or "const" in schema:
            return self._enum(schema["enum"] if "enum" in schema else [schema["const"]])
        if "oneOf" in schema:
            return self._union(schema["discriminator"], schema["oneOf"])
        if "anyOf" in schema:
            members = [AlternateMember(type=self._name(choice)) for choice in schema["anyOf"]]
            return self._add(AlternateInfo(name="", members=members))
        match schema.get("type", ""):
            case "array":
                return self._array(self._name(schema["items"]))
            case "object":
                return self._object(schema)
            case kind:
                return self._builtin(*_BUILTINS.get(kind, _ANY))

    def _referred(self, definition: str) -> str:
        if definition in self._unfinished:
            name = self._unfinished[definition] or self._new_name()
            self._unfinished[definition] = name
            return name
        text = json.dumps(self._definitions[definition])
        if text in self._recursive:
            return self._recursive[text]
        self._unfinished[definition] = None
        name = self._name(self._definitions[definition])
        own_name = self._unfinished.pop(definition)
        if own_name is None:
            return name
        self._recursive[text] = own_name
        self._types[own_name] = self._types.pop(name).model_copy(update={"name": own_name})
        return own_name

    def _builtin(self, name: str, json_type: str) -> str:
        self._types.setdefault(name, BuiltinInfo.model_validate({"name": name, "json-type": json_type}))
        return name

    def _array(self, element_type: str) -> str:
        name = f"[{element_type}]"
        self._types.setdefault(name, ArrayInfo(name=name, element_type=element_type))
        return name

    def _enum(self, values: list[str]) -> str:
        return self._add(
            EnumInfo(name="", members=[EnumMember(name=value) for value in values], values=values)
        )

    def _object(self, schema: Schema) -> str:
        return self._add(ObjectInfo(name="", members=list(self._members(schema))))

    def _members(self, schema: Schema, without: Iterable[str] = ()) -> Iterator[ObjectMember]:
        required = schema.get("required", ())
        for name, member in schema.get("properties", {}).items():
            if name not in without:
                yield ObjectMember(
                    name=name,
                    type=self._name(member),
                    is_optional=name not in required,
                    features=member.get(FEATURES),
                )

    def _union(self, discriminator: Schema, choices: list[Schema]) -> str:
        """Members that all variants have stand beside the tag, the others in a type for each variant."""
        tag: str = discriminator["propertyName"]
        by_case = {
            case: self._definitions[reference.rpartition("/")[2]]
            for case, reference in discriminator["mapping"].items()
        }
        first = next(iter(by_case.values()))
        shared = [
            member
            for member in self._members(first, without=[tag])
            if all(member in list(self._members(variant, without=[tag])) for variant in by_case.values())
        ]
        shared_names = [tag, *(member.name for member in shared)]
        variants = [
            ObjectVariant(
                case=case,
                type=self._add(
                    ObjectInfo(name="", members=list(self._members(variant, without=shared_names)))
                ),
            )
            for case, variant in by_case.items()
        ]
        members = [ObjectMember(name=tag, type=self._enum(list(by_case))), *shared]
        return self._add(ObjectInfo(name="", members=members, tag=tag, variants=variants))

    def _add(self, info: TypeInfo) -> str:
        # As it is sent: there a member that may be left out differs from one that may not.
        content = json.dumps(info.model_dump(mode="json", exclude_none=True))
        if content not in self._names:
            name = self._names[content] = self._new_name()
            self._types[name] = info.model_copy(update={"name": name})
        return self._names[content]

    def _new_name(self) -> str:
        self._name_count += 1
        return str(self._name_count)

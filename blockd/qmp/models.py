"""What QMP's arguments, results and events are made of: pydantic models with dashed member names.

A field `on_error` is the member `on-error`. Input is taken by the dashed name only, code constructs by
field name. Types are strict: `"5"`, `5.0` and `true` are not integers.
"""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

from blockd.wire.qmp import Value

# The validation context of `Arguments.from_wire`, and what stands for null there: of no type at all.
_FROM_WIRE = object()
_NULL = object()

Int64 = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]


def _uint32(value: object) -> object:
    """QEMU tells the mistakes of its unsigned types in words of their own."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise PydanticCustomError("expects", "uint64")
    if not 0 <= value < 1 << 32:
        raise PydanticCustomError("expects", "uint32_t")
    return value


UInt32 = Annotated[int, Field(ge=0, lt=1 << 32), BeforeValidator(_uint32)]
NonNegative = Annotated[int, Field(ge=0, lt=1 << 63)]


def _dashed(name: str) -> str:
    return name.replace("_", "-")


class Members(BaseModel):
    """An object with dashed member names; also the type of objects inside arguments and results.

    An optional member that is None is left out of what is sent.
    """

    model_config = ConfigDict(
        defer_build=True,
        strict=True,
        extra="forbid",
        frozen=True,
        alias_generator=_dashed,
        validate_by_name=True,
        validate_by_alias=True,
        serialize_by_alias=True,
        json_schema_serialization_defaults_required=True,
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_null(cls, members: object, info: ValidationInfo) -> object:
        """Make a client's null fail the type check of its field, for to code None means "left out"."""
        if info.context is not _FROM_WIRE or not isinstance(members, dict):
            return members
        named = {field.alias for field in cls.model_fields.values()}
        return {name: _NULL if value is None and name in named else value for name, value in members.items()}


class Arguments(Members):
    """The arguments of a command; `extra="allow"` in a subclass takes members it does not name."""

    @classmethod
    def from_wire(cls, members: Mapping[str, Value]) -> Self:
        """Check what a client sent: names are the dashed ones, and null is not a missing member.

        Raises:   ValidationError: see `errors.argument_error`.
        """
        return cls.model_validate(members, by_alias=True, by_name=False, context=_FROM_WIRE)


class Result(Members):
    """What a command returns, or an element of the list it returns."""


class Event(Members):
    """Something that happened; its fields are the event's data, and subclasses set `name`.

    class BlockSwitched(Event):
        name: ClassVar[str] = "BLOCK_SWITCHED"
        device: str
    """

    name: ClassVar[str]

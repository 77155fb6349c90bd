"""Errors at the QMP border: which class an error has, and QEMU's words for wrong arguments."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from blockd.errors import BlockdError, ErrorKind, RequestError
from blockd.wire.qmp import LongText, Value

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic_core import ErrorDetails

# Everything else is GenericError.
QMP_CLASSES: Mapping[ErrorKind, str] = {
    ErrorKind.COMMAND_NOT_FOUND: "CommandNotFound",
    ErrorKind.DEVICE_NOT_FOUND: "DeviceNotFound",
    ErrorKind.DEVICE_IN_USE: "DeviceInUse",
    ErrorKind.DEVICE_NOT_ACTIVE: "DeviceNotActive",
    ErrorKind.NOT_SUPPORTED: "NotSupported",
}

# pydantic's error type -> what QEMU says it expected.
_EXPECTED = {
    "int_type": "integer",
    "int_from_float": "integer",
    "less_than": "integer",
    "string_type": "string",
    "bool_type": "boolean",
    "float_type": "number",
    "list_type": "array",
    "dict_type": "object",
    "model_type": "object",
    "model_attributes_type": "object",
}


def error_object(error: BlockdError) -> dict[str, Value]:
    """Return the `error` member of a reply."""
    return {"class": QMP_CLASSES.get(error.kind, "GenericError"), "desc": error.message}


def argument_error(error: "ValidationError", arguments: Mapping[str, Value]) -> RequestError:
    """Say in QEMU's words what is wrong with `arguments`; the first fault is the one reported."""
    return RequestError(_describe(error.errors(include_url=False)[0], arguments))


def _describe(fault: "ErrorDetails", arguments: Mapping[str, Value]) -> str:
    kind, given, context = fault["type"], fault["input"], fault.get("ctx", {})
    location = _without_tags(fault["loc"], arguments)
    name = _dotted(location)
    if isinstance(given, LongText):
        return f"Parameter '{name}' is too long"
    match kind:
        case "missing":
            return f"Parameter '{name}' is missing"
        case "extra_forbidden":
            return f"Parameter '{name}' is unexpected"
        case "union_tag_not_found":
            return f"Parameter '{_dotted((*location, _tag_name(context)))}' is missing"
        case "union_tag_invalid":
            tag = _tag_name(context)
            if not isinstance(given[tag], str):
                return f"Invalid parameter type for '{_dotted((*location, tag))}', expected: string"
            return f"Parameter '{tag}' does not accept value '{given[tag]}'"
        case "literal_error" | "enum":
            if isinstance(given, str):
                return f"Parameter '{_innermost(location)}' does not accept value '{given}'"
            return f"Invalid parameter type for '{name}', expected: string"
        case "greater_than_equal" if context["ge"] == 0:
            return f"Parameter '{_innermost(location)}' expects a non-negative value"
        case "expects":
            return f"Parameter '{name}' expects {fault['msg']}"
        case "value_error":
            return str(context["error"])
    if kind in _EXPECTED:
        return f"Invalid parameter type for '{name}', expected: {_EXPECTED[kind]}"
    return f"Parameter '{name}' is not valid: {fault['msg']}"


def _tag_name(context: Mapping[str, str]) -> str:
    return context["discriminator"].strip("'")


def _without_tags(location: Sequence[int | str], arguments: Mapping[str, Value]) -> tuple[int | str, ...]:
    """Leave out the union tags that pydantic puts between the members of a location."""
    path: list[int | str] = []
    value: Value = dict(arguments)
    for step in location[:-1]:
        if isinstance(value, dict) and step in value:
            value = value[str(step)]
        elif isinstance(value, list) and isinstance(step, int):
            value = value[step]
        else:
            continue
        path.append(step)
    return (*path, *location[-1:])


def _dotted(location: Sequence[int | str]) -> str:
    text = ""
    for step in location:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text


def _innermost(location: Sequence[int | str]) -> str:
    """Name the last member of `location`, with its index: for values QEMU does not give the whole path."""
    start = len(location) - 1
    while start > 0 and isinstance(location[start], int):
        start -= 1
    return _dotted(location[start:])

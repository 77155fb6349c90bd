"""Objects: adding and removing them, looking at one, and changing the limits of a throttle group.

The `qom-*` commands are QEMU's way to do the latter; they know no more than that takes. Objects have
paths: ``/objects/ID``, or just ``ID``.
"""

from pydantic import ConfigDict, JsonValue

from blockd.block.options import Place, record
from blockd.commands.context import Services
from blockd.commands.field_schemas import object_schema
from blockd.commands.topic import Table
from blockd.errors import ErrorKind, RequestError
from blockd.filters.throttle_group import NO_LIMITS, ThrottleGroup
from blockd.objects import LIMIT_PREFIX, LIMITS, Object, check_object
from blockd.qmp.models import Arguments, Result

TABLE: Table = Table()

_CONTAINER = "objects"


class ObjectAddArguments(Arguments):
    """An object; which other members there are depends on its type."""

    model_config = ConfigDict(extra="allow", json_schema_extra=object_schema)

    qom_type: str
    """``throttle-group``, ``secret``, ``tls-creds-x509`` or ``iothread``."""
    id: str


@TABLE.command("object-add")
async def object_add(services: Services, arguments: ObjectAddArguments) -> None:
    """Define an object that nodes and servers can refer to by its id."""
    options = arguments.model_dump(by_alias=True, exclude_unset=True)
    await services.objects.add(check_object(options, is_text=False))


class ObjectDelArguments(Arguments):
    """Which object."""

    id: str


@TABLE.command("object-del")
async def object_del(services: Services, arguments: ObjectDelArguments) -> None:
    """Remove an object that nobody uses."""
    services.objects.remove(arguments.id)


# -- looking at objects ------------------------------------------------------------------------


class QomListArguments(Arguments):
    """Where to look."""

    path: str


class ObjectPropertyInfo(Result):
    """One property of an object, or what stands below a path."""

    name: str
    type: str


class QomGetArguments(QomListArguments):
    """Which property of which object."""

    property: str


class QomSetArguments(QomGetArguments):
    """Which property of which object, and its new value."""

    value: JsonValue


@TABLE.command("qom-list")
async def qom_list(services: Services, arguments: QomListArguments) -> list[ObjectPropertyInfo]:
    """List the properties of an object, or what stands below a path."""
    types = {"type": "string"}
    match _parts(services, arguments.path):
        case []:
            types[_CONTAINER] = "child<container>"
        case [_]:
            types |= {object_id: f"child<{found.type}>" for object_id, found in services.objects}
        case [_, object_id]:
            types |= _property_types(_object(services, object_id, arguments.path))
    return [ObjectPropertyInfo(name=name, type=type_name) for name, type_name in types.items()]


def _property_types(found: Object) -> dict[str, str]:
    if found.throttle_group is None:
        return {}
    return {"limits": "ThrottleLimits", **{LIMIT_PREFIX + name: "int" for name in NO_LIMITS}}


@TABLE.command("qom-get")
async def qom_get(services: Services, arguments: QomGetArguments) -> JsonValue:
    """Tell the value of a property of an object."""
    found = _found(services, arguments)
    values: dict[str, JsonValue] = {"type": found.type}
    if found.throttle_group is not None:
        limits = found.throttle_group.limits
        values |= {"limits": dict(limits), **{LIMIT_PREFIX + name: limits[name] for name in limits}}
    if arguments.property not in values:
        raise RequestError(f"Property '{found.type}.{arguments.property}' not found")
    return values[arguments.property]


@TABLE.command("qom-set")
async def qom_set(services: Services, arguments: QomSetArguments) -> None:
    """Change the ``limits`` of a throttle group, from now on; limits that are not given stay."""
    found = _found(services, arguments)
    if arguments.property == "type":
        raise RequestError(f"Property '{found.type}.type' is not writable")
    if found.throttle_group is None or arguments.property not in _property_types(found):
        raise RequestError(f"Property '{found.type}.{arguments.property}' not found")
    if arguments.property != "limits":
        raise RequestError("Property cannot be set after initialization")
    _set_limits(found.throttle_group, arguments.value)


def _set_limits(group: ThrottleGroup, value: JsonValue) -> None:
    limits = record(LIMITS)(value, Place({}, is_text=False, path="limits"))
    assert isinstance(limits, dict)
    group.set_limits(limits)


def _found(services: Services, arguments: QomGetArguments) -> Object:
    match _parts(services, arguments.path):
        case [_, object_id]:
            return _object(services, object_id, arguments.path)
        case _:
            return Object("container")


def _parts(services: Services, path: str) -> list[str]:
    """The steps of a path from the root on."""
    parts = [part for part in path.split("/") if part]
    if not path.startswith("/") and len(parts) == 1 and services.objects.get(parts[0]) is not None:
        return [_CONTAINER, *parts]
    if len(parts) > 2 or parts[:1] not in ([], [_CONTAINER]) or not path:
        raise _not_found(path)
    return parts


def _object(services: Services, object_id: str, path: str) -> Object:
    found = services.objects.get(object_id)
    if found is None:
        raise _not_found(path)
    return found


def _not_found(path: str) -> RequestError:
    return RequestError(f"Device '{path}' not found", kind=ErrorKind.DEVICE_NOT_FOUND)

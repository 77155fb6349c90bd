"""What nodes may be told: BlockdevOptions as tables of checks, with QEMU's words for what is wrong.

A driver has a table of fields; each field has a check that returns the value as it is to be used or
raises. The same tables serve QMP, where values have JSON's types, and the command line, where every
value was written as a string (`is_text`), and `query-qmp-schema`, which shows them
(`commands/field_schemas.py`). Nested nodes are checked along with the node around them, so that nothing
is opened before all of it is known to make sense.

Raises:   RequestError, from everything in here: what is wrong with which option; nothing happened.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from blockd.errors import RequestError
from blockd.units import parse_size

# Nodes inside nodes; more is a mistake or an attack.
NESTING_MAX = 64
# Elements of one list.
ELEMENT_COUNT_MAX = 1024

_INTEGER_MIN, _INTEGER_MAX = -(1 << 63), (1 << 63) - 1
INT32_MAX = (1 << 31) - 1
FLAGS = {
    "on": True,
    "yes": True,
    "true": True,
    "y": True,
    "off": False,
    "no": False,
    "false": False,
    "n": False,
}

Options = dict[str, object]


class Place(NamedTuple):
    """Where a value stands: the dotted path to it, and how it was written."""

    drivers: Mapping[str, "Fields"]
    is_text: bool
    path: str = ""
    nesting: int = 0

    def member(self, name: str) -> "Place":
        return self._replace(path=f"{self.path}.{name}" if self.path else name)

    def element(self, index: int) -> "Place":
        return self._replace(path=f"{self.path}.{index}" if self.is_text else f"{self.path}[{index}]")

    @property
    def name(self) -> str:
        """The last step of the path: all that QEMU says about a value outside a set of names."""
        return self.path.rpartition(".")[2]

    def mistyped(self, expected: str) -> RequestError:
        return RequestError(f"Invalid parameter type for '{self.path}', expected: {expected}")


Check = Callable[[object, Place], object]


class Field(NamedTuple):
    """One option of a driver."""

    check: Check
    is_required: bool = False
    # What `query-qmp-schema` says of it besides, such as ``deprecated``.
    features: tuple[str, ...] = ()


Fields = Mapping[str, Field]


def check_options(
    options: Mapping[str, object], drivers: Mapping[str, Fields], *, is_text: bool, path: str = ""
) -> Options:
    """Check the options of a node and of all nodes inside it, and return them with JSON's types."""
    return _check_node(options, Place(drivers, is_text, path))


def _check_node(options: Mapping[str, object], place: Place) -> Options:
    if place.nesting > NESTING_MAX:
        raise RequestError(f"More than {NESTING_MAX} nodes inside each other")
    at = place.member("driver")
    if "driver" not in options:
        raise RequestError(f"Parameter '{at.path}' is missing")
    driver = text(options["driver"], at)
    if driver not in place.drivers:
        raise RequestError(f"Parameter 'driver' does not accept value '{driver}'")
    return {"driver": driver, **_check_fields(options, place.drivers[driver], place, {"driver"})}


def check_fields(options: Mapping[str, object], fields: Fields, *, is_text: bool) -> Options:
    """Check options that belong to no node, such as those of a new image."""
    return _check_fields(options, fields, Place({}, is_text))


def _check_fields(
    options: Mapping[str, object], fields: Fields, place: Place, done: set[str] | None = None
) -> Options:
    checked: Options = {}
    for name, field in fields.items():
        if name in options:
            checked[name] = field.check(options[name], place.member(name))
        elif field.is_required:
            raise RequestError(f"Parameter '{place.member(name).path}' is missing")
    for name in options:
        if name not in fields and name not in (done or ()):
            raise RequestError(f"Parameter '{place.member(name).path}' is unexpected")
    return checked


def flattened(options: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """All single options with their dotted names, as on a command line."""
    for name, value in options.items():
        match value:
            case dict():
                yield from flattened(value, f"{prefix}{name}.")
            case list():
                yield from flattened(
                    {str(number): element for number, element in enumerate(value)}, f"{prefix}{name}."
                )
            case _:
                yield f"{prefix}{name}", value


# -- checks -----------------------------------------------------------------------------------


def text(value: object, place: Place) -> str:
    """A string."""
    if not isinstance(value, str):
        raise place.mistyped("string")
    return value


def flag(value: object, place: Place) -> bool:
    """A boolean; ``on`` or ``off`` on the command line."""
    if place.is_text and isinstance(value, str):
        if value not in FLAGS:
            raise RequestError(f"Parameter '{place.path}' expects 'on' or 'off'")
        return FLAGS[value]
    if not isinstance(value, bool):
        raise place.mistyped("boolean")
    return value


def integer(value: object, place: Place) -> int:
    """A 64-bit integer."""
    if place.is_text and isinstance(value, str):
        try:
            value = int(value)
        except ValueError:
            raise RequestError(f"Parameter '{place.path}' expects integer") from None
    if not isinstance(value, int) or isinstance(value, bool) or not _INTEGER_MIN <= value <= _INTEGER_MAX:
        raise place.mistyped("integer")
    return value


def size(value: object, place: Place) -> int:
    """A number of bytes; with a suffix such as k or M on the command line."""
    if place.is_text and isinstance(value, str):
        try:
            value = parse_size(value)
        except ValueError:
            raise RequestError(
                f"Parameter '{place.path}' expects a non-negative number below 2^64, optionally with one of "
                "the suffixes k, M, G, T, P and E"
            ) from None
    number = integer(value, place)
    if number < 0:
        raise RequestError(f"Parameter '{place.path}' expects a non-negative number below 2^64")
    return number


def small_size(value: object, place: Place) -> int:
    """A number of bytes below 2 GiB."""
    number = size(value, place)
    if number > INT32_MAX:
        raise RequestError(f"Parameter '{place.path}' expects int32_t")
    return number


@dataclass(frozen=True)
class Choice:
    """One of a set of names."""

    names: tuple[str, ...]

    def __call__(self, value: object, place: Place) -> str:
        chosen = text(value, place)
        if chosen not in self.names:
            raise RequestError(f"Parameter '{place.name}' does not accept value '{chosen}'")
        return chosen


def choice(*names: str) -> Check:
    """One of a set of names."""
    return Choice(names)


@dataclass(frozen=True)
class Record:
    """An object with fields of its own."""

    fields: Fields

    def __call__(self, value: object, place: Place) -> Options:
        if not isinstance(value, dict):
            raise place.mistyped("object")
        return _check_fields(value, self.fields, place)


def record(fields: Fields) -> Check:
    """An object with fields of its own."""
    return Record(fields)


@dataclass(frozen=True)
class Array:
    """A list of values that are all checked alike."""

    check_element: Check

    def __call__(self, value: object, place: Place) -> list[object]:
        if not isinstance(value, list):
            raise place.mistyped("array")
        if len(value) > ELEMENT_COUNT_MAX:
            raise RequestError(f"Parameter '{place.path}' has more than {ELEMENT_COUNT_MAX} elements")
        return [self.check_element(element, place.element(index)) for index, element in enumerate(value)]


@dataclass(frozen=True)
class NameOrRecord:
    """One of a set of names, or an object with fields of its own."""

    name: Choice
    record: Record

    def __call__(self, value: object, place: Place) -> str | Options:
        return self.record(value, place) if isinstance(value, dict) else self.name(value, place)


def array(check_element: Check) -> Check:
    """A list of values that are all checked alike."""
    return Array(check_element)


def node(value: object, place: Place) -> str | Options:
    """The name of a node that exists, or the options of one to open."""
    if isinstance(value, str):
        return value
    if not isinstance(value, dict):
        raise place.mistyped("BlockdevRef")
    return _check_node(value, place._replace(nesting=place.nesting + 1))


def node_or_none(value: object, place: Place) -> str | Options | None:
    """Like `node`, or null for none at all, for which blockdev-add takes "" too."""
    if value is None:
        return None
    if not isinstance(value, str | dict):
        raise place.mistyped("BlockdevRefOrNull")
    return node(value, place)

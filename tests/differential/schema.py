"""What two answers to query-qmp-schema say of the commands and events that both have, where they differ.

A place is written as QEMU documents it: `command/arg-type/member/+case/member`. Types stand in many places;
each pair of them is compared in the first.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

Entity = dict[str, Any]


class Finding(NamedTuple):
    """Where, whether the other one `lacks` or `adds` it or `differs`, and the name of what it is."""

    place: str
    verb: str
    name: str


class Schema:
    """The entities by name."""

    def __init__(self, entities: Iterable[Entity]) -> None:
        self.entities = {entity["name"]: entity for entity in entities}

    def names(self, meta_type: str) -> set[str]:
        return {name for name, entity in self.entities.items() if entity["meta-type"] == meta_type}

    def kind(self, name: str) -> str:
        entity = self.entities[name]
        return str(entity.get("json-type", entity["meta-type"]))

    def inner(self, name: str) -> Entity:
        """The type itself, or of an array what it is made of."""
        entity = self.entities[name]
        return self.inner(entity["element-type"]) if entity["meta-type"] == "array" else entity


class Comparison:
    """Theirs and ours, and which types were compared already."""

    def __init__(self, theirs: Schema, ours: Schema) -> None:
        self._theirs, self._ours = theirs, ours
        self._seen: set[tuple[str, str]] = set()

    def findings(self) -> Iterator[Finding]:
        """All differences within the commands and events that both have."""
        faces = self._theirs.names("command") | self._theirs.names("event")
        for name in sorted(faces & self._ours.entities.keys()):
            their_face, our_face = self._theirs.entities[name], self._ours.entities[name]
            yield from _features(name, their_face, our_face)
            for side in ("arg-type", "ret-type"):
                if side in their_face:
                    yield from self._types(f"{name}/{side}", their_face[side], our_face[side])

    def _types(self, place: str, their_type: str, our_type: str) -> Iterator[Finding]:
        theirs, ours = self._theirs.inner(their_type), self._ours.inner(our_type)
        pair = (theirs["name"], ours["name"])
        if pair in self._seen:
            return
        self._seen.add(pair)
        their_kind, our_kind = self._theirs.kind(their_type), self._ours.kind(our_type)
        if their_kind != our_kind:
            yield Finding(place, "differs", f"{their_kind}, {our_kind}")
            return
        match theirs["meta-type"]:
            case "enum":
                yield from _names(place, theirs["values"], ours["values"])
                their_values, our_values = ({m["name"]: m for m in e["members"]} for e in (theirs, ours))
                for name in sorted(their_values.keys() & our_values.keys()):
                    yield from _features(f"{place}/{name}", their_values[name], our_values[name])
            case "object":
                yield from self._objects(place, theirs, ours)
            case "alternate":
                yield from self._alternates(place, theirs, ours)

    def _objects(self, place: str, theirs: Entity, ours: Entity) -> Iterator[Finding]:
        their_members, our_members = ({m["name"]: m for m in entity["members"]} for entity in (theirs, ours))
        yield from _names(place, their_members, our_members)
        yield from _features(place, theirs, ours)
        for name in sorted(their_members.keys() & our_members.keys()):
            yield from _features(f"{place}/{name}", their_members[name], our_members[name])
            is_required = "default" not in our_members[name] and "default" in their_members[name]
            if is_required and "/arg-type" in place:
                yield Finding(f"{place}/{name}", "differs", "may be left out there only")
            types = (members[name]["type"] for members in (their_members, our_members))
            yield from self._types(f"{place}/{name}", *types)
        # Which variants there are is told by the names that the tag can have.
        their_cases, our_cases = (
            {v["case"]: v["type"] for v in e.get("variants", [])} for e in (theirs, ours)
        )
        for case in sorted(their_cases.keys() & our_cases.keys()):
            yield from self._types(f"{place}/+{case}", their_cases[case], our_cases[case])
        if their_cases and not our_cases:
            # The members of our only variant stand beside the tag.
            [case] = self._ours.entities[our_members[theirs["tag"]]["type"]]["values"]
            members = {m["name"] for m in self._theirs.entities[their_cases[case]]["members"]}
            yield from (
                Finding(f"{place}/+{case}", "lacks", name) for name in sorted(members - our_members.keys())
            )

    def _alternates(self, place: str, theirs: Entity, ours: Entity) -> Iterator[Finding]:
        their_kinds, our_kinds = (
            {schema.kind(member["type"]): member["type"] for member in entity["members"]}
            for schema, entity in ((self._theirs, theirs), (self._ours, ours))
        )
        yield from _names(place, their_kinds, our_kinds)
        for kind in sorted(their_kinds.keys() & our_kinds.keys()):
            yield from self._types(place, their_kinds[kind], our_kinds[kind])


def _features(place: str, theirs: Entity, ours: Entity) -> Iterator[Finding]:
    """Features are written with a dollar before the name, as libvirt does."""
    yield from _names(
        place, *([f"${name}" for name in entity.get("features", [])] for entity in (theirs, ours))
    )


def _names(place: str, theirs: Iterable[str], ours: Iterable[str]) -> Iterator[Finding]:
    yield from (Finding(place, "lacks", name) for name in sorted({*theirs} - {*ours}))
    yield from (Finding(place, "adds", name) for name in sorted({*ours} - {*theirs}))

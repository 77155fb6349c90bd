"""The recorded state as plain JSON values, and what differs between two moments: what the journal is made of.

Most of the state is tables of records, each record with a key. What changes is recorded by table: the records
that are new or different, and the keys that are gone. Everything else is a value that changes as a whole.
A record that is replaced keeps its place, a new one comes last.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Json = Any
Key = Callable[[Json], str]

# How a record is told from the others of its table.
TABLES: Mapping[str, Key] = {
    "nodes": lambda record: str(record["options"]["node-name"]),
    "devices": lambda record: str(record["name"]),
    "exports": lambda record: str(record["id"]),
    "jobs": lambda record: str(record["id"]),
    "allowed-files": str,
}


@dataclass
class Changes:
    """What is to be set, in tables and of other values, and which records are gone."""

    records: dict[str, dict[str, Json]] = field(default_factory=dict)
    gone: dict[str, dict[str, None]] = field(default_factory=dict)
    values: dict[str, Json] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.records or self.gone or self.values)

    def members(self) -> dict[str, Json]:
        """As an object to be written."""
        return {
            "set": {table: [*records.values()] for table, records in self.records.items()},
            "gone": {table: [*keys] for table, keys in self.gone.items()},
            "values": self.values,
        }

    @classmethod
    def parse(cls, members: Mapping[str, Json]) -> "Changes":
        """What `members` has written."""
        records = {
            table: {TABLES[table](record): record for record in records}
            for table, records in members["set"].items()
        }
        gone = {table: dict.fromkeys(keys) for table, keys in members["gone"].items()}
        return cls(records, gone, dict(members["values"]))


class RecordedState:
    """The whole state, to which changes are made one after the other."""

    def __init__(self, members: Mapping[str, Json]) -> None:
        self.tables = {
            table: {key(record): record for record in members.get(table, ())} for table, key in TABLES.items()
        }
        self.values = {name: value for name, value in members.items() if name not in TABLES}

    def members(self) -> dict[str, Json]:
        """As an object to be written."""
        return {**{table: [*records.values()] for table, records in self.tables.items()}, **self.values}

    def set(self, changes: Changes, table: str, key: str, record: Json) -> None:
        """Make a record what it is now (None: it is gone), and note that if it was different."""
        if self.tables[table].get(key) == record:
            return
        if record is None:
            changes.gone.setdefault(table, {})[key] = None
            changes.records.get(table, {}).pop(key, None)
            del self.tables[table][key]
        else:
            # One that was gone meanwhile stays so in the changes: it comes last now.
            changes.records.setdefault(table, {})[key] = record
            self.tables[table][key] = record

    def set_value(self, changes: Changes, name: str, value: Json) -> None:
        """The same for what is not in a table."""
        if self.values.get(name) != value:
            self.values[name] = changes.values[name] = value

    def become(self, changes: Changes, members: Mapping[str, Json]) -> None:
        """Make all of it what `members` are, and note what was different."""
        new = RecordedState(members)
        for table, records in new.tables.items():
            for key in [*self.tables[table].keys() - records.keys(), *records]:
                self.set(changes, table, key, records.get(key))
        for name in {**self.values, **new.values}:
            self.set_value(changes, name, new.values.get(name))

    def apply(self, changes: Changes) -> None:
        """Make changes that were recorded."""
        for table, keys in changes.gone.items():
            for key in keys:
                self.tables[table].pop(key, None)
        for table, records in changes.records.items():
            self.tables[table].update(records)
        self.values.update(changes.values)

"""Which line of a TOML file says what, for errors; the parser itself forgets it.

The file is cut into statements: as few lines as make a document on their own. Each of them, a table header or
a `key = value`, is parsed for itself, which tells the path that it gives a value to.
"""

import tomllib
from collections.abc import Iterator

Path = tuple[str | int, ...]


class ConfigLines:
    """The line of each table and key of a valid TOML document."""

    def __init__(self, text: str) -> None:
        self._lines: dict[Path, int] = {}
        # How many tables each array of tables has so far.
        self._counts: dict[Path, int] = {}
        table: Path = ()
        for line, statement in _statements(text):
            if statement.lstrip().startswith("["):
                table = self._header(tomllib.loads(statement), line)
            else:
                self._keys(tomllib.loads(statement), table, line)

    def find(self, path: Path) -> int:
        """The line of a key, or of the innermost table around it that has one."""
        while path and path not in self._lines:
            path = path[:-1]
        return self._lines.get(path, 1)

    def _header(self, value: object, line: int) -> Path:
        path: Path = ()
        while True:
            if isinstance(value, list):
                self._counts[path] = self._counts.get(path, 0) + 1
                value = value[0]
            self._lines.setdefault(path, line)
            if path in self._counts:
                path = (*path, self._counts[path] - 1)
                self._lines.setdefault(path, line)
            if not isinstance(value, dict) or not value:
                return path
            ((name, value),) = value.items()
            path = (*path, name)

    def _keys(self, value: object, path: Path, line: int) -> None:
        self._lines.setdefault(path, line)
        if isinstance(value, dict):
            for name, member in value.items():
                self._keys(member, (*path, name), line)
        elif isinstance(value, list):
            for index, element in enumerate(value):
                self._keys(element, (*path, index), line)


def _statements(text: str) -> Iterator[tuple[int, str]]:
    pending: list[str] = []
    first = 1
    for number, line in enumerate(text.splitlines(), 1):
        if not pending:
            first = number
        pending.append(line)
        statement = "\n".join(pending)
        if _is_document(statement):
            yield first, statement
            pending = []


def _is_document(text: str) -> bool:
    try:
        tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return False
    return True

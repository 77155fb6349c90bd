"""Changes in the journal: one is there as a whole or not at all, whatever a crash leaves of it."""

import errno
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from blockd.daemon import journal as journal_text
from blockd.daemon import state_dir
from blockd.daemon.changes import Changes, Json, RecordedState
from blockd.daemon.journal import checksum_of, parse_journal
from blockd.daemon.state_dir import JOURNAL, NEW_JOURNAL, StateDir
from blockd.errors import ImageError, StorageError
from tests.state.full_disk import FullDisk

SECTOR = 512
BASE = {"devices": [{"name": "vda", "node": "a"}], "exports": [], "nodes": [], "jobs": [], "given": {}}
NAMES = ["vdb", "vdc", "vdd"]


class Crash(Exception):
    """The process ends here."""


def change(state: RecordedState, name: str, changes: Changes | None = None) -> Changes:
    """Add a device to a state, and take the first one away if there are two."""
    changes = Changes() if changes is None else changes
    if len(state.tables["devices"]) > 1:
        state.set(changes, "devices", next(iter(state.tables["devices"])), None)
    state.set(changes, "devices", name, {"name": name, "node": f"node-of-{name}" * 40})
    state.set_value(changes, "given", {"option": name})
    return changes


def refuse_whole() -> Json:
    raise AssertionError("a line is enough")


def append(directory: StateDir, changes: Changes) -> None:
    directory.prepare(changes, refuse_whole)
    directory.publish()
    directory.sync()


class Journal:
    """A journal with changes, and the state after each of them."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "state" / JOURNAL
        self.directory = StateDir.open(str(folder / "state"))
        self.state = RecordedState(BASE)
        self.directory.write_new(self.state.members())
        self.directory.publish()
        self.directory.sync()
        self.states = [self.content()]
        self.ends = [self.path.stat().st_size]
        for name in NAMES:
            append(self.directory, change(self.state, name))
            self.states.append(self.content())
            self.ends.append(self.path.stat().st_size)

    def content(self) -> Any:
        return json.loads(json.dumps(self.state.members()))

    def read(self) -> Any:
        return parse_journal(self.path.read_bytes(), JOURNAL).state


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path)


def test_changes_are_read_again(journal: Journal) -> None:
    assert journal.read() == journal.states[-1]
    assert journal.directory.has_changes
    journal.directory.close()
    assert StateDir.open(str(journal.path.parent)).load() == journal.states[-1]


def test_what_is_torn_anywhere_is_left_out(journal: Journal) -> None:
    """At every byte of the last change: cut off there, zero from there on, or zero up to there."""
    whole = journal.path.read_bytes()
    *_, before, last = journal.states
    start, end = journal.ends[-2:]
    for position in range(start, end):
        rest = end - position
        for torn in (
            whole[:position],
            whole[:position] + bytes(rest),
            whole[:start] + bytes(position - start) + whole[position:],
        ):
            journal.path.write_bytes(torn)
            # All of it may be there but for the ends of lines around it.
            is_there = whole[start:end].strip() in torn
            assert journal.read() == before or (is_there and journal.read() == last), position
    journal.path.write_bytes(whole)
    assert journal.read() == last


@pytest.mark.parametrize("seed", range(50))
def test_any_sectors_of_the_last_change_may_be_missing(journal: Journal, seed: int) -> None:
    rng = random.Random(seed)
    torn = bytearray(journal.path.read_bytes())
    *_, before, last = journal.states
    for start in range(journal.ends[-2] // SECTOR * SECTOR, len(torn), SECTOR):
        if rng.random() < 0.5:
            begin = max(start, journal.ends[-2])
            torn[begin : start + SECTOR] = bytes(len(torn[begin : start + SECTOR]))
    is_whole = bytes(torn) == journal.path.read_bytes()
    journal.path.write_bytes(torn)
    assert journal.read() == (last if is_whole else before)


def test_what_is_damaged_in_the_middle_is_found_out(journal: Journal) -> None:
    """It was acknowledged: to go on without it would be to guess."""
    whole = journal.path.read_bytes()
    for position in range(journal.ends[0], journal.ends[-2]):
        journal.path.write_bytes(whole[:position] + b"#" + whole[position + 1 :])
        with pytest.raises(ImageError, match="damaged, a change in it has a wrong checksum: bring"):
            journal.read()
    first, second = (whole[start:end] for start, end in zip(journal.ends[:2], journal.ends[1:3], strict=True))
    for lines in (second, second + first, first + first):
        journal.path.write_bytes(whole[: journal.ends[0]] + lines)
        with pytest.raises(ImageError, match="is damaged, a change is missing in it: bring it back"):
            journal.read()


def test_changes_of_another_journal_are_not_taken(journal: Journal, tmp_path: Path) -> None:
    other = RecordedState({**BASE, "given": {"another": "one"}})
    directory = StateDir.open(str(tmp_path / "other"))
    directory.write_new(other.members())
    directory.publish()
    directory.sync()
    path = tmp_path / "other" / JOURNAL
    path.write_bytes(path.read_bytes() + journal.path.read_bytes()[journal.ends[0] :])
    assert parse_journal(path.read_bytes(), JOURNAL).state == other.members()


def test_what_older_versions_have_written_is_read(tmp_path: Path) -> None:
    found = {"blockd-journal": 1, "sha256": checksum_of(BASE), "state": BASE}
    (tmp_path / "state").mkdir(0o700)
    (tmp_path / "state" / JOURNAL).write_text(json.dumps(found, indent=1))
    assert StateDir.open(str(tmp_path / "state")).load() == BASE


def test_long_changes_make_the_journal_be_written_as_a_whole(journal: Journal) -> None:
    count = 0
    while not journal.directory.needs_whole:
        append(journal.directory, change(journal.state, f"vd{count}"))
        count += 1
    assert journal.read() == journal.content()
    assert journal.path.stat().st_size > journal_text.CHANGES_LENGTH_MIN
    journal.directory.write_new(journal.state.members())
    journal.directory.publish()
    journal.directory.sync()
    assert not (journal.directory.needs_whole or journal.directory.has_changes)
    assert journal.path.stat().st_size < journal_text.CHANGES_LENGTH_MIN // 10
    assert journal.read() == journal.content()
    append(journal.directory, change(journal.state, "last"))
    assert journal.read() == journal.content()


# -- crashes and errors between any two steps --------------------------------------------------


class Steps:
    """Stands in for `os`: the step with `number` ends badly, a write half done.

    `to_the_end`: so do all later ones.
    """

    def __init__(self, number: int, failure: Exception, *, to_the_end: bool = False) -> None:
        self.taken: list[str] = []
        self._number = number
        self._to_the_end = to_the_end
        self._failure = failure

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in ("open", "write", "pwrite", "fsync", "close", "rename", "ftruncate"):
            return real

        def step(*arguments: Any, **named: Any) -> object:
            self.taken.append(name)
            # Who has ended does nothing more.
            if isinstance(self._failure, Crash) and len(self.taken) > self._number:
                raise self._failure
            if len(self.taken) != self._number and not (self._to_the_end and len(self.taken) > self._number):
                return real(*arguments, **named)
            if name in ("write", "pwrite"):
                real(arguments[0], arguments[1][: len(arguments[1]) // 2], *arguments[2:])
            raise self._failure

        return step


APPENDING = ["pwrite", "fsync"]


def append_in_steps(journal: Journal, steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = change(journal.state, "new")
    with monkeypatch.context() as patch:
        patch.setattr(state_dir, "os", steps)
        append(journal.directory, changes)


def test_a_change_is_durable_at_the_end(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(100, Crash())
    append_in_steps(journal, steps, monkeypatch)
    assert steps.taken == APPENDING


@pytest.mark.parametrize("number", [1, 2])
def test_crash_leaves_the_journal_without_the_change_or_with_it(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    with pytest.raises(Crash):
        append_in_steps(journal, Steps(number, Crash()), monkeypatch)
    assert journal.read() == (journal.states[-1] if number == 1 else journal.content())


@pytest.mark.parametrize("number", range(1, 8))
def test_crash_while_it_is_written_as_a_whole_leaves_all_changes(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The same content in another form, whichever is found."""
    with monkeypatch.context() as patch:
        patch.setattr(state_dir, "os", Steps(number, Crash()))
        with pytest.raises(Crash):
            journal.directory.write_new(journal.state.members())
            journal.directory.publish()
            journal.directory.sync()
    assert journal.read() == journal.states[-1]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_change_that_cannot_be_written_is_told_and_added_with_the_next_one(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    changes = Changes()
    with monkeypatch.context() as patch:
        patch.setattr(state_dir, "os", Steps(1, OSError(code, os.strerror(code))))
        with pytest.raises(StorageError, match=r"Could not write '.*/journal.json'"):
            append(journal.directory, change(journal.state, "new", changes))
    assert journal.path.stat().st_size == journal.ends[-1]  # nothing half written is left
    assert journal.read() == journal.states[-1]
    append(journal.directory, change(journal.state, "newer", changes))
    assert journal.read() == journal.content()


@pytest.mark.parametrize(("number", "to_the_end"), [(1, True), (2, False)])
def test_after_a_failed_sync_or_a_rest_that_stays_the_next_journal_is_a_whole_one(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, number: int, to_the_end: bool
) -> None:
    """What is in the file is not known then."""
    steps = Steps(number, OSError(errno.EIO, "no"), to_the_end=to_the_end)
    with pytest.raises(StorageError, match=r"Could not write '.*/journal.json'"):
        append_in_steps(journal, steps, monkeypatch)
    assert journal.directory.needs_whole
    write_whole(journal)
    assert journal.read() == journal.content()


def test_what_is_torn_is_cut_off_before_the_next_change(journal: Journal) -> None:
    journal.directory.close()
    os.truncate(journal.path, journal.ends[-1] - 10)
    journal.directory = StateDir.open(str(journal.path.parent))
    found = journal.directory.load()
    assert found == journal.states[-2]
    journal.state, changes = RecordedState(found), Changes()
    journal.state.become(changes, {**found, "given": {"after": "the crash"}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StateDir, "write_new", no_room)
        append_rather_whole(journal, changes)
    assert journal.read() == journal.content()
    assert journal.path.stat().st_size < journal.ends[-1] + 100


# -- little room -------------------------------------------------------------------------------


def no_room(*_arguments: object) -> None:
    raise StorageError("no room", errno=errno.ENOSPC)


def write_whole(journal: Journal) -> None:
    journal.directory.prepare(Changes(), journal.state.members, is_whole=True)
    journal.directory.publish()
    journal.directory.sync()


def append_rather_whole(journal: Journal, changes: Changes) -> None:
    journal.directory.prepare(changes, journal.state.members, is_whole=True)
    journal.directory.publish()
    journal.directory.sync()


def test_changes_are_added_where_a_second_journal_does_not_fit(journal: Journal, full_disk: FullDisk) -> None:
    full_disk.room = 3000
    count = 0
    while full_disk.room > 1000:
        append_rather_whole(journal, change(journal.state, f"vd{count}"))
        assert journal.read() == journal.content()
        assert not (journal.path.parent / NEW_JOURNAL).exists()
        count += 1
    assert count > 1
    full_disk.room = None
    write_whole(journal)
    assert not journal.directory.has_changes
    assert journal.read() == journal.content()


def test_journal_that_is_due_but_does_not_fit_is_not_tried_each_time(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[object] = []

    def fail(*arguments: object) -> None:
        tries.append(arguments)
        no_room()

    monkeypatch.setattr(StateDir, "write_new", fail)
    count = 0
    while journal.path.stat().st_size < 5 * journal_text.CHANGES_LENGTH_MIN:
        journal.directory.prepare(change(journal.state, f"vd{count}"), journal.state.members)
        journal.directory.publish()
        journal.directory.sync()
        count += 1
    assert 2 <= len(tries) <= 4


def test_journal_never_becomes_longer_than_what_is_read(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = journal.ends[-1] + 2000
    monkeypatch.setattr(journal_text, "LENGTH_MAX", limit)
    changes = Changes()
    with pytest.raises(StorageError, match=rf"bytes long, and no more than {limit} are read: remove"):
        for count in range(1000):
            changes = Changes()
            journal.state.set(changes, "devices", f"vd{count}", {"name": f"vd{count}", "node": "n" * 200})
            before = journal.read()
            journal.directory.prepare(changes, journal.state.members)
            journal.directory.publish()
            journal.directory.sync()
            assert journal.path.stat().st_size <= limit
            assert journal.read() == journal.content()
    assert journal.read() == before
    for name in [*journal.state.tables["devices"]][1:]:
        journal.state.set(changes, "devices", name, None)
    journal.directory.prepare(changes, journal.state.members)
    journal.directory.publish()
    journal.directory.sync()
    assert journal.read() == journal.content()


def test_what_is_gone_and_comes_back_before_it_is_written_comes_last(journal: Journal) -> None:
    journal.state.set(first := Changes(), "devices", "vdx", {"name": "vdx", "node": "x"})
    append(journal.directory, first)
    again, changes = next(iter(journal.state.tables["devices"].items())), Changes()
    journal.state.set(changes, "devices", again[0], None)
    journal.state.set(changes, "devices", *again)
    append(journal.directory, changes)
    assert journal.read() == journal.content()
    assert journal.read()["devices"][-1] == again[1]


# -- somebody else -----------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["removed", "replaced", "cut off"])
def test_journal_that_somebody_else_has_changed_takes_no_change(journal: Journal, what: str) -> None:
    data = journal.path.read_bytes()
    if what == "cut off":
        os.truncate(journal.path, 0)
    else:
        journal.path.unlink()
    if what == "replaced":
        journal.path.write_bytes(data)
    with pytest.raises(StorageError, match="removed, replaced or changed by somebody else"):
        append(journal.directory, change(journal.state, "vde"))
    assert journal.directory.needs_whole
    journal.directory.write_new(journal.state.members())
    journal.directory.publish()
    journal.directory.sync()
    assert journal.read() == journal.content()

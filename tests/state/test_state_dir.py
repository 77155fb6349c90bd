"""The state directory by itself: a journal is there as a whole or not at all, and is never guessed at."""

import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blockd.daemon import state_dir
from blockd.daemon.changes import Json
from blockd.daemon.journal import VERSION, checksum_of
from blockd.daemon.state_dir import JOURNAL, NEW_JOURNAL, StateDir
from blockd.errors import BlockdError, ImageError, RequestError, StorageError

OLD, NEW = {"disks": ["old"]}, {"disks": ["new", "ä", 7, None, True]}
# What writing a journal asks of the system, in this order and no other.
STEPS = ["open", "write", "fsync", "close", "rename", "fsync"]


class Crash(Exception):
    """The process ends here."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A state directory with the journal OLD in it."""
    write(tmp_path / "state", OLD)
    return tmp_path / "state"


def write(folder: Path, state: Json) -> None:
    directory = StateDir.open(str(folder))
    try:
        directory.write_new(state)
        directory.publish()
        directory.sync()
    finally:
        directory.close()


def read(folder: Path) -> object:
    directory = StateDir.open(str(folder))
    try:
        return directory.load()
    finally:
        directory.close()


def refusal(action: Callable[[], object]) -> BlockdError:
    with pytest.raises(BlockdError) as caught:
        action()
    return caught.value


# -- the life of a journal ---------------------------------------------------------------------


def test_directory_is_made_for_us_alone_and_has_no_journal_yet(tmp_path: Path) -> None:
    assert read(tmp_path / "state") is None
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700


def test_what_was_written_is_read_again(folder: Path) -> None:
    assert read(folder) == OLD
    write(folder, NEW)
    assert read(folder) == NEW
    assert stat.S_IMODE((folder / JOURNAL).stat().st_mode) == 0o600
    assert not (folder / NEW_JOURNAL).exists()


@pytest.mark.parametrize("left_behind", [b"", b"{", b'{"blockd-journal": 99}', bytes(100_000)])
def test_what_a_crash_left_half_written_is_not_looked_at(folder: Path, left_behind: bytes) -> None:
    (folder / NEW_JOURNAL).write_bytes(left_behind)
    assert read(folder) == OLD
    write(folder, NEW)
    assert read(folder) == NEW


def test_one_daemon_at_a_time(folder: Path) -> None:
    first = StateDir.open(str(folder))
    error = refusal(lambda: StateDir.open(str(folder)))
    assert isinstance(error, RequestError)
    assert error.message == (
        f"Could not use '{folder}' as state directory: another blockd uses it, process {os.getpid()}"
    )
    first.close()
    assert read(folder) == OLD


# -- a journal that is none --------------------------------------------------------------------


def journal(version: object = VERSION, checksum: str | None = None, state: object = None) -> bytes:
    found = {"blockd-journal": version, "sha256": checksum or checksum_of(state), "state": state}
    return json.dumps(found).encode()


BAD_JOURNALS = [
    (b"", "is damaged: bring it back from a backup, or move it away"),
    (journal(state=OLD)[:-5], "is damaged: "),
    (b"\xff\xfe" * 50, "is damaged: "),
    (b"[" * 100_000, "is damaged: "),
    (b'{"name": "somebody else\'s"}', "is not a journal of blockd: move it away"),
    (b"[1, 2]", "is not a journal of blockd"),
    (journal(version="1"), "is not a journal of blockd"),
    (
        journal(version=VERSION + 1, state=OLD),
        "was written by a newer blockd (its version is 2, this one knows 1)",
    ),
    (journal(version=0, state=OLD), "is damaged, its checksum is wrong: "),
    (journal(state=NEW, checksum=checksum_of(OLD)), "is damaged, its checksum is wrong: "),
]


@pytest.mark.parametrize(("data", "text"), BAD_JOURNALS)
def test_journal_that_cannot_be_trusted(folder: Path, data: bytes, text: str) -> None:
    (folder / JOURNAL).write_bytes(data)
    error = refusal(lambda: read(folder))
    assert isinstance(error, ImageError)
    assert error.message.startswith(f"'{folder}/{JOURNAL}' {text}")
    assert "find out first which image of each is in use" in error.message
    assert (folder / JOURNAL).read_bytes() == data


def test_every_torn_and_every_flipped_journal_is_found_out(folder: Path) -> None:
    whole = (folder / JOURNAL).read_bytes()
    for length in range(len(whole)):
        (folder / JOURNAL).write_bytes(whole[:length])
        assert isinstance(refusal(lambda: read(folder)), ImageError), length
    for position in range(len(whole)):
        (folder / JOURNAL).write_bytes(whole[:position] + b"#" + whole[position + 1 :])
        try:
            assert read(folder) == OLD, position  # white space between members
        except ImageError:
            continue


@pytest.mark.parametrize("kind", ["fifo", "symlink", "directory"])
def test_something_else_in_the_place_of_the_journal(folder: Path, kind: str) -> None:
    path = folder / JOURNAL
    path.rename(folder / "moved")
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "symlink":
        path.symlink_to("moved")
    else:
        path.mkdir()
    assert str(path) in refusal(lambda: read(folder)).message


def test_directories_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "open").mkdir(0o700)
    (tmp_path / "open").chmod(0o777)
    for name, text in [
        ("file", "Not a directory"),
        ("no/such", "No such file or directory"),
        ("open", "everybody can write to it"),
    ]:
        error = refusal(lambda name=name: StateDir.open(str(tmp_path / name)))  # type: ignore[misc]
        assert error.message.startswith(f"Could not use '{tmp_path / name}' as state directory: ")
        assert text in error.message
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("what", ["", JOURNAL])
def test_what_belongs_to_another_user_is_not_believed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Who owns it could say which files are opened, and written, with our rights."""
    fstat = os.fstat

    def owned_by_another(fd: int) -> os.stat_result:
        status = fstat(fd)
        is_meant = os.path.samestat(status, (folder / what).stat())
        return os.stat_result((*status[:4], os.geteuid() + 7, *status[5:])) if is_meant else status

    monkeypatch.setattr(os, "fstat", owned_by_another)
    error = refusal(lambda: read(folder))
    assert isinstance(error, RequestError)
    assert (
        f"it belongs to the user with id {os.geteuid() + 7}, and it says which files to open" in error.message
    )


def test_renamed_directory_is_gone_on_with_and_each_new_name_is_told_once(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = StateDir.open(str(folder))
    moved = folder.with_name("moved")
    further = folder.with_name("further")
    try:
        for old, new in ((folder, moved), (moved, further), (further, moved)):
            old.rename(new)
            folder.mkdir(exist_ok=True)
            for _ in range(2):
                directory.write_new(NEW)
                directory.publish()
                directory.sync()
    finally:
        directory.close()
    assert list(folder.iterdir()) == []
    assert read(moved) == NEW
    told = [record.getMessage() for record in caplog.records]
    assert [text.split(": ", 1)[1].split(",")[0] for text in told] == [
        f"the journal goes on in '{place}'" for place in (moved, further, moved)
    ]


# -- crashes and errors between any two steps --------------------------------------------------


class Steps:
    """Stands in for `os`: notes the steps of writing a journal, and ends the one with `number` badly."""

    def __init__(
        self, number: int = 0, failure: Exception | None = None, *, is_half_done: bool = False
    ) -> None:
        self.taken: list[str] = []
        self._number = number
        self._failure = failure
        self._is_half_done = is_half_done

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in STEPS:
            return real

        def step(*arguments: Any, **named: Any) -> object:
            self.taken.append(name)
            if len(self.taken) != self._number or self._failure is None:
                return real(*arguments, **named)
            if self._is_half_done and name == "write":
                real(arguments[0], arguments[1][: len(arguments[1]) // 2])
            raise self._failure

        return step


def write_in_steps(folder: Path, steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = StateDir.open(str(folder))
    with monkeypatch.context() as patch:
        patch.setattr(state_dir, "os", steps)
        try:
            directory.write_new(NEW)
            directory.publish()
            directory.sync()
        finally:
            patch.undo()
            directory.close()


def test_content_is_durable_before_it_gets_the_name_and_the_name_before_the_end(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps()
    write_in_steps(folder, steps, monkeypatch)
    assert steps.taken == STEPS


@pytest.mark.parametrize("is_half_done", [False, True])
@pytest.mark.parametrize("number", range(1, len(STEPS) + 1))
def test_crash_between_any_two_steps_leaves_the_old_or_the_new_journal(
    folder: Path, monkeypatch: pytest.MonkeyPatch, number: int, is_half_done: bool
) -> None:
    with pytest.raises(Crash):
        write_in_steps(folder, Steps(number, Crash(), is_half_done=is_half_done), monkeypatch)
    assert read(folder) == (NEW if number > STEPS.index("rename") + 1 else OLD)
    write(folder, NEW)
    assert read(folder) == NEW


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("number", [1, 2, 3, 5, 6])
def test_step_that_fails_is_told_and_the_journal_stays_whole(
    folder: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    with pytest.raises(StorageError) as caught:
        write_in_steps(
            folder, Steps(number, OSError(code, os.strerror(code)), is_half_done=True), monkeypatch
        )
    assert caught.value.message == f"Could not write '{folder}/{JOURNAL}': {os.strerror(code)}"
    assert read(folder) == (NEW if number == 6 else OLD)

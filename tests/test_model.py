"""The oracle itself: it must notice what is wrong, and allow no more than it has to."""

import random

import pytest

from tests.model import ModelDisk, drawn, stamp
from tests.recording import Punch, RecordingFile, Sync, Timeline, Truncate, Write

A, B, C = (stamp(number, 0, 512) for number in (1, 2, 3))


def written(model: ModelDisk, data: bytes) -> None:
    model.begin_write(0, data)
    model.finish_write(0, data)


def test_wrong_read_is_noticed_and_named() -> None:
    model = ModelDisk(bytes(1024))
    written(model, model.new_data(0, 512))

    model.check_read(0, stamp(1, 0, 512))
    with pytest.raises(AssertionError, match="read zeroes, expected write 1 for offset 0x0"):
        model.check_read(0, bytes(512))
    with pytest.raises(AssertionError):
        model.check_read(512, stamp(1, 512, 512))


def test_discarded_sector_settles_at_the_first_read() -> None:
    model = ModelDisk(A + A)
    model.begin_write(0, bytes(1024))
    model.finish_discard(0, 1024)

    model.check_read(0, bytes(512))
    model.check_read(512, A)
    with pytest.raises(AssertionError):
        model.check_read(0, A)
    with pytest.raises(AssertionError):
        model.check_read(512, bytes(512))


def test_crash_allows_what_came_since_the_last_acknowledged_flush() -> None:
    model = ModelDisk(bytes(1024))
    written(model, A)
    durable = model.begin_flush()
    model.begin_write(0, B)
    assert model.allowed_after_crash(0) == (bytes(512), A, B)
    model.finish_flush(durable)
    assert model.allowed_after_crash(0) == (A, B)
    model.finish_write(0, B)
    model.finish_flush(model.begin_flush())
    assert model.allowed_after_crash(0) == (B,)
    assert model.allowed_after_crash(1) == (bytes(512),)


def test_flushes_may_be_acknowledged_in_any_order() -> None:
    model = ModelDisk(bytes(512))
    written(model, A)
    first = model.begin_flush()
    written(model, B)
    second = model.begin_flush()
    written(model, C)
    model.finish_flush(second)
    model.finish_flush(first)
    assert model.allowed_after_crash(0) == (B, C)


def test_untouched_sector_may_only_hold_what_it_held() -> None:
    model = ModelDisk(A + B)
    written(model, C)
    after = model.after_crash()

    assert list(after.problems(C + B)) == []
    assert list(after.problems(A + B)) == []
    [problem] = after.problems(A + bytes(512))
    assert problem == "untouched sector at 0x200 holds zeroes, not write 2 for offset 0x0"


def test_drawing_shows_layers_through_and_ends_them() -> None:
    content = drawn(["AB", "-0", "--C-"], 512)
    assert content == stamp(ord("A"), 0, 512) + bytes(512) + stamp(ord("C"), 1024, 512) + bytes(512)


async def test_timeline_builds_every_kind_of_crash() -> None:
    file = RecordingFile(bytes(1024))
    await file.write(0, A)
    await file.flush()
    await file.write(512, B)
    await file.write(1024, C + C)
    await file.discard(0, 512)
    await file.resize(4096)
    assert [type(entry) for entry in file.log] == [Write, Sync, Write, Write, Punch, Truncate]

    states = list(Timeline([file]).states(random.Random(1), subset_count=3))
    last = {disk for position, _, [disk] in states if position == len(file.log)}
    assert bytes(file.disk) in last
    assert A + bytes(512) in last  # up to the last sync
    assert A + B in last  # one alone
    assert (bytes(512) + bytes(512) + C + C).ljust(4096, b"\0") in last  # all but one
    assert (A + B + C).ljust(4096, b"\0") in last or A + bytes(512) + C in last  # torn
    assert (A + bytes(512) + C + C)[:1024] in last  # not extended
    before_sync = {disk for position, _, [disk] in states if position == 1}
    assert before_sync == {bytes(1024), A + bytes(512)}

"""Memory that copies pass through."""

import contextlib
import ctypes
import mmap
import threading

import pytest

from blockd.block.copy_memory import ALIGNMENT, LENGTH, TURN_COUNT, CopyMemory
from blockd.units import KIB, MIB


def address_of(buffer: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


@pytest.mark.parametrize("length", [1, 64 * KIB, LENGTH, LENGTH + 1, 64 * MIB])
def test_memory_is_aligned_and_as_long_as_asked_for(length: int) -> None:
    with CopyMemory().lent(length) as buffer:
        assert len(buffer) == length
        assert address_of(buffer) % ALIGNMENT == 0


def test_memory_is_used_again() -> None:
    memory = CopyMemory()
    with memory.lent(1 * MIB) as first:
        first[:4] = b"used"
        place = address_of(first)
    with memory.lent(2 * MIB) as second:
        assert address_of(second) == place
        assert bytes(second[:4]) == b"used"


def test_copies_at_once_have_memory_of_their_own() -> None:
    memory = CopyMemory()
    with memory.lent(1 * MIB) as first, memory.lent(1 * MIB) as second:
        first[:], second[:] = bytes([1]) * MIB, bytes([2]) * MIB
        assert set(first.tobytes()) == {1}
        assert set(second.tobytes()) == {2}


def test_all_but_one_buffer_go_when_no_copy_is_under_way() -> None:
    memory = CopyMemory()
    with memory.lent(1), memory.lent(1):
        with memory.lent(1):
            pass
        assert len(memory._free) == 1
        with memory.lent(1), memory.lent(1):
            pass
        assert len(memory._free) == 2, "they are needed again"
    assert len(memory._free) == 1


def test_memory_that_is_too_small_is_replaced() -> None:
    memory = CopyMemory()
    with memory.lent(1):
        pass
    with memory.lent(LENGTH + 1) as buffer:
        assert len(buffer) == LENGTH + 1
    assert [len(buffer) for buffer in memory._free] == [LENGTH + 1]


def test_memory_of_a_copy_that_failed_is_used_again() -> None:
    memory = CopyMemory()
    with pytest.raises(OSError, match="source"), memory.lent(1):
        raise OSError("the source cannot be read")
    assert memory._lent_count == 0
    assert len(memory._free) == 1


def test_threads_take_turns() -> None:
    memory = CopyMemory()
    is_asking, has_it = threading.Event(), threading.Event()

    def copy() -> None:
        is_asking.set()
        with memory.lent_in_turn(1):
            has_it.set()

    with contextlib.ExitStack() as held:
        for _ in range(TURN_COUNT):
            held.enter_context(memory.lent_in_turn(1))
        thread = threading.Thread(target=copy)
        thread.start()
        is_asking.wait()
        with memory.lent(1):
            assert memory._lent_count == TURN_COUNT + 1, "who cannot wait does not"
        assert not has_it.is_set()
    thread.join()
    assert has_it.is_set()
    assert memory._lent_count == 0


def test_a_kernel_without_huge_pages_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", -1)
    with CopyMemory().lent(1 * MIB) as buffer:
        assert address_of(buffer) % ALIGNMENT == 0

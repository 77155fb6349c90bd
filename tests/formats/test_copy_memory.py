"""Memory that copies pass through."""

import contextlib
import ctypes
import mmap

import pytest

from blockd.block.copy_memory import ALIGNMENT, LENGTH, SMALL_LENGTH, CopyMemory
from blockd.units import KIB, MIB


def address_of(buffer: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


@pytest.mark.parametrize("length", [1, 64 * KIB, SMALL_LENGTH + 1, LENGTH, LENGTH + 1, 64 * MIB])
def test_memory_is_aligned_and_as_long_as_asked_for(length: int) -> None:
    with CopyMemory().lent(length) as buffer:
        assert len(buffer) == length
        assert address_of(buffer) % (mmap.PAGESIZE if length <= SMALL_LENGTH else ALIGNMENT) == 0


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
    with memory.lent(1 * MIB), memory.lent(1 * MIB):
        with memory.lent(1 * MIB):
            pass
        assert len(memory._free) == 1
        with memory.lent(1 * MIB), memory.lent(1 * MIB):
            pass
        assert len(memory._free) == 2, "they are needed again"
    assert len(memory._free) == 1


def test_memory_that_is_too_small_is_replaced() -> None:
    memory = CopyMemory()
    with memory.lent(1 * MIB):
        pass
    with memory.lent(LENGTH + 1) as buffer:
        assert len(buffer) == LENGTH + 1
    assert [len(buffer) for buffer in memory._free] == [LENGTH + 1]


def test_memory_of_a_copy_that_failed_is_used_again() -> None:
    memory = CopyMemory()
    with pytest.raises(OSError, match="source"), memory.lent(1 * MIB):
        raise OSError("the source cannot be read")
    assert memory._lent_count == 0
    assert len(memory._free) == 1


def test_small_copies_have_pages_of_their_own() -> None:
    memory = CopyMemory()
    with contextlib.ExitStack() as held:
        buffers = [held.enter_context(memory.lent(64 * KIB)) for _ in range(100)]
        assert not memory._free
        assert not memory._lent_count
        assert all(len(buffer) == 64 * KIB and not address_of(buffer) % mmap.PAGESIZE for buffer in buffers)
        assert len({address_of(buffer) for buffer in buffers}) == 100


def test_a_kernel_without_huge_pages_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", -1)
    with CopyMemory().lent(1 * MIB) as buffer:
        assert address_of(buffer) % ALIGNMENT == 0

"""Every sequence of up to three operations, and after every entry on the tape every kind of crash.

Only crashes after the last operation began are looked at: those before it belong to the shorter
sequence. Each test says how many states it has to find at least; with those of test_crash_lives.py
these are more than 100,000. (There are some 150,000 and 90,000.)
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash.judge import Judge
from tests.crash.operations import OPERATIONS, TARGETS, is_possible
from tests.crash.scene import Scene

# Cluster size and count: the sizes of the smallest disks on which everything can happen.
GEOMETRIES = [(2048, 4), (1024, 8), (512, 16)]
STATE_COUNT_MIN = 5_000


def _sequences(first: str, length_max: int) -> Iterator[tuple[str, ...]]:
    for more in range(length_max):
        for rest in itertools.product(OPERATIONS, repeat=more):
            yield first, *rest


async def sweep_sequence(
    judge: Judge, names: tuple[str, ...], geometry: tuple[int, int], base_name: str | None
) -> None:
    """Judge every crash during the last operation of a sequence, unless it cannot be."""
    start = 0
    async with Scene(*geometry, base_name=base_name).running() as scene:
        for name in names:
            if not is_possible(name, scene):
                return
            start = scene.position
            await OPERATIONS[name](scene)
    try:
        await judge.sweep(scene, start=start, subset_count=6)
    except AssertionError as error:
        error.add_note(f"{' → '.join(names)}, {geometry}, stream to {base_name}")
        raise


async def sweep_sequences(judge: Judge, first: str, length_max: int) -> None:
    for geometry, base_name in itertools.product(GEOMETRIES, TARGETS):
        for names in _sequences(first, length_max):
            await sweep_sequence(judge, names, geometry, base_name)


@pytest.mark.slow
@pytest.mark.parametrize("first", OPERATIONS)
async def test_crash_in_every_pair_of_operations(first: str) -> None:
    judge = Judge()
    await sweep_sequences(judge, first, 2)
    assert judge.state_count > 100 or first == "cancel"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("first", OPERATIONS)
async def test_crash_in_every_three_operations(first: str, tmp_path: Path) -> None:
    judge = Judge(qemu_every=100, folder=tmp_path)
    await sweep_sequences(judge, first, 3)
    print(f"{first}: {judge}")
    if first != "cancel":  # there is nothing to cancel at first
        assert judge.state_count >= STATE_COUNT_MIN
        assert judge.rerun_count > 500
        assert judge.qemu_count > 10

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
from tests.crash.scene import COLD_SHARES, Scene

# Cluster size and count: the sizes of the smallest disks on which everything can happen.
GEOMETRIES = [(2048, 4), (1024, 8), (512, 16)]
STATE_COUNT_MIN = 4_000

# Geometry, and what is streamed to.
SmallDisk = tuple[tuple[int, int], str | None]
DISKS: list[SmallDisk] = list(itertools.product(GEOMETRIES, TARGETS))
SOME_COLD = [share for share in COLD_SHARES.values() if share]


def _sequences(first: str, length_max: int) -> Iterator[tuple[str, ...]]:
    for more in range(length_max):
        for rest in itertools.product(OPERATIONS, repeat=more):
            yield first, *rest


async def sweep_sequence(
    judge: Judge, names: tuple[str, ...], disk: SmallDisk, cold_share: float = 0, seed: int = 0
) -> None:
    """Judge every crash during the last operation of a sequence, unless it cannot be."""
    start, (geometry, base_name) = 0, disk
    scene = Scene(*geometry, base_name=base_name, cold_share=cold_share, seed=seed)
    try:
        async with scene.running():
            for name in names:
                if not is_possible(name, scene):
                    return
                start = scene.position
                await OPERATIONS[name](scene)
        await judge.sweep(scene, start=start, subset_count=6)
    except AssertionError as error:
        where = f"{geometry}, stream to {base_name}, cold {cold_share}, seed {seed}"
        error.add_note(f"{' → '.join(names)}, {where}")
        raise


async def sweep_sequences(judge: Judge, first: str, length_max: int) -> None:
    for disk in DISKS:
        for names in _sequences(first, length_max):
            await sweep_sequence(judge, names, disk)


async def sweep_cold_sequences(judge: Judge, first: str, length_max: int) -> None:
    """Every sequence over files that are in the page cache at random or never: one way for each in turn."""
    for seed, names in enumerate(_sequences(first, length_max)):
        cold_share = SOME_COLD[seed // len(DISKS) % len(SOME_COLD)]
        await sweep_sequence(judge, names, DISKS[seed % len(DISKS)], cold_share, seed)


@pytest.mark.slow
@pytest.mark.parametrize("first", OPERATIONS)
async def test_crash_in_every_pair_of_operations(first: str) -> None:
    judge = Judge()
    await sweep_sequences(judge, first, 2)
    assert judge.state_count > 100 or first == "cancel"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("first", OPERATIONS)
async def test_crash_in_every_three_operations_over_cold_files(first: str, tmp_path: Path) -> None:
    judge = Judge(qemu_every=100, folder=tmp_path)
    await sweep_cold_sequences(judge, first, 3)
    print(f"{first}: {judge}")
    assert judge.state_count > 500 or first == "cancel"


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

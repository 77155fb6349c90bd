"""add-cow images keep every promise that others keep: named workloads, pairs of operations, long lives."""

import itertools
import random

import pytest

from tests.crash.add_cow import ADD_COW_SWEEPS, ADD_COW_WORKLOADS, CLUSTER
from tests.crash.judge import Judge
from tests.crash.lives import draw, judge_life
from tests.crash.operations import OPERATIONS, TARGETS, is_possible
from tests.crash.promises import Sweep
from tests.crash.scene import COLD_SHARES, Scene
from tests.crash.workloads import Workload


@pytest.mark.parametrize("cold_share", COLD_SHARES.values(), ids=list(COLD_SHARES))
@pytest.mark.parametrize("workload", ADD_COW_WORKLOADS, ids=str)
async def test_every_crash_leaves_what_it_may(workload: Workload, cold_share: float) -> None:
    async with workload.scene(cold_share).running() as scene:
        await workload.run(scene)
        await scene.guest.read_all()
    assert await Judge(rerun_every=4).sweep(scene) > 5


@pytest.mark.parametrize("sweep", ADD_COW_SWEEPS, ids=lambda sweep: sweep.__name__)
async def test_sweep(sweep: Sweep) -> None:
    await sweep()


@pytest.mark.slow
@pytest.mark.parametrize("base_name", TARGETS)
async def test_crash_in_every_pair_of_operations(base_name: str | None) -> None:
    judge = Judge(rerun_every=4)
    for names in itertools.product(OPERATIONS, repeat=2):
        async with Scene(CLUSTER, 6, image_format="add-cow", base_name=base_name).running() as scene:
            for name in names:
                if is_possible(name, scene):
                    await OPERATIONS[name](scene)
        try:
            await judge.sweep(scene)
        except AssertionError as error:
            error.add_note(f"{' → '.join(names)}, stream to {base_name}")
            raise
    print(judge)
    assert judge.state_count > 1_000


@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_crash_in_drawn_lives() -> None:
    judge = Judge(rerun_every=8)
    for seed in range(12):
        life = draw(random.Random(seed), step_count=25)
        life.geometry, life.image_format = (CLUSTER, random.Random(seed).choice([8, 12])), "add-cow"
        try:
            await judge_life(judge, life, seed)
        except AssertionError as error:
            error.add_note(f"seed {seed}")
            raise
    print(judge)
    assert judge.state_count > 1_000

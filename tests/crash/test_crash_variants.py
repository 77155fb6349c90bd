"""Images of every variant of qcow2 keep the promises that ordinary ones keep."""

import random
from pathlib import Path

import pytest

from tests.crash.judge import Judge
from tests.crash.lives import draw, judge_life
from tests.crash.scene import COLD_SHARES
from tests.crash.variants import SNAPSHOT_OPTIONS, VARIANT_WORKLOADS, VARIANTS, sweep_snapshot
from tests.crash.workloads import Workload


@pytest.mark.parametrize("cold_share", COLD_SHARES.values(), ids=list(COLD_SHARES))
@pytest.mark.parametrize(
    "workload",
    [
        pytest.param(workload, marks=() if workload.variant == "extended L2" else pytest.mark.slow)
        for workload in VARIANT_WORKLOADS
    ],
    ids=str,
)
async def test_every_crash_leaves_what_it_may(workload: Workload, cold_share: float, tmp_path: Path) -> None:
    async with workload.scene(cold_share).running() as scene:
        await workload.run(scene)
        await scene.guest.read_all()
    judge = Judge(rerun_every=8, qemu_every=50, folder=tmp_path)
    assert await judge.sweep(scene) > 5


@pytest.mark.parametrize("options", SNAPSHOT_OPTIONS.values(), ids=list(SNAPSHOT_OPTIONS))
async def test_snapshot_stays_whatever_happens_to_the_disk(options: tuple[str, ...]) -> None:
    await sweep_snapshot(*options)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("variant", ["version 2", "1-bit refcounts", "extended L2"])
async def test_crash_in_drawn_lives(variant: str, tmp_path: Path) -> None:
    judge = Judge(qemu_every=200, folder=tmp_path)
    for seed in range(2):
        life = draw(random.Random(seed), step_count=25)
        life.options = VARIANTS[variant]
        try:
            await judge_life(judge, life, seed)
        except AssertionError as error:
            error.add_note(f"seed {seed}")
            raise
    print(judge)
    assert judge.state_count > 100

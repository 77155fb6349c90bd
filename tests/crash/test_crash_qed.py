"""QED images keep every promise that others keep: named workloads, pairs of operations, long lives."""

import itertools
import random
from pathlib import Path

import pytest

from tests.crash.judge import Judge
from tests.crash.lives import draw, judge_life
from tests.crash.operations import OPERATIONS, TARGETS, is_possible
from tests.crash.promises import Sweep
from tests.crash.qed import CLUSTER, QED_SWEEPS, QED_WORKLOADS, sweep_large_clusters
from tests.crash.scene import COLD_SHARES, Scene
from tests.crash.workloads import Workload, rename_the_backing


@pytest.mark.parametrize("cold_share", COLD_SHARES.values(), ids=list(COLD_SHARES))
@pytest.mark.parametrize("workload", QED_WORKLOADS, ids=str)
async def test_every_crash_leaves_what_it_may(workload: Workload, cold_share: float, tmp_path: Path) -> None:
    async with workload.scene(cold_share).running() as scene:
        await workload.run(scene)
        await scene.guest.read_all()
    # QEMU cannot open images whose tables have one cluster, or whose backing file does not exist.
    is_for_qemu = not workload.options and workload.run is not rename_the_backing
    judge = Judge(rerun_every=4, qemu_every=25 if is_for_qemu else 0, folder=tmp_path)
    assert await judge.sweep(scene) > 5


@pytest.mark.parametrize("sweep", QED_SWEEPS, ids=lambda sweep: sweep.__name__)
async def test_sweep(sweep: Sweep) -> None:
    await sweep()


@pytest.mark.slow
async def test_sweep_of_large_clusters() -> None:
    await sweep_large_clusters()


@pytest.mark.slow
@pytest.mark.parametrize("base_name", TARGETS)
async def test_crash_in_every_pair_of_operations(base_name: str | None, tmp_path: Path) -> None:
    judge = Judge(qemu_every=200, folder=tmp_path)
    for names in itertools.product(OPERATIONS, repeat=2):
        async with Scene(CLUSTER, 6, image_format="qed", base_name=base_name).running() as scene:
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
async def test_crash_in_drawn_lives(tmp_path: Path) -> None:
    judge = Judge(qemu_every=200, folder=tmp_path)
    for seed in range(20):
        life = draw(random.Random(seed), step_count=25)
        life.geometry, life.image_format = (CLUSTER, random.Random(seed).choice([8, 12])), "qed"
        try:
            await judge_life(judge, life, seed)
        except AssertionError as error:
            error.add_note(f"seed {seed}")
            raise
    print(judge)
    assert judge.state_count > 2_000

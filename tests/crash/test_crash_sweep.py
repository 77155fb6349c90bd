"""No crash at any moment loses what durability promises: named workloads, each about one thing."""

from pathlib import Path

import pytest

from tests.crash.judge import Judge
from tests.crash.scene import COLD_SHARES
from tests.crash.workloads import WORKLOADS, Workload


@pytest.mark.parametrize("cold_share", COLD_SHARES.values(), ids=list(COLD_SHARES))
@pytest.mark.parametrize(
    "workload",
    [pytest.param(workload, marks=pytest.mark.slow if workload.is_large else ()) for workload in WORKLOADS],
    ids=str,
)
async def test_every_crash_leaves_what_it_may(workload: Workload, cold_share: float, tmp_path: Path) -> None:
    async with workload.scene(cold_share).running() as scene:
        await workload.run(scene)
        await scene.guest.read_all()
    judge = Judge(rerun_every=50 if workload.is_large else 1, qemu_every=50, folder=tmp_path)
    assert await judge.sweep(scene) > 5

"""What is cloned is as durable as what is written, and in the same order before the maps."""

from dataclasses import replace

import pytest

from blockd.formats import copying
from tests.crash.add_cow import ADD_COW_WORKLOADS
from tests.crash.judge import Judge
from tests.crash.qed import QED_WORKLOADS
from tests.crash.variants import VARIANT_WORKLOADS
from tests.crash.workloads import (
    WORKLOADS,
    Workload,
    cancel_then_stream,
    stream_to_base,
    stream_to_none,
    switch_and_stream,
    write_then_stream,
)
from tests.recording import CloningFile

_STREAMS = (stream_to_none, stream_to_base, write_then_stream, cancel_then_stream, switch_and_stream)
CLONING_WORKLOADS = [
    replace(workload, file_type=CloningFile)
    for workload in (*WORKLOADS, *VARIANT_WORKLOADS, *QED_WORKLOADS, *ADD_COW_WORKLOADS)
    if workload.run in _STREAMS and workload.variant in ("", "extended L2")
]


@pytest.mark.parametrize("workload", CLONING_WORKLOADS, ids=str)
async def test_every_crash_leaves_what_it_may(workload: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "CLONE_LENGTH_MIN", 0)
    async with workload.scene().running() as scene:
        await workload.run(scene)
        await scene.guest.read_all()
    assert await Judge(rerun_every=4).sweep(scene) > 5
    assert sum(file.cloned_bytes for file in scene.files if isinstance(file, CloningFile)) > 0

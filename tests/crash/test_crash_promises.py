"""What else a crash must leave: raw images, FUA and flush over NBD, and what a stream need not copy again."""

import asyncio

import pytest

from blockd.jobs import stream as stream_module
from tests.crash.promises import CLUSTER, SWEEPS, Sweep
from tests.crash.scene import Scene
from tests.nbd.serving import until
from tests.recording import Sync


@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda sweep: sweep.__name__)
async def test_sweep(sweep: Sweep) -> None:
    await sweep()


async def test_what_a_paused_stream_has_copied_becomes_durable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "CHECKPOINT_INTERVAL_S", 0.001)
    async with Scene(CLUSTER, 12).running() as scene:
        await scene.stream_step()
        assert scene.job is not None
        scene.job.pause()
        await until(lambda: [type(entry) for entry in scene.files[0].log[-1:]] == [Sync])
        log_length = len(scene.files[0].log)
        for _ in range(20):
            await asyncio.sleep(0.001)
        assert len(scene.files[0].log) == log_length, "checkpoints of what is durable already"

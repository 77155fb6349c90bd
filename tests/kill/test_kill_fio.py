"""SIGKILL 208 times, at random moments, under fio, a guest with a model, and a stream.

After each kill the image is checked and compared with what was acknowledged, and the stream started
again; when it has completed, the base is taken away and must not be missed. Then a new disk begins.
"""

import asyncio
import random
from pathlib import Path

import pytest

from blockd.units import MIB
from tests import qemu_img
from tests.chains import Chain
from tests.kill.fio_load import FioLoad
from tests.kill.test_kill import CLUSTER, COUNT, Session, make_chain, recorded_backing
from tests.model import AfterCrash, ModelDisk

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

BLOCK_COUNT = 8
KILL_COUNT = 26
# The guest with the model has the first half of the disk, fio the second.
HALF = COUNT * CLUSTER // 2


@pytest.mark.parametrize("block", range(BLOCK_COUNT))
async def test_killed_under_load(tmp_path: Path, block: int) -> None:
    rng = random.Random(block)
    kill_count = completed_count = flushed_count = 0
    while kill_count < KILL_COUNT:
        chain = make_chain(tmp_path, "qcow2" if block % 2 else "raw")
        content = chain.content
        while kill_count < KILL_COUNT and recorded_backing(chain.active) is not None:
            kill_count += 1
            folder = tmp_path / f"life{kill_count}"
            session = await Session.start(folder, chain, ModelDisk(content), seed=1000 * block + kill_count)
            fio, after = await live_and_die(session, folder, rng)
            content = check(chain, content, fio, after, f"kill {kill_count}")
            flushed_count += len(fio.flushed())
        completed_count += recorded_backing(chain.active) is None
    assert completed_count > 2
    assert flushed_count > 0  # how many depends on the machine


async def live_and_die(session: Session, folder: Path, rng: random.Random) -> tuple[FioLoad, AfterCrash]:
    """Let both guests use the disk while it is streamed, and kill the daemon."""
    uri = session.daemon.nbd_uri("vda")
    session.guest.model.busy.append((HALF, 2 * HALF))
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(session.use_disk())
        fio = await FioLoad.start(folder, uri, HALF, HALF, seed=rng.randrange(1 << 30))
        await asyncio.sleep(rng.random() * 0.4)  # fio takes a while to begin
        speed = rng.choice([0, 2 * MIB, 4 * MIB, 8 * MIB])
        await session.qmp.command("block_stream", device="vda", speed=speed)
        await asyncio.sleep(rng.random() * 0.6)  # the moment of the kill
        after = await session.kill()
        printed = await fio.wait()
        assert "verify:" not in printed, printed
    return fio, after


def check(chain: Chain, before: bytes, fio: FioLoad, after: AfterCrash, which: str) -> bytes:
    """Judge what the kill left; returns the content, with which the next life begins."""
    base = chain.paths[0]
    away = base.with_suffix(".away")
    is_whole = recorded_backing(chain.active) is None
    if is_whole:
        base.rename(away)
    qemu_img.assert_sound(chain.active)
    content = qemu_img.content(chain.active)
    if is_whole:
        away.rename(base)
    problems = [*after.problems(content[:HALF] + after.content[HALF:]), *fio.problems(before, content)]
    assert problems == [], f"{which}: {problems[:5]}"
    return content

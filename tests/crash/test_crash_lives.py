"""Long random lives: hypothesis draws what happens, and makes a life that goes wrong as short as it can."""

import asyncio
import random
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from tests.crash.judge import Judge
from tests.crash.lives import (
    DISK_KINDS,
    GEOMETRIES,
    GUEST_KINDS,
    DiskStep,
    GuestStep,
    Life,
    Together,
    draw,
    judge_life,
)
from tests.crash.operations import TARGETS

guest_steps = st.builds(
    GuestStep, st.sampled_from(GUEST_KINDS), st.integers(0, 399), st.sampled_from([1, 2, 3, 4, 8, 16])
)


class LifeOfADisk(RuleBasedStateMachine):
    """Draws a life step by step; it is lived, and every crash in it judged, when it is complete."""

    judge: ClassVar[Judge]

    @initialize(
        geometry=st.sampled_from(GEOMETRIES), base_name=st.sampled_from(TARGETS), is_slow=st.booleans()
    )
    def begin(self, geometry: tuple[int, int], base_name: str | None, is_slow: bool) -> None:
        self.life = Life(geometry, base_name, is_slow)

    @rule(step=guest_steps)
    def use(self, step: GuestStep) -> None:
        self.life.steps.append(step)

    @rule(kind=st.sampled_from(DISK_KINDS))
    def operate(self, kind: str) -> None:
        self.life.steps.append(DiskStep(kind))

    @rule(steps=st.lists(guest_steps, min_size=2, max_size=4))
    def use_together(self, steps: list[GuestStep]) -> None:
        self.life.steps.append(Together(tuple(steps)))

    def teardown(self) -> None:
        asyncio.run(judge_life(self.judge, self.life))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_crash_in_long_lives() -> None:
    LifeOfADisk.judge = Judge()
    run_state_machine_as_test(
        LifeOfADisk,
        settings=settings(
            max_examples=130,
            stateful_step_count=25,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
    print(LifeOfADisk.judge)
    assert LifeOfADisk.judge.state_count > 20_000


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("block", range(4))
async def test_crash_in_drawn_lives(block: int, tmp_path: Path) -> None:
    """The lives that `make sweep` goes on with, from the first seeds on."""
    judge = Judge(qemu_every=400, folder=tmp_path)
    for seed in range(block * 40, block * 40 + 40):
        try:
            await judge_life(judge, draw(random.Random(seed), step_count=25), seed)
        except AssertionError as error:
            error.add_note(f"seed {seed}")
            raise
    print(judge)
    assert judge.state_count > 9_000

"""Short storms; ``make storm`` makes long ones."""

from pathlib import Path

import pytest

from tests.storm.storm import storm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.parametrize("seed", range(2))
async def test_storm(tmp_path: Path, seed: int) -> None:
    counts = await storm(tmp_path, seed=seed, step_count=8)
    assert counts.total() == 8

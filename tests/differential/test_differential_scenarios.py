"""What is done to qemu-storage-daemon and to blockd has the same answers and events, in the same order."""

from pathlib import Path

import pytest

from tests.differential import drivers, endings, exports, jobs, nodes, permissions
from tests.differential.differences import DIFFERENCES, unexplained
from tests.differential.images import make_images
from tests.differential.pair import IMAGES, Scenario, transcripts

PARTS = (nodes, exports, jobs, permissions, endings, drivers)
SCENARIOS = {scenario.name: scenario for part in PARTS for scenario in part.SCENARIOS}
EXCHANGE_COUNT_MIN = 500


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the images of both are, and those that theirs are copied from."""
    folder = tmp_path_factory.mktemp("differential")
    make_images(folder / IMAGES)
    return folder


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS.keys())
async def test_scenario(scenario: Scenario, folder: Path) -> None:
    theirs, ours = await transcripts(scenario, folder)
    faults = unexplained(scenario.name, theirs, ours)
    assert not faults, "\n\n".join(faults)


def test_there_is_enough_to_compare() -> None:
    assert sum(scenario.exchange_count for scenario in SCENARIOS.values()) >= EXCHANGE_COUNT_MIN
    assert DIFFERENCES.keys() <= SCENARIOS.keys()

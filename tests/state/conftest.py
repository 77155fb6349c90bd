"""Every state that is recorded is compared with a look at all of the daemon."""

import pytest

from blockd.daemon.changes import TABLES, Json, RecordedState
from blockd.daemon.recorder import Recorder
from blockd.jobs.job import Job
from tests.state.full_disk import FullDisk


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> FullDisk:
    """A disk with room; set `room` to change that."""
    return FullDisk(monkeypatch)


@pytest.fixture(autouse=True)
def recorded_state_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    update = Recorder._update

    async def checked(recorder: Recorder, ending: Job | None = None) -> None:
        await update(recorder, ending)
        if recorder._services.graph.nodes._touched:
            return  # while the state was worked out: that counts for the next time
        assert _content(recorder._state) == _content(RecordedState(recorder._take(ending).members()))

    monkeypatch.setattr(Recorder, "_update", checked)


def _content(state: RecordedState) -> Json:
    present = {name: value for name, value in state.values.items() if value is not None}
    for table in TABLES:
        present[table] = state.tables[table]
    return present

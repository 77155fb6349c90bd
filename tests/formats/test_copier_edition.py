"""The copier's program is that of the blockd that runs, or it copies nothing."""

import threading

import pytest

from blockd.protocols import copier, copier_process
from blockd.protocols.copier import Copier

WAIT_S = 60.0


@pytest.mark.parametrize("is_same", [True, False])
def test_a_program_that_was_replaced_since_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, is_same: bool
) -> None:
    """An upgrade replaces the files of a daemon that runs."""
    monkeypatch.setattr(copier, "START_TIMEOUT_S", WAIT_S)
    if not is_same:
        monkeypatch.setattr(copier_process, "EDITION", "0.0.1-0")
    one = Copier()
    assert one.start_blocking() == is_same
    del one  # its end of the lanes is closed: the program ends
    for thread in threading.enumerate():
        if thread.name == copier.THREAD_NAME:
            thread.join(WAIT_S)
    assert ("the blockd that runs (0.0.1-0) is not the one that is installed" in caplog.text) != is_same

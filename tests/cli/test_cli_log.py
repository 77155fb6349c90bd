"""What the daemon logs is one line a message, whatever names it has to tell."""

import logging

import pytest

from blockd.cli.log import start_log


def test_names_cannot_garble_the_log(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging, "root", logging.RootLogger(logging.NOTSET))
    start_log()
    logging.root.warning("'%s' was removed", "a\nblockd: \x1b[31mall is well\udcff")
    try:
        raise ValueError("inside")
    except ValueError:
        logging.root.exception("a defect")

    first, *others = capsys.readouterr().err.splitlines()
    assert first == r"blockd: WARNING: root: 'a\nblockd: \x1b[31mall is well\udcff' was removed"
    assert others[0] == "blockd: ERROR: root: a defect"
    assert others[1].startswith("Traceback") and others[-1] == "ValueError: inside"

"""What the daemon logs is one line a message, whatever names it has to tell."""

import logging
import subprocess
import sys

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


FULL = """
import errno, io, logging
from blockd.cli.log import start_log

class FullDisk(io.TextIOBase):
    def write(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")

start_log()
logging.getLogger().handlers[0].setStream(FullDisk())
logging.getLogger("blockd").error("what nobody will read")
"""


def test_a_line_that_cannot_be_written_is_no_traceback() -> None:
    ended = subprocess.run([sys.executable, "-c", FULL], check=True, capture_output=True)
    assert ended.stderr == b""

"""Some kills and restarts of streams with small clusters; ``make direct-cycles`` makes many."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

CYCLE_COUNT = 40


def test_no_page_is_stale_after_kills_and_restarts(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "tests.kill.direct_cycles"]
    arguments = ["--cycles", str(CYCLE_COUNT), "--folder", str(tmp_path)]
    ended = subprocess.run([*program, *arguments], capture_output=True, text=True, check=False)
    assert not ended.returncode, ended.stdout + ended.stderr
    assert ended.stdout.startswith(f"{CYCLE_COUNT} cycles"), ended.stdout

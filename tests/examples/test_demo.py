"""`make demo`, as a user runs it: twice, and what it promises each time."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests import qemu_img
from tests.programs import run
from tests.walls import PROJECT


def test_it_empties_no_folder_that_it_has_not_made(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("important")
    command = [sys.executable, str(PROJECT / "examples/demo.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1
    assert "was not made by this demonstration" in done.stderr
    assert (tmp_path / "letter.txt").read_text() == "important"


@pytest.mark.slow
async def test_demo_keeps_its_promises_twice(tmp_path: Path) -> None:
    folder = tmp_path / "demo-run"
    for _ in range(2):
        said = await run(sys.executable, PROJECT / "examples/demo.py", folder, cwd=tmp_path)
        assert "All as promised" in said
        assert "Traceback" not in said + (folder / "blockd.log").read_text()
        qemu_img.assert_sound(folder / "copy.qcow2")
        assert "backing" not in qemu_img.qemu("qemu-img", "info", folder / "copy.qcow2")

"""`make demo`, as a user runs it: twice, and what it promises each time."""

import sys
from pathlib import Path

import pytest

from tests import qemu_img
from tests.programs import run
from tests.walls import PROJECT


@pytest.mark.slow
async def test_demo_keeps_its_promises_twice(tmp_path: Path) -> None:
    folder = tmp_path / "demo-run"
    for _ in range(2):
        said = await run(sys.executable, PROJECT / "examples/demo.py", folder, cwd=tmp_path)
        assert "All as promised" in said
        assert "Traceback" not in said + (folder / "blockd.log").read_text()
        qemu_img.assert_sound(folder / "copy.qcow2")
        assert "backing" not in qemu_img.qemu("qemu-img", "info", folder / "copy.qcow2")

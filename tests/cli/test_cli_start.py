"""What a start loads before everybody can connect: as little as it can."""

import json
import sys
from pathlib import Path

import pytest

from tests import qemu_img
from tests.programs import run

# Each of these takes longer to load than most modules of blockd together.
OURS = {"blockd.commands.table", "blockd.daemon.state", "blockd.qmp.session_commands", "blockd.web"}
LIBRARIES = {"aiohttp", "prometheus_client", "pydantic"}
# Libraries may load these, too, as they please.
FOR_LIBRARIES = {"rich", "tomllib", "zstandard"}

JOURNAL = {"pydantic", "blockd.daemon.state"}
# Whose status is shown as models, too.
WEB = {"pydantic", "aiohttp", "blockd.web", "prometheus_client"}

# The daemon itself, which says what is loaded when it is ready, and ends then.
PROGRAM = """
import json, os, signal, sys
import blockd.cli.daemon as program

def announce(config):
    print(json.dumps([name for name in sys.modules]))
    os.kill(os.getpid(), signal.SIGTERM)

program._announce = announce
sys.exit(program.main())
"""


async def loaded_when_ready(*arguments: str | Path) -> set[str]:
    said = await run(sys.executable, "-c", PROGRAM, *arguments)
    (names,) = (line for line in said.splitlines() if line.startswith("["))
    return set(json.loads(names))


@pytest.mark.parametrize(
    ("options", "needed"),
    [([], set()), (["--state-dir", "s"], JOURNAL), (["--http", "h"], WEB)],
    ids=["plain", "journal", "http"],
)
async def test_only_what_is_needed_is_loaded(options: list[str], needed: set[str], tmp_path: Path) -> None:
    base = qemu_img.create(tmp_path / "base.qcow2", 1 << 20)
    overlay = qemu_img.create(tmp_path / "disk.qcow2", 1 << 20, backing=base)
    own = [tmp_path / word if len(word) == 1 else word for word in options]
    loaded = await loaded_when_ready(
        *("--device", f"vda={overlay}", "--qmp", tmp_path / "q", "--nbd", tmp_path / "n"),
        *("--pidfile", tmp_path / "pid", *own),
    )
    assert "blockd.formats.qcow2.image" in loaded
    assert loaded & (OURS | LIBRARIES) == needed
    assert needed or not loaded & FOR_LIBRARIES

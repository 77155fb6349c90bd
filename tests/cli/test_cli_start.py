"""What a start loads before everybody can connect: as little as it can."""

import json
import re
import subprocess
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

def announce(config, served):
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


def loaded_by_blockctl(*arguments: str | Path, found: str = "*sys.modules") -> set[str]:
    """What a command has loaded when it ends, or something else that it `found`."""
    program = (
        "import atexit, gc, sys; from blockd.cli.blockctl import main;"
        f"atexit.register(lambda: print({found}, file=sys.stderr)); sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True
    )
    return set(done.stderr.split())


IMAGE_COMMANDS = {"info", "map", "check"}


@pytest.mark.parametrize("command", sorted(IMAGE_COMMANDS))
def test_image_commands_load_only_what_they_need(command: str, tmp_path: Path) -> None:
    image = qemu_img.create(tmp_path / "disk.qcow2", 1 << 20)
    loaded = loaded_by_blockctl("image", command, image)
    assert ("blockd.formats.qcow2.image" in loaded) == (command != "check")
    assert ("blockd.formats.qcow2.check" in loaded) == (command == "check")
    unneeded = {f"blockd.cli.image.{name}" for name in {"create", "convert"} | IMAGE_COMMANDS - {command}}
    unneeded |= {"blockd.jobs.stream", "platform", "datetime"}
    assert not loaded & (unneeded | OURS | LIBRARIES | FOR_LIBRARIES)


@pytest.mark.parametrize("image_format", ["qcow2", "qed"])
def test_image_commands_load_no_other_format(image_format: str, tmp_path: Path) -> None:
    image = tmp_path / f"disk.{image_format}"
    qemu_img.qemu("qemu-img", "create", "-q", "-f", image_format, image, "1M")
    loaded = loaded_by_blockctl("image", "info", image)
    images = {name for name in loaded if re.fullmatch(r"blockd\.formats\.\w+\.image", name)}
    assert images == {f"blockd.formats.{image_format}.image", "blockd.formats.raw.image"}
    assert not loaded & {
        f"blockd.{name}" for name in ("filters.blkstream", "protocols.null", "drivers.add_cow")
    }


def test_an_end_looks_for_no_garbage() -> None:
    """Nearly all objects are frozen when the interpreter would look through them."""
    (count,) = loaded_by_blockctl("raw", "--help", found="gc.get_freeze_count() > 10 * len(gc.get_objects())")
    assert count == "True"

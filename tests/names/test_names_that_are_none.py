"""Empty names, names with a NUL, and a working folder that is gone: one clear line each."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from blockd.cli.options import parse_command_line
from blockd.daemon import Daemon
from blockd.errors import BlockdError
from tests import qemu_img
from tests.control.running import refusal, running

NUL = "a\0b"
CHARDEV = '[[chardev]]\nbackend = "socket"\nid = "c"\npath = "{}"\n'
MONITOR = '[[monitor]]\nchardev = "c"\n'
OPTIONS = {
    "state-dir": 'state-dir = "{}"\n',
    "pidfile": 'pidfile = "{}"\n',
    "image-paths": 'image-paths = ["{}"]\n',
    "qmp": 'qmp = "{}"\n',
    "nbd": 'nbd = "{}"\n',
    "http": 'http = "{}"\n',
    "nbd-server": '[nbd-server]\naddr = {{ type = "unix", path = "{}" }}\n',
    "chardev": f"{CHARDEV}server = true\n{MONITOR}",
    "chardev of a client": CHARDEV + MONITOR,
    "device": '[[device]]\nname = "vda"\nfilename = "{}"\n',
    "blockdev": '[[blockdev]]\ndriver = "file"\nnode-name = "n"\nfilename = "{}"\n',
    "object": '[[object]]\nqom-type = "secret"\nid = "s"\nfile = "{}"\n',
}
EMPTY = [option for option in OPTIONS if option != "object"]


@pytest.mark.parametrize(
    ("option", "name"), [*((option, NUL) for option in OPTIONS), *((option, "") for option in EMPTY)]
)
async def test_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "blockd.toml"
    text = OPTIONS[option].format(json.dumps(name)[1:-1])
    if option in ("state-dir", "pidfile", "image-paths"):
        text += 'qmp = "qmp"\n'
    config.write_text(text)
    with pytest.raises(BlockdError) as refused:
        await Daemon().run(parse_command_line(["--config", str(config)]).config, lambda _served: None)
    expected = ("has a NUL", "has control characters") if name else ("is empty", "requires a file name")
    assert any(words in refused.value.message for words in expected), refused.value.message
    assert [path.name for path in tmp_path.iterdir()] == ["blockd.toml"]


async def test_command(tmp_path: Path) -> None:
    disk = qemu_img.create(tmp_path / "disk.qcow2", 1 << 20)
    async with running(tmp_path, "--device", f"vda={disk}") as daemon:
        client = await daemon.qmp()
        await client.command("nbd-server-stop")
        for name in (NUL, ""):
            address = {"type": "unix", "data": {"path": name}}
            commands: dict[str, dict[str, object]] = {
                "nbd-server-start": {"addr": address},
                "block_switch": {"device": "vda", "filename": name},
                "blockdev-snapshot-sync": {"device": "vda", "snapshot_file": name},
                "blockdev-add": {"driver": "file", "node_name": "n", "filename": name},
                "block_stream": {"device": "vda", "base": name},
                "block-stream": {"device": "vda", "base": name, "job_id": "j"},
                "object-add": {"qom_type": "secret", "id": "s", "file": name},
            }
            for command, arguments in commands.items():
                error_class, text = await refusal(client, command, **arguments)
                assert error_class == "GenericError"
                assert "Internal error" not in text
                assert text.isprintable(), (command, text)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "words", "text"),
    [
        ("daemon", ["--device", "vda=disk.qcow2"], "the working folder was removed"),
        ("daemon", ["--qmp", "qmp"], "the working folder was removed"),
        ("daemon", ["--qmp", "{tmp}/qmp", "--image-paths", "images"], "the working folder was removed"),
        ("daemon", ["--qmp", "{tmp}/qmp", "--state-dir", "st"], "the working folder was removed"),
        ("daemon", ["--qmp", "{tmp}/qmp", "--pidfile", "pid"], "the working folder was removed"),
        ("blockctl", ["image", "create", "new.qcow2", "1M"], "the working folder was removed"),
        ("blockctl", ["image", "info", "disk.qcow2"], "the working folder was removed"),
        (
            "blockctl",
            ["image", "convert", "-f", "raw", "-O", "qcow2", "a.raw", "{tmp}/b"],
            "folder was removed",
        ),
        ("blockctl", ["switch", "vda", "new.qcow2"], "the working folder was removed"),
    ],
)
def test_working_folder_is_gone(tmp_path: Path, program: str, words: list[str], text: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    arguments = [word.format(tmp=tmp_path) for word in words]
    run = f"import os, sys; os.rmdir(os.getcwd()); from blockd.cli.{program} import main; sys.exit(main())"
    result = subprocess.run(
        [sys.executable, "-c", run, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert result.returncode not in (0, -6)
    assert result.stderr.count("\n") == 1, result.stderr
    assert text in result.stderr

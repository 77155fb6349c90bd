"""A sample of `errno_sweep`, and the errors of filesystems without locks."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import qemu_img
from tests.faults import calls, errno_sweep
from tests.faults.errno_sweep import ERRORS, Fault

pytestmark = pytest.mark.slow


async def test_an_error_of_each_call(tmp_path: Path) -> None:
    """The middle one of each call, with another error for each."""
    counts = await errno_sweep.counted(tmp_path)
    made = [call for call in ERRORS if counts[call]]
    faults = [
        Fault(call, (counts[call] + 1) // 2, ERRORS[call][index % len(ERRORS[call])])
        for index, call in enumerate(made)
    ]
    assert len(faults) > 20
    assert await errno_sweep.sweep(tmp_path, faults, at_once=4) == []


def test_no_sockets_for_the_event_loop(tmp_path: Path) -> None:
    disk = qemu_img.create(tmp_path / "disk.raw", 1 << 20)
    environment = calls.environment(disk, fail=f"socketpair:1:{errno.EMFILE}")
    command = [sys.executable, "-m", "blockd.cli.daemon", "--device", f"a={disk}", "--nbd", f"{tmp_path}/n"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert ended.stderr == "blockd: Could not start the event loop: Too many open files\n"
    assert ended.returncode == 1


@pytest.mark.parametrize("number", [1, 4])
@pytest.mark.parametrize("error", ["ENOLCK", "EINVAL", "EOPNOTSUPP", "ENOSYS", "EACCES"])
@pytest.mark.parametrize("call", ["lock", "ask-lock"])
def test_filesystem_without_locks(tmp_path: Path, call: str, error: str, number: int) -> None:
    disk = qemu_img.create(tmp_path / "disk.qcow2", 1 << 20)
    code = getattr(errno, error)
    node = f"qcow2,node-name=q,file.driver=file,file.filename={disk}"  # a file that nobody uses is not locked
    sockets = ["--chardev", f"socket,path={tmp_path}/q,id=c,server=on", "--monitor", "c"]
    environment = calls.environment(disk, fail=f"{call}:{number}+:{code}")
    command = [sys.executable, "-m", "blockd.cli.daemon", "--blockdev", node, *sockets]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"blockd: --blockdev {node}: Could not open '{disk}': Failed to lock byte ")
    assert line.endswith(f": {os.strerror(code)} (there is locking=off)")

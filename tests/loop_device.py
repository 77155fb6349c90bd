"""Block devices whose content is in a file, where they can be made."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def can_loop(folder: Path) -> bool:
    """Whether loop devices can be made here: as root, where the kernel has them and no sandbox forbids it."""
    if shutil.which("losetup") is None:
        return False
    path = folder / "probe"
    path.write_bytes(bytes(512))
    try:
        with loop_device(path):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


@contextmanager
def loop_device(path: Path) -> Iterator[Path]:
    """A block device whose content is in a file."""
    attach = ["losetup", "--find", "--show", str(path)]
    device = subprocess.run(attach, check=True, capture_output=True, text=True).stdout.strip()
    try:
        yield Path(device)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)

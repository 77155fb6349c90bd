"""QEMU's tests, from Debian's source package: where the archive lies, and what is unpacked of it.

The archive is fetched once with apt and kept in a folder for temporary files.
"""

import fcntl
import subprocess
import tarfile
import tempfile
from pathlib import Path

from tests.missing import skip_without
from tests.walls import PROJECT

KEPT = Path(tempfile.gettempdir()) / "blockd-qemu-source"
FETCH = PROJECT / "tests" / "qemu_iotests" / "fetch"
# Of the package: the tests, and the Python modules that they import.
WANTED = ("tests/qemu-iotests", "python/qemu")


def unpacked_tests() -> Path:
    """The folder of QEMU's iotests, as they are in the package; skips the test if that cannot be had."""
    KEPT.mkdir(exist_ok=True)
    with (KEPT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        archive = _archive() or _fetched()
        folder = KEPT / archive.name.removesuffix(".tar.xz")
        if not folder.exists():
            _unpack(archive, folder)
    return folder / WANTED[0]


def _archive() -> Path | None:
    return next(iter(sorted(KEPT.glob("qemu_*.orig.tar.xz"))), None)


def _fetched() -> Path:
    done = subprocess.run([FETCH], check=False, capture_output=True, text=True)
    archive = _archive()
    if done.returncode or archive is None:
        skip_without(f"Debian's source package of QEMU: {FETCH} says {done.stderr.strip()[-500:]}")
    return archive


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack what is wanted, without the folder at the top; all of it is there or nothing."""
    with tempfile.TemporaryDirectory(dir=KEPT) as unfinished:
        with tarfile.open(archive) as package:
            for member in package:
                member.path = member.path.partition("/")[2]
                if member.path.startswith(WANTED):
                    package.extract(member, unfinished, filter="tar")
        Path(unfinished).rename(folder)
        Path(unfinished).mkdir()  # for the manager of the folder, which removes it

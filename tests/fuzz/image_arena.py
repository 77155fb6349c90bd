"""A folder for hostile images, with what they may name inside and canaries outside, and a guard at the doors.

The guard hears of every file that Python opens, renames, removes, and of every socket and program. While it
watches, only files of the arena may be opened.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.fuzz.image_seeds import BASE

IMAGES, OUTSIDE = "images", "outside"
# What a module that is loaded late reads.
_CODE = (".py", ".pyc", ".so")
_FORBIDDEN = ("os.", "shutil.", "socket.", "subprocess.", "tempfile.", "pathlib.")
# Looking, and changing what is open already, is no harm.
_ALLOWED = ("os.listdir", "os.scandir", "os.truncate", "os.lockf", "socket.__new__")


class Trespass(BaseException):
    """Something outside was touched. No handler of the product takes it for one of its errors."""


class Guard:
    """Hears what Python does; there is one in a process, for ever."""

    def __init__(self) -> None:
        self.folder: str | None = None
        sys.addaudithook(self._heard)

    def _heard(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.folder is None:
            return
        if event == "open":
            if not self._may_open(arguments[0]):
                raise Trespass(f"opened {arguments[0]!r}")
        elif event.startswith(_FORBIDDEN) and not event.startswith(_ALLOWED):
            raise Trespass(f"{event} {arguments!r}")

    def _may_open(self, name: object) -> bool:
        assert self.folder is not None
        if isinstance(name, int):
            return True
        path = os.path.abspath(os.fsdecode(name))  # type: ignore[arg-type]  # noqa: PTH100
        if path.startswith("/proc/self/fd/"):
            path = str(Path(path).readlink())  # what is open already, once more
        return f"{path}/".startswith(self.folder) or path.endswith(_CODE)

    @contextmanager
    def watching(self, folder: Path) -> Iterator[None]:
        """Inside, only files below `folder` may be opened."""
        self.folder = f"{folder}/"
        try:
            yield
        finally:
            self.folder = None


class Arena:
    """The folders, and the one file that each hostile image is written to in turn."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / IMAGES
        self.folder.mkdir()
        (root / OUTSIDE).mkdir()
        self.canaries = [root / OUTSIDE / f"canary.{suffix}" for suffix in ("raw", "qcow2")]
        for canary in self.canaries:
            canary.write_bytes(b"canary" * 10000)
        os.mkfifo(self.folder / "fifo")
        (self.folder / "folder").mkdir()
        (self.folder / "link").symlink_to(self.canaries[0])
        (self.folder / "link.qcow2").symlink_to("../outside/canary.qcow2")
        (self.folder / "loop").symlink_to("loop")
        self.disk = self.folder / "disk"
        self.disk.touch()

    def put(self, content: bytes, length: int) -> None:
        """Write a hostile image, sparse behind its bytes."""
        with self.disk.open("r+b") as file:  # not cut to nothing: what follows that, ext4 brings to the disk
            file.write(content)
            file.truncate(len(content))
            file.truncate(length)

    def bystanders(self) -> list[bytes]:
        """What nobody may change."""
        return [path.read_bytes() for path in (*self.canaries, self.folder / BASE)]

"""The images that are measured on, and how results are compared byte by byte."""

import json
import mmap
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

from bench.peers import Image
from blockd.units import GIB, MIB, TIB

# Data for most rows; more than any cache of a daemon, less than the page cache.
DATA_SIZE = 512 * MIB
SPARSE_SIZE = 1 * TIB
SPARSE_DATA_SIZE = 16 * MIB

REQUIRED_PROGRAMS = {"qemu-img": "qemu-utils", "fio": "fio"}
FREE_SPACE_NEEDED = 16 * GIB
# More than all images of a row and what is compared with them.
MEMORY_USED = 16 * GIB


class Lab:
    """A folder with the bases, made once, and overlays, made for every sample."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.raw_base = Image(folder / "base.raw", "raw")
        self.qcow2_base = Image(folder / "base.qcow2", "qcow2")
        self.sparse_base = Image(folder / "sparse.qcow2", "qcow2")

    @classmethod
    @contextmanager
    def prepared(cls, parent: Path) -> Iterator[Self]:
        """Make a folder of its own below `parent`, with the bases in it; both are gone afterwards.

        Raises:   RuntimeError: a program or disk space is missing.
        """
        _use_memory()
        with TemporaryDirectory(prefix="run-", dir=parent.resolve()) as folder:
            lab = cls(Path(folder))
            lab._make_bases()
            yield lab

    def _make_bases(self) -> None:
        missing = [package for name, package in REQUIRED_PROGRAMS.items() if not shutil.which(name)]
        if missing:
            raise RuntimeError(f"the measurements need {' and '.join(missing)}: install with apt")
        if shutil.disk_usage(self.folder).free < FREE_SPACE_NEEDED:
            raise RuntimeError(f"{self.folder} needs {FREE_SPACE_NEEDED // GIB} GiB of free space")
        generator = random.Random(2011)
        with self.raw_base.path.open("wb") as file:
            for _ in range(DATA_SIZE // MIB):
                file.write(generator.randbytes(MIB))
        qemu_img("convert", "-O", "qcow2", self.raw_base.path, self.qcow2_base.path)
        sparse = self.folder / "sparse.raw"
        with sparse.open("wb") as file:
            file.truncate(SPARSE_SIZE)
            for piece in range(SPARSE_DATA_SIZE // MIB):
                file.seek(piece * SPARSE_SIZE // (SPARSE_DATA_SIZE // MIB))
                file.write(generator.randbytes(MIB))
        qemu_img("convert", "-O", "qcow2", sparse, self.sparse_base.path)
        sparse.unlink()

    def large_base(self, size: int) -> Image:
        """A raw base of `size`, made when first asked for: the same data over and over again."""
        image = Image(self.folder / f"large-{size // MIB}.raw", "raw")
        if not image.path.exists():
            with image.path.open("wb") as target:
                for _ in range(size // DATA_SIZE):
                    with self.raw_base.path.open("rb") as source:
                        shutil.copyfileobj(source, target, MIB)
        return image

    def overlay(self, base: Image) -> Image:
        """Make a fresh, empty overlay of `base`."""
        path = self.folder / "overlay.qcow2"
        path.unlink(missing_ok=True)
        qemu_img("create", "-q", "-f", "qcow2", "-b", base.path, "-F", base.format, path)
        self.settle()
        return Image(path, "qcow2", base)

    def filled(self, image_format: str = "qcow2") -> Image:
        """Make a fresh image, qcow2 or raw, that holds all of the base's data itself."""
        path = self.folder / f"filled.{image_format}"
        shutil.copyfile({"qcow2": self.qcow2_base, "raw": self.raw_base}[image_format].path, path)
        self.settle()
        return Image(path, image_format)

    def settle(self) -> None:
        """Let write-back of earlier work finish, so that it does not slow down what is measured."""
        os.sync()

    def compare(self, image: str | Path, base: Image, image_format: str = "qcow2") -> None:
        """Compare all bytes of an image, or of an NBD URI, with a base.

        Raises:   RuntimeError: they differ.
        """
        qemu_img("compare", "-U", "-f", image_format, "-F", base.format, image, base.path)

    def has_backing(self, image: Image) -> bool:
        """Whether the image's header names a backing file."""
        return "backing-filename" in json.loads(qemu_img("info", "--output=json", image.path))

    def check(self, image: Image) -> None:
        """Check an image's metadata, if it has any.

        Raises:   RuntimeError: it has errors.
        """
        if image.format != "raw":
            qemu_img("check", "-q", image.path)


def _use_memory() -> None:
    """Use once the memory that page caches will be made of.

    Where a virtual machine's memory was never used, its host provides it page by page, at several times the
    price of everything that is measured, and to whoever happens to come first.
    """
    length = min(MEMORY_USED, os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGESIZE") // 2)
    with mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        for position in range(0, length, mmap.PAGESIZE):
            memory[position] = 1


def qemu_img(*arguments: str | Path) -> str:
    """Run qemu-img; see `qemu`."""
    return qemu("qemu-img", *arguments)


def qemu(*command: str | Path) -> str:
    """Run one of QEMU's tools and return what it prints.

    Raises:   RuntimeError: it failed, or what it read was not what was expected.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or "Pattern verification failed" in done.stdout:
        raise RuntimeError(f"{' '.join(map(str, command))}: {done.stdout}{done.stderr}")
    return done.stdout

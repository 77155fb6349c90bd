"""Headers that are nearly right: blockd opens those that QEMU opens, and refuses those that it refuses."""

import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from blockd.errors import ImageError
from blockd.formats.qcow2.header import HEADER_LENGTH, HEADER_LENGTH_V2, parse
from tests import qemu_img

CLUSTER = 64 << 10
NAME = b"base.raw"
UNKNOWN, END = 0x12345678, 0


class Made(NamedTuple):
    """Changes to the header cluster of an image of a version, with a backing file or without."""

    name: str
    version: int
    change: Callable[[bytearray], None]


def put(offset: int, field: str, value: int) -> Callable[[bytearray], None]:
    return lambda header: struct.pack_into(field, header, offset, value)


def put_name(distance: int, *extensions: tuple[int, int]) -> Callable[[bytearray], None]:
    """Put extensions (type and told length) behind the header, and the backing name `distance` behind it."""

    def change(header: bytearray) -> None:
        start = HEADER_LENGTH if header[7] == 3 else HEADER_LENGTH_V2
        header[start:CLUSTER] = bytes(CLUSTER - start)
        offset = start
        for kind, length in extensions:
            struct.pack_into(">II", header, offset, kind, length)
            offset += 8 + (length + 7) // 8 * 8
        header[start + distance : start + distance + len(NAME)] = NAME
        struct.pack_into(">QI", header, 8, start + distance, len(NAME))

    return change


def made() -> Iterator[Made]:
    for version in (2, 3):
        for offset in (0, 1, 8, 512, 4096, CLUSTER - 1, CLUSTER, 3 * CLUSTER):
            yield Made(f"no snapshots at {offset}", version, put(64, ">Q", offset))
        for offset in (1 << 62, (1 << 63) - CLUSTER, 1 << 63, (1 << 64) - CLUSTER):
            yield Made(f"no snapshots at {offset:#x}", version, put(64, ">Q", offset))
        for distance in range(0, 17, 4):
            yield Made(f"the name {distance} behind the header", version, put_name(distance))
            yield Made(f"the name {distance} behind it, in an end", version, put_name(distance, (END, 0)))
        for length in (0, 1, 8, 9):
            for distance in (8, 15, 16, 24, 30):
                extensions = [(UNKNOWN, length), (UNKNOWN, 0)]
                name = f"extensions of {length} bytes, the name {distance} behind the header"
                yield Made(name, version, put_name(distance, *extensions))
        for length in (1, 8, 1 << 16, (1 << 32) - 1):
            yield Made(f"an end of {length} bytes", version, put_name(24, (END, length)))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("headers")
    (folder / NAME.decode()).write_bytes(bytes(1 << 20))
    return {
        version: qemu_img.create(folder / f"{version}.qcow2", 1 << 20, f"compat=v{version}")
        for version in (2, 3)
    }


@pytest.mark.parametrize("version", [2, 3])
def test_what_qemu_refuses_is_refused(version: int, images: dict[int, Path]) -> None:
    sound = images[version].read_bytes()
    different, refused_count = [], 0
    cases = [case for case in made() if case.version == version]
    for case in cases:
        content = bytearray(sound)
        case.change(content)
        image = images[version].with_name("made.qcow2")
        image.write_bytes(content)
        command = ["qemu-img", "info", "-f", "qcow2", str(image)]
        theirs = subprocess.run(command, capture_output=True, check=False).returncode != 0
        ours = is_refused(bytes(content[:CLUSTER]))
        refused_count += theirs
        if theirs != ours:
            different.append(f"{case.name}: {'refused' if theirs else 'opened'} there only")
    assert different == []
    assert 0 < refused_count < len(cases)


def is_refused(cluster: bytes) -> bool:
    try:
        parse(cluster, "made.qcow2")
    except ImageError:
        return True
    return False

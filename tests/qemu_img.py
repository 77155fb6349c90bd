"""qemu-img and qemu-io as oracles: what QEMU says about an image, and images made by QEMU."""

import json
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

TIMEOUT_S = 100.0


class Verdict(NamedTuple):
    """What `qemu-img check` found."""

    corruptions: int
    leaks: int
    total_clusters: int
    allocated_clusters: int
    compressed_clusters: int
    fragmented_clusters: int
    image_end_offset: int


def qemu(*command: str | Path, expect: int | None = 0) -> str:
    """Run a QEMU program and return what it printed on standard output."""
    words = [str(word) for word in command]
    result = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert expect in (None, result.returncode), f"{' '.join(words)}: {result.stdout}{result.stderr}"
    return result.stdout


def create(
    path: Path, size: int, *options: str, backing: Path | None = None, backing_format: str = "qcow2"
) -> Path:
    """Make a qcow2 image; `options` as after -o, each one.

    The backing file is not opened: a daemon may be writing its header just then.
    """
    link = ["-u", "-b", str(backing), "-F", backing_format] if backing else []
    extra = [word for option in options for word in ("-o", option)]
    qemu("qemu-img", "create", "-q", "-f", "qcow2", *extra, *link, path, str(size))
    return path


def write(path: Path, *commands: str, image_format: str = "qcow2") -> None:
    """Run qemu-io commands on an image."""
    qemu(
        "qemu-io",
        "-t",
        "unsafe",
        "-f",
        image_format,
        *(word for command in commands for word in ("-c", command)),
        path,
    )


def check(path: Path, image_format: str = "qcow2", *, is_in_use: bool = False) -> Verdict | None:
    """Ask QEMU about an image; None when QEMU cannot even open it."""
    share = ["-U"] if is_in_use else []
    text = qemu("qemu-img", "check", *share, "--output=json", "-f", image_format, path, expect=None)
    if not text.strip():
        return None
    found = json.loads(text)
    return Verdict(*(found.get(name.replace("_", "-"), 0) for name in Verdict._fields))


def assert_sound(path: Path, image_format: str = "qcow2") -> None:
    """No corruption; leaks are not counted as such."""
    verdict = check(path, image_format)
    assert verdict is not None, f"QEMU cannot open {path}"
    assert verdict.corruptions == 0, verdict


def assert_same(one: Path, one_format: str, other: Path, other_format: str) -> None:
    """Both images have the same content for a guest."""
    qemu("qemu-img", "compare", "-f", one_format, "-F", other_format, one, other)


def content(path: Path, image_format: str = "qcow2", *, snapshot: str | None = None) -> bytes:
    """All that a guest of QEMU would read from an image, which may be in use, or from a snapshot in it."""
    raw = path.with_name(path.name + ".content")
    chosen = ["-l", snapshot] if snapshot is not None else []
    qemu("qemu-img", "convert", "-U", "-t", "unsafe", "-f", image_format, *chosen, "-O", "raw", path, raw)
    try:
        return raw.read_bytes()
    finally:
        raw.unlink()


def map_of(path: Path, image_format: str) -> list[dict[str, Any]]:
    """What `qemu-img map` tells about an image, extent by extent."""
    extents: list[dict[str, Any]] = json.loads(
        qemu("qemu-img", "map", "--output=json", "-f", image_format, path)
    )
    return extents


def info(path: Path) -> dict[str, Any]:
    """What `qemu-img info` tells about an image, which may be in use."""
    found: dict[str, Any] = json.loads(qemu("qemu-img", "info", "-U", "--output=json", path))
    return found

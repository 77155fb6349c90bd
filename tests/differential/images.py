"""The images that scenarios work on; made once, copied for each."""

import json
from pathlib import Path

from tests import qemu_img

SIZE = 4 << 20


def make_images(folder: Path) -> None:
    """Make a chain top → mid → base of 4 MiB, 1 MiB of data in each, and some that stand alone."""
    folder.mkdir()
    base = qemu_img.create(folder / "base.qcow2", SIZE)
    mid = qemu_img.create(folder / "mid.qcow2", SIZE, backing=base)
    top = qemu_img.create(folder / "top.qcow2", SIZE, backing=mid)
    for offset, image in enumerate([base, mid, top]):
        qemu_img.qemu("qemu-io", "-f", "qcow2", "-c", f"write -P {offset + 1} {offset}M 1M", image)
    # Overlays that have nothing themselves; one of them is larger.
    qemu_img.create(folder / "deep.qcow2", SIZE, backing=top)
    qemu_img.create(folder / "over.qcow2", SIZE, backing=base)
    qemu_img.create(folder / "larger.qcow2", 2 * SIZE, backing=base)
    # Overlays of what is not there, and of what is not in the format that is recorded.
    for name, backing, recorded in [("lost", "none.qcow2", "qcow2"), ("wrong", "text.txt", "qcow2")]:
        qemu_img.qemu(
            *("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-F", recorded, "-b", folder / backing),
            *(folder / f"{name}.qcow2", str(SIZE)),
        )
    # Names that say more than where a file is.
    options: dict[str, dict[str, object]] = {
        "nested": {"driver": "qcow2", "file": {"driver": "file", "filename": str(folder / "base.qcow2")}},
        "dotted": {"driver": "raw", "file.driver": "file", "file.filename": str(folder / "data.raw")},
        "elsewhere": {"driver": "raw", "file": {"driver": "nbd", "path": str(folder / "none")}},
    }
    for name, given in options.items():
        qemu_img.qemu(
            *("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-F", str(given["driver"])),
            *("-b", f"json:{json.dumps(given)}", folder / f"{name}.qcow2", str(SIZE)),
        )
    for name in ("alone", "free"):
        qemu_img.create(folder / f"{name}.qcow2", SIZE)
    (folder / "disk.raw").write_bytes(bytes(SIZE))
    (folder / "data.raw").write_bytes(b"data" * (SIZE // 4))
    qemu_img.create(folder / "upper.qcow2", SIZE, backing=folder / "data.raw", backing_format="raw")
    (folder / "odd.raw").write_bytes(bytes(SIZE + 100))
    (folder / "text.txt").write_text("no image\n")
    qemu_img.qemu("qemu-img", "create", "-q", "-f", "qed", folder / "disk.qed", str(SIZE))
    (folder / "folder").mkdir()

"""The example of QEMU's streaming design: `ide0-hd.qed`, an overlay, is streamed while a guest uses it."""

from pathlib import Path

import pytest

from tests import qemu_img
from tests.conftest import StartDaemon
from tests.qemu_img import qemu

SIZE = 4 << 20


def make_images(folder: Path, base_format: str) -> Path:
    base, overlay = folder / f"base.{base_format}", folder / "ide0-hd.qed"
    qemu("qemu-img", "create", "-q", "-f", base_format, base, str(SIZE))
    qemu_img.write(base, "write -P 1 0 1M", "write -P 2 3M 300k", image_format=base_format)
    qemu("qemu-img", "create", "-q", "-f", "qed", "-b", base.name, "-F", base_format, overlay, str(SIZE))
    qemu_img.write(overlay, "write -P 3 512k 100k", "write -z 64k 128k", image_format="qed")
    return overlay


@pytest.mark.parametrize(
    "base_format",
    ["raw", pytest.param("qcow2", marks=pytest.mark.slow), pytest.param("qed", marks=pytest.mark.slow)],
)
async def test_a_qed_overlay_streams_and_is_copied_live(
    start_daemon: StartDaemon, tmp_path: Path, base_format: str
) -> None:
    image = make_images(tmp_path, base_format)
    content = bytearray(qemu_img.content(image, "qed"))
    daemon = await start_daemon("--device", f"ide0-hd={image}")
    qmp = await daemon.qmp()

    await qmp.command("block_stream", device="ide0-hd")
    assert "error" not in await qmp.event("BLOCK_JOB_COMPLETED", device="ide0-hd")
    await qmp.event("JOB_STATUS_CHANGE", id="ide0-hd", status="null")
    assert await qmp.command("block_stream_status") == []
    (tmp_path / f"base.{base_format}").unlink()
    qemu("qemu-io", "-f", "raw", "-c", "write -P 4 2M 100k", daemon.nbd_uri("ide0-hd"))
    content[2 << 20 : (2 << 20) + 102400] = b"\4" * 102400

    copy = tmp_path / "copy.qed"
    qemu("qemu-img", "create", "-q", "-u", "-f", "qed", "-b", image.name, "-F", "qed", copy, str(SIZE))
    await qmp.command("block_switch", device="ide0-hd", filename=str(copy), format="qed")
    qemu("qemu-io", "-f", "raw", "-c", "write -P 5 1M 70k", daemon.nbd_uri("ide0-hd"))
    await qmp.command("block_stream", device="ide0-hd")
    assert "error" not in await qmp.event("BLOCK_JOB_COMPLETED", device="ide0-hd")
    await qmp.close()
    assert await daemon.stop() == 0

    qemu("qemu-img", "check", "-q", "-f", "qed", image)
    assert qemu_img.content(image, "qed") == content
    image.unlink()
    content[1 << 20 : (1 << 20) + 71680] = b"\5" * 71680
    qemu("qemu-img", "check", "-q", "-f", "qed", copy)
    assert qemu_img.content(copy, "qed") == content
    qemu_img.write(copy, "write -P 6 0 64k", "read -P 6 0 64k", image_format="qed")

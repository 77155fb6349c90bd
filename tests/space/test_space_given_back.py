"""Clusters of a copy that came to nothing, when a checkpoint has counted them meanwhile."""

from blockd.formats.qcow2.image import Qcow2Image
from blockd.units import KIB
from tests.recording import RecordingFile
from tests.streaming import check, overlay

CLUSTER = 4 * KIB


async def test_the_disk_does_not_count_them_when_the_image_is_trimmed() -> None:
    file = RecordingFile()
    image = await overlay(file, None, 64 * CLUSTER, cluster_size=CLUSTER)
    assert isinstance(image, Qcow2Image)
    await image.write(0, b"x" * CLUSTER)
    run = await image.metadata.allocate(8)
    file.write_blocking(run.host_offset, b"y" * 8 * CLUSTER)
    await image.write(CLUSTER, b"z" * CLUSTER)  # behind them: the file cannot be cut off there
    await image.flush()
    assert (await check(file.again())).leaks == 8
    image.metadata.allocator.give_back(run)
    await image.trim()
    report = await check(file.again())
    assert (report.leaks, report.image_end_offset) == (0, file.size)

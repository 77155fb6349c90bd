"""Other people's clients, unchanged: qemu's tools, libnbd's, and fio."""

import json
from pathlib import Path

import pytest

from blockd.block.root import Root
from blockd.exports.nbd.export import Export
from blockd.units import KIB, MIB
from tests.missing import require_programs
from tests.nbd.memory_node import MemoryNode
from tests.nbd.serving import Serving, serving
from tests.programs import run

SIZE = 4 * MIB
# nbdsh is a module of the distribution's own Python, not of the one that runs the tests.
NBDSH_PATH = "/usr/bin:/bin"


async def nbdsh(script: str, *, expect: int = 0) -> str:
    require_programs("nbdsh", path=NBDSH_PATH)
    return await run("env", f"PATH={NBDSH_PATH}", "nbdsh", "-c", script, expect=expect)


def uri(at: Serving) -> str:
    return f"nbd+unix:///disk?socket={at.path}"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A raw image of the node's size: data, then a hole, then data."""
    path = tmp_path / "image.raw"
    with path.open("wb") as file:
        file.write(bytes(range(256)) * (4 * KIB))
        file.seek(3 * MIB)
        file.write(b"\xa5" * 64 * KIB)
        file.truncate(SIZE)
    return path


async def test_qemu_io(node: MemoryNode, tmp_path: Path) -> None:
    commands = [
        *("write -P 1 0 2M", "write -f -P 2 1000 3000", "write -z 64k 64k", "write -z -u 128k 64k"),
        *("discard 1M 64k", "flush", "read -P 1 0 1000", "read -P 2 1000 3000", "read -P 0 64k 128k"),
        *("aio_write -P 3 2M 1M", "aio_write -P 4 3M 1M", "aio_flush", "read -P 3 2M 1M", "read -P 4 3M 1M"),
    ]
    async with serving(node, tmp_path) as at:
        output = await run("qemu-io", "-f", "raw", *(w for c in commands for w in ("-c", c)), uri(at))
        assert "failed" not in output
        output = await run("qemu-io", "-r", "-f", "raw", "-c", "write 0 512", uri(at), expect=None)
        assert "read-only" in output
    assert node.data[1000:4000] == b"\2" * 3000
    assert node.data[3 * MIB :] == b"\4" * MIB


async def test_qemu_img_converts_both_ways_and_compares(
    node: MemoryNode, tmp_path: Path, image: Path
) -> None:
    back = tmp_path / "back.raw"
    async with serving(node, tmp_path) as at:
        info = json.loads(await run("qemu-img", "info", "--output=json", "-f", "raw", uri(at)))
        assert info["virtual-size"] == SIZE
        await run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", image, uri(at))
        assert node.data == image.read_bytes()
        await run("qemu-img", "compare", "-f", "raw", "-F", "raw", image, uri(at))
        mapped = json.loads(await run("qemu-img", "map", "--output=json", "-f", "raw", uri(at)))
        assert [(run_["start"], run_["data"]) for run_ in mapped] == [
            *((0, True), (MIB, False), (3 * MIB, True), (3 * MIB + 64 * KIB, False))
        ]
        await run("qemu-img", "convert", "-f", "raw", "-O", "raw", uri(at), back)
    assert back.read_bytes() == image.read_bytes()


async def test_nbdinfo(node: MemoryNode, tmp_path: Path) -> None:
    node.holes -= set(range(256, 512))
    async with serving(node, tmp_path) as at:
        (export,) = json.loads(await run("nbdinfo", "--json", uri(at)))["exports"]
        assert export["export-size"] == SIZE
        assert export["description"] == "a test's disk"
        assert export["contexts"] == ["base:allocation"]
        assert (export["block_size_minimum"], export["block_size_preferred"]) == (1, 4096)
        for ability in ("cache", "df", "flush", "fua", "multi_conn", "trim", "zero", "fast_zero"):
            assert export[f"can_{ability}"], ability
        runs = json.loads(await run("nbdinfo", "--map", "--json", uri(at)))
        assert [(run_["offset"], run_["type"]) for run_ in runs] == [(0, 3), (MIB, 0), (2 * MIB, 3)]


async def test_nbdinfo_and_qemu_nbd_list_all_exports(node: MemoryNode, tmp_path: Path) -> None:
    async with serving(node, tmp_path) as at:
        at.server.add_export(Export("second", Root(MemoryNode(12345)), False, "another", "2"))
        listed = json.loads(await run("nbdinfo", "--list", "--json", f"nbd+unix:///?socket={at.path}"))
        assert [export["export-name"] for export in listed["exports"]] == ["disk", "second"]
        assert listed["exports"][1]["is_read_only"]
        output = await run("qemu-nbd", "--list", "-k", at.path)
        assert "exports available: 2" in output
        assert "export: 'second'" in output
        assert "base:allocation" in output


async def test_nbdcopy_both_ways(node: MemoryNode, tmp_path: Path, image: Path) -> None:
    back = tmp_path / "back.raw"
    async with serving(node, tmp_path) as at:
        await run("nbdcopy", image, uri(at))
        assert node.data == image.read_bytes()
        await run("nbdcopy", "--connections=4", "--requests=64", uri(at), back)
    assert back.read_bytes() == image.read_bytes()


LIBNBD_SCRIPT = """
h.set_request_structured_replies({structured})
h.add_meta_context("base:allocation")
h.connect_uri("{uri}")
assert h.get_protocol() == "newstyle-fixed"
assert h.get_structured_replies_negotiated() == {structured}
size = h.get_size()
h.pwrite(b"x" * 1000, 500)
h.pwrite(b"y" * 1000, 100000, nbd.CMD_FLAG_FUA)
assert h.pread(1000, 500) == b"x" * 1000
assert h.pread(200000, 0)[100000:101000] == b"y" * 1000
if {structured}:
    chunks = []
    h.pread_structured(200000, 0, lambda data, offset, status, error: chunks.append(data), nbd.CMD_FLAG_DF)
    assert [chunk[100000:101000] for chunk in chunks] == [b"y" * 1000]
h.zero(700, 500)
h.trim(65536, 65536, nbd.CMD_FLAG_FUA)
h.cache(4096, 0)
h.flush()
assert h.pread(1000, 500) == bytes(700) + b"x" * 300
h.set_strict_mode(h.get_strict_mode() & ~nbd.STRICT_BOUNDS & ~nbd.STRICT_ZERO_SIZE)
def fails(call, *args):
    try:
        call(*args)
    except nbd.Error as error:
        return error.errnum
import errno
assert fails(h.pread, 512, size) == errno.EINVAL
assert fails(h.pwrite, bytes(512), size) == errno.ENOSPC
h.pwrite(b"", 0)
runs = []
if {structured}:
    h.block_status(size, 0, lambda context, offset, entries, error: runs.extend(entries))
    assert sum(runs[0::2]) == size, runs
buffers = [nbd.Buffer(4096) for _ in range(200)]
cookies = [h.aio_pread(buffer, index * 4096) for index, buffer in enumerate(buffers)]
while h.aio_in_flight():
    h.poll(-1)
assert all(h.aio_command_completed(cookie) for cookie in cookies)
assert buffers[0].to_bytearray()[1200:1500] == b"x" * 300
h.shutdown()
"""


@pytest.mark.parametrize("structured", [True, False])
async def test_libnbd(node: MemoryNode, tmp_path: Path, structured: bool) -> None:
    async with serving(node, tmp_path) as at:
        await nbdsh(LIBNBD_SCRIPT.format(uri=uri(at), structured=structured))


async def test_libnbd_sees_errors_of_a_read_only_export(tmp_path: Path) -> None:
    node = MemoryNode(MIB, read_only=True)
    script = "h.set_strict_mode(0); h.connect_uri({!r}); assert h.is_read_only(); h.pwrite(b'x', 0)"
    async with serving(node, tmp_path, writable=False) as at:
        output = await nbdsh(script.format(uri(at)), expect=1)
    assert "Operation not permitted" in output


FIO_JOB = """
[global]
ioengine=nbd
uri={uri}
size=64M
verify=crc32c
verify_fatal=1
serialize_overlap=1

[random]
rw=randwrite
bsrange=512-256k
blockalign=512
iodepth=16
io_size=128M
"""


@pytest.mark.slow
@pytest.mark.parametrize("nowait", [True, False])
async def test_fio_verifies_what_it_wrote(tmp_path: Path, nowait: bool) -> None:
    node = MemoryNode(64 * MIB)
    node.nowait = nowait
    job = tmp_path / "verify.fio"
    async with serving(node, tmp_path) as at:
        job.write_text(FIO_JOB.format(uri=uri(at)))
        output = await run("fio", job, cwd=tmp_path)
    assert "err= 0" in output, output

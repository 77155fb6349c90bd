"""Images from strangers: what each rule about them promises, by the tests that show it.

Nothing an image says leads outside its folder: canaries stand there, and a guard hears of every file that is
opened. Mutants by the thousand are in `tests/fuzz`.
"""

import ast
import os
import struct
import zlib
from pathlib import Path

import pytest

from blockd.block.node import OverlayNode
from blockd.drivers import FORMATS, NodeGraph
from blockd.errors import BlockdError, ImageError, RequestError
from blockd.formats.check_report import CheckReport
from blockd.formats.qcow2.compressed import CompressedCluster
from blockd.formats.qcow2.header import Header
from blockd.protocols.file import FileNode
from blockd.units import KIB, MIB
from tests import qemu_img
from tests.formats.damaged import COPIED, Image
from tests.fuzz.image_arena import Guard, Trespass
from tests.recording import RecordingFile
from tests.streaming import streaming
from tests.walls import PROJECT

# Every rule, and where it is shown: a file of tests and the tests in it.
RULES: dict[str, tuple[str, list[str]]] = {
    "the format is given, recorded, or said by name and content alike": (
        "cli/test_cli_graph.py",
        ["test_format_needs_name_and_content_to_agree"],
    ),
    "that of a backing file too; a raw image whose guest wrote a header stays raw, or is refused": (
        "cli/test_cli_backing_formats.py",
        [
            "test_name_and_content_agree",
            "test_a_raw_image_whose_guest_wrote_a_header_is_never_taken_for_that",
            "test_what_is_recorded_comes_first",
        ],
    ),
    "names lead into allowed folders only; no protocols, devices, doors to the kernel, control characters": (
        "cli/test_cli_graph.py",
        ["test_names_that_images_may_not_have", "test_folders_and_files_that_the_user_named_are_allowed"],
    ),
    "what is outside is neither read nor written": (
        "badinput/test_hostile_images.py",
        ["test_nothing_outside_is_touched", "test_name_with_a_nul"],
    ),
    "external data files are refused": ("badinput/test_hostile_images.py", ["test_external_data_file"]),
    "no loops, no file twice, a bounded depth": (
        "cli/test_cli_graph.py",
        ["test_loops", "test_a_file_given_twice_in_one_chain", "test_depth_has_a_bound"],
    ),
    "qcow2: bounds of every field, and of every table, before anything is allocated": (
        "badinput/test_bad_tables.py",
        [
            "test_wrong_header_field_is_refused_with_the_file_and_the_field",
            "test_spoiled_image_gets_an_error_or_is_read_and_is_never_written",
            "test_writing_to_a_spoiled_image_raises_only_our_errors",
            "test_guest_write_never_lands_in_metadata",
        ],
    ),
    "qcow2: extensions and snapshots are bounded": (
        "badinput/test_hostile_images.py",
        ["test_too_many_extensions", "test_extension_past_the_header", "test_snapshots_that_cannot_be"],
    ),
    "qcow2: an entry without a place is unallocated": (
        "badinput/test_hostile_images.py",
        ["test_stream_over_an_entry_that_names_no_cluster"],
    ),
    "qed: bounds of every field": (
        "badinput/test_hostile_images.py",
        [
            "test_wrong_qed_field_is_refused_by_name",
            "test_check_of_a_sparse_terabyte",
            "test_qed_image_with_more_errors_than_are_told",
        ],
    ),
    "compressed clusters give one cluster at most": (
        "badinput/test_hostile_images.py",
        ["test_bomb_gives_one_cluster"],
    ),
    "zstd too": ("formats/test_qcow2_features.py", ["test_bomb_gives_one_cluster_and_no_more"]),
    "two writers are refused, as QEMU does": (
        "locks/test_image_locks.py",
        [
            "test_image_that_another_program_writes_is_refused",
            "test_image_that_blockd_writes_is_refused_to_another_program",
        ],
    ),
    "a file that was removed, replaced or cut is noticed": (
        "formats/test_file_lost.py",
        ["test_lost_file_is_noticed_before_anything_is_acknowledged"],
    ),
    "mutants of every format": ("fuzz/test_fuzz_images.py", ["test_hostile_images_do_no_harm"]),
}


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_has_its_tests(rule: str) -> None:
    file, names = RULES[rule]
    tree = ast.parse((PROJECT / "tests" / file).read_text())
    functions = ast.FunctionDef, ast.AsyncFunctionDef
    assert set(names) <= {node.name for node in tree.body if isinstance(node, functions)}


# -- canaries -----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def guard() -> Guard:
    return Guard()


def test_the_guard_hears(guard: Guard, tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    canary = tmp_path / "canary"
    canary.touch()
    with guard.watching(tmp_path / "inside"):
        (tmp_path / "inside" / "file").write_bytes(b"x")
        with pytest.raises(Trespass):
            canary.read_bytes()
        with pytest.raises(Trespass):
            canary.unlink()


@pytest.mark.parametrize(
    "name", ["../outside/canary.raw", "{outside}/canary.raw", "link", "folder/canary.raw"]
)
@pytest.mark.parametrize("image_format", [name for name, entry in FORMATS.items() if entry.has_backing])
async def test_nothing_outside_is_touched(guard: Guard, tmp_path: Path, image_format: str, name: str) -> None:
    """Whatever field of an image names it, by whichever way."""
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for folder in (inside, outside):
        folder.mkdir()
    canary = outside / "canary.raw"
    canary.write_bytes(b"canary" * 10000)
    (inside / "link").symlink_to(canary)
    (inside / "folder").symlink_to(outside)
    path = inside / f"top.{image_format}"
    path.touch()
    file = await FileNode.open(str(path), node_name="file", read_only=False)
    named = name.format(outside=outside)
    await FORMATS[image_format].create(file, 64 * KIB, backing_filename=named, backing_format="raw")
    await file.close()
    for read_only in (True, False):
        graph = NodeGraph()
        with guard.watching(inside), pytest.raises(BlockdError, match="outside the folder of the image"):
            await graph.open_image(str(path), image_format, read_only=read_only)
        await graph.close()
    assert canary.read_bytes() == b"canary" * 10000


async def test_external_data_file(guard: Guard, tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    path, canary = tmp_path / "inside" / "top.qcow2", tmp_path / "canary.raw"
    qemu_img.qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={canary}", path, "1M")
    before = canary.read_bytes()
    graph = NodeGraph()
    with guard.watching(tmp_path / "inside"), pytest.raises(ImageError, match="external data file"):
        await graph.open_image(str(path), "qcow2", read_only=True)
    assert canary.read_bytes() == before


async def test_name_with_a_nul(tmp_path: Path) -> None:
    path = qemu_img.create(tmp_path / "top.qcow2", MIB)
    data = bytearray(path.read_bytes())
    name = b"base.raw\0/etc/passwd"
    data[600 : 600 + len(name)] = name
    struct.pack_into(">QI", data, 8, 600, len(name))
    path.write_bytes(data)
    with pytest.raises(RequestError, match=r"control characters in its backing file name 'base.raw\\x00/etc"):
        await NodeGraph().open_image(str(path), "qcow2", read_only=True)


# -- bounds -------------------------------------------------------------------------------------------


async def sound(image_format: str) -> RecordingFile:
    file = RecordingFile(name=f"recorded.{image_format}")
    await FORMATS[image_format].create(file, 256 * KIB)
    return file


QED_FIELDS = {
    "cluster size 2048": (4, "<I", 2048),
    "cluster size 12288": (4, "<I", 12288),
    "cluster size 134217728": (4, "<I", 128 * MIB),
    "table size 0": (8, "<I", 0),
    "table size 3": (8, "<I", 3),
    "table size 32": (8, "<I", 32),
    "header size 0 clusters": (12, "<I", 0),
    "header size 4294967295 clusters": (12, "<I", (1 << 32) - 1),
    "unknown feature bit 3": (16, "<Q", 1 << 3),
    "unknown feature bit 63": (16, "<Q", 1 << 63),
    "L1 table offset 0x10001 is not cluster aligned": (40, "<Q", 0x10001),
    "L1 table offset 0x0 overlaps the header": (40, "<Q", 0),
    "L1 table at 0x8000000000000000 runs past the end": (40, "<Q", 1 << 63),
    "image size 262145 is not a multiple of 512": (48, "<Q", 256 * KIB + 1),
    "image size 9223372036854775808 is more than the tables can map": (48, "<Q", 1 << 63),
    "backing file name is 1024 bytes long, more than 1023": (56, "<II", (512, 1024)),
    "backing file name at 65500 is outside the header's clusters": (56, "<II", (65500, 100)),
    "backing file name at 4 is outside the header's clusters": (56, "<II", (4, 10)),
}


@pytest.mark.parametrize("said", QED_FIELDS)
async def test_wrong_qed_field_is_refused_by_name(said: str) -> None:
    offset, layout, value = QED_FIELDS[said]
    file = await sound("qed")
    values = value if isinstance(value, tuple) else (value,)
    if offset == 56:
        struct.pack_into("<Q", file.disk, 16, 1)  # there is a backing file
    struct.pack_into(layout, file.disk, offset, *values)
    for read_only in (True, False):
        with pytest.raises(ImageError) as caught:
            await FORMATS["qed"].open(file, "image", read_only)
        assert "'recorded.qed'" in caught.value.message
        assert said in caught.value.message


async def test_too_many_extensions() -> None:
    file = await sound("qcow2")
    for number in range(65):
        struct.pack_into(">II", file.disk, 112 + number * 8, 0x1000 + number, 0)
    with pytest.raises(ImageError, match=r"'recorded\.qcow2': more than 64 header extensions"):
        await FORMATS["qcow2"].open(file, "image", True)


async def test_extension_past_the_header() -> None:
    file = await sound("qcow2")
    struct.pack_into(">II", file.disk, 112, 0x1000, 1 << 31)
    with pytest.raises(
        ImageError, match="header extension 0x00001000 of 2147483648 bytes runs past the header"
    ):
        await FORMATS["qcow2"].open(file, "image", True)


async def checked(file: RecordingFile | FileNode, image_format: str) -> CheckReport:
    check = FORMATS[image_format].check
    assert check is not None
    return await check(file)


def image_with_snapshots_at(folder: Path, offset: int) -> Path:
    path = qemu_img.create(folder / "disk.qcow2", MIB)
    data = bytearray(path.read_bytes())
    struct.pack_into(">IQ", data, 60, 1000, offset)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("offset", [1 << 40, 1 << 62, (1 << 63) - 65536])
async def test_snapshots_that_cannot_be(tmp_path: Path, offset: int) -> None:
    path = image_with_snapshots_at(tmp_path, offset)
    file = await FileNode.open(str(path), node_name="file", read_only=True)
    report = await checked(file, "qcow2")
    assert any("snapshot table" in str(finding) for finding in report.findings)
    await file.close()


@pytest.mark.parametrize("offset", [1 << 63, (1 << 64) - 65536])
async def test_snapshots_where_no_file_can_have_them(tmp_path: Path, offset: int) -> None:
    path = image_with_snapshots_at(tmp_path, offset)
    file = await FileNode.open(str(path), node_name="file", read_only=True)
    with pytest.raises(ImageError, match="snapshot table offset"):
        await checked(file, "qcow2")
    await file.close()


async def test_check_of_a_sparse_terabyte(tmp_path: Path) -> None:
    """Most of it is free clusters, more than can be looked at one by one."""
    path = tmp_path / "disk.qed"
    path.write_bytes((await sound("qed")).disk)
    used = -(-path.stat().st_size // (64 * KIB))
    os.truncate(path, 1 << 40)
    file = await FileNode.open(str(path), node_name="file", read_only=True)
    assert (await checked(file, "qed")).leaks == (1 << 40) // (64 * KIB) - used
    await file.close()


async def test_qed_image_with_more_errors_than_are_told() -> None:
    """A thousand that can be repaired are described, the one that cannot is only counted."""
    file = RecordingFile(name="recorded.qed")
    await FORMATS["qed"].create(file, 256 * KIB, cluster_size=4096, table_size=2)
    l1, l2 = struct.unpack_from("<Q", file.disk, 40)[0], len(file.disk)
    file.disk += struct.pack("<Q", 0xFFF) * 1024
    file.size = len(file.disk)
    struct.pack_into("<QQ", file.disk, l1, l2, l2)
    struct.pack_into("<Q", file.disk, 16, 2)  # to be checked before it is written
    with pytest.raises(ImageError, match=r"'recorded\.qed' was not closed cleanly and has 2 errors"):
        await FORMATS["qed"].open(file, "image", False)


@pytest.mark.parametrize("name", ["missing", "fat:etc", "../../x"])
async def test_check_of_an_add_cow_file_names_it(tmp_path: Path, name: str) -> None:
    path = tmp_path / "top.add-cow"
    path.touch()
    file = await FileNode.open(str(path), node_name="file", read_only=False)
    await FORMATS["add-cow"].create(file, 256 * KIB)
    path.write_bytes(path.read_bytes().replace(b"top.raw", name.encode(), 1))
    (tmp_path / "top.raw").unlink()
    with pytest.raises(BlockdError, match=r"top\.add-cow"):
        await checked(file, "add-cow")
    await file.close()


@pytest.mark.parametrize("entry", [COPIED, 1 << 3, COPIED | 1 << 8, 1 << 57, 1 << 61])
async def test_stream_over_an_entry_that_names_no_cluster(tmp_path: Path, entry: int) -> None:
    """It is unallocated, as it is for QEMU, whatever else it says: also for who looks whether it still is."""
    base = tmp_path / "base.raw"
    base.write_bytes(b"base" * 64 * KIB)
    path = qemu_img.create(tmp_path / "top.qcow2", 256 * KIB, backing=base, backing_format="raw")
    qemu_img.write(path, "write -P 1 0 64k")
    image = Image(path)
    image.put(image.l2 + 8, entry)
    assert qemu_img.content(path) == b"\1" * 64 * KIB + base.read_bytes()[64 * KIB :]
    graph = NodeGraph()
    opened = await graph.open_image(str(path), "qcow2", read_only=False)
    assert isinstance(opened, OverlayNode)
    async with streaming(opened) as disk:
        job = await disk.start()
        await job.wait_ended()
    assert job.error is None
    await graph.close()
    assert qemu_img.content(path) == b"\1" * 64 * KIB + base.read_bytes()[64 * KIB :]


@pytest.mark.parametrize("level", [1, 9])
async def test_bomb_gives_one_cluster(level: int) -> None:
    packer = zlib.compressobj(level, zlib.DEFLATED, -12)
    bomb = packer.compress(b"x" * 64 * MIB) + packer.flush()
    header = Header(3, 16, MIB, 1, 65536, 131072, 1)
    content = bytearray(64 * KIB)
    CompressedCluster(RecordingFile(bomb), 0, len(bomb), header).readinto_blocking(0, memoryview(content))
    assert content == b"x" * 64 * KIB

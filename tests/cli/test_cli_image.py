"""`blockctl image …` beside qemu-img: the same words, shapes and exit statuses."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from blockd.cli import display
from blockd.cli.blockctl import main
from blockd.drivers import FORMATS
from blockd.errors import StorageError
from tests import qemu_img
from tests.qemu_img import qemu

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `blockctl image` in a folder of its own; returns status, output and errors."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main(["image", *map(str, words)])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def disk(image: Run, tmp_path: Path) -> Path:
    """Three layers with data, zeroes, holes, compressed clusters, and a shorter base."""
    base = tmp_path / "base.raw"
    qemu("qemu-img", "create", "-q", "-f", "raw", base, "1M")
    qemu_img.write(base, "write -P 1 100k 300k", image_format="raw")
    middle = tmp_path / "middle.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", middle, "2M")
    qemu_img.write(middle, "write -P 2 0 64k", "write -z 64k 64k", "write -c -P 3 1M 64k")
    top = tmp_path / "disk.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-b", "middle.qcow2", "-F", "qcow2", top, "3M")
    qemu_img.write(top, "write -P 4 640k 70000", "write -P 5 2900k 100k", "write -z 192k 64k")
    return top


# -- create -----------------------------------------------------------------------------------


def test_create_takes_options_of_qemu_img(image: Run) -> None:
    words = "cluster_size=4k,refcount_bits=8,lazy_refcounts=on"
    assert image("create", "-o", words, "-o", "compat=1.1", "new.qcow2", "3M") == (0, "", "")
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", words, "theirs.qcow2", "3M")
    ours, theirs = (
        json.loads(qemu("qemu-img", "info", "--output=json", name)) for name in ("new.qcow2", "theirs.qcow2")
    )
    assert ours["format-specific"] == theirs["format-specific"]
    assert ours["cluster-size"] == theirs["cluster-size"] == 4096


def test_create_takes_the_backing_as_options_too(image: Run) -> None:
    assert image("create", "-f", "raw", "base.raw", "1M") == (0, "", "")
    told = image("create", "-o", "backing_file=base.raw,backing_fmt=raw", "top.qcow2", "--json")
    assert told == (0, '{"filename": "top.qcow2", "size": 1048576}\n', "")
    assert image("create", "-f", "raw", "-o", "size=2M", "sized.raw")[0] == 0
    assert Path("sized.raw").stat().st_size == 2 << 20


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("-f", "vmdk", "x", "1M"), "Unknown file format 'vmdk'; there are "),
        (
            ("-o", "colour=red", "x", "1M"),
            "Invalid option 'colour' for the format 'qcow2', which can be told: ",
        ),
        (("-o", "cluster_size=1000", "x", "1M"), "Cluster size must be a power of two between 512 and 2048k"),
        (("-o", "cluster_size=many", "x", "1M"), "Parameter 'cluster_size' expects a non-negative number"),
        (("-f", "raw", "-b", "y", "-F", "raw", "x", "1M"), "A raw image cannot have a backing file"),
        (("-o", "compat", "x", "1M"), "Expected '=' after parameter 'compat'"),
    ],
)
def test_create_refuses(image: Run, words: tuple[str, ...], text: str) -> None:
    status, output, error = image("create", *words)
    assert (status, output) == (1, "")
    assert error.startswith(f"blockctl: {text}")
    assert not Path("x").exists()


# -- info -------------------------------------------------------------------------------------


def same_lines(one: str, other: str) -> bool:
    """Members of what is specific to a format have no order."""
    return sorted(one.splitlines()) == sorted(other.splitlines())


def test_info_is_that_of_qemu_img(image: Run, disk: Path) -> None:
    qemu("qemu-img", "snapshot", "-c", "before", disk)
    for name in (disk.name, "middle.qcow2", "base.raw"):
        status, output, _ = image("info", name)
        assert status == 0
        assert same_lines(output, qemu("qemu-img", "info", name))
        _, output, _ = image("info", name, "--json")
        assert json.loads(output) == json.loads(qemu("qemu-img", "info", "--output=json", name))


def test_info_of_a_chain(image: Run, disk: Path) -> None:
    status, output, _ = image("info", "--backing-chain", disk.name)
    assert status == 0
    assert same_lines(output, qemu("qemu-img", "info", "--backing-chain", disk.name))
    _, output, _ = image("info", "--backing-chain", "--output", "json", disk.name)
    theirs = json.loads(qemu("qemu-img", "info", "--backing-chain", "--output=json", disk.name))
    assert json.loads(output) == theirs


def test_info_needs_no_backing_file(image: Run, disk: Path) -> None:
    Path("middle.qcow2").unlink()
    assert image("info", disk.name)[0] == 0
    status, _, error = image("info", "--backing-chain", disk.name)
    assert status == 1
    assert "Could not open backing file of 'disk.qcow2'" in error


def test_formats_are_not_guessed(image: Run, disk: Path) -> None:
    """A guest that writes the start of a qcow2 image to its raw disk gains nothing."""
    shutil.copy(disk, "disk.img")
    for command in ("info", "map", "check"):
        status, _, error = image(command, "disk.img")
        assert status == 1
        assert "specify the format" in error
    assert image("info", "-f", "raw", "disk.img")[1].splitlines()[1] == "file format: raw"


@pytest.mark.parametrize(
    "words", [("info", "--backing-chain"), ("map",), ("convert", "-O", "raw")], ids=lambda words: words[0]
)
def test_the_format_of_a_backing_file_that_is_not_recorded(
    image: Run, disk: Path, words: tuple[str, ...]
) -> None:
    """A QED image records that its backing file is raw, or nothing."""
    disk.rename("base.img")
    qemu("qemu-img", "create", "-q", "-f", "qed", "-b", "base.img", "-F", "qcow2", "top.qed")
    names = ("top.qed", "copy.raw") if words[0] == "convert" else ("top.qed",)
    status, _, error = image(*words, *names)
    assert status == 1
    assert error.endswith("specify the format (qcow2, qed, raw, add-cow) with the option backing-format\n")
    assert image(*words, "--backing-format", "qcow2", *names)[0] == 0
    assert "Unknown file format 'zap'" in image(*words, "--backing-format", "zap", *names)[2]
    if words[0] == "convert":
        qemu("qemu-img", "compare", "-f", "qed", "-F", "raw", *names)


def test_names_in_images_lead_to_allowed_folders_only(
    image: Run, disk: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("elsewhere")
    shutil.move("middle.qcow2", folder)
    shutil.copy("base.raw", folder)
    qemu("qemu-img", "rebase", "-u", "-b", str(folder / "middle.qcow2"), "-F", "qcow2", disk)
    for words in (("map", disk.name), ("convert", disk.name, "copy.raw", "-O", "raw")):
        status, output, error = image(*words)
        assert (status, output) == (1, "")
        assert "which is outside the folder of the image; allow it with --image-paths" in error
        assert image(*words, "--image-paths", folder)[0] == 0
    qemu_img.assert_same(disk, "qcow2", tmp_path / "copy.raw", "raw")


# -- check ------------------------------------------------------------------------------------


def leak(path: Path) -> None:
    """Give the image a cluster that nothing refers to: one more is counted than the file has."""
    size = path.stat().st_size
    os.truncate(path, -(-size // 65536 + -1) * 65536)
    with path.open("r+b") as file:
        file.seek(48)
        file.seek(int.from_bytes(file.read(8), "big"))
        file.seek(int.from_bytes(file.read(8), "big") + 2 * (size // 65536))
        file.write(b"\0\1")


def corrupt(path: Path) -> None:
    """Take away the refcount of the first cluster of the L1 table."""
    with path.open("r+b") as file:
        file.seek(40)
        cluster = int.from_bytes(file.read(8), "big") // 65536
        file.seek(int.from_bytes(file.read(8), "big"))
        file.seek(int.from_bytes(file.read(8), "big") + 2 * cluster)
        file.write(b"\0\0")


@pytest.mark.parametrize(("harm", "status"), [(None, 0), (corrupt, 2), (leak, 3)])
def test_check_tells_by_its_exit_status(
    image: Run, disk: Path, harm: Callable[[Path], None] | None, status: int
) -> None:
    if harm is not None:
        harm(disk)
    told, output, _ = image("check", disk.name)
    assert told == status
    theirs = qemu("qemu-img", "check", disk, expect=status)
    ours = [line for line in output.splitlines() if not line.startswith(("Leak: ", "ERROR: "))]
    assert ours[-2:] == theirs.splitlines()[-2:]
    told, output, _ = image("check", disk.name, "--json")
    assert told == status
    found = json.loads(output)
    assert bool(found.pop("findings", [])) == bool(harm)
    theirs = json.loads(qemu("qemu-img", "check", "--output=json", disk.name, expect=status))
    assert found == theirs


@pytest.mark.parametrize(("harm", "mode"), [(leak, "leaks"), (leak, "all"), (corrupt, "all")])
def test_check_repairs(image: Run, disk: Path, harm: Callable[[Path], None], mode: str) -> None:
    before = qemu_img.content(disk)
    harm(disk)
    status, output, _ = image("check", "--repair", mode, disk.name)
    assert status == 0
    assert "The following inconsistencies were found and repaired:" in output
    qemu("qemu-img", "check", disk, expect=0)
    assert qemu_img.content(disk) == before


def test_check_of_raw_images_has_nothing_to_check(image: Run, disk: Path) -> None:
    told = image("check", "base.raw")
    assert told == (63, "", "blockctl: This image format does not support checks\n")
    qemu("qemu-img", "check", "-f", "raw", "base.raw", expect=63)


# -- map --------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [(), ("-s", "150k"), ("-s", "640k", "-l", "64k"), ("-l", "1")])
def test_map_is_that_of_qemu_img(image: Run, disk: Path, words: tuple[str, ...]) -> None:
    for name in (disk.name, "middle.qcow2", "base.raw"):
        status, output, _ = image("map", name, "--json", *words)
        assert status == 0
        image_format = "raw" if name.endswith(".raw") else "qcow2"
        theirs = qemu("qemu-img", "map", "--output=json", "-f", image_format, *words, name)
        assert json.loads(output) == json.loads(theirs)


def test_map_as_a_table(image: Run, disk: Path) -> None:
    qemu("qemu-img", "rebase", "-f", "qcow2", "-b", "base.raw", "-F", "raw", disk)
    status, output, _ = image("map", disk.name)
    assert (status, output) == (0, qemu("qemu-img", "map", disk.name))
    lines = image("map", "middle.qcow2")[1].splitlines()
    assert lines[-1] == f"{'0x100000':<16}{'0x10000':<16}{'(compressed)':<16}middle.qcow2"


@pytest.mark.parametrize("name", ["disk.qcow2", "missing.qcow2"])
def test_reader_that_has_enough_is_met_without_a_traceback(disk: Path, name: str) -> None:
    """As in `blockctl image map disk.qcow2 | head -1`."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "blockd.cli.blockctl", "image", "map", "--json", name]
    with os.fdopen(write_end, "wb") as output:
        done = subprocess.run(command, cwd=disk.parent, stdout=output, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (141, b"")


# -- convert ----------------------------------------------------------------------------------


# QEMU does not know add-cow: tests/cli/test_cli_image_add_cow.py looks at its images.
@pytest.mark.parametrize("target_format", [name for name in FORMATS if name != "add-cow"])
def test_convert_is_a_stream_into_a_new_image(image: Run, disk: Path, target_format: str) -> None:
    status, output, error = image("convert", disk.name, "copy", "-O", target_format)
    assert (status, output, error) == (0, "", "")
    qemu_img.assert_same(disk, "qcow2", Path("copy"), target_format)
    info = json.loads(qemu("qemu-img", "info", "--output=json", "-f", target_format, "copy"))
    assert "backing-filename" not in info
    if FORMATS[target_format].check is not None:
        qemu("qemu-img", "check", "-f", target_format, "copy", expect=0)


@pytest.mark.slow
@pytest.mark.parametrize("source_format", FORMATS)
@pytest.mark.parametrize("target_format", FORMATS)
def test_convert_from_any_format_to_any(
    image: Run, disk: Path, source_format: str, target_format: str
) -> None:
    assert image("convert", disk.name, "first", "-O", source_format)[0] == 0
    assert image("convert", "first", "second", "-f", source_format, "-O", target_format)[0] == 0
    assert image("convert", "second", "last.raw", "-f", target_format, "-O", "raw")[0] == 0
    assert Path("last.raw").read_bytes() == qemu_img.content(disk)
    if FORMATS[target_format].check is not None:
        assert image("check", "-f", target_format, "second")[0] == 0


def test_convert_takes_options_and_tells_progress(image: Run, disk: Path) -> None:
    words = ("-o", "cluster_size=4k,compat=1.1", "--json")
    status, output, _ = image("convert", disk.name, "copy.qcow2", *words)
    assert status == 0
    last = json.loads(output.splitlines()[-1])
    assert last == {
        "filename": "copy.qcow2",
        "format": "qcow2",
        "result": "completed",
        "size": 3 << 20,
        "copied": last["copied"],
        "zero": last["zero"],
    }
    assert 500 << 10 < last["copied"] < 900 << 10
    qemu_img.assert_same(disk, "qcow2", Path("copy.qcow2"), "qcow2")


@pytest.mark.parametrize("patience_s", [0.0, 1000.0])
def test_map_and_check_show_a_bar_when_they_take_long(
    image: Run, disk: Path, monkeypatch: pytest.MonkeyPatch, patience_s: float
) -> None:
    expected = [image("map", disk.name), image("map", disk.name, "--json"), image("check", disk.name)]
    monkeypatch.setattr(display, "PATIENCE_S", patience_s)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    found = [image("map", disk.name), image("map", disk.name, "--json"), image("check", disk.name)]
    assert [result[:2] for result in found] == [result[:2] for result in expected]
    assert [disk.name in error for _, _, error in found] == [patience_s == 0.0] * 3


def test_convert_overwrites_nothing(image: Run, disk: Path) -> None:
    before = disk.read_bytes()
    status, _, error = image("convert", "base.raw", disk.name)
    assert (status, disk.read_bytes()) == (1, before)
    assert error == "blockctl: Could not create 'disk.qcow2': the file exists and is not overwritten\n"
    assert image("convert", "missing.raw", "copy.qcow2")[0] == 1
    assert image("convert", disk.name, "copy.qcow2", "-o", "backing_file=base.raw")[0] == 1
    assert not Path("copy.qcow2").exists()


@pytest.mark.parametrize("target_format", FORMATS)
def test_convert_leaves_nothing_half_made(
    image: Run, disk: Path, monkeypatch: pytest.MonkeyPatch, target_format: str
) -> None:
    async def fail(*_arguments: object, **_options: object) -> None:
        raise StorageError("Could not write: No space left on device")

    monkeypatch.setattr("blockd.filters.blkstream.BlkStream.populate", fail)
    status, output, error = image("convert", disk.name, "copy", "-O", target_format)
    assert (status, output, error) == (1, "", "blockctl: Could not write: No space left on device\n")
    assert not list(Path().glob("copy*"))


@pytest.mark.parametrize("target_format", ["qcow2", "raw"])
def test_convert_ends_with_ctrl_c(
    image: Run, disk: Path, monkeypatch: pytest.MonkeyPatch, target_format: str
) -> None:
    interrupted: list[bool] = []

    async def hang(*_arguments: object, **_options: object) -> None:
        if not interrupted:
            interrupted.append(Path("copy").exists())
            os.kill(os.getpid(), signal.SIGINT)
        await asyncio.Event().wait()

    monkeypatch.setattr("blockd.filters.blkstream.BlkStream.populate", hang)
    assert image("convert", disk.name, "copy", "-O", target_format) == (130, "", "")
    assert interrupted == [True]
    assert not Path("copy").exists()


@pytest.mark.parametrize("size", [0, 512, 65536 + 512])
@pytest.mark.parametrize("target_format", ["qcow2", "raw"])
def test_convert_of_odd_sizes(image: Run, tmp_path: Path, target_format: str, size: int) -> None:
    Path("odd.raw").write_bytes(b"x" * size)
    assert image("convert", "odd.raw", "copy", "-O", target_format)[0] == 0
    assert qemu_img.content(tmp_path / "copy", target_format) == b"x" * size


def test_convert_to_raw_is_sparse(image: Run, tmp_path: Path) -> None:
    """What is zero takes no space, whether the source knows that or has to be read."""
    Path("source.raw").write_bytes(b"x" * 65536 + bytes(10 << 20) + b"y" * 65536 + bytes(1 << 20))
    assert image("convert", "source.raw", "copy.raw", "-O", "raw")[0] == 0
    assert Path("copy.raw").read_bytes() == Path("source.raw").read_bytes()
    assert Path("copy.raw").stat().st_blocks * 512 <= 2 * 65536


@pytest.mark.parametrize("command", ["check", "info", "map", "convert", "create"])
def test_help_tells_the_exit_statuses(image: Run, capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit):
        image(command, "--help")
    assert "\n  63   check: images of this format hold nothing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("x.qed", "-f qed, or -f qcow2"),
        ("x.RAW", "-f raw, or -f qcow2"),
        ("x.add-cow", "-f add-cow, or -f qcow2"),
        ("x.vmdk", "-f qcow2; blockd makes no vmdk images"),
    ],
)
def test_name_that_says_another_format_than_the_default_is_no_accident(
    image: Run, name: str, said: str, tmp_path: Path
) -> None:
    problem = f"blockctl: '{name}' is not named like a qcow2 image, which it would be: say {said}\n"
    assert image("create", name, "1M") == (1, "", problem)
    assert image("create", "disk.img", "1M")[0] == 0
    problem = problem.replace("-f", "-O")
    assert image("convert", "-f", "qcow2", "disk.img", name) == (1, "", problem)
    assert {path.name for path in tmp_path.iterdir()} == {"disk.img"}
    assert image("create", "-f", "qcow2", name, "1M")[0] == 0
    assert image("info", "-f", "qcow2", name)[0] == 0


def test_backing_file_that_is_hardly_meant_so(image: Run, tmp_path: Path) -> None:
    assert image("create", "base.qcow2", "1M")[0] == 0
    (tmp_path / "x").mkdir()
    overlay = ("create", "-b", "base.qcow2", "-F")
    status, _, said = image(*overlay, "raw", "top.qcow2")
    assert (status, said.startswith("blockctl: warning: 'base.qcow2' looks like a qcow2 image; with")) == (
        0,
        True,
    )
    assert image(*overlay, "qcow2", "other.qcow2") == (0, "", "")
    missing = "blockctl: Could not open 'x/base.qcow2': No such file or directory"
    hint = "; the name of a backing file counts from the folder of the new image: -b "
    told = image(*overlay, "qcow2", "x/top.qcow2")
    assert told == (1, "", f"{missing}{hint}{tmp_path}/base.qcow2\n")
    # Also where its size is not asked for.
    missing = "blockctl: Could not open 'none.qcow2': No such file or directory\n"
    assert image("create", "-b", "none.qcow2", "-F", "qcow2", "new.qcow2", "1M") == (1, "", missing)
    assert not (tmp_path / "new.qcow2").exists()


def test_size_may_stand_behind_options(image: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert image("create", "a.raw", "-f", "raw", "1M") == (0, "", "")
    assert "virtual size: 1 MiB" in image("info", "a.raw")[1]
    for words in (
        ("b.raw", "-f", "raw", "1X"),
        ("b.raw", "1M", "-f", "raw", "1M"),
        ("b.raw", "-f", "raw", "1", "2"),
    ):
        with pytest.raises(SystemExit):
            image("create", *words)
        assert "unrecognized arguments: " in capsys.readouterr().err

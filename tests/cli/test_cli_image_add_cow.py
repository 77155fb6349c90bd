"""`blockctl image …` with add-cow files: the image beside them is what QEMU can look at."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from blockd.cli.blockctl import main
from tests import qemu_img
from tests.qemu_img import qemu

Run = Callable[..., tuple[int, str, str]]

MIB = 1 << 20


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
def base(image: Run, tmp_path: Path) -> Path:
    """A plain image with data, zeroes and holes, which ends in the middle of a cluster."""
    path = tmp_path / "base.raw"
    qemu("qemu-img", "create", "-q", "-f", "raw", path, str(3 * MIB + 512))
    qemu_img.write(path, "write -P 1 100k 300k", "write -P 2 3M 512", image_format="raw")
    return path


def create_over(image: Run, base: Path, *words: str) -> None:
    told = image("create", "-f", "add-cow", *words, "-b", base.name, "-F", "raw", "top.add-cow")
    assert told == (0, "", "")


def test_create_makes_the_image_beside_it(image: Run, base: Path) -> None:
    create_over(image, base)
    target = Path("top.raw")
    assert (target.stat().st_size, target.stat().st_blocks) == (base.stat().st_size, 0)
    _, output, _ = image("info", "--json", "top.add-cow")
    info = json.loads(output)
    assert (info["format"], info["virtual-size"], info["cluster-size"]) == ("add-cow", 3 * MIB + 512, 65536)
    assert (info["backing-filename"], info["backing-filename-format"]) == ("base.raw", "raw")
    assert info["format-specific"]["data"] == {"image-file": "top.raw", "all-allocated": False}


def test_create_takes_an_image_that_is_there(image: Run, base: Path) -> None:
    qemu("qemu-img", "create", "-q", "-f", "raw", "mine.img", str(base.stat().st_size))
    create_over(image, base, "-o", "image_file=mine.img,cluster_size=4k")
    _, output, _ = image("info", "--json", "top.add-cow")
    assert json.loads(output)["format-specific"]["data"]["image-file"] == "mine.img"
    assert json.loads(output)["cluster-size"] == 4096


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("-o", "image_file=base.raw"), "The image file and the backing file must differ, and both are"),
        (("-o", "image_file=small.raw"), "The image 'small.raw' has 512 bytes, and the disk is to have"),
        (("-o", "cluster_size=2k"), "Cluster size 2048 must be a power of two between 4k and 2M"),
        (("-o", f"image_file={'x' * 1024}"), "The image file name is 1024 bytes long, more than 1023"),
        (("-o", "compat=1.1"), "Invalid option 'compat' for the format 'add-cow'"),
    ],
)
def test_create_refuses(image: Run, base: Path, words: tuple[str, ...], text: str) -> None:
    Path("small.raw").write_bytes(bytes(512))
    before = base.read_bytes()
    told = image("create", "-f", "add-cow", *words, "-b", base.name, "-F", "raw", "top.add-cow")
    assert told[:2] == (1, "")
    assert told[2].startswith(f"blockctl: {text}")
    assert sorted(path.name for path in Path().iterdir()) == ["base.raw", "small.raw"]
    assert base.read_bytes() == before


def test_check_counts_clusters_and_finds_a_short_bitmap(image: Run, base: Path) -> None:
    create_over(image, base)
    status, output, _ = image("check", "--output=json", "top.add-cow")
    found = json.loads(output)
    assert (status, found["total-clusters"], found.get("allocated-clusters", 0)) == (0, 49, 0)
    bitmap = 65536
    with Path("top.add-cow").open("r+b") as file:
        file.seek(bitmap)
        file.write(b"\x0f")
    assert json.loads(image("check", "--output=json", "top.add-cow")[1])["allocated-clusters"] == 4
    with Path("top.add-cow").open("r+b") as file:
        file.seek(bitmap + 7)
        file.write(b"\x80")
    status, output, _ = image("check", "--output=json", "top.add-cow")
    assert (status, json.loads(output)["leaks"]) == (3, 1)
    with Path("top.add-cow").open("r+b") as file:
        file.truncate(1 << 40)  # nobody looks through all that
    status, output, _ = image("check", "--output=json", "top.add-cow")
    assert (status, json.loads(output)["leaks"]) == (3, 2)
    with Path("top.add-cow").open("r+b") as file:
        file.truncate(bitmap)
    status, output, _ = image("check", "--output=json", "top.add-cow")
    assert (status, json.loads(output)["corruptions"]) == (2, 1)


def test_map_tells_which_file_has_what(image: Run, base: Path) -> None:
    create_over(image, base)
    with Path("top.raw").open("r+b") as target, Path("top.add-cow").open("r+b") as file:
        target.write(b"x" * 65536)
        file.seek(65536)
        file.write(b"\1")
    lines = image("map", "top.add-cow")[1].splitlines()[1:]
    assert [line.split()[-1] for line in lines] == ["top.raw", "base.raw", "base.raw"]
    _, output, _ = image("map", "--output=json", "top.add-cow")
    assert json.loads(output)[0] == {
        "start": 0,
        "length": 65536,
        "depth": 0,
        "present": True,
        "zero": False,
        "data": True,
        "offset": 0,
    }


def test_convert_from_add_cow(image: Run, base: Path) -> None:
    create_over(image, base)
    assert image("convert", "top.add-cow", "copy.qcow2") == (0, "", "")
    qemu_img.assert_same(base, "raw", Path("copy.qcow2"), "qcow2")


def test_convert_to_add_cow_is_a_plain_image(image: Run, base: Path) -> None:
    assert image("convert", base.name, "copy.add-cow", "-O", "add-cow") == (0, "", "")
    assert Path("copy.raw").read_bytes() == base.read_bytes()
    assert Path("copy.raw").stat().st_blocks * 512 <= 7 * 65536, "the clusters with data"
    info = json.loads(image("info", "--json", "copy.add-cow")[1])
    assert "backing-filename" not in info
    assert info["format-specific"]["data"]["all-allocated"] is True
    assert image("check", "copy.add-cow")[0] == 0

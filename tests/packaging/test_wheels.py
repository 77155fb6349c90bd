"""Wheels: the one that everybody gets is plain Python, and the compiled one does the same."""

import shutil
import sys
import sysconfig
import tomllib
from pathlib import Path
from zipfile import ZipFile

import pytest
import pytest_asyncio

from blockd.protocols.nbd_client import NbdClient
from blockd.units import KIB, MIB
from tests import qemu_img
from tests.conftest import StartDaemon
from tests.programs import run
from tests.walls import PROJECT

pytestmark = pytest.mark.slow

ENABLE = "HATCH_BUILD_HOOK_ENABLE_MYPYC"
BUILD = tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
HOOK = BUILD["targets"]["wheel"]["hooks"]["mypyc"]
COMPILED_MODULES: list[str] = [path.removeprefix("/").removesuffix(".py") for path in HOOK["include"]]
EXTENSION_SUFFIX: str = sysconfig.get_config_var("EXT_SUFFIX")

# What looks maps up and speaks NBD most.
TESTS = {
    "maps": [
        "tests/formats/test_qcow2_lookup.py",
        "tests/formats/test_qcow2_image.py",
        "tests/formats/test_qcow2_plans.py",
        "tests/formats/test_qcow2_corruption.py",
        "tests/formats/test_fill_clones.py",
        "tests/formats/test_qed_image.py",
        "tests/formats/test_add_cow_image.py",
    ],
    "nbd": [
        "tests/nbd/test_nbd_wire.py",
        "tests/nbd/test_nbd_handshake.py",
        "tests/nbd/test_nbd_requests.py",
        "tests/nbd/test_nbd_server.py",
        "tests/nbd/test_nbd_client.py",
    ],
}


def _sources() -> set[str]:
    """All files of the package, as a wheel names them."""
    return {
        path.relative_to(PROJECT).as_posix()
        for path in (PROJECT / "blockd").rglob("*")
        if path.is_file() and path.parent.name != "__pycache__"
    }


def _contents(wheel: Path) -> set[str]:
    """What a wheel puts into site-packages, without what it says about itself."""
    names = ZipFile(wheel).namelist()
    about = {name for name in names if name.partition("/")[0].endswith(".dist-info")}
    assert any(name.endswith("/licenses/LICENSE") for name in about)
    assert any(name.endswith("/entry_points.txt") for name in about)
    return set(names) - about


async def test_plain_wheel_takes_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENABLE, raising=False)
    monkeypatch.setenv("CC", "false")
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation")
    await run(*pip, "--wheel-dir", tmp_path, PROJECT)
    (wheel,) = tmp_path.iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    assert _contents(wheel) == _sources()


@pytest.mark.parametrize(("enabled", "expected"), [("false", []), ("true", HOOK["dependencies"])])
async def test_only_a_compiled_wheel_takes_mypy(
    monkeypatch: pytest.MonkeyPatch, enabled: str, expected: list[str]
) -> None:
    monkeypatch.setenv(ENABLE, enabled)
    ask = "from hatchling import build; print(build.get_requires_for_build_wheel())"
    assert await run(sys.executable, "-c", ask, cwd=PROJECT) == f"{expected}\n"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled wheel."""
    folder = tmp_path_factory.mktemp("compiled")
    environment = Path(sys.executable).parent
    make = ("make", "--assume-old=.venv/.ready-dev", "wheel-compiled")
    await run(*make, f"BIN={environment}", f"DIST={folder}", cwd=PROJECT)
    (built,) = folder.iterdir()
    return built


@pytest.fixture
async def site(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the compiled wheel is installed; what is started finds it there."""
    folder = tmp_path / "site"
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index")
    await run(*pip, "--target", folder, wheel)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return folder


def test_modules_that_are_compiled_are_beside_their_sources(wheel: Path) -> None:
    assert not wheel.name.endswith("-any.whl")
    (shared,) = [name for name in _contents(wheel) if "/" not in name]
    assert shared == f"blockd__mypyc{EXTENSION_SUFFIX}"
    extensions = {f"{module}{EXTENSION_SUFFIX}" for module in COMPILED_MODULES}
    assert _contents(wheel) == _sources() | extensions | {shared}


@pytest.mark.parametrize("subject", TESTS)
async def test_compiled_modules_pass_the_tests_of_their_sources(site: Path, subject: str) -> None:
    shutil.copytree(PROJECT / "tests", site / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(PROJECT / "pyproject.toml", site)
    for module in COMPILED_MODULES:
        (site / f"{module}.py").unlink()  # nothing is left to be imported but the extension module
    pytest_of_tests = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    await run(*pytest_of_tests, *TESTS[subject], cwd=site)


async def test_daemon_of_the_compiled_wheel_serves_a_guest(
    site: Path, tmp_path: Path, start_daemon: StartDaemon
) -> None:
    image = qemu_img.create(tmp_path / "disk.qcow2", MIB)
    daemon = await start_daemon("--device", f"vda={image}")
    data = bytes(range(256)) * 512
    async with await NbdClient.connect_unix(str(daemon.nbd_path), "vda") as guest:
        await guest.write(64 * KIB - 512, data)
        await guest.flush()
        assert await guest.read(64 * KIB - 512, len(data)) == data
    loaded = Path(f"/proc/{daemon.pid}/maps").read_text()
    for module in ("blockd/formats/qcow2/lookup", "blockd/wire/nbd/transmission"):
        assert f"{site / module}{EXTENSION_SUFFIX}" in loaded
    assert await daemon.stop() == 0
    qemu_img.assert_sound(image)

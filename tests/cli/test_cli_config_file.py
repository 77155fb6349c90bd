"""``--config`` and ``--check-config``: a file means what the command line means, and errors name the line."""

import os
import textwrap
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockd.cli.config_lines import ConfigLines
from blockd.cli.options import Action, CommandLine, parse_command_line
from blockd.errors import RequestError
from tests import qemu_img
from tests.cli.fake_daemon import Result
from tests.cli.test_cli_daemon import run
from tests.daemon_process import DaemonProcess
from tests.walls import PROJECT

EXAMPLE = PROJECT / "examples" / "blockd.toml"


def read(folder: Path, text: str, *arguments: str) -> CommandLine:
    file = folder / "d.toml"
    file.write_text(textwrap.dedent(text))
    return parse_command_line(["--config", str(file), *arguments])


def test_a_file_means_what_its_command_line_means(tmp_path: Path) -> None:
    line = read(
        tmp_path,
        """\
        state-dir = "state"
        image-paths = ["/a", "/b"]
        guest-latency = 2500
        nbd-poll = 100
        daemonize = true
        qmp = ["q1", "q2"]
        nbd = "localhost:10809"
        [[monitor]]
        chardev = "c"
        pretty = true
        [[chardev]]
        backend = "socket"
        id = "c"
        path = "m"
        server = true
        [[export]]
        type = "nbd"
        id = "e"
        node-name = "top"
        writable = true
        [[device]]
        name = "vda"
        filename = "disk.qcow2"
        format = "qcow2"
        [[device]]
        id = "vdb"
        node-name = "top"
        [[blockdev]]
        driver = "qcow2"
        node-name = "top"
        file.driver = "file"
        file.filename = "a,b"
        [[object]]
        qom-type = "iothread"
        id = "t"
        """,
    )
    expected = parse_command_line(
        [
            *("--state-dir", "state", "--daemonize", "--image-paths", "/a", "--image-paths", "/b"),
            *("--guest-latency", "2500", "--nbd-poll", "100"),
            *("--object", "iothread,id=t"),
            *("--blockdev", "qcow2,node-name=top,file.driver=file,file.filename=a,,b"),
            *("--nbd", "localhost:10809"),
            *("--device", "vda=disk.qcow2,format=qcow2", "--device", "id=vdb,node-name=top"),
            *("--export", "nbd,id=e,node-name=top,writable=on"),
            *("--chardev", "socket,id=c,path=m,server=on", "--monitor", "c,pretty=on"),
            *("--qmp", "q1", "--qmp", "q2"),
        ]
    )
    assert [given.option for given in line.config.options] == [
        given.option for given in expected.config.options
    ]
    assert line.config._replace(options=()) == expected.config._replace(options=())
    assert line.is_background


def test_each_option_is_also_a_command_line(tmp_path: Path) -> None:
    (option, *_) = read(tmp_path, '[[blockdev]]\ndriver = "null-co"\n'.replace("null-co", "file")
                        + 'node-name = "f"\nfilename = "x"\n').config.options  # fmt: skip
    name, _, value = option.argument.partition(" ")
    assert parse_command_line([name, value]).config.options[0].option == option.option
    assert option.where == f"{tmp_path}/d.toml:1: blockdev"


def test_the_rest_of_the_command_line_is_added(tmp_path: Path) -> None:
    config = read(tmp_path, 'qmp = "q"', "--qmp", "r", "--pidfile", "p").config
    assert [given.argument for given in config.options] == ["--qmp q", "--qmp r"]
    assert config.pidfile == "p"
    with pytest.raises(RequestError, match=r"d\.toml:2: --pidfile option can only be given once"):
        parse_command_line(["--pidfile", "p", "--config", _file(tmp_path, '\npidfile = "q"')])


def _file(folder: Path, text: str) -> str:
    file = folder / "d.toml"
    file.write_text(text)
    return str(file)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("qmpp = 'q'", 1, "unknown key 'qmpp'; did you mean 'qmp'?"),
        ("\n[[devices]]\nname='a'", 2, "unknown key 'devices'; did you mean 'device'?"),
        (
            "[nbd-server]\naddr = {type = 'unix', path = 'x'}\ntls-creds = 't'",
            3,
            "unknown key 'tls-creds' in nbd-server; the NBD server cannot do TLS yet; start it without "
            "'tls-creds' on a unix socket",
        ),
        ("zzzzzzzz = 1", 1, "unknown key 'zzzzzzzz'"),
        (
            "[[device]]\nname = 'a'\n\nfile_name = 'x'\nfilename = 'y'",
            4,
            "unknown key 'file_name' in device; did you mean 'filename'?",
        ),
        (
            "[[device]]\nname = 'a'\nfile-name = 'x'",
            3,
            "unknown key 'file-name' in device; did you mean 'filename'?",
        ),
        (
            "[device.vda]\nfilename='f'",
            1,
            "unknown key 'vda' in device; expected one of name, filename, format, backing-format, id, "
            "node-name",
        ),
        (
            "[[blockdev]]\ndriver='qcow2'\nnode-name='q'\n[blockdev.file]\ndriver='file'\nfilname='x'",
            6,
            "unknown key 'filname' in blockdev; did you mean 'filename'?",
        ),
        (
            "[[blockdev]]\ndriver='file'\nnode-name='f'\nfilename='x'\n"
            "[[blockdev]]\ndriver='qcow2'\nnode-name='q'\n[blockdev.file]\ndriver='file'\nfilname='x'\n"
            "filename='x'",
            10,
            "unknown key 'file.filname' in blockdev; did you mean 'filename'?",
        ),
        (
            "[[blockdev]]\ndriver='file'\nnode-name='f'\nfilename='x'\nread-only='yes'",
            5,
            "Invalid parameter type for 'read-only', expected: boolean",
        ),
        ("[[blockdev]]\nnode-name='f'\ndriver='qcow'", 3, "Parameter 'driver' does not accept value 'qcow'"),
        ("[[blockdev]]\nnode-name='f'", 1, "Parameter 'driver' is missing"),
        (
            "[[object]]\nid='g'\nqom-type='throttle-group'\nlimits.iops-total = 5\nlimits.iops-totl = 5",
            5,
            "unknown key 'limits.iops-totl' in object; did you mean 'iops-total'?",
        ),
        (
            "[[export]]\ntype='nbd'\nid='e'\nnode-name='n'\nwriteable=true",
            5,
            "unknown key 'writeable' in export; did you mean 'writable'?",
        ),
        ("qmp = 5", 1, "'qmp' has to be a string"),
        ("image-paths = [\n'a',\n5]", 1, "'image-paths' has to be a string"),
        ("guest-latency = '5'", 1, "'guest-latency' has to be a whole number"),
        ("nbd-poll = 1.5", 1, "'nbd-poll' has to be a whole number"),
        ("guest-latency = true", 1, "'guest-latency' has to be a whole number"),
        ("\nguest-latency = -5", 2, "--guest-latency -5: expected microseconds, 0 to 60000000"),
        ("daemonize = 'yes'", 1, "'daemonize' has to be true or false"),
        ("device = 'vda=disk.qcow2'", 1, "'device' is a table: write [[device]]"),
        ("[[device]]\nname='a'\nfilename=1979-05-27", 1, "dates and times, inf and nan mean nothing here"),
        ("qmp = 'a'\nqmp = 'b'", 2, "Cannot overwrite a value"),
        ("qmp = 'a'\n\nnbd = 'b", 3, 'Expected "\'"'),
        ("qmp = 'a'\nx = [", 2, "Invalid value"),
        ('qmp = """\n\n"""\nnbb = "n"', 4, "unknown key 'nbb'; did you mean 'nbd'?"),
    ],
)
def test_what_is_wrong_and_where(tmp_path: Path, text: str, line: int, message: str) -> None:
    with pytest.raises(RequestError) as refused:
        parse_command_line(["--config", _file(tmp_path, text)])
    assert refused.value.message == f"{tmp_path}/d.toml:{line}: {message}"


def test_what_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "d.toml").write_bytes(b"qmp = 'q'\nnbd = '\xff'\n")
    with pytest.raises(RequestError, match=r"d\.toml:2: not valid UTF-8"):
        parse_command_line(["--config", str(tmp_path / "d.toml")])
    with pytest.raises(RequestError, match="none: Could not open: No such file or directory"):
        parse_command_line(["--config", "none"])
    with (tmp_path / "large").open("wb") as file:
        file.truncate(5 << 20)
    with pytest.raises(RequestError, match="longer than 4 MiB: this is no config file"):
        parse_command_line(["--config", str(tmp_path / "large")])


@given(st.text(alphabet="ab=[].\"'\n{}, 1#x", max_size=60))
def test_any_document_gets_lines(text: str) -> None:
    """Whatever the parser accepts gets lines that are in the file, in the order of the keys."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return
    lines = ConfigLines(text)
    for name in document:
        found = lines.find((name,))
        assert name in text.split("\n")[found - 1]


# -- --check-config ---------------------------------------------------------------------------


def test_check_config_is_an_action() -> None:
    assert parse_command_line(["--qmp", "q", "--check-config"]).action is Action.CHECK


async def test_check_config_tells_all_that_does_not_fit(tmp_path: Path) -> None:
    text = """\
        [[blockdev]]
        driver = "qcow2"
        node-name = "q"
        file = "none"
        [[blockdev]]
        driver = "throttle"
        node-name = "q"
        throttle-group = "g"
        file = { driver = "file", filename = "f", node-name = "inner" }
        [[blockdev]]
        driver = "raw"
        file = "inner"
        [[export]]
        type = "nbd"
        id = "e"
        node-name = "nowhere"
        [[monitor]]
        chardev = "c"
        [[device]]
        id = "d"
        node-name = "q"
        [[device]]
        name = "d"
        filename = "x"
        format = "vmdk9"
        """
    file = _file(tmp_path, textwrap.dedent(text))
    result = await run(
        tmp_path, "--check-config", "--config", "d.toml", "--nbd-server", "addr.type=fd,addr.str=9"
    )
    assert result == Result(
        1,
        "",
        "blockd: d.toml:1: blockdev: Cannot find device='' nor node-name='none'\n"
        "blockd: d.toml:5: blockdev: Throttle group 'g' does not exist\n"
        "blockd: d.toml:5: blockdev: Duplicate nodes with node-name='q'\n"
        "blockd: d.toml:10: blockdev: 'node-name' must be specified for the root node\n"
        "blockd: d.toml:22: device: Unknown driver 'vmdk9'; the formats are qcow2, qed, raw, add-cow\n"
        "blockd: d.toml:22: device: Device 'd' already exists\n"
        "blockd: d.toml:13: export: Cannot find device='' nor node-name='nowhere'\n"
        "blockd: d.toml:13: export: NBD server not running\n"
        'blockd: d.toml:17: monitor: chardev "c" not found\n',
    )
    assert [path.name for path in tmp_path.iterdir()] == [Path(file).name]


async def test_check_config_names_options_of_the_command_line(tmp_path: Path) -> None:
    result = await run(tmp_path, "--check-config", "--monitor", "none")
    assert result == Result(1, "", 'blockd: --monitor none: chardev "none" not found\n')
    result = await run(tmp_path, "--check-config", "--config", _file(tmp_path, "nbb = 'x'"))
    assert result.status == 1
    assert "d.toml:1: unknown key 'nbb'; did you mean 'nbd'?" in result.stderr


async def test_check_config_opens_nothing(tmp_path: Path) -> None:
    """Neither the sockets nor the images nor the state directory: none of them is there, nor is made."""
    arguments = ("--device", "vda=none.qcow2", "--state-dir", "state", "--pidfile", "p")
    result = await run(tmp_path, "--check-config", *arguments)
    assert result == Result(0, "blockd: the configuration makes sense\n", "")
    assert list(tmp_path.iterdir()) == []


# -- the example, and a daemon that runs by a file ----------------------------------------------


async def test_the_example_serves_two_disks(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(os.urandom(1 << 20))
    qemu_img.create(tmp_path / "disk.qcow2", 1 << 20, backing=tmp_path / "base.raw", backing_format="raw")
    (tmp_path / "data.raw").write_bytes(os.urandom(1 << 20))
    checked = await run(tmp_path, "--config", str(EXAMPLE), "--check-config")
    assert checked == Result(0, "blockd: the configuration makes sense\n", "")
    daemon = DaemonProcess(tmp_path, "--config", EXAMPLE, own_sockets=False)
    daemon.nbd_path = tmp_path / "blockd.nbd"
    async with daemon:
        for export, image in (("vda", "base.raw"), ("vdb", "data.raw")):
            qemu_img.qemu("qemu-img", "compare", tmp_path / image, daemon.nbd_uri(export))


async def test_an_error_at_the_start_names_the_line(tmp_path: Path) -> None:
    _file(tmp_path, "\n\n[[device]]\nname = 'vda'\nfilename = 'none.qcow2'\n")
    result = await run(tmp_path, "--config", "d.toml")
    assert result == Result(
        1, "", "blockd: d.toml:3: device: Could not open 'none.qcow2': No such file or directory\n"
    )

"""The command line as a whole: order, defaults, blockd's own options, and what is refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockd.cli.announcement import ready_lines, stopped_line
from blockd.cli.options import Action, parse_command_line
from blockd.config import (
    Blockdev,
    Config,
    Export,
    FdAddress,
    FileDevice,
    InetAddress,
    Monitor,
    NbdServer,
    NodeDevice,
    Object,
    Option,
    QmpSocket,
    Served,
    SocketChardev,
    StdioChardev,
    StoppedJob,
    UnixAddress,
)
from blockd.errors import RequestError


def config_of(*arguments: str) -> Config:
    return parse_command_line(arguments).config


def options_of(*arguments: str) -> list[Option]:
    return [given.option for given in config_of(*arguments).options]


def test_order_is_kept() -> None:
    found = options_of(
        *("--blockdev", "file,node-name=f,filename=a.raw"),
        *("--nbd-server", "addr.type=unix,addr.path=n"),
        *("--blockdev", "raw,node-name=r,file=f"),
        *("--export", "nbd,id=e,node-name=r,writable=on"),
        *("--chardev", "socket,id=c,path=q,server=on,wait=off"),
        *("--monitor", "c,pretty=on"),
    )
    assert found == [
        Blockdev(options={"driver": "file", "node-name": "f", "filename": "a.raw"}),
        NbdServer(addr=UnixAddress(path="n")),
        Blockdev(options={"driver": "raw", "node-name": "r", "file": "f"}),
        Export(id="e", node_name="r", writable=True),
        SocketChardev(id="c", address=UnixAddress(path="q"), server=True),
        Monitor(chardev="c", pretty=True),
    ]


def test_each_option_knows_its_text() -> None:
    (given, *_) = config_of("--blockdev=file,node-name=f,filename=a").options
    assert given.argument == "--blockdev file,node-name=f,filename=a"


def test_device_alone_gets_both_sockets() -> None:
    assert options_of("--device", "vda=disk.qcow2") == [
        NbdServer(addr=UnixAddress(path="blockd.nbd")),
        FileDevice(name="vda", filename="disk.qcow2"),
        QmpSocket(path="blockd.qmp"),
    ]


def test_given_sockets_replace_the_default_ones() -> None:
    found = options_of("--qmp", "q", "--device", "vda=disk.qcow2", "--nbd", "n")
    assert found == [
        QmpSocket(path="q"),
        FileDevice(name="vda", filename="disk.qcow2"),
        NbdServer(addr=UnixAddress(path="n")),
    ]


def test_qemu_command_lines_get_no_sockets_of_ours() -> None:
    assert options_of("--chardev", "stdio,id=c", "--monitor", "c") == [
        StdioChardev(id="c"),
        Monitor(chardev="c"),
    ]


@pytest.mark.parametrize(
    ("value", "device"),
    [
        ("vda=disk.qcow2", FileDevice(name="vda", filename="disk.qcow2")),
        ("ide0-hd=a,,b=c.img,format=raw", FileDevice(name="ide0-hd", filename="a,b=c.img", format="raw")),
        (
            "vda=top.qed,backing-format=qcow2",
            FileDevice(name="vda", filename="top.qed", backing_format="qcow2"),
        ),
        ("ide0.hd=blkstream:d", FileDevice(name="ide0.hd", filename="blkstream:d")),
        ("id=vda,node-name=q", NodeDevice(id="vda", node_name="q")),
    ],
)
def test_device_forms(value: str, device: Option) -> None:
    assert device in options_of("--device", value)


@pytest.mark.parametrize(
    ("option", "value", "address"),
    [
        ("--nbd", "a/b.sock", UnixAddress(path="a/b.sock")),
        ("--nbd", "./a:1", UnixAddress(path="./a:1")),
        ("--nbd", "localhost:10809", InetAddress(host="localhost", port=10809)),
        ("--nbd", "[::1]:10809", InetAddress(host="::1", port=10809)),
        ("--nbd-server", "addr.type=inet,addr.host=h,addr.port=1", InetAddress(host="h", port=1)),
        ("--nbd-server", "addr.type=fd,addr.str=7", FdAddress(fd=7)),
        ("--nbd-server", '{"addr":{"type":"inet","host":"h","port":"1"}}', InetAddress(host="h", port=1)),
    ],
)
def test_nbd_addresses(option: str, value: str, address: UnixAddress | InetAddress | FdAddress) -> None:
    assert options_of(option, value) == [NbdServer(addr=address)]


@pytest.mark.parametrize(
    ("value", "chardev"),
    [
        ("socket,id=c,path=q,server=on", SocketChardev(id="c", address=UnixAddress(path="q"), server=True)),
        ("socket,id=c,path=q", SocketChardev(id="c", address=UnixAddress(path="q"), server=False)),
        ("socket,id=c,fd=3,server=on", SocketChardev(id="c", address=FdAddress(fd=3), server=True)),
        ("socket,id=c,host=h,port=4", SocketChardev(id="c", address=InetAddress(host="h", port=4))),
        ('{"backend":"socket","id":"c","path":"q"}', SocketChardev(id="c", address=UnixAddress(path="q"))),
    ],
)
def test_chardevs(value: str, chardev: Option) -> None:
    assert options_of("--chardev", value) == [chardev]


def test_objects() -> None:
    iothread: dict[str, object] = {"qom-type": "iothread", "id": "t"}
    assert options_of("--object", "iothread,id=t") == [Object(options=iothread)]
    group = {"qom-type": "throttle-group", "id": "g", "limits": {"iops-total": 5}, "x-bps-read": 7}
    text = "throttle-group,id=g,limits.iops-total=5,x-bps-read=7"
    assert options_of("--object", text) == [Object(options=group)]
    assert options_of("--object", json.dumps(group)) == [Object(options=group)]


def test_pidfile_and_image_paths() -> None:
    config = config_of("--pidfile", "p", "--image-paths", "/a", "--qmp", "q", "--image-paths=/b")
    assert (config.pidfile, config.image_paths) == ("p", ("/a", "/b"))


def test_microseconds() -> None:
    config = config_of("--qmp", "q")
    assert (config.guest_latency_us, config.nbd_poll_us) == (None, None)
    for text in ("0", "2500", "60000000"):
        assert config_of("--guest-latency", text).guest_latency_us == int(text)
    for text in ("0", "50", "1000"):
        assert config_of("--nbd-poll", text).nbd_poll_us == int(text)


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["--qmp", "q", "--help"]])
def test_help_wins(arguments: list[str]) -> None:
    assert parse_command_line(arguments).action is Action.HELP


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bogus"], "unrecognized option '--bogus'; see --help"),
        (
            ["--guest-latency", "60000001"],
            "--guest-latency 60000001: expected microseconds, 0 to 60000000",
        ),
        (["--nbd-poll", "1001"], "--nbd-poll 1001: expected microseconds, 0 to 1000"),
        (["--nbd-poll", "0", "--nbd-poll", "0"], "--nbd-poll option can only be given once"),
        (["--guest-latency=-1"], "--guest-latency -1: expected microseconds, 0 to 60000000"),
        (["--guest-latency", "5ms"], "--guest-latency 5ms: expected microseconds, 0 to 60000000"),
        (["--guest-latency", "\u00b2"], "--guest-latency \u00b2: expected microseconds, 0 to 60000000"),
        (
            ["--guest-latency", "1", "--guest-latency", "2"],
            "--guest-latency option can only be given once",
        ),
        (["disk.qcow2"], "disk.qcow2: Unexpected argument; a disk is given as --device NAME=FILE"),
        (["--blockdev"], "option '--blockdev' requires an argument"),
        (["--pidfile", "a", "--pidfile", "b"], "--pidfile option can only be given once"),
        (
            ["--device", "disk.qcow2"],
            "--device disk.qcow2: expected NAME=FILE, such as vda=disk.qcow2, or id=NAME,node-name=NODE",
        ),
        (
            ["--device", "9a=d"],
            "--device 9a=d: Parameter 'id' expects an identifier: letters, digits, '-', '.' and '_', "
            "starting with a letter",
        ),
        (
            ["--device", "a=d,zap=1"],
            "--device a=d,zap=1: Parameter 'zap' is unexpected; expected one of name, filename, format, "
            "backing-format, id, node-name",
        ),
        (
            ["--device", "a=d,fromat=raw"],
            "--device a=d,fromat=raw: Parameter 'fromat' is unexpected; did you mean 'format'?",
        ),
        (
            ["--object", "throttle-group,id=t,iops-total=5"],
            "--object throttle-group,id=t,iops-total=5: Parameter 'iops-total' is unexpected; did you mean "
            "'limits.iops-total'?",
        ),
        (
            ["--blockdev", "raw,node-name=r,file=f,backing=b"],
            "--blockdev raw,node-name=r,file=f,backing=b: Parameter 'backing' is unexpected",
        ),
        (["--devcie", "a=d"], "unrecognized option '--devcie'; did you mean '--device'?"),
        (
            ["--blockdev", "qcow3,node-name=q,file=f"],
            "--blockdev qcow3,node-name=q,file=f: Parameter 'driver' does not accept value 'qcow3'; did you "
            "mean 'qcow2'?",
        ),
        (
            ["--export", "nbd,id=e,nodename=q"],
            "--export nbd,id=e,nodename=q: Parameter 'node-name' is missing, and 'nodename' is unexpected; "
            "did you mean 'node-name'?",
        ),
        (
            ["--nbd-server", "addr.type=unix,addr.path=x,tls-creds=t"],
            "--nbd-server addr.type=unix,addr.path=x,tls-creds=t: Parameter 'tls-creds' is unexpected; the "
            "NBD server cannot do TLS yet; start it without 'tls-creds' on a unix socket",
        ),
        (
            ["--nbd-server", "addr.type=unx"],
            "--nbd-server addr.type=unx: Parameter 'type' does not accept value 'unx'; did you mean 'unix'?",
        ),
        (
            ["--nbd-server", "addr.type=unix,addr.pth=x"],
            "--nbd-server addr.type=unix,addr.pth=x: Parameter 'addr.path' is missing, and 'pth' is "
            "unexpected; did you mean 'path'?",
        ),
        (
            ["--nbd-server", '{"addr": {"type": "inet", "host": "localhost", "port": 65536}}'],
            '--nbd-server {"addr": {"type": "inet", "host": "localhost", "port": 65536}}: '
            "'65536' is not a port number (0 to 65535)",
        ),
        (["--qmp", ""], "--qmp '': expected the name of a file, and it is empty"),
        (["--nbd="], "--nbd '': expected the name of a file, and it is empty"),
        (["--http", ""], "--http '': expected the name of a file, and it is empty"),
        (["--pidfile", ""], "--pidfile '': expected the name of a file, and it is empty"),
        (["--state-dir", ""], "--state-dir '': expected the name of a file, and it is empty"),
        (["--image-paths", ""], "--image-paths '': expected the name of a file, and it is empty"),
        (["--config", ""], "--config '': expected the name of a file, and it is empty"),
        (
            ["--chardev", "socket,id=c,path="],
            "--chardev socket,id=c,path=: expected the name of a file, and it is empty",
        ),
        (
            ["--nbd-server", "addr.type=unix,addr.path="],
            "--nbd-server addr.type=unix,addr.path=: expected the name of a file, and it is empty",
        ),
        (
            ["--http", "9170"],
            "--http 9170: expected PATH or HOST:PORT, such as 127.0.0.1:9170 (a socket file of that name is "
            "./9170)",
        ),
        (
            ["--nbd", ":1"],
            "--nbd :1: expected PATH or HOST:PORT, such as 127.0.0.1:1 (a socket file of that name is ./:1)",
        ),
        (
            ["--http", "http://localhost:1"],
            "--http http://localhost:1: expected PATH or HOST:PORT, and this is a URL",
        ),
        (
            ["--qmp", "localhost:4444"],
            "--qmp localhost:4444: expected the path of a unix socket; for TCP, --chardev socket,id=I,"
            "host=localhost,port=4444,server=on --monitor I (a socket file of that name is ./localhost:4444)",
        ),
        (["--nbd", "localhost:x"], "--nbd localhost:x: 'x' is not a port number (0 to 65535)"),
        (
            ["--chardev", "socket,id=c"],
            "--chardev socket,id=c: chardev: socket: one of 'path', 'fd', or 'host' and 'port' is required",
        ),
        (
            ["--chardev", "socket,id=c,path=a,fd=1"],
            "--chardev socket,id=c,path=a,fd=1: chardev: socket: one of 'path', 'fd', or 'host' and 'port' "
            "is required",
        ),
        (
            ["--object", "rng-random,id=r"],
            "--object rng-random,id=r: Parameter 'qom-type' does not accept value 'rng-random'",
        ),
    ],
)
def test_refusals(arguments: list[str], message: str) -> None:
    with pytest.raises(RequestError) as refused:
        parse_command_line(arguments)
    assert refused.value.message == message


def served_by(nbd: str) -> Served:
    return Served(devices=("vda",), nbd=(UnixAddress(nbd),), exports=("vda",))


def test_announcement_can_be_copied() -> None:
    config = config_of("--device", "vda=d.qcow2", "--qmp", "/r/q", "--nbd", "/r/n n")
    lines = "\n".join(ready_lines(config, served_by("/r/n n")))
    assert "socat - UNIX-CONNECT:/r/q" in lines
    assert "nbd+unix:///vda?socket=/r/n%20n" in lines
    assert "blockctl --socket /r/q stream vda --wait" in lines


def test_what_a_stop_interrupts_is_told_as_it_goes_on() -> None:
    kept = stopped_line(StoppedJob("stream", "vda", 1 << 20, 4 << 20, is_kept=True))
    at = "stopped at 1.0 MiB of 4.0 MiB"
    assert kept == f"stream 'vda' {at}; it goes on at the next start with --state-dir"
    made = stopped_line(StoppedJob("create", "c", 1 << 20, 4 << 20, is_kept=False))
    assert made == f"create 'c' {at}: it was cancelled"


def test_nothing_is_announced_to_those_who_know() -> None:
    stdio = ("--chardev", "stdio,id=c", "--monitor", "c")
    assert ready_lines(config_of(*stdio, "--device", "vda=d.qcow2"), served_by("n")) == []
    assert ready_lines(config_of("--nbd-server", "addr.type=unix,addr.path=n"), served_by("n")) == []


def test_what_the_journal_alone_tells_is_announced() -> None:
    lines = "\n".join(ready_lines(config_of("--state-dir", "st"), served_by("/r/n")._replace(qmp=("/r/q",))))
    assert lines.startswith("blockd is ready")
    assert "socat - UNIX-CONNECT:/r/q" in lines
    assert "nbd+unix:///vda?socket=/r/n" in lines
    assert "blockctl --socket /r/q stream vda --wait" in lines


def test_announced_is_what_is_served_and_not_what_the_options_say() -> None:
    config = config_of("--device", "vda=d.qcow2", "--device", "vdb=e.qcow2", "--qmp", "/r/q", "--nbd", "/r/n")
    lines = "\n".join(ready_lines(config, Served(("vdb",), (InetAddress("127.0.0.1", 7),), ("b", "c"))))
    assert "nbd://127.0.0.1:7/b" in lines
    assert "nbd://127.0.0.1:7/c" in lines
    assert "/r/n" not in lines
    assert "vda" not in lines
    assert "NBD" not in "\n".join(ready_lines(config, Served((), (), ())))
    nothing = "\n".join(ready_lines(config, Served((), (InetAddress("127.0.0.1", 7),), ())))
    assert "nbd://127.0.0.1:7/, which has no exports yet" in nothing


OPTIONS = [
    "--blockdev",
    "--chardev",
    "--monitor",
    "--nbd-server",
    "--export",
    "--object",
    "--device",
    "--nbd",
]
PARTS = ["file", "qcow2", "driver", "backing", "file", "filename", "node-name", "id", "path", "fd", "addr"]
PARTS += ["type", "unix", "inet", "host", "port", "str", "socket", "stdio", "=", "=", ",", ",", ".", "0", "1"]
PARTS += ["on", "x", "", ":", '{"', '":', '"}', "[", "]", "\udcff", "\n"]


@given(st.sampled_from(OPTIONS), st.lists(st.sampled_from(PARTS), max_size=14).map("".join))
def test_any_value_is_taken_or_refused(option: str, value: str) -> None:
    try:
        parse_command_line([option, value])
    except RequestError as error:
        shown = value or "''"
        assert error.message.startswith((f"{option} {shown}: ", f"{value}: not valid UTF-8"))

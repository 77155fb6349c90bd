"""The key=value syntax: what it means, and that it means what qemu-storage-daemon takes it for."""

import json
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockd.cli.keyval import parse_flat, parse_json, parse_keyval
from blockd.cli.options import parse_command_line
from blockd.errors import RequestError

QSD_TIMEOUT_S = 100.0


@pytest.mark.parametrize(
    ("text", "members"),
    [
        ("", {}),
        ("a=1", {"a": "1"}),
        ("a=1,", {"a": "1"}),
        ("a=", {"a": ""}),
        ("a=x,,y", {"a": "x,y"}),
        ("a=x,,,b=y", {"a": "x,", "b": "y"}),
        ("a=b=c", {"a": "b=c"}),
        ("a=1,a=2", {"a": "2"}),
        ("a.b=1,a.c.d=2", {"a": {"b": "1", "c": {"d": "2"}}}),
        ("a.0=x,a.1=y", {"a": ["x", "y"]}),
        ("a.1=y,a.0=x", {"a": ["x", "y"]}),
        ("a.0.b=x,a.1.b=y", {"a": [{"b": "x"}, {"b": "y"}]}),
        ("__org.example_x=1", {"__org.example_x": "1"}),
        ("file", {"driver": "file"}),
        ("file,a=1", {"driver": "file", "a": "1"}),
        ("driver=file", {"driver": "file"}),
    ],
)
def test_meaning(text: str, members: dict[str, object]) -> None:
    assert parse_keyval(text, "driver") == members


names = st.from_regex(r"[A-Za-z][A-Za-z0-9_-]{0,5}", fullmatch=True).filter(
    lambda name: name not in ("help", "?")
)
trees = st.recursive(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    lambda inner: (
        st.dictionaries(names, inner, min_size=1, max_size=3) | st.lists(inner, min_size=1, max_size=3)
    ),
    max_leaves=8,
)


def written(value: object, path: str = "") -> list[str]:
    """Write a tree in the key=value syntax."""
    if isinstance(value, str):
        return [f"{path}={value.replace(',', ',,')}"]
    inner = value.items() if isinstance(value, dict) else enumerate(value)  # type: ignore[arg-type]
    return [
        part for name, member in inner for part in written(member, f"{path}.{name}" if path else str(name))
    ]


@given(st.dictionaries(names, trees, max_size=4))
def test_what_is_written_is_read_back(members: dict[str, object]) -> None:
    assert parse_keyval(",".join(written(members))) == members


@given(st.text(alphabet="ab01.=,?_-{ \x00é", max_size=40))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    try:
        assert isinstance(parse_keyval(text, "implied"), dict)
    except RequestError as error:
        assert error.message


def test_deep_nesting_is_refused() -> None:
    assert parse_keyval(".".join(["a"] * 64) + "=1")
    with pytest.raises(RequestError, match="nests more than 64 levels"):
        parse_keyval(".".join(["a"] * 65) + "=1")
    with pytest.raises(RequestError, match="nesting depth limit"):
        parse_json('{"a":' * 2000)


def test_flat_form_of_chardev() -> None:
    assert parse_flat("socket,id=c,path=a,,b,server,nowait", "backend") == {
        "backend": "socket",
        "id": "c",
        "path": "a,b",
        "server": "on",
        "wait": "off",
    }


# What qemu-storage-daemon says to the same words; "" where it takes them.
SAME_AS_QSD = [
    "--blockdev driver=file",
    "--blockdev node-name=x",
    "--blockdev driver=zap,node-name=x",
    "--blockdev driver=qcow2,node-name=x,file.driver=file",
    "--blockdev driver=qcow2,node-name=x,file.driver=zap",
    "--blockdev driver=file,node-name=x,filename=f,bogus=1",
    "--blockdev driver=qcow2,node-name=x,file.driver=file,file.filename=f,file.bogus=1",
    "--blockdev driver=file,node-name=x,filename=f,read-only=maybe",
    "--blockdev driver=qcow2,node-name=x,cache-size=foo,file=f",
    "--blockdev driver=qcow2,node-name=x,cache=foo,file=f",
    "--blockdev driver=file,node-name=x,filename=f,discard=foo",
    "--blockdev driver=file,cache.direct=x,filename=f",
    "--blockdev driver=qcow2,=x",
    "--blockdev driver=qcow2,a.=x",
    "--blockdev driver=qcow2,a..b=x",
    "--blockdev driver=qcow2,a",
    "--blockdev driver=qcow2,a!",
    "--blockdev driver=qcow2,9=x",
    "--blockdev driver=qcow2,file=x,file.filename=y",
    "--blockdev driver=qcow2,file.filename=y,file=z",
    "--blockdev driver=qcow2,file.1=y",
    "--blockdev driver=qcow2,file.0=y,file.2=z",
    "--blockdev driver=qcow2,file.0=y,file.a=z",
    "--blockdev driver=qcow2,file.0=y",
    "--blockdev driver=qcow2,file.0x=y",
    "--blockdev driver=qcow2,__org=1",
    f"--blockdev driver=qcow2,{'a' * 128}=1",
    f"--blockdev driver=qcow2,b.{'a' * 128}=1",
    "--blockdev ,",
    "--blockdev qcow2,,x",
    "--blockdev help",
    "--blockdev driver=file,help",
    "--blockdev {",
    "--blockdev {]",
    "--blockdev {}",
    '--blockdev {"driver":"file"} x',
    '--blockdev {"driver":"file","driver":"x"}',
    '--blockdev {"driver":"file","node-name":1}',
    '--blockdev {"driver":"file","node-name":null}',
    '--blockdev {"driver":"file","node-name":"x","filename":"f","read-only":"on"}',
    '--blockdev {"driver":"file","node-name":"x","filename":"f","cache":{"direct":1}}',
    '--blockdev {"driver":"qcow2","node-name":"x","file":1}',
    '--blockdev {"driver":"qcow2","node-name":"x","file":"f","backing":1}',
    '--blockdev {"driver":"qcow2","node-name":"x","cache-size":1.5,"file":"f"}',
    "--chardev socket",
    "--chardev socket,id=c,path=x,server=maybe",
    "--chardev socket,id=c,host=x",
    "--monitor chardev=c,mode=zap",
    "--monitor mode=control",
    "--nbd-server x",
    "--nbd-server addr=1",
    "--nbd-server addr.type=zap",
    "--nbd-server addr.type=unix",
    "--nbd-server addr.type=inet,addr.host=localhost",
    "--nbd-server addr.type=fd,addr.str=zz",
    "--nbd-server addr.type=unix,addr.path=n,max-connections=x",
    "--export zap",
    "--export nbd",
    "--export nbd,id=e",
    "--export nbd,id=e,node-name=x,writable=zap",
    '--export {"type":"nbd","id":"e","node-name":"x","writable":"on"}',
    "--object iothread",
]


@pytest.mark.parametrize("line", SAME_AS_QSD)
def test_errors_are_those_of_qemu(line: str) -> None:
    option, _, value = line.partition(" ")
    with pytest.raises(RequestError) as refused:
        parse_command_line([option, value])
    assert refused.value.message == qsd_error(option, value)


def qsd_error(option: str, value: str) -> str:
    """What qemu-storage-daemon says, its name left out."""
    command = ["qemu-storage-daemon", option, value]
    result = subprocess.run(command, capture_output=True, text=True, timeout=QSD_TIMEOUT_S, check=False)
    return result.stderr.splitlines()[0].removeprefix("qemu-storage-daemon: ")


def test_json_and_keyval_say_the_same() -> None:
    keyval = "qcow2,node-name=q,read-only=on,cache.direct=off,file.driver=file,file.filename=a,,b"
    members = {
        "driver": "qcow2",
        "node-name": "q",
        "read-only": True,
        "cache": {"direct": False},
        "file": {"driver": "file", "filename": "a,b"},
    }
    one, other = (
        parse_command_line(["--blockdev", text]).config.options[0].option
        for text in (keyval, json.dumps(members))
    )
    assert one == other

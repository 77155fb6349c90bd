"""Files of rules for blkdebug: both daemons take the same ones, and say the same of the others."""

import json
import os
from pathlib import Path

import pytest

from blockd.drivers.fault_config import LENGTH_MAX, read_rules_blocking
from blockd.errors import RequestError
from tests.differential.pair import IMAGES, Scenario, call, transcripts
from tests.differential.test_differential_faults import BAD_SECTOR, DAEMONS, FAULTS, results

GROUP = '[inject-error]\nevent = "read_aio"\n'
TEXTS = [
    "",
    "# a comment\n\n"
    + GROUP
    + 'errno = "5"\nonce = "on"\n[set-state]\nevent = "read_aio"\nnew_state = "2"\n',
    '[inject-error]\nerrno = "5"\n',
    '[set-state]\nnew_state = "5"\n',
    '[inject-error]\nevent = "zap"\n',
    '[inject-error]\nevent = "none"\niotype = "zap"\n',
    '[inject-error]\nevent = "none"\niotype = "block-status"\n',
    'event = "read_aio"\n',
    # groups
    "[zap]\n",
    "[zap]\n \n",
    "[]\n",
    '[ inject-error]\nevent = "read_aio"\n',
    ' [inject-error]\nevent = "read_aio"\n',
    '[inject-error]zap\nevent = "read_aio"zap\n',
    '[inject-error "x"]\nevent = "none"\n[set-state "x"]\nevent = "none"\n',
    '[inject-error "x"]\nevent = "none"\n[inject-error "x"]\nevent = "none"\n',
    '[inject-error "1 x"]\nevent = "none"\n',
    '[inject-error]\nid = "9"\nevent = "none"\n',
    "[" + "x" * 80 + "]\n",
    # lines
    GROUP + "  \n",
    GROUP + "  # zap\n",
    GROUP + 'zap = "1"\n',
    GROUP + 'new_state = "1"\n',
    GROUP + 'event="none"\n',
    GROUP + "event = none\n",
    GROUP + 'event = "zap"\n',
    '[inject-error]\nevent = "zap"\nevent = "none"\n',
    '[inject-error]\r\nevent = "read_aio"\r\n',
    '[inject-error]\r\n\r\nevent = "read_aio"\r\n',
    '[inject-error]\n   event =\t"none"   ',
    GROUP + "x" * 80 + ' = "1"\n',
    # values
    *(
        GROUP + f'state = "{number}"\n'
        for number in ("x", "1x", "", "0x1f", "0x", "017", "08", "-5", "+5", " 5", "5 ", 2**64 - 1, 2**64)
    ),
    GROUP + 'sector = "-1"\nerrno = "99999999999"\n',
    *(GROUP + f'once = "{flag}"\n' for flag in ("on", "yes", "true", "n", "ON", "maybe", "")),
    # of several mistakes
    '[inject-error]\nzap = "1"\n[set-state]\n \n',
    '[set-state]\nevent = "zap"\n[inject-error]\nerrno = "1"\n',
    '[inject-error]\nevent = "zap"\n[set-state]\nstate = "x"\n',
]


async def test_the_same_files_are_taken(tmp_path: Path) -> None:
    (tmp_path / IMAGES).mkdir()
    (tmp_path / IMAGES / "disk.raw").write_bytes(bytes(512))
    config = tmp_path / "rules"
    steps = []
    for number, text in enumerate(TEXTS):
        path = tmp_path / f"rules{number}"
        path.write_text(text, newline="")
        options = {"driver": "blkdebug", "node_name": f"n{number}", "config": str(path)}
        steps.append(call("blockdev-add", **options, image={"driver": "null-co"}))
    missing = {"driver": "blkdebug", "node_name": "n", "image": {"driver": "null-co"}}
    steps += [call("blockdev-add", **missing, config=name) for name in (str(config), "", 1)]
    theirs, ours = await transcripts(Scenario("files of rules", steps), tmp_path)
    assert len(theirs) == 1 + len(TEXTS) + 3
    said = [TEXTS[number - 1] if 0 < number <= len(TEXTS) else "" for number in range(len(theirs))]
    assert list(zip(said, ours, strict=True)) == list(zip(said, theirs, strict=True))
    assert any("return" in json.loads(line) for line in ours[1:])


@pytest.mark.parametrize("fault", FAULTS)
async def test_the_same_requests_fail(fault: str, tmp_path: Path) -> None:
    config = tmp_path / "rules"
    members = [f'{name} = "{value}"' for name, value in FAULTS[fault].items()]
    config.write_text("\n".join(["[inject-error]", *members]))
    theirs, ours = [await results(owner, tmp_path / owner, {"config": str(config)}) for owner in DAEMONS]
    assert ours == theirs
    assert any(end.endswith("failed") for end in ours[0])


async def test_rules_of_a_file_come_before_those_that_are_given(tmp_path: Path) -> None:
    config = tmp_path / "rules"
    sector = f'sector = "{BAD_SECTOR}"'
    passing = f'[inject-error]\nevent = "none"\niotype = "write"\n{sector}\nerrno = "0"\nonce = "on"\n'
    config.write_text(passing)
    rule = {"event": "none", "iotype": "write"}
    options = {"config": str(config), "inject-error": [rule]}
    theirs, ours = [await results(owner, tmp_path / owner, options) for owner in DAEMONS]
    assert ours == theirs
    writes = {end.endswith("failed") for end in ours[0] if end.startswith("write ")}
    assert writes == {False, True}


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name in ("fifo", "."):
        with pytest.raises(RequestError, match="it is no regular file"):
            read_rules_blocking(str(tmp_path / name))
    (tmp_path / "long").write_bytes(b"#" * (LENGTH_MAX + 1))
    with pytest.raises(RequestError, match="it is longer than 1048576 bytes"):
        read_rules_blocking(str(tmp_path / "long"))

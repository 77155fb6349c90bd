"""What ``-drive`` says, as a node that ``--blockdev`` can make.

Names are taken as QEMU's tests write them: a path, or ``blkdebug:RULES:PATH`` for a file that fails by the
rules of another one. Where options reach below the image (``backing.node-name=mid``) or a recorded name is
no path, the backing files are looked up here; otherwise that is left to blockd.
"""

import configparser
import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from blockd.cli.keyval import parse_keyval

Node = dict[str, Any]

FAULTS = "blkdebug:"
# What belongs to the guest's device, or is the default.
_OF_THE_DEVICE = ("if", "media", "index", "aio", "cache")


@dataclass(frozen=True)
class Drive:
    """A node, and what the guest's disk on it is called."""

    device: str
    node: Node


def drive(text: str, count: int) -> Drive:
    """Read one -drive; `count` is how many came before, and a part of the name if it has none."""
    options = dict(parse_keyval(text))
    for name in _OF_THE_DEVICE:
        options.pop(name, None)
    device = str(options.pop("id", f"virtio{count}"))
    driver = options.pop("format", None) or options.pop("driver", "raw")
    node: Node = {"driver": driver, "node-name": f"node-of-{device}", "file": _file(str(options.pop("file")))}
    return Drive(device, _merged(node, options))


def _merged(node: Node, options: Mapping[str, Any]) -> Node:
    """Put options on top of a node, and its recorded backing file below it if they are needed for that."""
    below = dict(options)
    backing = below.pop("backing", None)
    if recorded := _recorded_backing(node):
        name, driver = recorded
        if backing is not None or name.startswith(FAULTS):
            node["backing"] = _merged({"driver": driver, "file": _file(name)}, backing or {})
    return node | below


def _file(name: str) -> Node:
    if not name.startswith(FAULTS):
        return {"driver": "file", "filename": name}
    rules, _, path = name.removeprefix(FAULTS).partition(":")
    return {"driver": "blkdebug", "image": {"driver": "file", "filename": path}} | _rules(rules)


def _rules(path: str) -> Node:
    """Read a file of rules: sections [inject-error] and [set-state], of which there may be several."""
    if not path:
        return {}
    sections: dict[str, list[Node]] = {}
    for text in _sections(path):
        parser = configparser.ConfigParser()
        parser.read_string(text)
        for section in parser.sections():
            sections.setdefault(section, []).append(
                {name: _rule_value(name, value) for name, value in parser[section].items()}
            )
    return dict(sections)


def _sections(path: str) -> list[str]:
    with open(path, encoding="utf-8") as file:  # noqa: PTH123
        return ["[" + text for text in file.read().split("[")[1:]]


def _rule_value(name: str, value: str) -> object:
    value = value.strip('"')
    if name in {"immediately", "once"}:
        return value == "on"
    return value if name == "event" else int(value)


def _recorded_backing(node: Node) -> tuple[str, str] | None:
    """What an image names as its backing file, and the format of that."""
    if node["driver"] == "raw":
        return None
    file = node["file"].get("image", node["file"])
    command = ("qemu-img", "info", "-U", "--output=json", "-f", str(node["driver"]), str(file["filename"]))
    # qemu-img fails where the name is no path that it can open; it has said what the image records by then.
    info = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    name = info.get("backing-filename")
    return (name, info.get("backing-filename-format", "raw")) if name else None

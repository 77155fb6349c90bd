"""QEMU as the one that fills an image, and as the one that judges it and says what it is."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

from tests import qemu_img
from tests.qemu_img import qemu

_VERBS = ("write -P {number}", "write -P {number}", "write -z", "write -z -u", "discard")


def commands(rng: random.Random, size: int, cluster_size: int, count: int) -> Iterator[str]:
    """What qemu-io is to do to a disk: some of it in whole clusters, some not."""
    for number in range(1, count + 1):
        unit = rng.choice([512, 4096, cluster_size])
        offset = rng.randrange(0, size, unit)
        length = min(rng.randrange(1, 4) * unit, size - offset)
        yield f"{rng.choice(_VERBS).format(number=number)} {offset} {length}"


def judge(path: Path, image_format: str, content: bytearray, *, may_leak: bool = False) -> None:
    """QEMU finds nothing wrong, and reads what has to be there."""
    if image_format != "raw":
        verdict = qemu_img.check(path, image_format)
        assert verdict is not None
        assert verdict.corruptions == 0, verdict
        assert may_leak or verdict.leaks == 0, verdict
    assert qemu_img.content(path, image_format) == content


def kind_of(path: Path, image_format: str) -> tuple[object, object]:
    """What an image was made to be, as `qemu-img info` tells it."""
    found = json.loads(qemu("qemu-img", "info", "--output=json", "-f", image_format, path))
    return found.get("cluster-size"), found.get("format-specific")

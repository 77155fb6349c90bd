"""Trims and writes of zeroes over NBD, of a disk full of data, and then once more of what is zero already."""

import subprocess
from dataclasses import replace
from functools import partial
from pathlib import Path

from bench.lab import DATA_SIZE, Lab
from bench.peers import Image, Peer, Work, running
from bench.rows import Figure, Row, Sample
from blockd.units import KIB

FIRST = Figure("rate", "IOPS", is_more_better=True)
AGAIN = Figure("rate of the second pass", "IOPS", is_more_better=True)
LENGTH = 64 * KIB
DEPTH = 4
CLIENT = Path(__file__).parents[1] / "zero_client.py"
# It has libnbd's module, which cannot be installed elsewhere.
SYSTEM_PYTHON = "/usr/bin/python3"


def _zero(lab: Lab, peer: Peer, *, kind: str) -> Sample:
    image = replace(lab.filled(), discards=True)
    with running(peer, image, lab.folder) as daemon:
        client = [SYSTEM_PYTHON, str(CLIENT), kind, daemon.nbd_uri, str(LENGTH), str(DEPTH)]
        done = subprocess.run(client, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(client)}: {done.stderr}")
    _expect_zeroes(lab, image)
    first, again = map(float, done.stdout.split())
    return {FIRST.name: first, AGAIN.name: again}


def _expect_zeroes(lab: Lab, image: Image) -> None:
    lab.check(image)
    empty = lab.folder / "zeroes.raw"
    with empty.open("wb") as file:
        file.truncate(DATA_SIZE)
    lab.compare(image.path, Image(empty, "raw"), image.format)


ROWS = [
    Row(f"{name} 64 KiB, depth {DEPTH}", (FIRST, AGAIN), partial(_zero, kind=kind), work=Work.QMP)
    for kind, name in (("trim", "trim"), ("zero", "write zeroes"))
]

"""Samples in, medians and ratios out: a table for people, JSON for comparing runs."""

import json
import os
import platform
import subprocess
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from rich import box
from rich.table import Table

from bench.peers import BLOCKD, NBDKIT, QEMU_NBD, QSD, Peer
from bench.rows import Figure, Row, Sample

YARDSTICK = "copy loop"

# Whom blockd is compared with in one table.
DAEMONS = (QSD.name, YARDSTICK)
NBD_SERVERS = (QEMU_NBD.name, NBDKIT.name)


class Report:
    """All samples of a run, by row, figure and who made them."""

    def __init__(self) -> None:
        self._rows: list[Row] = []
        self._samples: dict[tuple[str, str, str], list[float]] = defaultdict(list)

    def add(self, row: Row, who: str, sample: Sample) -> None:
        if row not in self._rows:
            self._rows.append(row)
        for figure in row.figures:
            self._samples[row.name, figure.name, who].append(sample[figure.name])

    def table(self, others: Sequence[str]) -> Table:
        """Medians, their spread, and how blockd compares with others, as Markdown; above 1 × it is ahead.

        Rows that none of the others has are left out.
        """
        table = Table(box=box.MARKDOWN)
        for heading in ("work", "figure"):
            table.add_column(heading, no_wrap=True)
        for heading in (BLOCKD.name, *(cell for other in others for cell in (other, "ahead by"))):
            table.add_column(heading, justify="right", no_wrap=True)
        for row in self._rows:
            for figure in row.figures:
                samples = [self._samples.get((row.name, figure.name, who), []) for who in others]
                if any(samples):
                    own = self._samples.get((row.name, figure.name, BLOCKD.name), [])
                    cells = [
                        cell for other in samples for cell in (_spread(other), _ratio(own, other, figure))
                    ]
                    table.add_row(row.name, f"{figure.name}, {figure.unit}", _spread(own), *cells)
        return table

    def save(self, folder: Path, peers: list[Peer]) -> Path:
        """Write everything to a new JSON file and return its path."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / time.strftime("%Y%m%d-%H%M%S.json")
        results = [
            {"row": row, "figure": figure, "who": who, "median": median(samples), "samples": samples}
            for (row, figure, who), samples in self._samples.items()
        ]
        path.write_text(json.dumps({"machine": _machine(peers), "results": results}, indent=2) + "\n")
        return path


def _spread(samples: list[float]) -> str:
    if not samples:
        return "–"
    return f"{_number(median(samples))} ({_number(min(samples))}–{_number(max(samples))})"


def _ratio(own: list[float], other: list[float], figure: Figure) -> str:
    if not own or not other or not median(own) or not median(other):
        return "–"
    ratio = median(own) / median(other)
    return f"{ratio if figure.is_more_better else 1 / ratio:.2f} ×"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _machine(peers: list[Peer]) -> dict[str, object]:
    """What a figure depends on besides the code."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "cpu_count": os.cpu_count(),
        "commit": _first_line("git", "rev-parse", "--short", "HEAD"),
        "versions": {peer.name: _first_line(*peer.program, "--version") for peer in peers},
    }


def _first_line(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.partition("\n")[0]

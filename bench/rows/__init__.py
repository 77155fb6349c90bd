"""What is measured: one module per kind of work."""

from collections.abc import Callable
from dataclasses import dataclass

from bench.lab import Lab
from bench.peers import Peer, Work

Sample = dict[str, float]


@dataclass(frozen=True)
class Figure:
    """One number of a row: its unit, and which way is better."""

    name: str
    unit: str
    is_more_better: bool


@dataclass(frozen=True)
class Row:
    """One kind of work: `measure` does it once with one peer and compares the bytes afterwards."""

    name: str
    figures: tuple[Figure, ...]
    measure: Callable[[Lab, Peer], Sample]
    # The same work without a daemon, where that tells something.
    yardstick: Callable[[Lab], Sample] | None = None
    # Who is measured: the peers that do this.
    work: Work = Work.QMP

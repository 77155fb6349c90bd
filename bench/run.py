"""Measure blockd and other servers in turn: `python -m bench.run --help`."""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from bench.lab import Lab
from bench.peers import Peer, installed_peers
from bench.report import DAEMONS, NBD_SERVERS, YARDSTICK, Report
from bench.rows import Row, guest_beside, guest_io, process, streams, tools, used, zeroing

FOLDER = Path(__file__).parent
ROWS = [
    *streams.ROWS,
    *used.ROWS,
    *tools.ROWS,
    *guest_io.ROWS,
    *zeroing.ROWS,
    *guest_beside.ROWS,
    *streams.SPARSE_ROWS,
    *process.ROWS,
]

# Wide enough for every column, whatever the terminal: the table is pasted into documents.
TABLE_WIDTH = 200

# Progress goes to standard error, so that standard output holds the table alone.
progress = Console(stderr=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench BENCH=…", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="samples for each row and program (default 3)")
    parser.add_argument("--only", default="", metavar="TEXT", help="just the rows whose name contains TEXT")
    parser.add_argument(
        "--peer", default="", metavar="TEXT", help="just the programs whose name contains TEXT"
    )
    parser.add_argument("--list", action="store_true", help="name the rows and stop")
    parser.add_argument(
        "--folder", type=Path, default=FOLDER, help="where images are made for the run (default bench/)"
    )
    return parser.parse_args()


def _measure(rows: list[Row], peers: list[Peer], lab: Lab, rounds: int) -> tuple[Report, list[str]]:
    """Measure all rows; also returns which failed, and those do not stop the others."""
    report = Report()
    failures: list[str] = []
    for row in rows:
        try:
            _measure_row(row, peers, lab, rounds, report)
        except (RuntimeError, OSError) as error:
            progress.print(f"{row.name}: {error}", style="red")
            failures.append(row.name)
    return report, failures


def _measure_row(row: Row, peers: list[Peer], lab: Lab, rounds: int, report: Report) -> None:
    """Take turns, so that whatever else the machine does meets all alike."""
    able = [peer for peer in peers if row.work in peer.does]
    for number in range(rounds):
        progress.print(f"{row.name}: round {number + 1} of {rounds}")
        for peer in able:
            report.add(row, peer.name, row.measure(lab, peer))
        if row.yardstick is not None:
            report.add(row, YARDSTICK, row.yardstick(lab))


def main() -> int:
    arguments = _arguments()
    rows = [row for row in ROWS if arguments.only in row.name]
    if arguments.list or not rows:
        print("\n".join(row.name for row in ROWS))
        return 0 if rows else 2
    peers = [peer for peer in installed_peers() if arguments.peer in peer.name]
    try:
        with Lab.prepared(arguments.folder) as lab:
            report, failures = _measure(rows, peers, lab, arguments.rounds)
    except RuntimeError as error:
        progress.print(str(error), style="red")
        return 1
    for table in map(report.table, (DAEMONS, NBD_SERVERS)):
        if table.row_count:
            Console(width=TABLE_WIDTH).print(table)
    print(f"all samples: {report.save(FOLDER / 'results', peers)}")
    if failures:
        progress.print(f"failed: {', '.join(failures)}", style="red")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

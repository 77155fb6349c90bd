"""A long storm: ``python -m tests.storm --steps 2000 --seed 7``; if it fails, its folder stays."""

import argparse
import asyncio
import shutil
import sys
import tempfile
from pathlib import Path

from tests.storm.storm import storm


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.storm", description=__doc__)
    parser.add_argument(
        "--steps", type=int, default=200, help="lives of the daemon, most of which are killed"
    )
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="storm-"))
    try:
        counts = asyncio.run(storm(folder, seed=options.seed, step_count=options.steps, is_told=True))
    except BaseException:
        print(f"seed {options.seed}: see {folder}", file=sys.stderr)
        raise
    shutil.rmtree(folder)
    print(", ".join(f"{count} × {way}" for way, count in counts.items()))


if __name__ == "__main__":
    main()

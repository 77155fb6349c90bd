"""What is left of a stream when the daemon is killed right after it said COMPLETED.

    python -m bench.kill --runs 10

Each run streams a base into an overlay, kills the daemon with SIGKILL a random moment after
BLOCK_JOB_COMPLETED, and compares what the overlay then holds with the base.
"""

import argparse
import random
import subprocess
import sys
import time
from pathlib import Path

from bench.lab import Lab
from bench.peers import Peer, Work, installed_peers, running

FOLDER = Path(__file__).parent
DELAY_MAX_S = 0.05


def _survives(lab: Lab, peer: Peer, delay_s: float) -> bool:
    """Tell whether the image is whole without its former base after a kill."""
    overlay = lab.overlay(lab.raw_base)
    with running(peer, overlay, lab.folder) as daemon:
        daemon.qmp.command("block-stream", {"job-id": "stream", "device": "disk"})
        completed = daemon.qmp.event("BLOCK_JOB_COMPLETED")
        time.sleep(delay_s)
        daemon.kill()
    if "error" in completed:
        raise RuntimeError(f"{peer.name}: the stream failed: {completed['error']}")
    if subprocess.run(["qemu-img", "check", "-q", overlay.path], check=False).returncode not in (0, 3):
        return False
    try:
        lab.compare(overlay.path, lab.raw_base)
    except RuntimeError:
        return False
    return not lab.has_backing(overlay)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=10, help="kills for each daemon (default 10)")
    runs = parser.parse_args().runs
    generator = random.Random(1)
    with Lab.prepared(FOLDER) as lab:
        for peer in installed_peers():
            if Work.QMP not in peer.does:
                continue
            survived = sum(_survives(lab, peer, generator.uniform(0, DELAY_MAX_S)) for _ in range(runs))
            print(f"{peer.name}: {survived} of {runs} images whole after the kill")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What the daemon costs before it does anything."""

from bench.lab import Lab
from bench.peers import Peer, running
from bench.rows import Figure, Row, Sample
from blockd.units import MIB

GREETING = Figure("start to greeting", "ms", is_more_better=False)
REPLY = Figure("start to first reply", "ms", is_more_better=False)
IDLE_MEMORY = Figure("idle memory", "MiB", is_more_better=False)


def _start(lab: Lab, peer: Peer) -> Sample:
    with running(peer, lab.raw_base, lab.folder) as daemon:
        return {
            GREETING.name: daemon.greeting_s * 1e3,
            REPLY.name: daemon.start_s * 1e3,
            IDLE_MEMORY.name: daemon.memory_bytes() / MIB,
        }


ROWS = [Row("start, idle", (GREETING, REPLY, IDLE_MEMORY), _start)]

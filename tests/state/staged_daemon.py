"""A daemon that waits less for staged writes as it ends, and kills itself at a certain step of keeping them.

The steps are counted from the stop on; the file ``crash-at`` in the current folder says which one is not
reached any more. Without the file nothing is different but the time.
"""

import sys

from blockd.cli.daemon import main
from blockd.commands.context import Services
from blockd.daemon import daemon, settling, state_dir
from blockd.daemon.recorder import Recorder
from tests.state.crashing_daemon import CRASH_AT, CrashingSystem

if __name__ == "__main__":
    settling.MERGE_LIMIT_S = 0.1

    async def crashing_settle(services: Services, recorder: Recorder) -> None:
        if CRASH_AT.exists():
            state_dir.os = CrashingSystem(int(CRASH_AT.read_text()))  # type: ignore[assignment,attr-defined]
        await settling.settle(services, recorder)

    daemon.settle = crashing_settle  # type: ignore[attr-defined]
    sys.exit(main())

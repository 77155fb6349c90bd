"""What no start needs and a running daemon may come to need.

It is loaded after the start, not at the moment when it is needed: then there may be no descriptor left to
read it with, or the files may be those of another edition, which an upgrade has put there.
"""

import zstandard as _  # noqa: F401

import blockd.daemon.left_out
import blockd.daemon.restoring
import blockd.daemon.snapshot
import blockd.daemon.staged_file
import blockd.daemon.tracking
import blockd.formats.qcow2.check
import blockd.formats.qcow2.info
import blockd.formats.qcow2.leaks
import blockd.formats.qcow2.repair
import blockd.formats.qed.check
import blockd.formats.qed.info
import blockd.formats.qed.repair  # noqa: F401

"""A daemon on a machine without direct I/O: all that it writes goes through the page cache."""

import sys

from blockd.cli.daemon import main
from blockd.protocols import cold

if __name__ == "__main__":
    cold._open_direct = lambda fd: cold._NO_DIRECT
    sys.exit(main())

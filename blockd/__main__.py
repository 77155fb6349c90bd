"""`python -m blockd` is `blockd`."""

import sys

from blockd.cli.daemon import main

sys.exit(main())

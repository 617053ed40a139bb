"""Run the command line with ``python -m anomalib_lite.cli``."""

import sys

from anomalib_lite.cli import main

sys.exit(main())

"""`python -m tetrascope`."""

import sys

from tetrascope.cli import main

sys.exit(main())

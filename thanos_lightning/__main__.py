"""python -m thanos_lightning: the command line."""

import sys

from thanos_lightning.cli import main

sys.exit(main())

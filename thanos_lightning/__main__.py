"""python -m thanos_lightning: the command line."""

import sys

from thanos_lightning.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""Run a W&B sweep: python launch/sweep.py --sweep-config FILE [--count N] [--sweep-id ID]."""

import sys

from reid.commands.sweep import main

if __name__ == "__main__":
    sys.exit(main())

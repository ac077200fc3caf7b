"""Verify benchmarks on disk: python launch/data.py check [NAME ...] [--root DIR] [--images] [KEY=VALUE ...]."""

import sys

from reid.commands.check_data import main

if __name__ == "__main__":
    sys.exit(main())

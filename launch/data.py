"""Looks at benchmarks on disk: python launch/data.py check [NAME ...] [--root DIR] [--images] [KEY=VALUE ...]."""

import sys

from reid.data_check import main

if __name__ == "__main__":
    sys.exit(main())

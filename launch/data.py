"""Verify benchmarks on disk: python launch/data.py check [NAME ...] [--root DIR] [--images] [KEY=VALUE ...]."""

from reid.commands.check_data import main
from reid.commands.main import exit_process

if __name__ == "__main__":
    exit_process(main())

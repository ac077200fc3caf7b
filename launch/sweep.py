"""Run a W&B sweep: python launch/sweep.py --sweep-config FILE [--count N] [--sweep-id ID]."""

from reid.commands.main import exit_process
from reid.commands.sweep import main

if __name__ == "__main__":
    exit_process(main())

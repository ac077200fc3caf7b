"""Print mean and spread of several runs: summarize.py OUTPUT_DIR... (such as the seeds of slurm/array.sbatch)."""

import sys

from reid.commands.summarize import main

if __name__ == "__main__":
    sys.exit(main())

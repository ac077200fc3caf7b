"""Print mean and spread of several runs: summarize.py OUTPUT_DIR... (such as the seeds of slurm/array.sbatch)."""

from reid.commands.main import exit_process
from reid.commands.summarize import main

if __name__ == "__main__":
    exit_process(main())

"""Tries what a training would find: torchrun --nproc_per_node=N launch/check.py --config_file FILE [KEY VALUE ...]."""

from reid.commands.main import exit_process, main

if __name__ == "__main__":
    exit_process(main("check", "Check ranks, network, data, disk and speed; exit code 0: no problems, 1: problems."))

"""Train: torchrun --nproc_per_node=N launch/train.py --config_file FILE [KEY VALUE | KEY=VALUE ...]."""

from reid.commands.main import exit_process, main

if __name__ == "__main__":
    exit_process(main("train"))

"""Find problems before a training: torchrun --nproc_per_node=N launch/check.py --config_file FILE [KEY VALUE ...]."""

from reid.commands.main import exit_process, main

if __name__ == "__main__":
    exit_process(main("check"))

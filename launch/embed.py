"""Embed images: torchrun --nproc_per_node=N launch/embed.py FOLDER [--output OUT] TEST.WEIGHT FILE [KEY VALUE ...]."""

from reid.commands.main import exit_process, main

if __name__ == "__main__":
    exit_process(main("embed"))

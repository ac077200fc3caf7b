"""Trains: torchrun --nproc_per_node=N launch/train.py --config_file FILE [KEY VALUE | KEY=VALUE ...]."""

import sys

from reid.launcher import main

if __name__ == "__main__":
    sys.exit(main("train", "Train a person re-identification model and evaluate it; started again, it goes on."))

"""Evaluates: torchrun --nproc_per_node=N launch/evaluate.py --config_file FILE TEST.WEIGHT FILE [KEY VALUE ...]."""

import sys

from reid.launcher import main

if __name__ == "__main__":
    sys.exit(main("evaluate", "Evaluate a checkpoint of a person re-identification model."))

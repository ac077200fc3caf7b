"""Schema: every setting by its full key, in the order of configuration files.

The defaults are the published recipe of reid-strong-baseline (configs/legacy/softmax_triplet.yml).
"""

from __future__ import annotations

from reid.config.schema_data import DATALOADER, DATASETS, INPUT
from reid.config.schema_model import MODEL, RUN
from reid.config.schema_output import LOG, TEST, WANDB
from reid.config.schema_solver import SOLVER
from reid.config.validators import Setting

SETTINGS: dict[str, Setting] = RUN | MODEL | INPUT | DATASETS | DATALOADER | SOLVER | TEST | LOG | WANDB
SECTIONS = {key[:dot] for key in SETTINGS for dot, letter in enumerate(key) if letter == "."}

SECTION_TITLES = {
    "": "The run",
    "MODEL": "MODEL: backbone, neck and losses",
    "INPUT": "INPUT: images and augmentation",
    "DATASETS": "DATASETS: benchmarks and where they are",
    "DATALOADER": "DATALOADER: batches",
    "SOLVER": "SOLVER: optimization, precision and checkpoints",
    "TEST": "TEST: evaluation",
    "LOG": "LOG: TensorBoard",
    "WANDB": "WANDB: Weights & Biases",
}

_UNREAD = "reid-strong-baseline itself never reads it"
# Keys of reid-strong-baseline's files that have no effect here, and why.
NO_EFFECT = {
    "MODEL.DEVICE_ID": "CUDA_VISIBLE_DEVICES or torchrun chooses the GPUs",
    "SOLVER.CLUSTER_MARGIN": _UNREAD,
    "SOLVER.RANGE_K": _UNREAD,
    "SOLVER.RANGE_MARGIN": _UNREAD,
    "SOLVER.RANGE_ALPHA": _UNREAD,
    "SOLVER.RANGE_BETA": _UNREAD,
    "SOLVER.RANGE_LOSS_WEIGHT": _UNREAD,
}
